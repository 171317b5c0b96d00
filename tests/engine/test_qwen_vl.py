"""Qwen2.5-VL and Qwen3-VL: rotary positions in three axes, images of any resolution, features for several layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2VLImageProcessorPil, Qwen3VLConfig

from stockade.engine.errors import CheckpointMismatch, UnknownArchitecture
from stockade.engine.guards import Guard
from stockade.engine.images import load_image
from stockade.engine.models.decoder import DecoderConfig
from stockade.engine.models.loader import ModelSet, load_models
from tests.conftest import BASE, VOCAB
from tests.engine.eyes import PICTURES, SHORT, FamilyTests, chat, save_tokenizer, token

ADDED = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
IMAGE = token(ADDED, "<|image_pad|>")


class TestQwen25(FamilyTests):
    def save(self, folder: Path) -> Any:
        save_tokenizer(folder, "<|vision_start|><|image_pad|><|vision_end|>", ADDED)
        size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 12}
        Qwen2VLImageProcessorPil(size=size).save_pretrained(folder)
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        return Qwen2_5_VLConfig(
            text_config={**BASE, "vocab_size": VOCAB + 5, "rope_parameters": rope},
            vision_config={
                "depth": 3,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": BASE["hidden_size"],
                "window_size": 56,
                "fullatt_block_indexes": [1],
            },
            image_token_id=IMAGE,
        )

    def expand(self, given: dict[str, Any], index: int) -> list[int]:
        return [IMAGE] * (int(given["image_grid_thw"][index].prod()) // 4)

    def extras(self, ids: torch.Tensor, given: dict[str, Any]) -> dict[str, Any]:
        return {"mm_token_type_ids": (ids == IMAGE).int()} if given else {}

    def test_equal_pixels_in_another_grid_share_nothing(self, models: ModelSet) -> None:
        """A plain image of two sizes becomes the same patches in two grids."""
        tall, wide = (Image.new("RGB", size, (90, 20, 200)) for size in ((56, 112), (112, 56)))
        vision = models.models["mllm"].backbone.vision
        assert vision is not None
        one, other = vision.prepare([load_image(tall), load_image(wide)], "")
        assert one.inputs["pixel_values"].equal(other.inputs["pixel_values"]) and one.key != other.key
        engine = self.new(models)
        for messages in (chat("What?", tall), chat("What?", wide)):
            found = engine.chat([messages], sampling=SHORT)[0]
            assert found.passes[0].cached_tokens < 30
            assert found.token_ids == self.new(models).chat([messages], sampling=SHORT)[0].token_ids

    def test_a_hit_that_ends_inside_an_image_is_exact(self, models: ModelSet) -> None:
        messages = chat("What?", PICTURES[0])
        wanted = self.new(models).chat([messages], sampling=SHORT)[0].token_ids
        for rows in (1, 3, 5):
            engine = self.new(models)
            engine.submit(messages, sampling=SHORT)
            (work,) = engine.scheduler.schedule(engine.lanes[0])
            cut = work.sequence.images[0].start + rows
            engine.runner.run(engine.lanes[0], [work._replace(length=cut)])
            engine.scheduler.advance(work._replace(length=cut))
            engine.abort(work.sequence.order[0])
            reply = engine.chat([messages], sampling=SHORT)[0]
            assert reply.passes[0].cached_tokens == cut and reply.token_ids == wanted

    def test_an_answer_with_an_image_can_be_continued(self, models: ModelSet) -> None:
        """The judge in the answer's own sequence says what a chat with all of it would say."""
        engine = self.new(models)
        guard = Guard.ecso(mode="continue")
        guard = replace(guard, detector=replace(guard.detector, min_mass=1e-12, threshold=0.0))
        reply = engine.chat([chat("What is it?", PICTURES[0])], guard=guard, sampling=SHORT)[0]
        assert [(one.label, one.error) for one in reply.passes] == [("answer", None), ("judge", None)]
        assert reply.passes[1].cached_tokens >= reply.passes[0].prompt_tokens


class TestQwen3(TestQwen25):
    def save(self, folder: Path) -> Any:
        save_tokenizer(folder, "<|vision_start|><|image_pad|><|vision_end|>", ADDED)
        size = {"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 12}
        Qwen2VLImageProcessorPil(size=size, patch_size=16).save_pretrained(folder)
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
        return Qwen3VLConfig(
            text_config={**BASE, "vocab_size": VOCAB + 5, "head_dim": 16, "rope_parameters": rope},
            vision_config={
                "depth": 4,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": BASE["hidden_size"],
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 2],
            },
            image_token_id=IMAGE,
            tie_word_embeddings=True,
        )

    def test_features_reach_later_layers(self, models: ModelSet) -> None:
        vision = models.models["mllm"].backbone.vision
        assert vision is not None
        (features,) = vision.encode(vision.prepare([load_image(PICTURES[0])], ""))
        assert features.shape[0] == 3 and features.abs().amax((1, 2)).min() > 0.01


def test_a_grid_that_the_tower_does_not_take_is_refused(tmp_path: Path) -> None:
    config = TestQwen25().save(tmp_path)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    Qwen2VLImageProcessorPil(patch_size=16).save_pretrained(tmp_path)
    with pytest.raises(CheckpointMismatch, match=r"grids of .* \(16, 2, 2\); the vision tower takes \(14, 2, 2\)"):
        load_models(tmp_path)


def test_frequencies_that_no_axis_gets_are_refused(tmp_path: Path) -> None:
    config = TestQwen25().save(tmp_path)
    config.text_config.rope_parameters["mrope_section"] = [2, 2, 2]
    with pytest.raises(UnknownArchitecture, match=r"mrope_section \[2, 2, 2\] has to deal 8 rotary frequencies"):
        DecoderConfig.from_pretrained(config.text_config)
