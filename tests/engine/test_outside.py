"""Detectors outside the engine: their scores arrive whenever they like, and what does not arrive is a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path
from queue import Queue
from threading import Thread
from time import perf_counter, sleep
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stockade import Guard
from stockade.engine.engine import Engine
from stockade.engine.errors import BadInput, InvalidGuard, PassError, PassTimeout
from stockade.engine.guards import HarmHead, Refuse
from stockade.engine.models.heads import HeadSpec
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.outside import OutsideDetector
from stockade.engine.passes import Cancel, Decision, Generate, Score, Screen, Start, Wait
from stockade.engine.request import Outcome
from stockade.engine.sampling import SamplingParams
from stockade.engine.text import Codec, Segment, Trusted, Untrusted
from tests.engine.screened import ask, asking, engine_of, finish, force, replied, submit
from tests.engine.test_growing import CODECS, PROSE

PROMPT = tuple(range(5, 25))
QUESTION: tuple[Segment, ...] = (Trusted("Question: "), Untrusted("How? "), Trusted("\n\nAnswer: "))
LONG = SamplingParams(max_tokens=150, ignore_eos=True)


def score_of(ids: Sequence[int], pool_from: int) -> float:
    """Of every token and its place: whatever is lost or doubled on the way shows."""
    mean = sum((place + 1) * id for place, id in enumerate(ids[pool_from:])) % 997
    return 0.25 + 0.5 * (mean + len(ids)) / 1300


@dataclass
class Counting:
    """A detector on a thread of its own, with a score that needs no model. act: what it does before each score."""

    codec: Codec
    act: Callable[[], None] = lambda: None
    incremental: bool = True
    name: str = "counting"
    spec: HeadSpec = field(default_factory=lambda: HeadSpec(1, "mean", threshold=0.5))
    context: int = 400
    vocab_size: int = 1400
    opened: list[Counted] = field(default_factory=list)
    queue: Queue[Counted | None] = field(default_factory=Queue)

    def __post_init__(self) -> None:
        self.thread = Thread(target=self._work, daemon=True)
        self.thread.start()

    def open(self) -> Counted:
        self.opened.append(Counted(self))
        return self.opened[-1]

    def close(self) -> None:
        self.queue.put(None)
        self.thread.join()

    def _work(self) -> None:
        while (reading := self.queue.get()) is not None:
            ids, pool_from = reading.ids, reading.pool_from
            try:
                self.act()
                found: float | PassError = score_of(ids, pool_from)
            except PassError as error:
                found = error
            reading.found = ids, found
            if reading.on_done is not None:
                reading.on_done()


class Counted:
    def __init__(self, detector: Counting) -> None:
        self.on_done: Callable[[], None] | None = None
        self.detector, self.canceled, self.feeds = detector, False, 0
        self.ids: list[int] = []
        self.pool_from = 0
        self.found: tuple[list[int], float | PassError] | None = None

    def feed(self, keep: int, ids: Sequence[int], pool_from: int) -> None:
        assert self.ids[:keep] == list(ids[:keep]) and not self.canceled
        self.ids, self.pool_from = list(ids), pool_from
        self.feeds += 1
        self.detector.queue.put(self)

    def poll(self) -> float | None:
        if self.found is None or self.found[0] is not self.ids:  # of an earlier feed
            return None
        score = self.found[1]
        if isinstance(score, PassError):
            raise score
        return score

    def cancel(self) -> None:
        self.canceled = True


@pytest.fixture(scope="module")
def mllm(checkpoint: Callable[[str], Path]) -> ModelSet:
    return load_models(checkpoint("llama-gqa"), dtype=torch.float32)


@pytest.fixture
def outside(mllm: ModelSet) -> Iterator[Callable[..., tuple[Engine, Counting]]]:
    made = []

    def make(reader: str = "byte-level", **options: Any) -> tuple[Engine, Counting]:
        detector = Counting(CODECS[reader], **options)
        made.append(detector)
        return engine_of(replace(mllm, outside={"detector": detector})), detector

    yield make
    for detector in made:
        detector.close()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    reader=st.sampled_from(["byte-level", "llama", "grouping"]),
    chunk=st.sampled_from([1, 5, 16, None]),
    before=st.sampled_from([(), QUESTION]),
    many=st.integers(1, 4),
    pause=st.sampled_from([0.0, 0.002]),
)
def test_a_screened_score_is_that_of_the_whole_text(
    mllm: ModelSet, reader: str, chunk: int | None, before: tuple[Segment, ...], many: int, pause: float
) -> None:
    detector = Counting(CODECS[reader], lambda: sleep(pause))
    engine = engine_of(replace(mllm, outside={"detector": detector}))
    ids = engine.models["mllm"].codec.encode((Untrusted(PROSE),), add_special_tokens=False)
    force(engine, dict.fromkeys(range(many), ids))
    found: list[Any] = []
    screen = Screen("detector", before, chunk=chunk)
    requests = [
        submit(engine, asking(Generate("mllm", PROMPT, screen=screen), found), replace(LONG, max_tokens=40 + number))
        for number in range(many)
    ]
    finish(engine)
    assert [replied(request).error for request in requests] == [None] * many
    assert all(reading.canceled for reading in detector.opened) and len(detector.opened) == many
    for answer in found:
        whole = ask(engine, Score("detector", (*before, Untrusted(answer.text)), len(before)))
        assert answer.screened.error is None
        assert (answer.screened.score, answer.screened.threshold) == whole
    detector.close()


def test_a_text_is_read_in_chunks_while_the_answer_is_decoded(outside: Any) -> None:
    engine, detector = outside()
    submit(engine, asking(Generate("mllm", PROMPT, screen=Screen("detector")), []), LONG)
    finish(engine)
    assert detector.opened[0].feeds >= 3


@pytest.mark.parametrize("incremental", [True, False])
@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_guard_decides_by_it(outside: Any, incremental: bool, threshold: float) -> None:
    engine, detector = outside(incremental=incremental)
    guard = Guard(HarmHead(threshold=threshold), Refuse())
    (reply,) = engine.chat(["Tell me"], guard=guard, sampling=LONG)
    assert reply.outcome is (Outcome.CLEAN if threshold == 0.0 else Outcome.REFUSED)
    assert [record.label for record in reply.passes] == ["answer", "screen" if incremental else "score"]
    answer, read = reply.passes
    whole = detector.codec.encode((Untrusted(answer.text),), add_special_tokens=True)
    assert reply.verdicts[0].score == score_of(whole, 0)
    assert read.model == "detector" and read.finished is not None and read.error is None
    assert read.prompt_tokens == len(whole) == reply.usage["detector"].prompt <= read.computed_tokens
    finish(engine)


@pytest.mark.parametrize("incremental", [True, False])
def test_one_that_fails_refuses(outside: Any, incremental: bool) -> None:
    def fail() -> None:
        raise PassError("out of paper")

    engine, detector = outside(act=fail, incremental=incremental)
    (reply,) = engine.chat(["Tell me"], guard=Guard(HarmHead(), Refuse()), sampling=LONG)
    assert reply.outcome is Outcome.REFUSED and reply.verdicts[0].error == "out of paper"
    finish(engine)
    detector.spec = replace(detector.spec, threshold=nan)
    detector.act = lambda: None
    (reply,) = engine.chat(["Tell me"], guard=Guard(HarmHead(), Refuse()), sampling=LONG)
    assert reply.outcome is Outcome.REFUSED


@pytest.mark.parametrize("incremental", [True, False])
def test_one_that_hangs_is_given_up_in_time(outside: Any, incremental: bool) -> None:
    engine, _ = outside(act=lambda: sleep(1.5), incremental=incremental)
    began = perf_counter()
    guard = Guard(HarmHead(timeout=0.2), Refuse())
    (reply,) = engine.chat(["Tell me"], guard=guard, sampling=replace(LONG, max_tokens=8))
    assert perf_counter() - began < 1.2
    assert reply.outcome is Outcome.REFUSED and reply.verdicts[0].error == "timeout"
    finish(engine)


def test_an_engine_that_waits_does_not_spin(outside: Any) -> None:
    engine, _ = outside(act=lambda: sleep(0.3))
    engine.chat(["Tell me"], guard=Guard(HarmHead(), Refuse()), sampling=replace(LONG, max_tokens=4))
    assert engine.steps < 4 + 100


def test_one_that_cannot_be_opened_refuses(outside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, detector = outside()

    def closed() -> Any:
        raise BadInput("it was closed")

    monkeypatch.setattr(detector, "open", closed)
    (reply,) = engine.chat(["Tell me"], guard=Guard(HarmHead(), Refuse()), sampling=LONG)
    assert reply.outcome is Outcome.REFUSED and reply.verdicts[0].error == "it was closed"
    finish(engine)


@pytest.mark.parametrize("end", ["wait", "cancel", "forget"])
def test_a_score_can_be_started(outside: Any, end: str) -> None:
    engine, detector = outside(act=lambda: sleep(0.05))
    found = []

    def loop() -> Any:
        handle = yield Start(Score("detector", (Untrusted("some text"),), timeout=0.5))
        answer = yield Generate("mllm", PROMPT)
        if end == "wait":
            found.append((yield Wait(handle)))
        elif end == "cancel":
            yield Cancel(handle)
        return Decision(answer, Outcome.CLEAN)

    request = submit(engine, loop(), replace(LONG, max_tokens=6))
    finish(engine)
    assert replied(request).error is None and detector.opened[0].canceled
    assert [item.score for item in found] == ([score_of(detector.opened[0].ids, 0)] if end == "wait" else [])


def test_a_score_that_is_late_times_out(outside: Any) -> None:
    engine, detector = outside(act=lambda: sleep(0.4))
    with pytest.raises(PassTimeout, match="score pass took too long"):
        ask(engine, Score("detector", (Untrusted("some text"),), timeout=0.05))
    assert detector.opened[0].canceled


def test_an_abort_ends_it(outside: Any) -> None:
    engine, detector = outside(act=lambda: sleep(0.2))
    request = engine.submit("Tell me", guard=Guard(HarmHead(), Refuse()), sampling=LONG)
    while not detector.opened:
        engine.step()
    engine.abort(request.id)
    assert detector.opened[0].canceled
    finish(engine)


def test_closing_an_engine_closes_it(outside: Any) -> None:
    engine, detector = outside(act=lambda: sleep(0.05))
    request = engine.submit("Tell me", guard=Guard(HarmHead(), Refuse()), sampling=LONG)
    for _ in range(60):
        engine.step()
    engine.close()
    assert replied(request).error == "aborted" and not detector.thread.is_alive()
    finish(engine)


def test_what_it_cannot_do_is_refused(outside: Any) -> None:
    engine, _ = outside(incremental=False)
    assert isinstance(engine.outside["detector"], OutsideDetector)
    with pytest.raises(InvalidGuard, match="read along"):
        ask(engine, Generate("mllm", PROMPT, screen=Screen("detector")), sampling=LONG)
    with pytest.raises(InvalidGuard, match="scores texts, and does nothing else"):
        ask(engine, Generate("detector", PROMPT))
    with pytest.raises(InvalidGuard, match="window"):
        engine.submit("Tell me", guard=Guard(HarmHead(), Refuse()), streaming=True, release="window")
    with pytest.raises(InvalidGuard, match="stop_below needs"):
        engine.submit("Tell me", guard=Guard(HarmHead(stop_below=0.1), Refuse()))
    with pytest.raises(BadInput, match="takes 400"):
        ask(engine, Score("detector", (Untrusted("many words " * 400),)))
    with pytest.raises(BadInput, match="empty prompt"):
        ask(engine, Score("detector", ()))
    engine, _ = outside()
    text = "".join(
        str(piece)
        for piece in engine.stream(
            "Tell me", guard=Guard(HarmHead(threshold=0.0), Refuse()), sampling=LONG, release="window"
        )
    )
    assert text and engine.driver.unscreened_characters == 0
