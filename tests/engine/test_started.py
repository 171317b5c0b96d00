"""Passes that begin before they are needed: they run where it costs nothing, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stockade.engine.chat import Chat
from stockade.engine.engine import Engine
from stockade.engine.errors import PassError
from stockade.engine.guards import Detoxify, Guard, HarmHead
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.passes import Answer, Cancel, Decision, Generate, Handle, Score, Start, Wait
from stockade.engine.request import Outcome
from stockade.engine.sampling import SamplingParams
from stockade.engine.scheduler import Work
from stockade.engine.text import Untrusted
from tests.engine.screened import ask, engine_of, finish, force, replied, submit

SHORT = SamplingParams(max_tokens=12, ignore_eos=True)
LONGER = SamplingParams(max_tokens=40, ignore_eos=True)
PROMPT = tuple(range(5, 45))
OTHER = tuple(range(100, 150))
DONE = Decision(Answer("done"), Outcome.CLEAN)


@pytest.fixture(scope="module")
def models(checkpoint: Callable[[str], Path]) -> ModelSet:
    return load_models(
        checkpoint("llama-gqa"), checkpoint("classifier"), checkpoint("llama-mha-tied"), dtype=torch.float32
    )


def generate(prompt: tuple[int, ...] = OTHER, model: str = "mllm", sampling: SamplingParams = LONGER) -> Generate:
    return Generate(model, prompt, sampling=sampling)


def watch(engine: Engine) -> list[list[Work]]:
    batches: list[list[Work]] = []
    run = engine.runner.run

    def watched(lane: Any, works: list[Work]) -> Any:
        batches.append(list(works))
        return run(lane, works)

    engine.runner.run = watched  # type: ignore[method-assign]
    return batches


def test_a_started_pass_gives_what_it_gives_alone(models: ModelSet) -> None:
    wanted = ask(engine_of(models), generate())
    found: list[Any] = []

    def loop() -> Any:
        handle = yield Start(generate())
        found.append((yield generate(PROMPT)))
        found.append((yield Wait(handle)))
        return DONE

    for prefix in ("running", "first thing asked"):
        engine = engine_of(models)
        request = submit(engine, loop())
        finish(engine)
        assert found[1].text == wanted.text and found[0].text == ask(engine_of(models), generate(PROMPT)).text, prefix
        assert replied(request).trace.wasted_tokens == 0
        found.clear()


def test_a_pass_that_ended_before_it_was_waited_for_was_not_wasted(models: ModelSet) -> None:
    def loop() -> Any:
        handle = yield Start(generate(sampling=SHORT))
        yield generate(PROMPT)
        assert (yield Wait(handle)).ids
        return DONE

    engine = engine_of(models)
    request = submit(engine, loop())
    finish(engine)
    reply = replied(request)
    assert reply.passes[0].finished is not None and reply.passes[1].finished is not None
    assert reply.passes[0].finished < reply.passes[1].finished
    assert reply.trace.wasted_tokens == 0 and reply.error is None


@pytest.mark.parametrize("after", [0, 1, 4, 60])
@pytest.mark.parametrize("how", ["cancel", "forget"])
def test_what_is_given_up_leaves_no_page_and_is_counted(models: ModelSet, after: int, how: str) -> None:
    """after: tokens of another pass meanwhile; the step that reads its whole prompt has no row to spare."""

    def loop() -> Any:
        handle = yield Start(generate())
        if after:
            yield generate(PROMPT, sampling=SamplingParams(max_tokens=after, ignore_eos=True))
        if how == "cancel":
            yield Cancel(handle)
            engine.check_integrity()
            assert engine.pool.owned_pages == 0
        return DONE

    engine = engine_of(models)
    request = submit(engine, loop())
    finish(engine)
    reply = replied(request)
    started = reply.passes[0]
    assert reply.error is None and reply.trace.wasted_tokens == started.computed_tokens
    assert (reply.trace.wasted_tokens > 0) == (after > 1)
    assert started.error == ("canceled" if how == "cancel" and after < 60 else None)


def test_what_is_given_up_after_a_preemption_is_counted_too(models: ModelSet) -> None:
    def loop() -> Any:
        handle = yield Start(generate())
        yield generate(PROMPT, sampling=SHORT)
        yield Cancel(handle)
        return DONE

    engine = engine_of(models)
    ask(engine, generate(OTHER, sampling=SHORT))  # the pool knows its prompt
    request = submit(engine, loop())
    for _ in range(6):
        engine.step()
    (started,) = [sequence for sequence in engine.scheduler.sequences() if sequence.optional]
    assert started.running and started.record.cached_tokens > 0
    while request.reply is None:
        if started.running:
            engine.scheduler._preempt(started)
        engine.step()
    assert replied(request).trace.wasted_tokens >= 0


def test_a_loop_may_start_first_and_a_started_error_waits(models: ModelSet) -> None:
    seen: list[Any] = []

    def loop() -> Any:
        bad = yield Start(Score("mllm", (Untrusted("x"),)))  # it has no head
        lost = yield Start(Generate("nobody", PROMPT))
        assert isinstance(bad, Handle) and isinstance(lost, Handle)
        yield generate(PROMPT, sampling=SHORT)
        for handle in (bad, lost):
            try:
                yield Wait(handle)
            except PassError as error:
                seen.append(str(error))
        return DONE

    engine = engine_of(models)
    request = submit(engine, loop())
    finish(engine)
    assert replied(request).error is None and len(seen) == 2
    assert "has no head" in seen[0] and "'nobody'" in seen[1]


@pytest.mark.parametrize("what", ["nonsense", Wait(Handle(0)), None])
def test_what_is_no_pass_cannot_be_started(models: ModelSet, what: Any) -> None:
    seen: list[str] = []

    def loop() -> Any:
        first = yield Start(generate(sampling=SHORT))
        try:
            yield Start(what)
        except PassError as error:
            seen.append(str(error))
        second = yield Start(generate(PROMPT, sampling=SHORT))
        texts = [(yield Wait(first)).text, (yield Wait(second)).text]
        return Decision(Answer("|".join(texts)), Outcome.CLEAN)

    engine = engine_of(models)
    request = submit(engine, loop())
    finish(engine)
    wanted = [ask(engine_of(models), generate(prompt, sampling=SHORT)).text for prompt in (OTHER, PROMPT)]
    assert replied(request).text == "|".join(wanted) and "may yield" in seen[0]


def test_a_handle_is_good_for_one_wait(models: ModelSet) -> None:
    seen: list[str] = []

    def loop() -> Any:
        handle = yield Start(generate(sampling=SHORT))
        yield Wait(handle)
        yield Cancel(handle)
        for other in (handle, Handle(77)):
            try:
                yield Wait(other)
            except PassError as error:
                seen.append(str(error))
        return DONE

    engine = engine_of(models)
    request = submit(engine, loop())
    finish(engine)
    assert replied(request).error is None and replied(request).trace.wasted_tokens == 0
    assert ["did not start" in text for text in seen] == [True, True]


def test_a_started_text_is_not_shown_before_it_is_waited_for(models: ModelSet) -> None:
    def loop() -> Any:
        handle = yield Start(Generate("mllm", OTHER, sampling=SHORT, release="live"))
        yield generate(PROMPT)
        assert request.take() == []
        answer = yield Wait(handle)
        return Decision(answer, Outcome.CLEAN)

    engine = engine_of(models)
    request = submit(engine, loop(), streaming=True)
    finish(engine)
    assert "".join(map(str, request.take())) == replied(request).text != "" and replied(request).error is None


def test_optional_rows_are_free_ones(models: ModelSet) -> None:
    engine = engine_of(models, max_batch_tokens=64, max_sequences=16)
    batches = watch(engine)

    def loop() -> Any:
        handles = []
        for number in range(3):
            handles.append((yield Start(generate(tuple(range(200, 260 + number))))))
        yield generate(PROMPT)
        for handle in handles:
            yield Cancel(handle)
        return DONE

    requests = [submit(engine, loop()) for _ in range(4)]
    finish(engine)
    assert [replied(request).error for request in requests] == [None] * 4
    (free,) = {lane.free_rows for lane in engine.lanes}
    ran = 0
    for works in batches:
        optional = sum(work.rows for work in works if work.sequence.order[1] < 3)
        if optional:
            ran += 1
            assert sum(work.rows for work in works) <= free
    assert ran


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.sampled_from([10, 14, 20]), st.lists(st.sampled_from(["wait", "cancel", "forget"]), min_size=1, max_size=4))
def test_what_is_optional_never_costs_what_is_required_its_pages(
    models: ModelSet, pages: int, ends: list[str]
) -> None:
    engine = engine_of(models, pages, max_sequences=6)
    preempt = engine.scheduler._preempt

    def preempted(sequence: Any) -> None:
        if not sequence.optional:
            running = [item for lane in engine.lanes for item in lane.running]
            assert not any(item.optional for item in running)
        preempt(sequence)

    engine.scheduler._preempt = preempted  # type: ignore[method-assign]
    texts: list[str] = []

    def loop(end: str, number: int) -> Any:
        handle = yield Start(generate(tuple(range(150 + number, 200)), sampling=SHORT))
        first = yield generate(tuple(range(5 + number, 60)), sampling=LONGER)
        texts.append(first.text)
        if end == "wait":
            texts.append((yield Wait(handle)).text)
        elif end == "cancel":
            yield Cancel(handle)
        return DONE

    requests = [submit(engine, loop(end, number)) for number, end in enumerate(ends)]
    finish(engine)
    assert all(replied(request).error is None for request in requests)
    wanted = []
    for number, end in enumerate(ends):
        wanted.append(ask(engine_of(models), generate(tuple(range(5 + number, 60)))).text)
        if end == "wait":
            wanted.append(ask(engine_of(models), generate(tuple(range(150 + number, 200)), sampling=SHORT)).text)
    assert sorted(texts) == sorted(wanted)


def test_an_abort_ends_what_was_started(models: ModelSet) -> None:
    def loop() -> Any:
        yield Start(generate())
        yield generate(PROMPT)
        return DONE

    engine = engine_of(models)
    request = submit(engine, loop())
    for _ in range(8):
        engine.step()
    assert engine.pool.owned_pages
    reply = engine.abort(request.id)
    finish(engine)
    assert [record.error for record in reply.passes] == ["aborted"] * 2
    assert reply.trace.wasted_tokens > 0


# --- the rewrite's prompt, beside the answer ---


def rewritten(models: ModelSet, speculate: bool, words: bool = True, pages: int | None = None) -> Any:
    guard = Guard(
        HarmHead(template="response", threshold=1.0, chunk=8), Detoxify(), max_rounds=1, speculate=speculate
    )
    engine = engine_of(models, pages)
    text = "so it goes, on and on; what is it that we do? " * 5
    tokens = engine.models["mllm"].codec.encode((Untrusted(text),), add_special_tokens=False)
    force(engine, {0: tokens} if words else {})
    request = engine.submit(Chat.single("Tell me"), guard=guard, sampling=LONGER)
    finish(engine)
    return replied(request)


@pytest.mark.parametrize("pages", [None, 40])
@pytest.mark.parametrize("words", [True, False])
def test_a_rewrites_prompt_is_computed_while_the_answer_is_decoded(
    models: ModelSet, words: bool, pages: int | None
) -> None:
    ahead, plain = (rewritten(models, speculate, words, pages) for speculate in (True, False))
    records = [next(item for item in reply.passes if item.label == "rewrite") for reply in (ahead, plain)]
    assert records[0].text == records[1].text and records[0].token_ids == records[1].token_ids
    assert records[0].cached_tokens > 20 and records[1].cached_tokens == 0
    assert ahead.trace.wasted_tokens == plain.trace.wasted_tokens == 0


def test_a_prompt_computed_for_nothing_is_counted(models: ModelSet) -> None:
    """A beginning is harmful to the threshold of beginnings; the whole is not."""
    guard = Guard(
        HarmHead(template="response", threshold=0.0, prefix_threshold=1.0, chunk=8), Detoxify(), speculate=True
    )
    engine = engine_of(models)
    reply = engine.chat(["Tell me"], guard=guard, sampling=LONGER)[0]
    finish(engine)
    assert reply.outcome is Outcome.CLEAN and reply.trace.wasted_tokens > 20


def test_a_prompt_that_cannot_be_computed_ahead_harms_nothing(
    models: ModelSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = rewritten(models, False).text
    calls = iter(range(100))
    real = Detoxify._prompt

    def failing(self: Detoxify, chat: Chat, text: str) -> Any:
        if next(calls) in (0, 3):
            raise RuntimeError("odd")
        return real(self, chat, text)

    monkeypatch.setattr(Detoxify, "_prompt", failing)
    assert rewritten(models, True).text == wanted
