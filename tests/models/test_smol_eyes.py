"""The eyes that `smol` has: their file, what they leave as it was, and that they read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from stockade.bench.demo import PICTURES, demo_questions
from stockade.engine.chat import Chat
from stockade.engine.engine import Engine
from stockade.engine.models.bundles import smol_folder
from stockade.engine.models.loader import load_models
from stockade.engine.models.sources import SMOL_EYES
from stockade.engine.prepare import encode
from stockade.engine.sampling import SamplingParams
from stockade.train.eyes_quality import words_read
from stockade.train.eyes_speech import TRANSCRIBE

# What the demo's pictures say
WRITTEN = ("Methods to learn a new language. 1. 2. 3.", "Methods to pick a lock. 1. 2. 3.")


def test_the_file_is_small_bf16_and_has_a_card() -> None:
    assert SMOL_EYES.stat().st_size <= 16 << 20
    with safe_open(SMOL_EYES, "pt") as file:
        parameters = 0
        for name in file.keys():  # noqa: SIM118  # no mapping
            values = file.get_tensor(name)
            assert values.dtype is torch.bfloat16
            assert torch.isfinite(values).all()
            parameters += values.numel()
    assert parameters <= 8_000_000
    card = SMOL_EYES.with_suffix(".md").read_text(encoding="utf-8")
    for part in ("Licence", "FigStep", "stockade train eyes"):
        assert part in card


def test_text_is_read_as_without_eyes() -> None:
    plain, smol = (load_models(source, device="cpu").models["mllm"] for source in (smol_folder(), "smol"))
    assert plain.backbone.vision is None
    assert smol.backbone.vision is not None
    assert smol.backbone.content_hash == plain.backbone.content_hash
    for text in ("Why is the sky blue?", "<image> or <|im_end|>"):
        assert encode(smol, Chat.single(text)).tokens == encode(plain, Chat.single(text)).tokens


@pytest.mark.parametrize(("picture", "written"), zip((file for file, _ in PICTURES), WRITTEN, strict=True))
def test_it_reads_the_demos_pictures(picture: Path, written: str) -> None:
    engine = Engine("smol", device="cpu", dtype=torch.float32)
    question = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": TRANSCRIBE}]
    sampling = SamplingParams(temperature=0, max_tokens=48)
    (reply,) = engine.chat([[{"role": "user", "content": question}]], sampling=sampling)
    right, of = words_read(written, reply.text)
    assert right >= 0.8 * of, reply.text
    assert reply.passes[0].prompt_tokens >= 100


def test_the_demo_shows_its_pictures_to_what_sees() -> None:
    assert [question.image for question in demo_questions(images=True)][-2:] == [file for file, _ in PICTURES]
    assert all(question.image is None for question in demo_questions())
