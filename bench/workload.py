"""What is measured: the same weights for the engine and for `transformers`, questions and pictures of given sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..engine.engine import Engine
from ..engine.errors import BadInput, CheckpointMissing
from ..engine.models.bundles import smol_folder
from ..engine.models.shapes import NAMED_SHAPES
from ..engine.models.sources import BUNDLES, SMOL_DETECTOR
from ..engine.models.vision.adapter import VisionAdapter
from .checkpoints import SMOL_LLAVA, save_classifier, save_shape, save_smol_llava
from .published import Classifier, Probe, Scores, Speaker

# A sequence classifier on SmolLM2's own weights: as large and as deep as the model it judges.
SMOL_CLASSIFIER = "smol-classifier"
# The detector and the detoxifier that go with a model.
COMPANIONS = {
    SMOL_LLAVA: (SMOL_CLASSIFIER, "smol"),
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
    template); the others are folders that both sides read, `detector` perhaps a head file on the model's weights.
    work: a folder for whatever else a measurement writes; it is deleted in the end."""

    name: str
    model: str | Path
    folder: Path
    detector: Path
    detoxifier: Path
    work: Path

    def engine(self, dtype: torch.dtype | None, device: str | None = None) -> Engine:
        return Engine(self.model, self.detector, self.detoxifier, dtype=dtype, device=device)

    def scores(self, dtype: torch.dtype, device: torch.device) -> Scores:
        """The detector on `transformers`."""
        if self.detector.suffix == ".safetensors":
            return Probe(self.detector, self.folder, dtype, device)
        return Classifier(self.detector, dtype, device)

    def speakers(
        self, dtype: torch.dtype, device: torch.device, vision: VisionAdapter | None = None
    ) -> tuple[Speaker, Speaker]:
        """The MLLM (vision: its eyes) and the detoxifier on `transformers`, every text of the length asked for."""
        mllm = Speaker(self.folder, dtype, device, ignore_eos=True, vision=vision)
        if self.detoxifier == self.folder:
            return mllm, mllm
        return mllm, Speaker(self.detoxifier, dtype, device, ignore_eos=True)


class Asked(NamedTuple):
    """A question, and the picture it is about where the model has eyes. harmful: where some answers are to be found
    so and others not, this one is."""

    text: str
    images: list[Image.Image]
    harmful: bool = False

    @property
    def messages(self) -> list[dict[str, Any]]:
        shown: list[dict[str, Any]] = [{"type": "image", "image": image} for image in self.images]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": self.text}]}]


@contextmanager
def sources(model: str, detector: str | None = None, detoxifier: str | None = None) -> Iterator[Sources]:
    """Checkpoints on disk for a bundle, SmolLM2 with eyes, folders, or a named shape (random weights). What is
    written for it is deleted at the end.

    Raises `CheckpointMissing` for a model that is none, and `BadInput` when there is no detector or detoxifier to go
    with it.
    """
    with TemporaryDirectory(prefix="stockade-bench-") as name:
        work = Path(name)
        if model in BUNDLES:
            judge = _checkpoint(detector, work, True) if detector else SMOL_DETECTOR
            mender = _checkpoint(detoxifier, work) if detoxifier else smol_folder()
            yield Sources(model, model, smol_folder(), judge, mender, work)
            return
        if model not in (SMOL_LLAVA, *NAMED_SHAPES) and not Path(model).is_dir():
            raise CheckpointMissing(
                f"{model} is no checkpoint folder, no bundle and no named shape: there are "
                f"{', '.join((*BUNDLES, SMOL_LLAVA, *NAMED_SHAPES))}"
            )
        known = COMPANIONS.get(model, (None, None))
        detector, detoxifier = detector or known[0], detoxifier or known[1]
        if detector is None or detoxifier is None:
            raise BadInput(
                f"{model} needs a detector and a detoxifier; give --detector and --detoxifier, or one of "
                f"{', '.join((*BUNDLES, *COMPANIONS))} as model"
            )
        folder = _checkpoint(model, work)
        judge, mender = _checkpoint(detector, work, True), _checkpoint(detoxifier, work)
        yield Sources(model, folder, folder, judge, mender, work)


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
    """The folder of a checkpoint; what has to be made is written into `work`, once."""
    if source in BUNDLES:
        return SMOL_DETECTOR if classifier else smol_folder()
    made = work / f"{source}-{'classifier' if classifier else 'lm'}"
    if source not in (SMOL_LLAVA, SMOL_CLASSIFIER, *NAMED_SHAPES):
        return Path(source)
    if made.is_dir():
        return made
    if source == SMOL_LLAVA:
        return save_smol_llava(smol_folder(), made)
    if source == SMOL_CLASSIFIER:
        return save_classifier(smol_folder(), made)
    return save_shape(source, made, classifier)
