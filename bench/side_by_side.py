"""Several ways to answer the same questions, measured step by step in turn: what disturbs the machine for a while
disturbs all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, Protocol, TypeVar

from ..engine.engine import Engine, GuardLike
from ..engine.request import Reply
from ..engine.running import Request
from ..engine.sampling import SamplingParams
from ..engine.trace import Recorder
from .paired import Steps, take_turns
from .workload import Asked


class Run(NamedTuple):
    """One measured run: seconds and the work that was done in them.

    seconds: of its own steps only, preparing the questions included. before: of them, those of work that the
    unguarded run has as well, whatever the guard. exposed: those after the last step of the answer's decoding. steps:
    seconds of each step that did nothing but decode answers, in order. screened: tokens that a screen read after that
    last step. accepted: drafts that came true. wasted: seconds of work ahead of a verdict that was thrown away, by
    its tokens' share of what a step took longer than one that only decodes; wasted_tokens: of that work.
    """

    seconds: float
    passes: tuple[str, ...]
    prompt_tokens: int
    new_tokens: int
    before: float = 0.0
    exposed: float = 0.0
    steps: tuple[float, ...] = ()
    screened: int = 0
    accepted: int = 0
    wasted: float = 0.0
    wasted_tokens: int = 0

    @classmethod
    def of(cls, values: Sequence[Any]) -> Run:
        """A run from its values, which may have been JSON meanwhile."""
        run = cls(*values)
        return run._replace(passes=tuple(run.passes), steps=tuple(run.steps))

    @property
    def steady(self) -> float:
        """Seconds that a guard can change, the steps that only decode being counted by their median: one of them may
        take a hundred times as long when something else wants the machine."""
        typical = len(self.steps) * median(self.steps) if self.steps else 0.0
        return self.seconds - self.before - sum(self.steps) + typical


class UnderWay(Steps, Protocol):
    """A run under way. run: once it is done."""

    @property
    def run(self) -> Run: ...


class Variant(NamedTuple):
    """A way to answer. baseline: the unguarded variant it is compared with. begin: starts on some questions, on the
    given engine where it is this project's own."""

    name: str
    baseline: str
    path: str
    begin: Callable[[Engine, list[Asked]], UnderWay]


@dataclass
class Whole:
    """A run that can only be made in one step."""

    make: Callable[[], Run]
    made: Run | None = None

    @property
    def done(self) -> bool:
        return self.made is not None

    def step(self) -> None:
        self.made = self.make()

    @property
    def run(self) -> Run:
        assert self.made is not None
        return self.made


class _Early(NamedTuple):
    """A step with work ahead of a verdict: so many tokens, which are a share of all that are not the answer's."""

    seconds: float
    tokens: int
    share: float
    decoding: bool


@dataclass
class Answering:
    """An engine that answers questions, from an empty cache. check: raises where a reply, by the number of its
    question, is not what was meant."""

    engine: Engine
    requests: list[Request]
    check: Callable[[int, Reply], None]
    seconds: float
    before: float = 0.0
    exposed: float = 0.0
    screened: int = 0
    steps: list[float] = field(default_factory=list)
    early: list[_Early] = field(default_factory=list)

    @classmethod
    def begin(
        cls,
        engine: Engine,
        chats: Sequence[object],
        guards: Sequence[GuardLike | None],
        sampling: SamplingParams | None,
        check: Callable[[int, Reply], None],
    ) -> Answering:
        """guards: one for each chat."""
        engine.pool.clear_cache()
        engine.recorder = Recorder()
        began = perf_counter()
        requests = [
            engine.submit(chat, guard=guard, sampling=sampling) for chat, guard in zip(chats, guards, strict=True)
        ]
        seconds = perf_counter() - began
        return cls(engine, requests, check, seconds, before=seconds)

    @property
    def done(self) -> bool:
        return all(request.reply is not None for request in self.requests)

    def step(self) -> None:
        recorder = self.engine.recorder
        assert recorder is not None
        known = len(recorder.steps)
        began = perf_counter()
        self.engine.step()
        ended = perf_counter()
        took = ended - began
        self.seconds += took
        self.exposed += took
        done = set()
        for batch in recorder.steps[known:]:
            roles = {(work.label, work.role) for work in batch.works}
            done |= roles
            if roles & {("answer", "decode"), ("answer", "prefill")}:
                self.exposed, self.screened = ended - batch.ended, 0
            else:
                self.screened += sum(work.tokens for work in batch.works if work.label == "screen")
        if done == {("answer", "prefill")}:
            self.before += took
        elif done == {("answer", "decode")}:
            self.steps.append(took)
        works = [work for batch in recorder.steps[known:] for work in batch.works]
        if ahead := sum(work.tokens for work in works if work.role == "speculative"):
            guard = sum(work.tokens for work in works if work.label != "answer" or work.role == "speculative")
            self.early.append(_Early(took, ahead, ahead / guard, ("answer", "decode") in done))

    @property
    def run(self) -> Run:
        replies = [request.reply for request in self.requests if request.reply is not None]
        for number, reply in enumerate(replies):
            self.check(number, reply)
        records = [record for reply in replies for record in reply.passes]
        return Run(
            self.seconds,
            tuple(record.label for record in replies[0].passes),
            sum(record.prompt_tokens for record in records),
            sum(len(record.token_ids) for record in records),
            self.before,
            self.exposed,
            tuple(self.steps),
            self.screened,
            sum(record.accepted for record in records),
            *self._wasted(sum(reply.trace.wasted_tokens for reply in replies)),
        )

    def _wasted(self, tokens: int) -> tuple[float, int]:
        """(seconds, tokens) of the work ahead of a verdict that came to nothing."""
        ahead = sum(step.tokens for step in self.early)
        if not tokens or not ahead:
            return 0.0, tokens
        typical = median(self.steps) if self.steps else 0.0
        longer = sum(max(0.0, step.seconds - typical * step.decoding) * step.share for step in self.early)
        return longer * min(1.0, tokens / ahead), tokens


Key = TypeVar("Key")


def together(begun: dict[Key, UnderWay], random: Random) -> dict[Key, Run]:
    """Step all of them in turn until all are done."""
    take_turns(begun, random)
    return {key: one.run for key, one in begun.items()}
