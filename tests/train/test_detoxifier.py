"""Training a detoxifier: its loss falls, and the engine writes with it what `peft` writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from stockade.engine.chat import Chat
from stockade.engine.engine import Engine
from stockade.engine.errors import BadInput
from stockade.engine.guards import Detoxify
from stockade.engine.guards.prompts import rewrite, rewrite_with_question
from stockade.engine.models.loader import load_models
from stockade.engine.models.sources import Attached
from stockade.engine.passes import Answer, Decision
from stockade.engine.request import Outcome
from stockade.engine.sampling import SamplingParams
from stockade.train.backbone import adapt, open_backbone
from stockade.train.batches import padded
from stockade.train.detoxifier import DetoxifierCard, loss_of, rewriting, train_detoxifier
from stockade.train.recipe import Recipe
from stockade.train.refusals import LabelsSwapped
from stockade.train.rows import DataInvalid, Skipped
from stockade.train.triples import SORRY, Triple, read_triples, split_triples

QUICK = Recipe(rate=5e-3, epochs=6, batch=4, rank=4, alpha=8, dropout=0.0, max_tokens=400)
TRIPLES = [Triple(f"What of {n}?", f"harm {n} harm", f"good {n % 3}") for n in range(16)]


@pytest.fixture(scope="module")
def base(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama-gqa")


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Mend:
    """A guard whose loop mends a harmful answer at once."""

    def run(self, chat: Chat, traits: object, release: str = "verdict") -> object:
        mended = yield from Detoxify().bind(traits).mend(chat, Answer("harm 3 harm"))
        return Decision(mended, Outcome.MENDED)


@pytest.mark.parametrize("adapter", ["lora", "alora"])
def test_it_learns_and_the_engine_writes_what_peft_writes(adapter: str, base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "triples.jsonl", [item._asdict() for item in TRIPLES])
    out = tmp_path / "detox"
    card = train_detoxifier(base, [data], out, recipe=replace(QUICK, adapter=adapter), invocation=" !rewrite")
    assert card.after < card.before - 0.5 and (card.triples, card.validation) == (15, 1)
    assert (out / "README.md").read_text() == card.to_markdown() and not (out / ".work").exists()
    engine = Engine(base, None, Attached(out), device="cpu", dtype=torch.float32, kv_bytes=32 << 20)
    codec = engine.models["detoxifier"].codec
    invocation = codec.encode_text(" !rewrite", False) if adapter == "alora" else []
    assert engine.models["detoxifier"].invocation == tuple(invocation)
    prompt = codec.encode(rewrite_with_question("What of 3?", "harm 3 harm"), add_special_tokens=True)
    (reply,) = engine.chat(["What of 3?"], guard=Mend(), sampling=SamplingParams(temperature=0.0, max_tokens=8))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()
    tokens = [*prompt, *invocation]
    wanted: list[int] = []
    for _ in reply.token_ids:
        offsets = {"alora_offsets": [len(invocation) + len(wanted)]} if invocation else {}
        with torch.inference_mode():
            wanted.append(int(model(torch.tensor([[*tokens, *wanted]]), **offsets).logits[0, -1].argmax()))
    assert reply.token_ids == wanted
    with pytest.raises(BadInput, match="not empty"):
        train_detoxifier(base, [data], out)


def test_an_activated_adapter_applies_from_its_invocation_only(base: Path) -> None:
    backbone = open_backbone(base, device=torch.device("cpu"), dtype=torch.float32)
    backbone = adapt(backbone, Recipe(adapter="alora", rank=4), [300, 301])
    with torch.no_grad():
        for name, parameter in backbone.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    backbone.model.eval()
    items = [rewriting(backbone, triple, n % 2 == 0, False, [300, 301]) for n, triple in enumerate(TRIPLES[:3])]
    rows = [item.tokens for item in items]
    first = [item.active_from for item in items]
    with torch.no_grad():
        found = backbone.active_states(rows, first)
        with backbone.model.disable_adapter():
            same = backbone.active_states(rows, first)
            plain = backbone.states(padded(rows, 0, torch.device("cpu"))[0])
    for row, (item, start) in enumerate(zip(items, first, strict=True)):
        assert item.tokens[start : start + 2] == [300, 301] and item.target_from == start + 2
        behind, count = plain[row, start : len(item.tokens)], len(item.tokens) - start
        torch.testing.assert_close(same[row, :count], behind, rtol=0, atol=1e-5)
        assert (found[row, :count] - behind).abs().amax(1).min() > 1e-3


def test_the_loss_is_that_of_transformers_with_the_prompt_masked(base: Path) -> None:
    backbone = open_backbone(base, device=torch.device("cpu"), dtype=torch.float32)
    items = [rewriting(backbone, triple, n % 2 == 0, False, ()) for n, triple in enumerate(TRIPLES[:4])]
    ids, there = padded([item.tokens for item in items], 0, torch.device("cpu"))
    labels = ids.masked_fill(~there, -100)
    for row, item in enumerate(items):
        labels[row, : item.target_from] = -100
    with torch.no_grad():
        wanted = backbone.model(ids, labels=labels).loss
        backbone.run_states_only(normed=True)
        assert float(loss_of(backbone, items)) == pytest.approx(float(wanted), abs=1e-5)


def test_both_published_prompts_as_the_engine_asks(base: Path) -> None:
    codec = load_models(base).models["mllm"].codec
    backbone = open_backbone(base, device=torch.device("cpu"), dtype=torch.float32)
    triple = TRIPLES[0]
    for with_question, segments in (
        (True, rewrite_with_question(triple.question, triple.harmful)),
        (False, rewrite(triple.harmful)),
    ):
        item = rewriting(backbone, triple, with_question, False, ())
        assert item.tokens[: item.target_from] == codec.encode(segments, add_special_tokens=True)
        assert codec.decode(item.tokens[item.target_from :]) == triple.harmless
        assert item.tokens[-1] == codec.tokenizer.eos_token_id


def test_an_interrupted_run_goes_on_to_the_same_losses(base: Path, tmp_path: Path) -> None:
    data = [write(tmp_path / "triples.jsonl", [item._asdict() for item in TRIPLES])]
    recipe = replace(QUICK, epochs=2, dropout=0.2)

    def run(out: Path, progress: Callable[[str, int, int], None] | None = None) -> DetoxifierCard:
        return train_detoxifier(base, data, out, recipe=recipe, progress=progress, save_seconds=0.0)

    def interrupt(what: str, done: int, of: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", interrupt)
    assert run(tmp_path / "parts") == whole


def test_triples_of_every_form(tmp_path: Path) -> None:
    pku = {"prompt": "Q", "response_0": "one", "response_1": "two", "safer_response_id": 0}
    rows: list[dict[str, object]] = [
        {"question": "Q", "harmful": "bad", "harmless": "good"},
        {"prompt": "Q", "rejected": "worse", "chosen": "better"},
        {**pku, "is_response_0_safe": True, "is_response_1_safe": False},
        {**pku, "response_1": "three", "is_response_0_safe": False, "is_response_1_safe": False},
        {"question": "other", "harmful": " BAD ", "harmless": "good"},
    ]
    found = read_triples([write(tmp_path / "rows.jsonl", rows)])
    assert found.items == [
        Triple("Q", "bad", "good"),
        Triple("Q", "worse", "better"),
        Triple("Q", "two", "one"),
        Triple("Q", "three", SORRY),
    ]
    assert found.repeated == 1
    with pytest.raises(DataInvalid, match="two questions"):
        split_triples(found.items, 0.1, 0)
    wrong = write(tmp_path / "wrong.jsonl", [rows[0], {"question": "Q"}, rows[1]])
    with pytest.raises(DataInvalid, match=r"line 2.*--skip-bad"):
        read_triples([wrong])
    skipped = Skipped()
    assert len(read_triples([wrong], skipped).items) == 2 and skipped.count == 1


def test_triples_the_other_way_round_are_refused(tmp_path: Path) -> None:
    rows = [{"question": str(n), "harmful": f"I'm sorry, I can't do {n}.", "harmless": f"Do {n}."} for n in range(6)]
    with pytest.raises(LabelsSwapped):
        read_triples([write(tmp_path / "rows.jsonl", rows)])


def test_questions_validate_or_train() -> None:
    training, held = split_triples([*TRIPLES, *TRIPLES], 0.25, 1)
    assert not {item.question for item in training} & {item.question for item in held}
    assert (len(training), len(held)) == (24, 8)
