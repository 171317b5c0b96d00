"""What happened when: the steps that ran and the replies they ran for, where each reply's time went, and all of it as
a Chrome trace. It measures nothing; the engine tells it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

from .request import Reply
from .scheduler import Work
from .sequence import Sequence

OWN_LABELS = ("judge", "caption", "eyes_closed", "rewrite")  # passes whose time counts under their own name
SCREENING = ("screen", "score")
# Colors of the trace viewer's own palette.
COLORS = {
    "vision": "rail_load",
    "prefill": "thread_state_runnable",
    "decode": "thread_state_running",
    "screening_hidden": "yellow",
    "screening_exposed": "thread_state_uninterruptible",
    "judge": "rail_animation",
    "caption": "olive",
    "eyes_closed": "terrible",
    "rewrite": "bad",
    "gaps": "grey",
}

Decoding: TypeAlias = "dict[int, list[tuple[float, float]]]"
"""By request: from when to when (`time.perf_counter`) its answers were being decoded."""


@dataclass(frozen=True)
class StepWork:
    """A pass's part in a step. number: of the pass in its request. label: the pass's, as in `PassRecord`. role: what
    the tokens were computed for: decode, prefill, screen, score, judge, draft, speculative."""

    request: int
    number: int
    label: str
    role: str
    model: str
    tokens: int


@dataclass(frozen=True)
class StepRecord:
    """One lane's batch. began, ended: seconds of `time.perf_counter`. vision: how much of it the vision tower took,
    which works before the layers do."""

    lane: str
    began: float
    ended: float
    vision: float
    works: tuple[StepWork, ...]

    @property
    def layers_began(self) -> float:
        return min(self.began + max(self.vision, 0.0), self.ended)


class Slice(NamedTuple):
    """A stretch of a step that is drawn in one color. kind: a field of `Breakdown`."""

    kind: str
    began: float
    ended: float


@dataclass
class Breakdown:
    """Seconds of one reply, or of many together. They add up to `total`, the time from submission to reply.

    queue: batches ran in which the reply had no part. gaps: no batch ran at all (tokenizers, schedulers, samplers,
    the guard's loop). screening_hidden: the detector read along while an answer was still being decoded;
    screening_exposed: it read when the answer had ended. caption, eyes_closed, rewrite: the remedies' passes.
    """

    queue: float = 0.0
    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    screening_hidden: float = 0.0
    screening_exposed: float = 0.0
    judge: float = 0.0
    caption: float = 0.0
    eyes_closed: float = 0.0
    rewrite: float = 0.0
    gaps: float = 0.0

    @property
    def remedy(self) -> float:
        return self.caption + self.eyes_closed + self.rewrite

    @property
    def total(self) -> float:
        return sum(self.to_dict().values())

    def to_dict(self) -> dict[str, float]:
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def __add__(self, other: Breakdown) -> Breakdown:
        theirs = other.to_dict()
        return Breakdown(**{name: seconds + theirs[name] for name, seconds in self.to_dict().items()})


@dataclass
class Recorder:
    """Keeps what the engine tells it. submitted: `time.perf_counter` of each reply's submission, by its id."""

    steps: list[StepRecord] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    submitted: dict[int, float] = field(default_factory=dict)

    def record(self, step: StepRecord) -> None:
        self.steps.append(step)

    def finish(self, reply: Reply, submitted: float) -> None:
        """A request ended. submitted: `time.perf_counter` of its submission."""
        self.replies.append(reply)
        self.submitted[reply.id] = submitted

    @property
    def origin(self) -> float:
        """When the first thing happened; 0 where nothing did."""
        return min([*self.submitted.values(), *(step.began for step in self.steps)], default=0.0)

    def breakdown(self, reply: Reply | None = None) -> Breakdown:
        """Where a reply's time went; None sums all replies.

        A batch counts in full for every reply that has a part in it, for each waits until it ends. Its vision comes
        first; the rest is split between the reply's own passes in it by their shares of its tokens. (In a step that
        is bound by reading weights this gives a guard's rows more than they cost.) Batches of several lanes at the
        same time share it equally.
        """
        if reply is None:
            return sum((self.breakdown(one) for one in self.replies), Breakdown())
        begin = self.submitted[reply.id]
        seconds: dict[str, float] = defaultdict(float)
        for length, own, running in _stretches(list(self._parts(reply)), begin, begin + reply.trace.total):
            for shares in own:
                for kind, share in shares.items():
                    seconds[kind] += length * share / len(own)
            if not own:
                seconds["queue" if running else "gaps"] += length
        return Breakdown(**seconds)

    def slices(self) -> Iterator[tuple[StepRecord, list[Slice]]]:
        """Every step, cut by what it was for: vision first, then each kind by its share of all tokens."""
        decoding = self._decoding(self.replies)
        for step in self.steps:
            at, whole = step.layers_began, step.ended - step.layers_began
            cut = [Slice("vision", step.began, at)] if at > step.began else []
            for kind, share in _shares(step, step.works, decoding).items():
                end = min(at + share * whole, step.ended)
                cut.append(Slice(kind, at, end))
                at = end
            yield step, cut

    def gaps(self) -> list[tuple[float, float]]:
        """From when to when requests were under way and no batch ran."""
        marks: list[tuple[float, int, int]] = []
        for step in self.steps:
            marks += [(step.began, 1, 0), (step.ended, -1, 0)]
        for reply in self.replies:
            begin = self.submitted[reply.id]
            marks += [(begin, 0, 1), (begin + reply.trace.total, 0, -1)]
        out: list[tuple[float, float]] = []
        running = waiting = 0
        since = 0.0
        for time, runs, waits in sorted(marks):
            if waiting and not running and time > since:
                out.append((since, time))
            running, waiting, since = running + runs, waiting + waits, time
        return out

    def chrome_trace(self) -> dict[str, Any]:
        """The trace in the Trace Event Format, for chrome://tracing and ui.perfetto.dev: a thread a lane, one for the
        host's gaps, and a nestable asynchronous event for each request and each pass. Times are microseconds."""
        lanes = list(dict.fromkeys(step.lane for step in self.steps))
        threads = {lane: number for number, lane in enumerate(lanes, 1)}
        events = [_named("process_name", 0, {"name": "stockade"})]
        for lane, thread in [*threads.items(), ("host: no batch runs", len(lanes) + 1)]:
            events.append(_named("thread_name", thread, {"name": lane}))
            events.append(_named("thread_sort_index", thread, {"sort_index": thread}))
        origin = self.origin
        for number, (step, cut) in enumerate(self.slices()):
            detail = {
                "step": number,
                "passes": [
                    f"{work.request}.{work.number} {work.label}: {work.role} {work.tokens}" for work in step.works
                ],
            }
            for part in cut:
                events.append(_complete(part, threads[step.lane], origin) | {"args": detail})
        for began, ended in self.gaps():
            events.append(_complete(Slice("gaps", began, ended), len(lanes) + 1, origin))
        for reply in self.replies:
            events += _request_events(reply, self.submitted[reply.id] - origin)
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def _parts(self, reply: Reply) -> Iterator[tuple[float, float, dict[str, float] | None]]:
        """(began, ended, shares by kind) of every step, in order; no shares where the reply has no part in it."""
        decoding = self._decoding([reply])
        for step in self.steps:
            own = [work for work in step.works if work.request == reply.id]
            if own:
                yield step.began, step.layers_began, {"vision": 1.0}
                yield step.layers_began, step.ended, _shares(step, own, decoding)
            else:
                yield step.began, step.ended, None

    def _decoding(self, replies: Iterable[Reply]) -> Decoding:
        """For each text that was meant for the user, by its request: when its first and its last step began."""
        candidates = {
            (reply.id, number) for reply in replies for number, record in enumerate(reply.passes) if record.candidate
        }
        spans: dict[tuple[int, int], tuple[float, float]] = {}
        for step in self.steps:
            for work in step.works:
                key = work.request, work.number
                if key in candidates and work.role != "speculative" and kind_of(work) != "screening":
                    spans[key] = spans.get(key, (step.began, step.began))[0], step.began
        out: Decoding = defaultdict(list)
        for (request, _), span in spans.items():
            out[request].append(span)
        return out


def kind_of(work: StepWork) -> str:
    """What a work's time is called: screening, judge, caption, eyes_closed, rewrite, else prefill or decode.

    Work ahead of the verdict is a remedy's: it counts as the rewrite where its label does not say more.
    """
    if work.role in SCREENING or work.label in SCREENING:
        return "screening"
    if work.label in OWN_LABELS:
        return work.label
    if work.role == "speculative":
        return "rewrite"
    return work.role if work.role in ("judge", "prefill") else "decode"


def _shares(step: StepRecord, works: Iterable[StepWork], decoding: Decoding) -> dict[str, float]:
    """By field of `Breakdown`, the works' share of their tokens. Screening is hidden in every step between the first
    and the last that decoded a text of its request, these two included."""
    many = list(works)
    whole = sum(work.tokens for work in many)
    shares: dict[str, float] = defaultdict(float)
    for work in many:
        kind = kind_of(work)
        if kind == "screening":
            hidden = any(first <= step.began <= last for first, last in decoding.get(work.request, ()))
            kind += "_hidden" if hidden else "_exposed"
        shares[kind] += work.tokens / whole if whole else 1 / len(many)
    return shares


def _stretches(
    parts: list[tuple[float, float, dict[str, float] | None]], begin: float, end: float
) -> Iterator[tuple[float, list[dict[str, float]], bool]]:
    """Cut begin..end wherever a part begins or ends: (seconds, shares of the reply's own parts, whether any runs)."""
    marks: list[tuple[float, int]] = [(begin, -1), (end, -1)]
    for number, (first, last, _) in enumerate(parts):
        first, last = max(first, begin), min(last, end)
        if first < last:
            marks += [(first, number), (last, number)]
    marks.sort()
    active: set[int] = set()
    for (time, number), (until, _) in pairwise(marks):
        if number >= 0:
            active ^= {number}  # its first mark begins it, its second ends it
        if until > time:
            own = [shares for shares in (parts[one][2] for one in sorted(active)) if shares is not None]
            yield until - time, own, bool(active)


# Events of the Trace Event Format.


def _named(what: str, thread: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": 1, "tid": thread, "args": args}


def _complete(part: Slice, thread: int, origin: float) -> dict[str, Any]:
    began, ended = _microseconds(part.began - origin), _microseconds(part.ended - origin)
    return {
        "ph": "X",
        "name": part.kind,
        "cat": "step",
        "cname": COLORS[part.kind],
        "pid": 1,
        "tid": thread,
        "ts": began,
        "dur": round(ended - began, 3),
    }


def _request_events(reply: Reply, submitted: float) -> Iterator[dict[str, Any]]:
    """Requests and passes are ids of their own: passes of one request may overlap, so they need not nest."""
    name = f"request {reply.id}"
    yield from _async(
        "request", name, name, submitted, submitted + reply.trace.total, {"outcome": reply.outcome.value}
    )
    for number, record in enumerate(reply.passes):
        if record.finished is None:
            continue
        args = {
            "model": record.model,
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "new_tokens": len(record.token_ids),
        }
        began, ended = submitted + record.submitted, submitted + record.finished
        yield from _async("pass", f"{name} pass {number}", f"{reply.id} {record.label}", began, ended, args)


def _async(
    category: str, identity: str, name: str, began: float, ended: float, args: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    common = {"cat": category, "id": identity, "name": name, "pid": 1, "tid": 0}
    yield {"ph": "b", "ts": _microseconds(began), "args": args, **common}
    yield {"ph": "e", "ts": _microseconds(ended), **common}


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def step_works(works: list[Work]) -> tuple[StepWork, ...]:
    """What each work of a batch is for."""
    return tuple(
        StepWork(
            work.sequence.order[0],
            work.sequence.order[1],
            work.sequence.record.label,
            _role(work.sequence),
            work.sequence.model.name,
            work.rows,
        )
        for work in works
    )


def _role(sequence: Sequence) -> str:
    if sequence.optional:
        return "speculative"
    if sequence.scored:
        return "screen" if sequence.record.label == "screen" else "score"
    if sequence.words:
        return "judge"
    if sequence.closing:
        return "screen"
    return "decode" if sequence.num_computed >= sequence.prompt_tokens else "prefill"
