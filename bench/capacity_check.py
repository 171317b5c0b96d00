"""Whether the simulation is right: what it predicts for the loads of a `bench throughput`, beside the measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from math import ceil
from random import Random
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from .capacity import latency
from .cost_fit import FittedCosts, fit, measured_steps
from .document import BadDocument, Document, as_written
from .driving import Served
from .guard_programs import GUARDS, Asked, Sizes, models_of, stages
from .objective import Objective
from .replica import Job, Limits, Placement, Replica, simulate
from .throughput import RAMP
from .traffic import Item, arrivals
from .traffic import Sizes as Requests

TEMPLATE = 30  # tokens of SmolLM2's chat template, where images make it impossible to tell


@dataclass(frozen=True)
class Measured:
    """What a `bench throughput` says of the engine: costs, limits, sizes of requests and the objective."""

    costs: FittedCosts
    limits: Limits
    sizes: Sizes
    requests: Requests
    objective: Objective


class Compared(NamedTuple):
    """One load under one guard; predicted over measured is what counts. Seconds of whole replies, in the median and
    at the 95th percentile, and requests a second."""

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
    """Raises `BadDocument` for what no `bench throughput` has written, and as `fit` does. leave_out: see
    `measured_steps`."""
    try:
        settings = document.settings
        requests = Requests(**settings["sizes"])
        sizes = _sizes(document, requests)
        objective = Objective(**settings.get("objective", {}))
    except (KeyError, TypeError, ValueError) as error:
        raise BadDocument(f"the settings are not those of a `bench throughput`: {error!r}") from None
    cuda = document.machine.get("accelerator") is not None
    limits = Limits(8192, 128, 64, 16) if cuda else Limits()
    costs = fit(measured_steps(document, leave_out), f"steps of {settings.get('model')} in {document.started}")
    return Measured(costs, limits, sizes, requests, objective)


def _sizes(document: Document, requests: Requests) -> Sizes:
    """From the prompts of unguarded requests, which have one pass each."""
    prompts = [
        Served(*served).prompt
        for name, unit in document.units.items()
        if name.split(" ")[-1] == "off"
        for served in unit["served"]
    ]
    more = round(median(prompts)) - requests.prompt_tokens if prompts and not document.settings["trace"] else TEMPLATE
    if not requests.images:
        return Sizes(template=max(0, more))
    return Sizes(image=max(0, more - TEMPLATE) // requests.images, template=TEMPLATE)


def compare(document: Document) -> list[Compared]:
    """Every load of a run, predicted from the steps of all its other loads. Raises as `read_run` does."""
    if document.settings.get("release") != "verdict":
        raise BadDocument("the simulation holds text back until the verdict; the run released it otherwise")
    with as_written(document):
        loads = {(loop, float(level)) for loop, level, _, _ in (name.split(" ") for name in document.units)}
    if not loads:
        raise BadDocument("the run has no loads to compare with")
    out = []
    for loop, level in sorted(loads):
        own = tuple(name for name in document.units if name.startswith(f"{loop} {level:g} "))
        found = read_run(document, own if len(loads) > 1 else ())
        for guard in GUARDS:
            mine = [document.units[name] for name in own if name.endswith(f" {guard}")]
            if mine:
                out.append(_compare(document, found, loop, level, guard, mine))
    return out


def _compare(
    document: Document, found: Measured, loop: str, level: float, guard: str, units: list[dict[str, Any]]
) -> Compared:
    served = [Served(*one) for unit in units for one in unit["served"]]
    e2e: list[float] = []
    seconds = 0.0
    ended = 0
    for repeat in range(len(units)):
        items = _items(document, found.requests, loop, level, repeat, units[repeat])
        models = models_of(guard, any(item.harmful for item in items) or found.requests.harmful > 0)
        replica = Replica(found.costs, models, found.limits, Placement())
        jobs = [_job(number, item, guard, found.sizes) for number, item in enumerate(items)]
        if loop == "closed":
            done, took = _closed(replica, jobs, int(level))
            late = done
        else:
            done = simulate([replica], jobs)
            took = max(job.finished or 0.0 for job in done)
            late = done[int(RAMP * len(done)) :]
        e2e += [latency(job, guard)[2] for job in late]
        seconds += took
        ended += len(done)
    theirs = np.array([one.e2e for one in _after_ramp(units, loop)])
    rate = sum(unit["requests"] for unit in units) / sum(unit["seconds"] for unit in units)
    mine = np.array(e2e)
    return Compared(
        guard,
        loop,
        level,
        len(served),
        predicted_p50=float(np.percentile(mine, 50)),
        measured_p50=float(np.percentile(theirs, 50)),
        predicted_p95=float(np.percentile(mine, 95)),
        measured_p95=float(np.percentile(theirs, 95)),
        predicted_rate=ended / seconds,
        measured_rate=rate,
    )


def _items(
    document: Document, sizes: Requests, loop: str, level: float, repeat: int, unit: dict[str, Any]
) -> list[Item]:
    """The very requests that were measured: random numbers are drawn as `bench throughput` draws them. In a closed
    loop only those that counted are known, hence those around them are taken to be harmless."""
    settings = document.settings
    if loop == "trace":
        factor = settings["speed"]
        items = [Item(*values) for values in settings["trace"]]
        return [item._replace(arrival=item.arrival / factor) for item in items]
    if loop == "open":
        random = Random(f"{document.seed} {loop} {level:g} {repeat}")
        due = arrivals(level, len(unit["served"]), random, settings["burst"])
        return [sizes.item(at, random) for at in due]
    known = [one.harmful for one in sorted(Served(*values) for values in unit["served"])]
    plain = Item(0.0, sizes.prompt_tokens, sizes.images, sizes.answer_tokens)
    at_once = int(level)
    counted = [plain._replace(harmful=harmful) for harmful in known]
    return [*[plain] * at_once, *counted, *[plain] * (4 * at_once)]


def _job(number: int, item: Item, guard: str, sizes: Sizes) -> Job:
    asked = Asked(item.arrival, item.prompt_tokens, item.answer_tokens, item.images, item.harmful)
    return Job(number, asked, stages(guard, asked, sizes))


def _closed(replica: Replica, jobs: list[Job], at_once: int) -> tuple[list[Job], float]:
    """`at_once` under way all the time; the first ones are shortened, as in a measurement, and do not count."""
    waiting: Iterator[int] = count()

    def submit() -> None:
        number = next(waiting)
        if number < len(jobs):
            job = jobs[number]
            if number < at_once:
                tokens = max(2, ceil(job.asked.answer * (number + 1) / at_once))
                job.stages = tuple(stage._replace(new=min(stage.new, tokens)) for stage in job.stages)
            job.asked = replace(job.asked, arrival=replica.now)
            replica.submit(job)

    for _ in range(at_once):
        submit()
    opened: float | None = None
    early = 0  # that ended before the window opened
    done: list[Job] = []
    measured = len(jobs) - 5 * at_once
    while len(done) < measured:
        replica.start()
        replica.advance(replica.next_event)
        while replica.finished:
            job = replica.finished.pop(0)
            if at_once <= job.number < at_once + measured:
                done.append(job)
            submit()
        if opened is None and all(job.finished is not None for job in jobs[:at_once]):
            opened, early = replica.now, len(done)
    return done, (replica.now - (opened or 0.0)) * len(done) / max(1, len(done) - early)


def _after_ramp(units: list[dict[str, Any]], loop: str) -> list[Served]:
    out: list[Served] = []
    for unit in units:
        served = sorted(Served(*values) for values in unit["served"])  # by arrival
        out += served if loop == "closed" else served[int(RAMP * len(served)) :]
    return out


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
