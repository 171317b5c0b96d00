"""Fine-tuning a tiny LLaVA: its loss falls, prompts are the engine's own, and so is what it then writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import LlavaForConditionalGeneration
from typer.testing import CliRunner

from stockade.cli import app
from stockade.engine.engine import Engine
from stockade.engine.errors import BadInput, UnknownArchitecture, UnsupportedImage
from stockade.engine.images import load_image
from stockade.engine.models.loader import load_models
from stockade.engine.sampling import SamplingParams
from stockade.train.mllm import conversation_targets, train_mllm
from stockade.train.pairs import Conversation, Turn, read_mixed
from stockade.train.recipe import Recipe
from stockade.train.rows import DataInvalid, DataMissing, Skipped

QUICK = Recipe(rate=5e-3, epochs=6, batch=4, rank=4, alpha=8, dropout=0.0, max_tokens=200)


def pair(question: str, answer: str, image: str | None = None) -> dict[str, Any]:
    shown = {} if image is None else {"image": image}
    value = question if image is None else f"<image>\n{question}"
    return {**shown, "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for color in ("red", "blue"):
        Image.new("RGB", (60, 60), color).save(folder / f"{color}.png")
    return folder


def test_it_learns_and_the_engine_writes_what_peft_writes(
    checkpoint: Callable[[str], Path], images: Path, tmp_path: Path
) -> None:
    base = checkpoint("llava")
    rows = [pair(f"What {n}?", f"{color} {color}", f"{color}.png") for n in range(4) for color in ("red", "blue")]
    data = write(tmp_path / "pairs.json", [*rows, pair("Why?", "so"), rows[0]])
    out = tmp_path / "tuned"
    card = train_mllm(base, [data], out, images=images, recipe=QUICK)
    assert sum(card.losses[-3:]) < 0.7 * sum(card.losses[:3])
    assert (card.conversations, card.turns, card.with_image, card.repeated) == (9, 9, 8, 1)
    assert (out / "README.md").read_text() == card.to_markdown()
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": str(images / "red.png")}, {"type": "text", "text": "What 1?"}],
        }
    ]
    engine = Engine((out, base), device="cpu", dtype=torch.float32, kv_bytes=32 << 20)
    (reply,) = engine.chat([chat], sampling=SamplingParams(temperature=0.0, max_tokens=6))
    model = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), out).eval()
    encoder = load_models(base, dtype=torch.float32).models["mllm"]
    (shown,) = conversation_targets(encoder, Conversation((Turn("What 1?", "?"),), "red.png"), images)
    tokens = shown.target.tokens[: shown.target.target_from]
    assert encoder.backbone.vision is not None
    (prepared,) = encoder.backbone.vision.prepare((load_image(str(images / "red.png")),), "")
    wanted: list[int] = []
    for _ in reply.token_ids:
        with torch.inference_mode():
            logits = model(
                input_ids=torch.tensor([[*tokens, *wanted]]), pixel_values=prepared.inputs["pixel_values"]
            ).logits
        wanted.append(int(logits[0, -1].argmax()))
    assert reply.token_ids == wanted
    names = {name for name, _ in model.named_parameters() if "lora" in name}
    assert names and all("language_model" in name for name in names)


def test_each_answer_of_a_conversation_is_a_target(checkpoint: Callable[[str], Path], images: Path) -> None:
    encoder = load_models(checkpoint("llava"), dtype=torch.float32).models["mllm"]
    item = Conversation((Turn("What?", "red"), Turn("Why?", "so")), "red.png")
    first, second = conversation_targets(encoder, item, images)
    assert encoder.image_token_id is not None and encoder.backbone.vision is not None
    for shown, answer in ((first, "red"), (second, "so")):
        its = shown.target
        assert its.tokens.count(encoder.image_token_id) == encoder.backbone.vision.fewest_tokens
        assert encoder.codec.decode(its.tokens[its.target_from :]) == answer
        assert its.tokens[-1] == encoder.codec.tokenizer.eos_token_id
    assert encoder.codec.decode(second.target.tokens).count("red") == 1
    with pytest.raises(UnsupportedImage):
        conversation_targets(encoder, Conversation(item.turns, "../red.png"), images)


def test_utility_data_is_mixed_in(tmp_path: Path) -> None:
    safe = write(tmp_path / "safe.json", [pair(f"S {n}", "safe") for n in range(6)])
    utility = write(tmp_path / "utility.json", [pair(f"U {n}", "useful") for n in range(20)] + [pair("S 0", "safe")])
    mixed = read_mixed([safe], [utility], 0.4, seed=0)
    assert (len(mixed.items), mixed.repeated) == (10, 1)
    assert sum(item.turns[0].answer == "useful" for item in mixed.items) == 4
    assert read_mixed([safe], [utility], 0.4, seed=0) == mixed != read_mixed([safe], [utility], 0.4, seed=1)
    refusing = write(tmp_path / "refusing.json", [pair(f"U {n}", "I'm sorry, I can't.") for n in range(3)])
    with pytest.raises(DataInvalid, match="3 of the utility data"):
        read_mixed([safe], [refusing], 0.4, seed=0)
    with pytest.raises(DataInvalid, match="share"):
        read_mixed([safe], [utility], 1.0, seed=0)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"conversations": []},
        {"conversations": [{"from": "human", "value": "Q"}]},
        {"conversations": [{"from": "gpt", "value": "A"}, {"from": "human", "value": "Q"}]},
        {**pair("Q", "A"), "image": "red.png"},
        {"conversations": pair("Q", "A", "red.png")["conversations"]},
        pair("Q <image>", "A"),
        pair("Q", "<image>", "red.png"),
        pair("Q", " "),
    ],
)
def test_a_conversation_of_another_form(row: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.json", [pair("Q", "A"), row])
    with pytest.raises(DataInvalid, match=r"entry 2.*--skip-bad"):
        read_mixed([path], [], 0.0, 0)
    skipped = Skipped()
    assert len(read_mixed([path], [], 0.0, 0, skipped).items) == 1 and skipped.count == 1


def test_the_file_that_keeps_ecsos_work_can_be_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"key": "1", **pair("Q", "A"), "outcome": "clean"}, {"key": "2", "refused": "nonsense"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_mixed([path], [], 0.0, 0).items == [Conversation((Turn("Q", "A"),), None)]
    path.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(DataMissing, match="no conversation"):
        read_mixed([path], [], 0.0, 0)


def test_what_cannot_be_trained(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.json", [pair("Q", "A")])
    with pytest.raises(UnknownArchitecture, match="no LLaVA"):
        train_mllm(checkpoint("llama-gqa"), [data], tmp_path / "one", recipe=QUICK)
    with pytest.raises(BadInput, match="adapter lora"):
        train_mllm(checkpoint("llava"), [data], tmp_path / "two", recipe=replace(QUICK, adapter="alora"))
    with pytest.raises(BadInput, match="max_tokens"):
        train_mllm(checkpoint("llava"), [data], tmp_path / "three", recipe=replace(QUICK, max_tokens=8))


def test_the_command(checkpoint: Callable[[str], Path], images: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.json", [pair("What?", "red", "red.png"), pair("Why?", "so")])
    options = [
        "--image-root",
        str(images),
        "--epochs=1",
        "--rank=2",
        "--device=cpu",
        "--out",
        str(tmp_path / "tuned"),
    ]
    done = CliRunner().invoke(app, ["train", "mllm", str(checkpoint("llava")), "--data", str(data), *options])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "tuned" / "adapter_model.safetensors").is_file()
