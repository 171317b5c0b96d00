"""A request under way: its loop, its passes, and what of its text may be shown. It decides nothing."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from .output import OutputText
from .outside import OutsideText
from .passes import Answer, Loop, Pass, Score
from .request import PassRecord, Replaced, Reply, Trace, Usage
from .sampling import Sampled, SamplingParams
from .screening import InLane, Screening
from .sequence import Sequence


@dataclass(eq=False)
class Run:
    """A pass under way. Its answer is `ready` when it is decoded and only its screen has not come to the end."""

    number: int
    step: Pass
    record: PassRecord
    sequence: Sequence
    output: OutputText | None = None
    screening: Screening | None = None
    ahead: Sequence | None = None  # a prompt that will follow, as far as it is known
    ahead_from: int = 0  # characters of the answer from which on it is worth encoding that prompt again
    ready: Answer | None = None
    started: bool = False  # before it was certain to be needed, and not waited for yet

    @property
    def sequences(self) -> list[Sequence]:
        """All that may be in the scheduler for it."""
        own = [self.sequence]
        if self.screening is not None and isinstance(self.screening.reader, InLane):
            own.append(self.screening.reader.sequence)
        return own if self.ahead is None else [*own, self.ahead]


@dataclass(eq=False)
class OutsideRun:
    """A text that a detector outside the engine scores."""

    number: int
    step: Score
    record: PassRecord
    text: OutsideText
    threshold: float
    started: bool = False


@dataclass(eq=False)
class Request:
    """A request under way, and its handle for the caller: `reply` is None until it is finished."""

    id: int
    loop: Loop
    sampling: SamplingParams
    salt: str | None
    streaming: bool
    guarded: bool
    seed: int = 0
    submitted: float = field(default_factory=perf_counter)
    runs: dict[int, Run | OutsideRun] = field(default_factory=dict)
    results: dict[int, Any] = field(default_factory=dict)  # of started passes nobody waited for yet; may be errors
    waiting_for: int = -1  # the pass whose result the loop wants
    passes: list[PassRecord] = field(default_factory=list)
    generations: int = 0
    usage: dict[str, Usage] = field(default_factory=dict)
    sampled: dict[tuple[int, ...], list[Sampled]] = field(default_factory=dict)
    overhead: float = 0.0
    exposed: float = 0.0  # seconds that answers waited for their screens
    wasted: int = 0  # tokens
    ahead_model: str | None = None  # whose prompt was begun beside the last answer, and how much of it
    ahead_tokens: int = 0
    unscreened: int = 0
    reply: Reply | None = None
    _ready: list[str | Replaced] = field(default_factory=list)
    _shown: str = ""

    def __post_init__(self) -> None:
        self.seed = secrets.randbits(63) if self.sampling.seed is None else self.sampling.seed

    @property
    def elapsed(self) -> float:
        return perf_counter() - self.submitted

    def take(self) -> list[str | Replaced]:
        """What may be shown and was not taken yet, where streaming was asked for."""
        ready = self._ready[:]
        self._ready.clear()
        return ready

    def show(self, text: str, cleared: int | None = None) -> None:
        """Make ready what of the text so far was not shown yet. cleared: how many of its characters a verdict covers;
        None: nothing has to."""
        new = text[len(self._shown) :]
        if not self.streaming or not new:
            return
        if cleared is not None:
            self.unscreened += max(0, min(len(text) - cleared, len(new)))
        self._shown = text
        self._ready.append(new)

    def conclude(self, text: str, reason: str) -> None:
        """Make the rest of the final text ready, or all of it in place of what was shown if that was another."""
        if text.startswith(self._shown):
            self.show(text)
        elif self.guarded:
            self._ready.append(Replaced(text, self._shown, reason))

    def trace(self) -> Trace:
        total = self.elapsed
        trace = Trace(total=total, queued=total, answer=total, overhead=self.overhead)
        trace.exposed_screening, trace.wasted_tokens = self.exposed, self.wasted
        trace.unscreened_characters = self.unscreened
        if self.passes:
            first = self.passes[0]
            trace.answer = total if first.finished is None else first.finished
            trace.queued = total if first.started is None else first.started
            trace.first_token = first.first_token
            trace.guard = total - trace.answer
        return trace
