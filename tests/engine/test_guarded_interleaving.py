"""Guards, releases, aborts and steps in any order under memory pressure: clean pools, and streams that add up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from stockade.engine.engine import Request
from stockade.engine.guards import Cascade, Detoxify, Guard, HarmHead, Probe, Refuse, SelfJudge
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.passes import ReleaseMode
from stockade.engine.request import FinishReason, Replaced
from stockade.engine.sampling import SamplingParams
from tests.engine.screened import assert_empty, engine_of, probe_on, with_models

TEXTS = ["Hi", "What is this?", "What is this thing, and what was it before it became what it is?"]
JUDGE = SelfJudge(threshold=0.0)
GUARDS: list[Guard | None] = [
    None,
    Guard(HarmHead(template="response", threshold=0.0, chunk=2), Detoxify(), speculate=True),
    Guard(HarmHead(template="question_answer", threshold=1.0, chunk=3), Detoxify(), max_rounds=2, speculate=True),
    Guard(HarmHead(template="response", threshold=1.0, stop_below=0.7, patience=1, chunk=1), Detoxify()),
    Guard(HarmHead(template="response", threshold=0.0, prefix_threshold=0.6, chunk=1), Detoxify(), speculate=True),
    Guard(Probe(threshold=0.0, chunk=2), Refuse()),
    Guard(Probe(threshold=1.0, stop_below=0.9, chunk=2, fallback=HarmHead(template="response")), Detoxify()),
    Guard(Cascade(Probe(chunk=2), HarmHead(template="response"), (0.3, 0.6)), Detoxify()),
]
LATE: list[Guard | None] = [Guard.ecso(threshold=0.0, speculate=True), Guard(JUDGE, Detoxify(), max_rounds=1)]
SAMPLINGS = [
    SamplingParams(max_tokens=3, ignore_eos=True),
    SamplingParams(max_tokens=30, temperature=1.0, seed=3, draft_tokens=4),
    SamplingParams(max_tokens=40, draft_tokens=8),
    SamplingParams(max_tokens=25, temperature=1.0, seed=8, stop=("e", "!")),
]
RELEASES: tuple[ReleaseMode, ...] = ("verdict", "window", "audit")


@pytest.fixture(scope="module")
def models(checkpoint: Callable[[str], Path]) -> ModelSet:
    found = load_models(
        checkpoint("llama-gqa"), checkpoint("classifier"), checkpoint("llama-mha-tied"), dtype=torch.float32
    )
    return with_models(found, probe=probe_on(found.models["mllm"]))


class Interleaving(RuleBasedStateMachine):
    """Every request is a stream; what it has shown is compared with its reply."""

    models: ModelSet

    @initialize(pages=st.sampled_from([36, 200]), budget=st.sampled_from([8, 50]))
    def start(self, pages: int, budget: int) -> None:
        self.engine = engine_of(self.models, pages, max_batch_tokens=budget, max_sequences=min(budget, 12))
        self.requests: dict[int, tuple[Request, ReleaseMode, Guard | None]] = {}
        self.shown: dict[int, str] = {}
        self.replaced: dict[int, Replaced] = {}

    @rule(
        text=st.sampled_from(TEXTS),
        guard=st.sampled_from(GUARDS),
        params=st.sampled_from(SAMPLINGS),
        release=st.sampled_from(RELEASES),
        salt=st.sampled_from([None, "a"]),
    )
    def submit(
        self, text: str, guard: Guard | None, params: SamplingParams, release: ReleaseMode, salt: str | None
    ) -> None:
        self._submit(text, guard, params, release, salt)

    @rule(guard=st.sampled_from(LATE), release=st.sampled_from([RELEASES[0], RELEASES[2]]))
    def submit_what_is_judged_at_the_end(self, guard: Guard, release: ReleaseMode) -> None:
        self._submit(TEXTS[1], guard, SAMPLINGS[1], release, None)

    def _submit(
        self, text: str, guard: Guard | None, params: SamplingParams, release: ReleaseMode, salt: str | None
    ) -> None:
        request = self.engine.submit(
            text, guard=guard, sampling=params, salt=salt, streaming=True, release=release if guard else "verdict"
        )
        self.requests[request.id] = (request, release, guard)
        self.shown[request.id] = ""

    @rule(steps=st.integers(1, 12))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self._step()

    def _step(self) -> None:
        self.engine.step()
        self.engine.check_integrity()
        for number, (request, release, guard) in self.requests.items():
            for item in request.take():
                assert number not in self.replaced
                if isinstance(item, Replaced):
                    assert item.released == self.shown[number]
                    self.replaced[number] = item
                else:
                    self.shown[number] += item
                    assert guard is None or release != "verdict" or request.reply is not None

    @precondition(lambda self: self.engine.driver.requests)
    @rule(which=st.integers(0, 99))
    def abort(self, which: int) -> None:
        live = sorted(self.engine.driver.requests)
        reply = self.engine.abort(live[which % len(live)])
        assert reply.finish_reason is FinishReason.ABORTED and reply.text == ""

    @rule()
    def forget(self) -> None:
        self.engine.pool.clear_cache()

    @invariant()
    def the_pool_is_clean(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(5000):
            if not self.engine.has_work:
                break
            self._step()
        self._step()
        unscreened = 0
        for number, (request, release, guard) in self.requests.items():
            reply = request.reply
            assert reply is not None
            if number in self.replaced:
                assert self.replaced[number].text == reply.text
            elif reply.finish_reason is not FinishReason.ABORTED:
                assert self.shown[number] == reply.text
            assert reply.trace.wasted_tokens >= 0
            unscreened += reply.trace.unscreened_characters
            assert reply.trace.unscreened_characters == 0 or release == "audit"
            assert guard is None or reply.verdicts or reply.finish_reason is FinishReason.ABORTED
        assert self.engine.driver.unscreened_characters == unscreened
        assert_empty(self.engine)


@pytest.mark.slow
def test_any_interleaving_of_guards_and_releases_adds_up(models: ModelSet) -> None:
    machine = type("Machine", (Interleaving,), {"models": models})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=12, stateful_step_count=16, deadline=None, database=None)
    )
