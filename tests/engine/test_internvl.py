"""InternVL: images in tiles of their own aspect ratio, between marks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLProcessor,
    InternVLVisionConfig,
    Qwen2Config,
)

from stockade.engine.errors import CheckpointMismatch, UnknownArchitecture
from stockade.engine.images import load_image
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.models.shapes import image_processor_for
from stockade.engine.models.vision.internvl import TILES, tile_rows
from tests.conftest import BASE, VOCAB
from tests.engine.eyes import PICTURES, FamilyTests, chat, last_logits, pictures, save_tokenizer, token

ADDED = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
BEGIN, END, IMAGE = (token(ADDED, name) for name in ADDED[:3])


def vision(**changes: Any) -> InternVLVisionConfig:
    return InternVLVisionConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
            **changes,
        }
    )


class TestInternVL(FamilyTests):
    small_pool = 24

    def save(self, folder: Path) -> Any:
        tokenizer = save_tokenizer(folder, "<IMG_CONTEXT>\n", ADDED)
        names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
        tokenizer._set_model_specific_special_tokens(dict(zip(names, ADDED, strict=True)))  # as the hub's have them
        tokenizer.save_pretrained(folder)
        GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, max_patches=6).save_pretrained(folder)
        return InternVLConfig(
            text_config=Qwen2Config(**{**BASE, "vocab_size": VOCAB + 2 + len(ADDED)}),
            vision_config=vision(),
            image_token_id=IMAGE,
            image_seq_length=4,
            tie_word_embeddings=False,
        )

    def inputs(self, folder: Path, models: ModelSet, messages: list[dict[str, Any]]) -> dict[str, Any]:
        tokenizer = models.models["mllm"].codec.tokenizer
        processor = object.__new__(InternVLProcessor)  # a whole one wants torchvision for videos
        processor.start_image_token, processor.image_token, processor.end_image_token = ADDED[0], ADDED[2], ADDED[1]
        processor.image_seq_length = 4
        given = dict(image_processor_for(folder)(images=pictures(messages), return_tensors="pt", **TILES))
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        before, *rest = text.split("<IMG_CONTEXT>")
        marked = [processor.replace_image_token(given, index) for index in range(len(rest))]
        whole = before + "".join(mark + piece for mark, piece in zip(marked, rest, strict=True))
        pixels = {"pixel_values": given["pixel_values"]} if rest else {}
        return {**tokenizer(whole, return_tensors="pt"), **pixels}

    @pytest.mark.parametrize("size", [(1, 200), (200, 1), (28, 28), (29, 28), (400, 300), (300, 401), (3, 5)])
    def test_tokens_are_known_from_the_size(self, models: ModelSet, size: tuple[int, int]) -> None:
        eyes = models.models["mllm"].backbone.vision
        assert eyes is not None
        (image,) = eyes.prepare([load_image(Image.new("RGB", size, (9, 99, 200)))], "")
        (features,) = eyes.encode([image])
        assert eyes.fewest_tokens <= eyes.tokens(size, 1) == image.tokens == features.shape[1] + 2 <= 7 * 4 + 2

    def test_marks_that_a_user_spells_stay_text(self, models: ModelSet) -> None:
        ids, _ = last_logits(self.new(models), chat("<img><IMG_CONTEXT></img>", PICTURES[1]))
        eyes = models.models["mllm"].backbone.vision
        assert eyes is not None
        assert ids.count(IMAGE) == eyes.tokens(PICTURES[1].size, 1) - 2
        assert (ids.count(BEGIN), ids.count(END)) == (1, 1)

    def test_tiles_that_the_tower_does_not_take_are_refused(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder, tmp_path / "other")
        GotOcr2ImageProcessorPil(size={"height": 56, "width": 28}).save_pretrained(tmp_path / "other")
        with pytest.raises(
            CheckpointMismatch, match=r"tiles of \(56, 28\) pixels; the vision tower takes \(28, 28\)"
        ):
            load_models(tmp_path / "other")

    def test_a_tokenizer_without_the_marks_is_refused(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder, tmp_path / "other")
        save_tokenizer(tmp_path / "other", "<IMG_CONTEXT>\n", ("<image>", "<other>", "<IMG_CONTEXT>", "<video>"))
        with pytest.raises(CheckpointMismatch, match="no added token '<img>', which marks images"):
            load_models(tmp_path / "other")


@pytest.mark.parametrize(
    "changes",
    [
        {"vision_config": vision(image_size=(28, 56))},
        {"vision_config": vision(image_size=35)},
        {"downsample_ratio": 0.4},
        {"vision_feature_layer": [-1, -2]},
        {"vision_feature_select_strategy": "full"},
    ],
)
def test_rows_that_make_no_squares_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnknownArchitecture, match="known: a square whose side the ratio divides, of one layer"):
        tile_rows(InternVLConfig(**{"vision_config": vision(), **changes}))
