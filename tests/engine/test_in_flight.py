"""Batches in flight: steps launched before the last one's tokens are known, and lanes beside each other.

What a GPU does is done here on the CPU: up to two batches of a lane are under way, and when one has ended is drawn.
Everything comes out as in plain order, and no page is given away that a batch in flight uses.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test

from stockade.engine.decoding import Decoding, Shape
from stockade.engine.engine import Engine
from stockade.engine.flight import Flight
from stockade.engine.guards import Detoxify, Guard, HarmHead, Probe, Refuse
from stockade.engine.kv_pages import Page
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.request import Reply
from stockade.engine.sampling import SamplingParams
from stockade.engine.scheduler import Lane, Work
from stockade.engine.trace import Recorder
from stockade.kernels import backend
from tests.engine.screened import engine_of, finish, probe_on, with_models
from tests.engine.test_guarded_interleaving import Interleaving

SAMPLINGS = [
    SamplingParams(max_tokens=1, ignore_eos=True),
    SamplingParams(max_tokens=9, ignore_eos=True),
    SamplingParams(max_tokens=40),
    SamplingParams(max_tokens=30, temperature=1.0, seed=1 << 63),
    SamplingParams(max_tokens=30, temperature=0.8, top_p=0.9, top_k=50, min_p=0.01, seed=5),
    SamplingParams(max_tokens=20, temperature=1.5, seed=8, stop=("e", "!"), stop_token_ids=(40, 50, 60)),
    SamplingParams(max_tokens=20, draft_tokens=4),
    SamplingParams(max_tokens=20, repetition_penalty=1.3),
    SamplingParams(max_tokens=12, logprobs=2),
]
GUARDS: list[Guard | None] = [
    None,
    None,
    Guard(HarmHead(template="response", threshold=0.0, chunk=3), Detoxify()),
    Guard(HarmHead(template="response", threshold=1.0, chunk=2), Detoxify(), max_rounds=1),
    Guard(Probe(threshold=0.0, chunk=2), Refuse()),
]


@pytest.fixture(scope="module")
def models(checkpoint: Callable[[str], Path]) -> ModelSet:
    """With fused layers, whose decoding steps choose tokens on the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backend.VARIABLE, "reference")
        found = load_models(
            checkpoint("llama-gqa"), checkpoint("classifier"), checkpoint("llama-mha-tied"), dtype=torch.float32
        )
    return with_models(found, probe=probe_on(found.models["mllm"]))


@pytest.fixture(autouse=True)
def ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch has ended when that is asked for the third time or so."""

    def has_ended(flight: Flight) -> bool:
        flight.__dict__["asked"] = asked = flight.__dict__.get("asked", 0) + 1
        return Random(f"{flight.works[0].sequence.order} {flight.works[0].start} {asked}").random() < 0.35

    monkeypatch.setattr(Flight, "has_ended", property(has_ended))


class Watched:
    """An engine whose batches fly. guesses: decoding steps launched before their tokens were known."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.guesses = 0
        self._pages: dict[int, set[Page]] = {}  # by batch, while it flies
        self._run = engine.runner.run
        self._allocate = engine.pool.allocate
        engine.runner.ahead = 2
        engine.runner.run = self.run  # type: ignore[method-assign]
        engine.pool.allocate = self.allocate  # type: ignore[method-assign]

    def run(self, lane: Lane, works: list[Work]) -> Any:
        self.guesses += any(work.start >= work.sequence.num_tokens for work in works)
        result = self._run(lane, works)
        self._pages[id(result)] = {page for work in works for page in work.sequence.table.pages}
        return result

    def allocate(self, *args: Any) -> list[Page] | None:
        pages = self._allocate(*args)
        flying = {id(flight.result) for lane in self.engine.lanes for flight in lane.flights}
        used = {(page.slab, page.index) for batch in flying for page in self._pages[batch]}
        assert not used & {(page.slab, page.index) for page in pages or ()}, "a batch in flight uses this page"
        return pages


def answers(engine: Engine, asked: list[tuple[int, SamplingParams, Guard | None]]) -> list[Reply]:
    requests = []
    for length, sampling, guard in asked:
        text = "What was it before it became what it is now? "[:length]
        requests.append(engine.submit(text, sampling=sampling, guard=guard))
        engine.step()
    finish(engine)
    return [request.reply for request in requests if request.reply is not None]


def told(reply: Reply) -> Any:
    """What a caller sees, but for scores, which are sums in another order."""
    verdicts = [(verdict.harmful, verdict.error) for verdict in reply.verdicts]
    return reply.text, reply.token_ids, reply.outcome, reply.finish_reason, verdicts, reply.logprobs


@given(
    asked=st.lists(
        st.tuples(st.integers(1, 45), st.sampled_from(SAMPLINGS), st.sampled_from(GUARDS)), min_size=1, max_size=5
    ),
    pages=st.sampled_from([40, 300]),
    options=st.sampled_from(
        [{}, {"max_batch_tokens": 8, "max_sequences": 3}, {"max_batch_tokens": 24, "max_sequences": 2}]
    ),
)
@settings(max_examples=8, deadline=None, database=None, derandomize=True)
def test_replies_are_those_of_plain_order(
    models: ModelSet,
    asked: list[tuple[int, SamplingParams, Guard | None]],
    pages: int,
    options: dict[str, int],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flight, "has_ended", property(lambda flight: True))
        plain = answers(engine_of(models, pages, **options), asked)
    flying = Watched(engine_of(models, pages, **options))
    for want, got in zip(plain, answers(flying.engine, asked), strict=True):
        assert told(got) == told(want)
        for one, other in zip(want.verdicts, got.verdicts, strict=True):
            assert other.score == pytest.approx(one.score, abs=1e-5)


def test_steps_are_launched_ahead_and_rows_for_nothing_leave_no_trace(models: ModelSet) -> None:
    asked = [(length, SAMPLINGS[index], None) for index, length in ((2, 10), (3, 20), (4, 40))]
    plain = engine_of(models)
    want = [told(reply) for reply in answers(plain, asked)]
    flying = Watched(engine_of(models))
    assert [told(reply) for reply in answers(flying.engine, asked)] == want
    assert flying.guesses > 10
    assert flying.engine.pool.cached_pages == plain.pool.cached_pages


def test_graphs_recorded_while_batches_fly_change_no_token(models: ModelSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording one runs rows of nobody over the buffers that the next batch reads the last one's tokens from."""
    asked = [(length, SAMPLINGS[index], None) for index, length in ((2, 10), (3, 20), (4, 40))]
    want = [told(reply) for reply in answers(engine_of(models), asked)]
    recorded = []

    def record(decoding: Decoding, shape: Shape) -> Any:
        recorded.append(shape)
        return SimpleNamespace(replay=lambda: decoding._compute(shape))

    monkeypatch.setattr(Decoding, "_recorded", record)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    flying = Watched(engine_of(models))
    for decoding in flying.engine.runner._decoding.values():
        decoding.capture(0.0)
    assert [told(reply) for reply in answers(flying.engine, asked)] == want
    assert flying.guesses > 10 and len(set(recorded)) == len(recorded) > 1


def test_recorded_steps_of_a_lane_follow_each_other(models: ModelSet) -> None:
    flying = Watched(engine_of(models))
    flying.engine.recorder = Recorder()
    answers(flying.engine, [(20, SAMPLINGS[1], GUARDS[2]), (30, SAMPLINGS[2], None)])
    for name in {step.lane for step in flying.engine.recorder.steps}:
        steps = [step for step in flying.engine.recorder.steps if step.lane == name]
        assert all(step.began < step.ended for step in steps)
        assert all(one.ended <= other.began for one, other in pairwise(steps))


@pytest.mark.parametrize(
    "params", [{"draft_tokens": 4}, {"repetition_penalty": 1.3}, {"logprobs": 1}, {"tap": True}], ids=str
)
def test_steps_that_need_the_tokens_wait_for_them(models: ModelSet, params: dict[str, Any]) -> None:
    guard = Guard(Probe(threshold=0.0, chunk=2), Refuse()) if params.pop("tap", False) else None
    flying = Watched(engine_of(models))
    answers(flying.engine, [(20, SamplingParams(max_tokens=12, ignore_eos=True, **params), guard)])
    assert flying.guesses == 0


def test_a_batch_that_is_aborted_in_flight_keeps_its_pages_until_it_ends(models: ModelSet) -> None:
    engine = engine_of(models)
    Watched(engine)
    request = engine.submit("What is this?", sampling=SAMPLINGS[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flight, "has_ended", property(lambda flight: True))
        engine.step()
        patch.setattr(Flight, "has_ended", property(lambda flight: False))
        lane = engine.lanes[0]
        assert engine._launch(lane)
        engine.abort(request.id)
        held = engine.pool.owned_pages
        assert held > 0 and engine.has_work
        engine.check_integrity()
    finish(engine)


class InFlight(Interleaving):
    """The same with batches in flight."""

    @initialize(pages=st.sampled_from([36, 200]), budget=st.sampled_from([8, 50]))
    def start(self, pages: int, budget: int) -> None:
        super().start(pages, budget)
        Watched(self.engine)


@pytest.mark.slow
def test_any_interleaving_adds_up(models: ModelSet) -> None:
    machine = type("Machine", (InFlight,), {"models": models})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=12, stateful_step_count=16, deadline=None, database=None)
    )
