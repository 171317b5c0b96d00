"""What is measured: the same weights for the engine and for `transformers`, questions and pictures of given sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

from ..engine.engine import Engine
from ..engine.errors import BadInput
from ..engine.models.bundles import smol_folder
from ..engine.models.loader import BUNDLES, SMOL_DETECTOR
from ..engine.models.shapes import NAMED_SHAPES, byte_tokenizer, image_processor_for, named_config
from .published import Classifier, Probe, Scores, Speaker

# The detector and the detoxifier that go with a named shape of an MLLM.
COMPANIONS = {
    "tiny-llava": ("tiny-llama", "tiny-llama"),
    "tiny-llama": ("tiny-llama", "tiny-llama"),
    "llava-1.5-7b": ("open-llama-3b", "vicuna-7b"),
    "llava-1.5-13b": ("open-llama-3b", "vicuna-7b"),
}
WORDS = (
    *("river", "garden", "winter", "paper", "window", "market", "silver", "mountain", "letter", "summer", "kitchen"),
    *("music", "forest", "bridge", "morning", "teacher", "engine", "island", "harbor", "bread", "candle", "village"),
    *("orchard", "camera", "pencil", "station", "weather", "blanket", "journey", "library", "meadow", "copper"),
)


@dataclass(frozen=True)
class Sources:
    """Where weights are. name: what was asked for. model: what the engine is given (a bundle brings its own chat
    template); the others are folders that both sides read, `detector` perhaps a head file on the model's weights."""

    name: str
    model: str | Path
    folder: Path
    detector: Path
    detoxifier: Path

    def engine(self, dtype: torch.dtype | None, device: str | None = None) -> Engine:
        return Engine(self.model, self.detector, self.detoxifier, dtype=dtype, device=device)

    def scores(self, dtype: torch.dtype, device: torch.device) -> Scores:
        """The detector on `transformers`."""
        if self.detector.suffix == ".safetensors":
            return Probe(self.detector, self.folder, dtype, device)
        return Classifier(self.detector, dtype, device)

    def speakers(self, dtype: torch.dtype, device: torch.device) -> tuple[Speaker, Speaker]:
        """The MLLM and the detoxifier on `transformers`, every text of the length that is asked for."""
        mllm = Speaker(self.folder, dtype, device, ignore_eos=True)
        if self.detoxifier == self.folder:
            return mllm, mllm
        return mllm, Speaker(self.detoxifier, dtype, device, ignore_eos=True)


@contextmanager
def sources(model: str, detector: str | None = None, detoxifier: str | None = None) -> Iterator[Sources]:
    """Checkpoints on disk for a bundle, folders, or a named shape (random weights, deleted at the end).

    Raises `BadInput` when there is no detector or detoxifier to go with a model.
    """
    with TemporaryDirectory(prefix="stockade-bench-") as work:
        if model in BUNDLES:
            yield Sources(
                model,
                model,
                smol_folder(),
                _checkpoint(detector, Path(work), True) if detector else SMOL_DETECTOR,
                _checkpoint(detoxifier, Path(work)) if detoxifier else smol_folder(),
            )
            return
        known = COMPANIONS.get(model, (None, None))
        detector, detoxifier = detector or known[0], detoxifier or known[1]
        if detector is None or detoxifier is None:
            raise BadInput(
                f"{model} needs a detector and a detoxifier; give --detector and --detoxifier, or one of "
                f"{', '.join((*BUNDLES, *COMPANIONS))} as model"
            )
        folder = _checkpoint(model, Path(work))
        yield Sources(
            model, folder, folder, _checkpoint(detector, Path(work), True), _checkpoint(detoxifier, Path(work))
        )


def question(tokenizer: Any, tokens: int, random: Random) -> str:
    """Ordinary words, about `tokens` tokens long and hardly ever the same twice."""
    text = " ".join(random.choices(WORDS, k=tokens))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip()


def picture(random: Random, side: int = 224) -> Image.Image:
    """A square picture of noise: no two are the same, so that nothing kept of one serves the next."""
    pixels = np.random.default_rng(random.getrandbits(63)).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _checkpoint(source: str, work: Path, classifier: bool = False) -> Path:
    """The folder of a checkpoint; a named shape is written into `work` with random weights."""
    if source in BUNDLES:
        return SMOL_DETECTOR if classifier else smol_folder()
    if source not in NAMED_SHAPES:
        return Path(source)
    folder = work / f"{source}-{'classifier' if classifier else 'lm'}"
    if folder.is_dir():
        return folder
    config = named_config(source)
    assert config is not None
    image_token, vocab = None, config.get_text_config().vocab_size
    build: Any = AutoModelForCausalLM.from_config
    if classifier:
        config.num_labels, config.pad_token_id = 1, 2
        build = AutoModelForSequenceClassification.from_config
    elif config.model_type == "llava":
        image_token = config.image_token_id
        build = AutoModelForImageTextToText.from_config
        image_processor_for(config.vision_config.image_size).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build(config, dtype=torch.bfloat16).save_pretrained(folder)
    byte_tokenizer(vocab, image_token).save_pretrained(folder)
    return folder
