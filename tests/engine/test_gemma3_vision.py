"""Gemma 3 with eyes: an image's rows see each other in both directions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3Config, Gemma3ImageProcessorPil, Gemma3TextConfig, SiglipVisionConfig

from stockade.engine.errors import UnknownArchitecture
from stockade.engine.models.loader import ModelSet, load_models
from tests.conftest import BASE, VOCAB
from tests.engine.eyes import PICTURES, SHORT, FamilyTests, chat, last_logits, save_tokenizer, token

ADDED = ("<start_of_image>", "<image_soft_token>", "<end_of_image>")
BEGIN, IMAGE, END = (token(ADDED, name) for name in ADDED)
ROWS = 9


class TestGemma3(FamilyTests):
    small_pool = 20

    def save(self, folder: Path) -> Any:
        save_tokenizer(folder, "<start_of_image>", ADDED)
        Gemma3ImageProcessorPil(size={"height": 42, "width": 42}).save_pretrained(folder)
        return Gemma3Config(
            text_config=Gemma3TextConfig(
                **{**BASE, "vocab_size": VOCAB + 5},
                head_dim=16,
                query_pre_attn_scalar=20,
                sliding_window=24,
                layer_types=["sliding_attention", "sliding_attention", "full_attention"],
                final_logit_softcapping=None,
            ),
            vision_config=SiglipVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=42,
                patch_size=7,
            ),
            mm_tokens_per_image=ROWS,
            boi_token_index=BEGIN,
            image_token_index=IMAGE,
            eoi_token_index=END,
        )

    def expand(self, given: dict[str, Any], index: int) -> list[int]:
        return [BEGIN, *[IMAGE] * ROWS, END]

    def rendered(self, models: ModelSet, messages: list[dict[str, Any]]) -> str:
        return super().rendered(models, messages).replace("<start_of_image>", "\n\n<start_of_image>\n\n")

    def process(self, folder: Path, images: Any) -> dict[str, Any]:
        return {"pixel_values": super().process(folder, images)["pixel_values"]}

    def extras(self, ids: torch.Tensor, given: dict[str, Any]) -> dict[str, Any]:
        return {"token_type_ids": (ids == IMAGE).long()}

    @pytest.mark.parametrize("budget", [1, 5, 11, 40])
    def test_a_step_computes_an_image_or_not(self, models: ModelSet, budget: int) -> None:
        """However small the step's budget is."""
        messages = chat("Which of these?", *PICTURES)
        _, wanted = last_logits(self.new(models), messages)
        engine = self.new(models, max_batch_tokens=budget, max_sequences=1)
        engine.submit(messages, sampling=replace(SHORT, logprobs=0))
        logits = None
        while logits is None or not len(logits):
            (work,) = engine.scheduler.schedule(engine.lanes[0])
            assert all(placed.stop <= work.stop for placed in work.sequence.images_between(work.start, work.stop))
            logits = engine.runner.run(engine.lanes[0], [work]).logits
            engine.scheduler.advance(work)
        torch.testing.assert_close(logits[0], wanted, atol=1e-5, rtol=0)

    def test_a_hit_that_ends_inside_an_image_is_exact(self, models: ModelSet) -> None:
        """The rows before the cut saw those behind it when they were computed."""
        messages = chat("What is it?", PICTURES[0])
        _, wanted = last_logits(self.new(models), messages)
        engine = self.new(models)
        engine.chat([messages], sampling=SHORT)
        engine.submit(messages, sampling=replace(SHORT, logprobs=0))
        (work,) = engine.scheduler.schedule(engine.lanes[0])
        (placed,) = work.sequence.images
        for start in range(placed.start - 1, placed.stop + 1):
            got = engine.runner.run(engine.lanes[0], [work._replace(start=start, length=work.stop - start)]).logits
            assert got is not None
            torch.testing.assert_close(got[0], wanted, atol=1e-5, rtol=0)


def test_pan_and_scan_is_refused(tmp_path: Path) -> None:
    config = TestGemma3().save(tmp_path)
    from transformers import AutoModelForImageTextToText

    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    Gemma3ImageProcessorPil(size={"height": 42, "width": 42}, do_pan_and_scan=True).save_pretrained(tmp_path)
    with pytest.raises(UnknownArchitecture, match="one image whole"):
        load_models(tmp_path)
