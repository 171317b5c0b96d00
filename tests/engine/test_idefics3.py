"""Idefics3 and SmolVLM: images in rows of tiles, whose places are named in text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import Idefics3Config, Idefics3Processor, LlamaConfig, SmolVLMConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from stockade.engine.errors import CheckpointMismatch, UnknownArchitecture
from stockade.engine.images import load_image
from stockade.engine.models.loader import ModelSet
from stockade.engine.models.shapes import image_processor_for
from stockade.engine.models.vision.idefics3 import Idefics3Vision
from tests.conftest import BASE, VOCAB
from tests.engine.eyes import PICTURES, FamilyTests, chat, last_logits, pictures, save_tokenizer

MARKS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
NAMES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4))
IMAGE = 3  # the tokenizer's own
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
SIZES = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}


class TestIdefics3(FamilyTests):
    """As in the first checkpoints, the names of rows and columns are no tokens."""

    small_pool = 28
    kind, marks, processor = Idefics3Config, MARKS, Idefics3ImageProcessorPil

    def save(self, folder: Path) -> Any:
        save_tokenizer(folder, "<image>", self.marks)
        self.processor(**SIZES).save_pretrained(folder)
        text = LlamaConfig(**{**BASE, "vocab_size": VOCAB + 2 + len(self.marks)})
        return self.kind(text_config=text, vision_config=VISION, image_token_id=IMAGE, scale_factor=2)

    def inputs(self, folder: Path, models: ModelSet, messages: list[dict[str, Any]]) -> dict[str, Any]:
        processor = Idefics3Processor(image_processor_for(folder), models.models["mllm"].codec.tokenizer, 4)
        text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return dict(processor(text=[text], images=pictures(messages) or None, return_tensors="pt"))

    def test_marks_that_a_user_spells_stay_text(self, models: ModelSet) -> None:
        plain, _ = last_logits(self.new(models), chat("What?", PICTURES[0]))
        spelled, _ = last_logits(self.new(models), chat("".join(self.marks[:6]) + "<image>", PICTURES[0]))
        tokenizer = models.models["mllm"].codec.tokenizer
        for mark in tokenizer.convert_tokens_to_ids([*self.marks, "<image>"]):
            assert spelled.count(mark) == plain.count(mark)

    def test_an_image_without_any_color_has_its_rows(self, models: ModelSet) -> None:
        """The model of `transformers` takes such a tile for padding and leaves it out."""
        eyes = models.models["mllm"].backbone.vision
        assert isinstance(eyes, Idefics3Vision)
        with torch.inference_mode():
            assert eyes.tower(torch.zeros(3, 3, 28, 28)).shape[:2] == (3, 4)


class TestSmolVLM(TestIdefics3):
    """As in the later checkpoints, the names of rows and columns are tokens."""

    small_pool = 20
    kind, marks, processor = SmolVLMConfig, (*MARKS, *NAMES), SmolVLMImageProcessorPil


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Idefics3Vision]:
    tokenizer = save_tokenizer(tmp_path_factory.mktemp("tokenizer"), "<image>", MARKS)

    def make(longest: int = 84, scale_factor: int = 2, **options: Any) -> Idefics3Vision:
        processor = Idefics3ImageProcessorPil(**{**SIZES, "size": {"longest_edge": longest}, **options})
        config = Idefics3Config(
            text_config=LlamaConfig(**BASE), vision_config=VISION, image_token_id=IMAGE, scale_factor=scale_factor
        )
        made = Idefics3Vision(config, processor, torch.device("cpu"), torch.float32)
        made.freeze(b"", tokenizer)
        return made

    return make


@pytest.mark.parametrize("longest", [20, 28, 84, 85, 100])
def test_tokens_are_known_from_the_size(eyes: Callable[..., Idefics3Vision], longest: int) -> None:
    """Odd sides are rounded up, which makes squares upright."""
    made = eyes(longest)
    for size in [(1, 200), (200, 1), (28, 28), (29, 28), (84, 29), (56, 84), (90, 90), (301, 300), (3, 5)]:
        (image,) = made.prepare([load_image(Image.new("RGB", size, (9, 99, 200)))], "")
        assert made.fewest_tokens <= made.tokens(size, 1) == image.tokens
        assert image.place.rows.max() + 1 == 4 * len(image.inputs["pixel_values"])


def test_an_image_may_stay_whole(eyes: Callable[..., Idefics3Vision]) -> None:
    made = eyes(do_image_splitting=False)
    (image,) = made.prepare([load_image(PICTURES[0])], "")
    assert image.tokens == made.tokens(PICTURES[0].size, 1) and len(image.inputs["pixel_values"]) == 1


@pytest.mark.parametrize(
    "options", [{"max_image_size": {"longest_edge": 56}}, {"longest": 4097}, {"do_resize": False}]
)
def test_tiles_that_the_tower_does_not_take_are_refused(
    eyes: Callable[..., Idefics3Vision], options: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointMismatch, match="the model takes at most 4096 and 28"):
        eyes(**options)


def test_rows_that_make_no_squares_are_refused(eyes: Callable[..., Idefics3Vision]) -> None:
    with pytest.raises(UnknownArchitecture, match="4 x 4 rows shuffled by 3; known: sides that it divides"):
        eyes(scale_factor=3)


def test_a_tokenizer_without_the_marks_is_refused(eyes: Callable[..., Idefics3Vision], tmp_path: Path) -> None:
    made = eyes()
    with pytest.raises(CheckpointMismatch, match="no added token '<fake_token_around_image>', which marks images"):
        made.freeze(b"", save_tokenizer(tmp_path, "<image>", ()))
