"""Architectures outside the engine's own decoder: the same tokens as `transformers`, whatever runs beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stockade.engine.engine import Engine
from stockade.engine.guards import Guard
from stockade.engine.models.fallback import FallbackDecoder
from stockade.engine.models.heads import Head, HeadSpec, save_head
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.passes import Answer, Decision, Score
from stockade.engine.request import Outcome
from stockade.engine.sampling import SamplingParams
from stockade.engine.text import Untrusted
from tests.conftest import OTHER_FAMILIES
from tests.engine.test_parity import last_logits

PAGE = 16
GREEDY = SamplingParams(max_tokens=48, ignore_eos=True)
LONGER = SamplingParams(max_tokens=36, ignore_eos=True)
SHORT = SamplingParams(max_tokens=6, ignore_eos=True)
ROOMY: dict[str, Any] = {"kv_bytes": 16 << 20, "tokens_per_page": PAGE}


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, 380, (size,), generator=generator).tolist() for size in (70, 1, 33)]


@pytest.fixture(scope="module", params=OTHER_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def models(family: str, checkpoint: Callable[[str], Path]) -> ModelSet:
    models = load_models(checkpoint(family), device="cpu", dtype=torch.float32)
    assert isinstance(models.models["mllm"].backbone.decoder, FallbackDecoder)
    return models


@pytest.fixture(scope="module")
def reference(family: str, checkpoint: Callable[[str], Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32).eval()


@torch.inference_mode()
def test_logits_and_greedy_tokens_are_those_of_transformers(models: ModelSet, reference: Any) -> None:
    engine = Engine(models=models, **ROOMY)
    for prompt in prompts():
        want = reference(torch.tensor([prompt])).logits[0, -1]
        assert torch.allclose(last_logits(engine, prompt), want, atol=1e-4, rtol=0)
    replies = Engine(models=models, **ROOMY).generate(prompts(), GREEDY)
    for prompt, reply in zip(prompts(), replies, strict=True):
        # each token is the likeliest after those before it
        logits = reference(torch.tensor([prompt + reply.token_ids])).logits[0]
        assert len(reply.token_ids) == 48
        assert reply.token_ids == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_company_chunks_hits_and_preemption_change_no_token(models: ModelSet) -> None:
    together = Engine(models=models, **ROOMY)
    want = [reply.token_ids for reply in together.generate(prompts(), LONGER)]
    again = together.generate(prompts(), SHORT)
    assert again[0].passes[0].cached_tokens >= 4 * PAGE
    assert [reply.token_ids for reply in again] == [tokens[:6] for tokens in want]
    (alone,) = Engine(models=models, **ROOMY).generate(prompts()[2:], SHORT)
    assert alone.token_ids == want[2][:6]
    page_bytes = models.models["mllm"].layout(PAGE).page_bytes
    tight = Engine(
        models=models, kv_bytes=11 * page_bytes, tokens_per_page=PAGE, max_batch_tokens=23, max_sequences=8
    )
    assert [reply.token_ids for reply in tight.generate(prompts(), LONGER)] == want
    assert tight.scheduler.preemptions > 0
    for engine in (together, tight):
        engine.check_integrity()
        assert engine.pool.owned_pages == 0


# --- guards: a detector below the last layer, a probe, and the model as its own judge ---


def heads(folder: Path) -> dict[str, Path]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, template in (("detector", "response"), ("probe", "context")):
        spec = HeadSpec(2, "mean", template=template, threshold=0.0)
        made[name] = folder / f"{name}.safetensors"
        save_head(Head(spec, torch.randn(64, generator=generator) * 0.05, torch.tensor([0.3])), made[name])
    return made


@pytest.fixture(scope="module", params=["mixtral", "cohere2"])
def guarded(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, Any]:
    folder = checkpoint(request.param)
    made = heads(tmp_path_factory.mktemp("heads"))
    engine = Engine(folder, made["detector"], folder, probe=made["probe"], dtype=torch.float32, **ROOMY)
    return engine, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def test_a_head_reads_its_layer_beside_deeper_sequences(guarded: tuple[Engine, Any]) -> None:
    engine, reference = guarded
    scores: list[Any] = []

    def loop() -> Any:
        scores.append((yield Score("detector", (Untrusted("What a day! " * 4),))))
        return Decision(Answer(""), Outcome.UNGUARDED)

    beside = engine.submit_prompt(prompts()[0], SHORT)
    request = engine.driver.submit(loop(), None, None, False, guarded=True)
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    assert request.reply is not None and request.reply.error is None
    head = engine.models["detector"].head
    assert head is not None
    ids = engine.models["detector"].codec.encode_text("What a day! " * 4)
    states = reference(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
    assert scores[0].score == pytest.approx(float(head.score(states.mean(0, keepdim=True))), abs=1e-5)
    logits = reference(torch.tensor([prompts()[0] + beside.reply.token_ids])).logits[0]  # type: ignore[union-attr]
    assert beside.reply is not None
    assert beside.reply.token_ids == logits[len(prompts()[0]) - 1 : -1].argmax(-1).tolist()


def ecso(threshold: float) -> Guard:
    """A judge that takes any answer for one, since random weights say yes and no rarely."""
    guard = Guard.ecso(threshold=threshold)
    return replace(guard, detector=replace(guard.detector, min_mass=1e-9))


@pytest.mark.parametrize(
    ("guard", "outcome", "labels"),
    [
        (Guard.protector(threshold=0.0), Outcome.CLEAN, {"answer", "screen"}),
        (Guard.protector(threshold=2.0, max_rounds=1), Outcome.REFUSED, {"answer", "screen", "rewrite"}),
        (Guard.probe(threshold=0.0), Outcome.CLEAN, {"answer"}),
        (Guard.probe(threshold=2.0), Outcome.MENDED, {"answer", "rewrite", "score"}),
        (ecso(0.0), Outcome.CLEAN, {"answer", "judge"}),
        (ecso(1.0), Outcome.REFUSED, {"answer", "judge", "eyes_closed"}),
        (Guard.ecso(), Outcome.REFUSED, {"answer", "judge"}),
    ],
)
def test_guards_end_to_end(guarded: tuple[Engine, Any], guard: Guard, outcome: Outcome, labels: set[str]) -> None:
    engine, _ = guarded
    for reply in engine.chat(
        ["Who are you?", "Why is the sky blue, and the grass green?"], guard=guard, sampling=SHORT
    ):
        assert (reply.outcome, {item.label for item in reply.passes}) == (outcome, labels)
    engine.check_integrity()
    assert engine.pool.owned_pages == 0
