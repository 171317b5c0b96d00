"""Defects that a search for them found, each with the run that showed it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from stockade.engine.chat import Chat
from stockade.engine.engine import Engine
from stockade.engine.guards import Guard, HarmHead
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.passes import Ahead, Answer, Decision, Generate, Start, Wait
from stockade.engine.request import FinishReason, Outcome
from stockade.engine.sampling import SamplingParams

SHORT = SamplingParams(max_tokens=6, ignore_eos=True)
LONG = SamplingParams(max_tokens=30, ignore_eos=True)


@pytest.fixture(scope="module")
def models(checkpoint: Callable[[str], Path]) -> ModelSet:
    return load_models(
        checkpoint("llama-gqa"), checkpoint("classifier"), checkpoint("llama-mha-tied"), dtype=torch.float32
    )


@pytest.fixture
def engine(models: ModelSet) -> Iterator[Engine]:
    """An engine that must have forgotten everything when the test is over."""
    engine = Engine(models=models, kv_bytes=16 << 20, tokens_per_page=16, max_sequences=32)
    yield engine
    assert not engine.has_work and not list(engine.scheduler.sequences()) and engine.pool.owned_pages == 0
    engine.check_integrity()


class Custom:
    """A guard made of one loop."""

    def __init__(self, loop: Callable[[Chat], Any]) -> None:
        self.loop = loop

    def run(self, chat: Chat, traits: Any) -> Any:
        return self.loop(chat)


def one(model: str, sampling: SamplingParams) -> Custom:
    def loop(chat: Chat) -> Any:
        return Decision((yield Generate(model, chat, sampling=sampling)), Outcome.CLEAN)

    return Custom(loop)


def test_a_loop_that_goes_on_when_it_is_closed_is_aborted_all_the_same(engine: Engine) -> None:
    def loop(chat: Chat) -> Any:
        try:
            yield Generate("mllm", chat, sampling=SHORT)
        finally:
            yield Generate("mllm", chat, sampling=SHORT)

    request = engine.submit("Hello", guard=Custom(loop))
    engine.step()
    assert engine.abort(request.id).finish_reason is FinishReason.ABORTED


class Beyond:
    """A remedy whose prompt, as far as it is known, has a token that its model has no weights for."""

    name = "beyond"
    keeps_images: ClassVar[bool] = False

    def ahead(self, chat: Chat) -> Ahead:
        return Ahead("detoxifier", lambda text: (5, 6, 99_999, 7))

    def mend(self, chat: Chat, answer: Answer) -> Any:
        return (yield Generate("detoxifier", chat, "rewrite", SHORT))


def test_a_prompt_ahead_that_cannot_run_takes_no_other_request_with_it(engine: Engine) -> None:
    head = HarmHead("detector", template="response", threshold=2.0, chunk=2)
    other = engine.submit("Hello", guard=one("detoxifier", LONG))
    own = engine.submit("How?", guard=Guard(head, Beyond(), 1, recheck=False, speculate=True), sampling=LONG)
    while engine.has_work:
        engine.step()
    assert other.reply is not None and (other.reply.outcome, other.reply.error) == (Outcome.CLEAN, None)
    assert own.reply is not None and own.reply.outcome is Outcome.MENDED


def test_the_time_of_a_started_pass_counts_from_when_it_is_waited_for(engine: Engine) -> None:
    def loop(chat: Chat) -> Any:
        handle = yield Start(Generate("mllm", chat, "caption", SHORT, timeout=0.5, candidate=False))
        yield Generate("mllm", chat, sampling=LONG)
        clock[0] += 1.0
        return Decision((yield Wait(handle)), Outcome.CLEAN)

    clock = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        for module in ("driver", "prepare"):
            patch.setattr(f"stockade.engine.{module}.perf_counter", lambda: clock[0])
        # as many others as there are rows that cost nothing, so that what was started stands back
        for _ in range(16):
            engine.submit("Hello", guard=one("mllm", LONG))
        request = engine.submit("How?", guard=Custom(loop))
        while engine.has_work:
            engine.step()
    assert request.reply is not None and (request.reply.outcome, request.reply.error) == (Outcome.CLEAN, None)
    assert next(item for item in request.reply.passes if item.label == "caption").computed_tokens > 0
