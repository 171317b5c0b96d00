"""Whether the simulation is right: what it predicts for the loads of a `bench throughput`, beside the measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from .cost_fit import FittedCosts, measured_steps
from .document import BadDocument, Document, as_written
from .driving import Served
from .guard_programs import GUARDS, Asked, Sizes, models_of, stages
from .objective import Objective
from .pace import fit_at_mean_pace
from .replica import Job, Limits, Placement, Replica, simulate
from .throughput import Load, asked, seeded
from .traffic import Item, faster
from .traffic import Sizes as Requests

TEMPLATE = 30  # tokens of SmolLM2's chat template, where images make it impossible to tell


@dataclass(frozen=True)
class Measured:
    """What a `bench throughput` says of the engine: costs at the machine's mean speed, how many times as long they
    were around each piece, limits, sizes of requests and the objective."""

    costs: FittedCosts
    paces: Mapping[str, float]
    limits: Limits
    sizes: Sizes
    requests: Requests
    objective: Objective


class Piece(NamedTuple):
    """A load of one round. replies: seconds of those that count; ended: requests in the `seconds` of its window."""

    replies: list[float]
    ended: int
    seconds: float

    @classmethod
    def of_unit(cls, unit: Mapping[str, Any]) -> Piece:
        return cls([Served(*one).e2e for one in unit["served"]], unit["requests"], unit["seconds"])


class Compared(NamedTuple):
    """One load under one guard; predicted over measured is what counts. Seconds of whole replies: the rounds' medians
    in the mean, since a machine that is slow in some rounds has two medians, and the 95th percentile; and requests a
    second."""

    guard: str
    loop: str
    level: float
    n: int
    predicted_p50: float
    measured_p50: float
    predicted_p95: float
    measured_p95: float
    predicted_rate: float
    measured_rate: float

    @property
    def errors(self) -> tuple[float, float]:
        """Relative, of the median and of the rate."""
        return self.predicted_p50 / self.measured_p50 - 1.0, self.predicted_rate / self.measured_rate - 1.0


def read_run(document: Document, leave_out: tuple[str, ...] = ()) -> Measured:
    """Raises `BadDocument` for what no `bench throughput` has written, and as `fit` does. leave_out: pieces that
    costs are not fitted to."""
    try:
        settings = document.settings
        requests = Requests(**settings["sizes"])
        sizes = _sizes(document, requests)
        objective = Objective(**settings.get("objective", {}))
    except (KeyError, TypeError, ValueError) as error:
        raise BadDocument(f"the settings are not those of a `bench throughput`: {error!r}") from None
    cuda = document.machine.get("accelerator") is not None
    limits = Limits(8192, 128, 64, 16) if cuda else Limits()
    source = f"steps of {settings.get('model')} in {document.started}"
    costs, paces = fit_at_mean_pace(measured_steps(document), source, leave_out)
    return Measured(costs, paces, limits, sizes, requests, objective)


def _sizes(document: Document, requests: Requests) -> Sizes:
    """From unguarded requests, which have one pass each: what is found in pages is what all of them begin with."""
    served = [
        Served(*one)
        for name, unit in document.units.items()
        if name.split(" ")[-1] == "off"
        for one in unit["served"]
    ]
    if not served or document.settings["trace"]:
        return Sizes(template=TEMPLATE)
    more = max(0, round(median(one.prompt for one in served)) - requests.prompt_tokens)
    shared = min(more, round(median(one.cached for one in served)))
    if not requests.images:
        return Sizes(template=more, shared=shared)
    return Sizes(max(0, more - TEMPLATE) // requests.images, TEMPLATE, min(TEMPLATE, shared))


def compare(document: Document) -> list[Compared]:
    """Every load of a run, predicted from the steps of all its other loads, each piece at the speed that the machine
    had for theirs around it. Raises as `read_run` does."""
    if document.settings.get("release") != "verdict":
        raise BadDocument("the simulation holds text back until the verdict; the run released it otherwise")
    with as_written(document):
        loads = sorted({(loop, float(level)) for loop, level, _, _ in (name.split(" ") for name in document.units)})
    if not loads:
        raise BadDocument("the run has no loads to compare with")
    out = []
    for loop, level in loads:
        own = tuple(name for name in document.units if name.startswith(f"{loop} {level:g} "))
        found = read_run(document, own if len(loads) > 1 else ())
        with as_written(document):
            for guard in GUARDS:
                if mine := [name for name in own if name.endswith(f" {guard}")]:
                    out.append(_compare(document, found, Load(loop, level), guard, mine))
    return out


def _compare(document: Document, found: Measured, load: Load, guard: str, names: list[str]) -> Compared:
    measured = [Piece.of_unit(document.units[name]) for name in names]
    predicted = [_predict(document, found, load, guard, name) for name in names]
    p50, p95, rate = zip(*(_figures(pieces) for pieces in (predicted, measured)), strict=True)
    return Compared(guard, *load, sum(len(piece.replies) for piece in measured), *p50, *p95, *rate)


def _figures(pieces: Sequence[Piece]) -> tuple[float, float, float]:
    """Seconds of replies, median and 95th percentile, and requests a second."""
    middle = mean(median(piece.replies) for piece in pieces)
    late = float(np.percentile([reply for piece in pieces for reply in piece.replies], 95))
    return middle, late, sum(piece.ended for piece in pieces) / sum(piece.seconds for piece in pieces)


def _predict(document: Document, found: Measured, load: Load, guard: str, name: str) -> Piece:
    """The very requests that were measured: random numbers are drawn as `bench throughput` draws them."""
    settings, unit = document.settings, document.units[name]
    random = seeded(document.seed, load, int(name.split(" ")[2]))
    items = asked(found.requests, load, settings["burst"], random)
    trace = [Item(*values) for values in settings["trace"]]
    if trace:
        items = iter(faster(trace, settings["speed"]))
    harmful = found.requests.harmful > 0 or any(item.harmful for item in trace)
    costs = found.costs.slower(found.paces[name])
    replica = Replica(costs, models_of(guard, harmful), found.limits, Placement())
    numbers = count()

    def job(item: Item) -> Job:
        one = Asked(item.arrival, item.prompt_tokens, item.answer_tokens, item.images, item.harmful)
        return Job(next(numbers), one, stages(guard, one, found.sizes))

    if load.loop == "closed":
        return _closed(replica, items, job, int(load.level), len(unit["served"]))
    return _open(replica, map(job, items), unit["ramp"], len(unit["served"]))


def _open(replica: Replica, jobs: Iterator[Job], ramp: int, measured: int) -> Piece:
    """As `driving.open_loop` does it."""
    left = measured

    def over(job: Job) -> bool:
        nonlocal left
        left -= ramp <= job.number < ramp + measured
        return not left

    known = simulate([replica], jobs, hopeless=over)
    counted = known[ramp : ramp + measured]
    ends = [job.finished for job in known if job.finished is not None]
    opened, closed = counted[0].asked.arrival, max(job.finished or 0.0 for job in counted)
    return Piece([_reply(job) for job in counted], sum(opened < end <= closed for end in ends), closed - opened)


def _closed(
    replica: Replica, items: Iterator[Item], job: Callable[[Item], Job], at_once: int, measured: int
) -> Piece:
    """As `driving.closed_loop` does it."""
    starters = []
    for number, item in enumerate(islice(items, at_once), 1):
        starters.append(job(item._replace(answer_tokens=max(1, item.answer_tokens * number // at_once))))
        replica.submit(starters[-1])
    counted: list[Job] = []
    opened: float | None = None
    ended = 0
    while len(counted) < measured or any(one.finished is None for one in counted):
        replica.start()
        replica.advance(replica.next_event)
        if opened is not None:
            ended += len(replica.finished)
        elif all(one.first is not None for one in starters):
            opened = replica.now
        for _ in replica.finished:
            following = job(next(items)._replace(arrival=replica.now))
            replica.submit(following)
            if opened is not None and len(counted) < measured:
                counted.append(following)
        replica.finished.clear()
    assert opened is not None
    return Piece([_reply(one) for one in counted], ended, replica.now - opened)


def _reply(job: Job) -> float:
    """Seconds of a finished one."""
    assert job.finished is not None
    return job.finished - job.asked.arrival


def table(compared: list[Compared]) -> Table:
    worst = max((abs(error) for one in compared for error in one.errors), default=0.0)
    middle = median([abs(one.errors[0]) for one in compared]) if compared else 0.0
    out = Table(
        title="predicted from the steps of the other loads, and measured",
        caption=f"median error of a reply's median {100 * middle:.1f} %, the largest of any {100 * worst:.1f} %",
    )
    for heading in ("guard", "load"):
        out.add_column(heading, no_wrap=True)
    for heading in ("n", "reply p50 s", "measured", "%", "p95 s", "measured", "req/s", "measured", "%"):
        out.add_column(heading, justify="right", no_wrap=True)
    for one in compared:
        latency_error, rate_error = one.errors
        out.add_row(
            one.guard,
            f"{one.level:g} at once" if one.loop == "closed" else f"{one.level:.3g}/s",
            str(one.n),
            *(f"{one.predicted_p50:.3g}", f"{one.measured_p50:.3g}", f"{100 * latency_error:+.1f}"),
            *(f"{one.predicted_p95:.3g}", f"{one.measured_p95:.3g}"),
            *(f"{one.predicted_rate:.3g}", f"{one.measured_rate:.3g}", f"{100 * rate_error:+.1f}"),
        )
    return out
