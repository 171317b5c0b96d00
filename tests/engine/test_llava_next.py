"""LLaVA-NeXT and LLaVA-OneVision: images in tiles, without the borders that fill them."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from stockade.engine.errors import CheckpointMismatch
from stockade.engine.images import load_image
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.models.shapes import image_processor_for
from tests.conftest import BASE, VOCAB
from tests.engine.eyes import PICTURES, SHORT, FamilyTests, chat, pictures, save_tokenizer

GRIDS = [[28, 56], [56, 28], [56, 56], [28, 84]]
MORE_GRIDS = [*GRIDS, [84, 84]]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}


class TestLlavaNext(FamilyTests):
    def save(self, folder: Path) -> Any:
        save_tokenizer(folder, "<image>\n", ())
        size, crop = {"shortest_edge": 28}, {"height": 28, "width": 28}
        LlavaNextImageProcessorPil(size=size, crop_size=crop, image_grid_pinpoints=GRIDS).save_pretrained(folder)
        return LlavaNextConfig(
            text_config=MistralConfig(**{**BASE, "vocab_size": VOCAB + 2}, sliding_window=None),
            vision_config=CLIPVisionConfig(**VISION, projection_dim=32),
            image_grid_pinpoints=GRIDS,
            image_token_index=3,
        )

    def inputs(self, folder: Path, models: ModelSet, messages: list[dict[str, Any]]) -> dict[str, Any]:
        processor = LlavaNextProcessor(
            image_processor_for(folder),
            models.models["mllm"].codec.tokenizer,
            patch_size=7,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
        text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return dict(processor(text=[text], images=pictures(messages) or None, return_tensors="pt"))

    @pytest.mark.parametrize("size", [(1, 200), (200, 1), (56, 55), (56, 57), (84, 28), (999, 1000), (3, 5)])
    def test_tokens_are_known_from_the_size(self, models: ModelSet, size: tuple[int, int]) -> None:
        vision = models.models["mllm"].backbone.vision
        assert vision is not None
        (image,) = vision.prepare([load_image(Image.new("RGB", size, (9, 99, 200)))], "")
        (features,) = vision.encode([image])
        assert features.shape[1] == image.tokens == vision.tokens(size, 1) >= vision.fewest_tokens

    def test_tiles_that_the_model_does_not_take_are_refused(self, folder: Path, tmp_path: Path) -> None:
        shutil.copytree(folder, tmp_path / "other")
        processor = image_processor_for(folder)
        processor.image_grid_pinpoints = GRIDS[:2]
        processor.save_pretrained(tmp_path / "other")
        with pytest.raises(CheckpointMismatch, match=r"tiles of 28 pixels in grids .*the model takes 28 in"):
            load_models(tmp_path / "other")


class TestLlavaOnevision(FamilyTests):
    small_pool = 24

    def save(self, folder: Path) -> Any:
        save_tokenizer(folder, "<image>\n", ())
        LlavaOnevisionImageProcessorPil(
            size={"height": 28, "width": 28}, image_grid_pinpoints=MORE_GRIDS
        ).save_pretrained(folder)
        return LlavaOnevisionConfig(
            text_config=Qwen2Config(**{**BASE, "vocab_size": VOCAB + 2}, tie_word_embeddings=True),
            vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
            image_grid_pinpoints=MORE_GRIDS,
            vision_aspect_ratio="anyres_max_2",
            image_token_index=3,
        )

    def process(self, folder: Path, images: list[Image.Image]) -> dict[str, Any]:
        return dict(image_processor_for(folder)(images=[images], return_tensors="pt"))

    def expand(self, given: dict[str, Any], index: int) -> list[int]:
        processor = object.__new__(LlavaOnevisionProcessor)  # a whole one wants torchvision for videos
        processor.image_processor = SimpleNamespace(image_grid_pinpoints=MORE_GRIDS)
        processor.num_image_tokens, processor.vision_aspect_ratio = 16, "anyres_max_2"
        height, width = given["image_sizes"][index].tolist()
        alone = len(given["image_sizes"]) == 1
        return [3] * (processor._get_number_of_features(height, width, 28, 28) if alone else 16 + 1)

    @pytest.mark.parametrize("size", [(84, 84), (300, 301), (28, 56), (1, 200), (84, 28)])
    def test_many_rows_are_scaled_down(self, models: ModelSet, size: tuple[int, int]) -> None:
        vision = models.models["mllm"].backbone.vision
        assert vision is not None
        (image,) = vision.prepare([load_image(Image.new("RGB", size, (9, 99, 200)))], "")
        (features,) = vision.encode([image])
        assert features.shape[1] == image.tokens == vision.tokens(size, 1) <= 16 + 2 * 16 * 1.3 + 8

    def test_an_image_alone_and_among_others_share_nothing(self, models: ModelSet) -> None:
        engine = self.new(models)
        alone, among = chat("What?", PICTURES[0]), chat("What?", PICTURES[0], PICTURES[1])
        for messages in (alone, among, alone):
            got = engine.chat([messages], sampling=SHORT)[0].token_ids
            assert got == self.new(models).chat([messages], sampling=SHORT)[0].token_ids
        assert engine.runner.images_encoded == 3

    def test_one_among_several_may_be_encoded_by_itself(self, models: ModelSet) -> None:
        vision = models.models["mllm"].backbone.vision
        assert vision is not None
        two = vision.prepare([load_image(one) for one in PICTURES[:2]], "")
        tiled = vision.prepare([load_image(PICTURES[2])], "")
        apart = [vision.encode([image])[0] for image in (two[0], *tiled, two[1])]
        for one, other in zip(vision.encode([two[0], *tiled, two[1]]), apart, strict=True):
            torch.testing.assert_close(one, other)
