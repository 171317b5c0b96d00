"""Drives a real engine with prepared requests, in a closed or an open loop, and notes when what was there.

Everything happens in one thread, as in a server's: requests are submitted between two steps. Latencies count from
the moment at which a request was due, not from when the engine had time for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from time import perf_counter, sleep
from typing import Any, NamedTuple

from ..engine.engine import Engine, GuardLike
from ..engine.kv_pages import PagePool
from ..engine.passes import ReleaseMode
from ..engine.request import Outcome
from ..engine.running import Request, Run
from ..engine.sampling import SamplingParams
from ..engine.sequence import Sequence as Tokens
from ..engine.trace import Recorder
from .report import WrongPath
from .step_costs import StepCost, step_costs
from .traffic import Item


class Ask(NamedTuple):
    """A request, ready to be submitted, and how it is meant to end."""

    item: Item
    messages: list[dict[str, Any]]
    guard: GuardLike | None
    outcome: Outcome


class Served(NamedTuple):
    """One request, in seconds from when it was due. arrival: that moment, from the run's beginning. waited: until it
    was submitted; queued: until the first of its tokens was computed; first_token: until the answer had one; ttft:
    until there was text that might be shown; e2e: until the reply. itl: mean time between two tokens of the answer.
    guard: from the answer's last token to the reply. prompt, cached: tokens of all its passes' prompts, and those of
    them that were found in pages."""

    arrival: float
    waited: float
    queued: float
    first_token: float
    ttft: float
    itl: float
    e2e: float
    guard: float
    answer_tokens: int
    prompt: int
    cached: int
    harmful: bool


@dataclass
class Driven:
    """A run. seconds: of the window that counts, in which `requests` ended and `tokens` of answers were decoded.
    gaps: seconds between two tokens of an answer. under_way: requests that the engine had, in the mean. inside,
    outside: seconds in the engine, and beside it while it had work: what measuring costs. pages: owned at
    most; pool: the part of the pool's bytes that these were."""

    served: list[Served] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    seconds: float = 0.0
    requests: int = 0
    tokens: int = 0
    steps: int = 0
    computed: int = 0
    under_way: float = 0.0
    inside: float = 0.0
    outside: float = 0.0
    pages: int = 0
    pool: float = 0.0
    evictions: int = 0
    preemptions: int = 0
    costs: list[StepCost] = field(default_factory=list)


@dataclass(eq=False)
class _Tracked:
    """A request under way. due: `perf_counter` of its arrival. counts: it is one of those that are measured."""

    ask: Ask
    request: Request
    answer: Tokens
    due: float
    submitted: float
    counts: bool
    tokens: int = 0
    last: float = 0.0
    first: float = 0.0
    shown: float | None = None


class Meter:
    """Submits, steps and notes. Times are seconds of `perf_counter`."""

    def __init__(self, engine: Engine, release: ReleaseMode = "verdict") -> None:
        engine.pool.clear_cache()
        engine.recorder = self._recorder = Recorder()
        self.engine, self.release = engine, release
        self.under_way: list[_Tracked] = []
        self.ended = 0  # of those that count
        self.driven = Driven()
        self._began = self._opened = perf_counter()
        self._counted_from = engine.steps, engine.pool.evictions, engine.scheduler.preemptions
        self._integral = 0.0  # of the requests under way, over time
        self._out_since: float | None = None  # since when the engine waits for us

    @property
    def now(self) -> float:
        """Seconds from the run's beginning."""
        return perf_counter() - self._began

    def open_window(self) -> None:
        """What ends or is decoded from now on counts for the rates."""
        self.driven.requests = self.driven.tokens = 0
        self._integral, self._opened = 0.0, perf_counter()

    def close_window(self) -> None:
        driven = self.driven
        driven.seconds = perf_counter() - self._opened
        driven.under_way = self._integral / driven.seconds if driven.seconds > 0 else 0.0

    def submit(self, ask: Ask, due: float | None = None, counts: bool = True) -> None:
        """due: seconds from the run's beginning; None: now."""
        sampling = SamplingParams(temperature=0.0, max_tokens=ask.item.answer_tokens, ignore_eos=True)
        began = perf_counter()
        self._leave(began)
        request = self.engine.submit(
            ask.messages, guard=ask.guard, sampling=sampling, streaming=True, release=self.release
        )
        ended = perf_counter()
        self.driven.inside += ended - began
        self._out_since = ended
        first = request.runs[0]
        assert isinstance(first, Run)
        tracked = _Tracked(ask, request, first.sequence, began if due is None else self._began + due, began, counts)
        self.under_way.append(tracked)

    def step(self) -> None:
        """One step of the engine, which must have work."""
        driven = self.driven
        began = perf_counter()
        self._leave(began)
        self.engine.step()
        now = perf_counter()
        driven.inside += now - began
        self._integral += len(self.under_way) * (now - began)
        self._out_since = now
        pages, pool = _owned(self.engine.pool)
        driven.pages, driven.pool = max(driven.pages, pages), max(driven.pool, pool)
        done = False
        for tracked in self.under_way:
            done |= self._look(tracked, now)
        if done:
            self.under_way = [tracked for tracked in self.under_way if tracked.request.reply is None]

    def idle(self, until: float) -> None:
        """Wait until so many seconds from the beginning; the engine has nothing to do."""
        self._leave(perf_counter())
        self._out_since = None
        left = until - self.now
        if left > 0:
            sleep(left)

    def finish(self) -> Driven:
        """End what is still under way, and sum up."""
        self._leave(perf_counter())
        for tracked in self.under_way:
            self.engine.abort(tracked.request.id)
        driven, engine = self.driven, self.engine
        steps, evictions, preemptions = self._counted_from
        driven.steps = engine.steps - steps
        driven.evictions, driven.preemptions = (
            engine.pool.evictions - evictions,
            engine.scheduler.preemptions - preemptions,
        )
        driven.computed = sum(work.tokens for step in self._recorder.steps for work in step.works)
        driven.costs = step_costs(self._recorder.steps)
        engine.recorder = None
        return driven

    def _leave(self, now: float) -> None:
        if self._out_since is not None:
            self.driven.outside += now - self._out_since

    def _look(self, tracked: _Tracked, now: float) -> bool:
        """Note what a step brought for a request; whether that was its end."""
        request, answer = tracked.request, tracked.answer
        tokens = min(answer.num_tokens - answer.prompt_tokens, tracked.ask.item.answer_tokens)
        if tokens > tracked.tokens:
            new = tokens - tracked.tokens
            if tracked.tokens:
                # tokens that came in one step, drafts that came true, count as if evenly spread
                self.driven.gaps += [(now - tracked.last) / new] * new if tracked.counts else ()
            else:
                tracked.first = now
            tracked.tokens, tracked.last = tokens, now
            self.driven.tokens += new
        if tracked.shown is None and any(piece if isinstance(piece, str) else piece.text for piece in request.take()):
            tracked.shown = now
        if request.reply is None:
            return False
        self._end(tracked, now)
        return True

    def _end(self, tracked: _Tracked, now: float) -> None:
        reply, item, due = tracked.request.reply, tracked.ask.item, tracked.due
        assert reply is not None
        if reply.outcome is not tracked.ask.outcome or tracked.tokens != item.answer_tokens:
            raise WrongPath(
                f"a request ended {reply.outcome} ({reply.error}) after {tracked.tokens} tokens; meant was "
                f"{tracked.ask.outcome} after {item.answer_tokens}"
            )
        self.driven.requests += 1
        if not tracked.counts:
            return
        self.ended += 1
        submitted = tracked.submitted - due
        shown = now if tracked.shown is None else tracked.shown
        self.driven.served.append(
            Served(
                arrival=due - self._began,
                waited=submitted,
                queued=submitted + reply.trace.queued,
                first_token=tracked.first - due,
                ttft=shown - due,
                itl=(tracked.last - tracked.first) / max(1, tracked.tokens - 1),
                e2e=now - due,
                guard=now - tracked.last,
                answer_tokens=tracked.tokens,
                prompt=sum(record.prompt_tokens for record in reply.passes),
                cached=sum(record.cached_tokens for record in reply.passes),
                harmful=item.harmful,
            )
        )


def _owned(pool: PagePool) -> tuple[int, float]:
    """Pages that are owned, and their part of the pool's bytes."""
    owned = [(slab.owned, slab.layout.page_bytes) for slab in pool.slabs if slab is not None]
    return sum(pages for pages, _ in owned), sum(pages * size for pages, size in owned) / pool.arena.nbytes


def closed_loop(engine: Engine, asks: Iterator[Ask], at_once: int, measured: int, release: ReleaseMode) -> Driven:
    """`at_once` requests are under way all the time, until `measured` of them have ended.

    Those that begin are shortened to different lengths, to what requests that came evenly would have left: the load
    is steady as soon as each of them has its first token. Then the window opens, and who comes next counts, but not
    they. Whoever follows the measured ones keeps the load up until these have ended, and is then aborted.
    """
    meter = Meter(engine, release)
    for number in range(at_once):
        ask = next(asks)
        tokens = max(1, ask.item.answer_tokens * (number + 1) // at_once)
        meter.submit(ask._replace(item=ask.item._replace(answer_tokens=tokens)), counts=False)
    starters = list(meter.under_way)
    left, opened = measured, False
    while meter.ended < measured:
        meter.step()
        if not opened and all(tracked.tokens for tracked in starters):
            opened = True
            meter.open_window()
        while len(meter.under_way) < at_once:
            counts = opened and left > 0
            left -= counts
            meter.submit(next(asks), counts=counts)
    meter.close_window()
    return meter.finish()


def open_loop(engine: Engine, asks: Iterable[Ask], measured: int, release: ReleaseMode, *, ramp: int = 0) -> Driven:
    """Every request is submitted when it is due, whatever the engine is busy with. asks: in order of arrival, ramp +
    measured at least.

    The first `ramp` of them come to an engine that is not yet as full as it will be, and do not count. The window
    opens with the next one; whoever follows the measured ones keeps the load up until these have ended, and is then
    aborted.
    """
    meter = Meter(engine, release)
    coming = iter(asks)
    following = next(coming, None)
    number = 0
    while meter.ended < measured:
        now = (
            meter.now
        )  # not later ones: where submitting takes longer than they come apart, nothing else would happen
        while following is not None and following.item.arrival <= now:
            if number == ramp:
                meter.open_window()
            meter.submit(following, following.item.arrival, counts=ramp <= number < ramp + measured)
            following = next(coming, None)
            number += 1
        if meter.under_way:
            meter.step()
        else:
            assert following is not None
            meter.idle(following.item.arrival)
    meter.close_window()
    return meter.finish()
