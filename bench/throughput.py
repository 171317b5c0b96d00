"""How much an engine serves: throughput, latency and goodput by load, in closed loops, open loops or by a trace.

The loads take turns in short pieces, round by round: a machine that is slow for minutes is slow for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, count, islice
from math import ceil, isfinite, isqrt
from random import Random
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from rich.console import RenderableType

from ..engine.engine import Engine
from ..engine.errors import BadInput
from ..engine.passes import ReleaseMode
from .asking import Asker, check_names
from .driving import Driven, Served, closed_loop, open_loop
from .objective import Objective
from .step_costs import StepCost, pooled
from .throughput_table import described, loads_table
from .traffic import Item, Sizes, arriving, faster, rate_of
from .units import Unit
from .workload import question

PERCENTILES = (50, 90, 95, 99)
MEASURES = ("ttft", "itl", "e2e", "queued")
FRACTIONS = (0.4, 0.6, 0.8)  # of the first guard's best closed loop: rates of the open ones
FEWEST, MOST = 4, 8  # requests of a closed loop's piece: as many as are under way, within these
ARRIVING = 16  # requests of an open loop's piece
HELD = 0.95  # of all requests have to meet an objective that is held
RAMP = 0.1  # of a trace come first, to an empty engine, and are left out


@dataclass(frozen=True)
class ThroughputConfig:
    """at_once: requests under way in the closed loops; () doubles them until the knee is behind, at most
    `most_at_once`, and then looks more closely around it. rates: requests a second of the open loops; () takes parts
    of what the best closed loop of the first guard had, and asks no guard for more than its own best; None leaves
    them out. burst: requests that come at the same moment. trace: instead of all these, once, in its own time; speed:
    how much faster than it says. seconds: for all rounds together, but each load has one at least; requests: at which
    a load has had enough of them. shared_tokens: of a text that all requests begin with.
    """

    guards: tuple[str, ...] = ("off", "protector-adapter", "probe", "ecso")
    sizes: Sizes = field(default_factory=Sizes)
    at_once: tuple[int, ...] = ()
    most_at_once: int = 64
    rates: tuple[float, ...] | None = ()
    burst: int = 1
    trace: tuple[Item, ...] = ()
    speed: float = 1.0
    requests: int = 200
    seconds: float = 900.0
    release: ReleaseMode = "verdict"
    shared_tokens: int = 0
    objective: Objective = field(default_factory=Objective)
    seed: int = 0


class Load(NamedTuple):
    """loop: closed, open or trace. level: requests at once, or a second."""

    loop: str
    level: float


class Turn(NamedTuple):
    """A load's part of every round: under each guard `measured` requests count, after `ramp` that do not."""

    load: Load
    guards: Sequence[str]
    measured: int
    ramp: int = 0


class Point(NamedTuple):
    """A load and what came of it: requests a second, and seconds of a reply."""

    level: float
    rate: float
    latency: float

    @property
    def power(self) -> float:
        return self.rate / self.latency


def knee(points: Sequence[Point]) -> Point:
    """Where more load begins to buy more waiting than work: the greatest power, throughput over latency (Kleinrock,
    "Power and deterministic rules of thumb", ICC 1979)."""
    return max(points, key=lambda point: (point.power, -point.level))


def asked(sizes: Sizes, load: Load, burst: int, random: Random) -> Iterator[Item]:
    """The requests of a loop, without end."""
    if load.loop == "open":
        return arriving(sizes, random, load.level, burst)
    return (sizes.item(0.0, random) for _ in count())


def seeded(seed: int | None, load: Load, number: int) -> Random:
    """Of a round's piece: every guard is asked the same."""
    return Random(f"{seed} {load.loop} {load.level:g} {number}")


class ThroughputPlan:
    """A round is a piece of every load under every guard, the loads in an order drawn anew, and so the guards in each
    load. The first one finds the levels, hence goes up the ladder.

    A piece is as short as a steady load allows. A closed loop's counts whoever follows those that it begins with,
    once all of these decode (see `closed_loop`). An open loop's counts whoever comes after a ramp, which lasts as
    long as a reply takes in the closed loop with that rate, under the slowest guard: so long it takes until as many
    leave as come. Requests that count are never cut off, and others come until the last of them has ended.
    """

    kind = "throughput"

    def __init__(self, engine: Engine, config: ThroughputConfig, model: str, dtype: str) -> None:
        """Raises `BadInput` for names that are none, and as `Asker.check_fits` does."""
        check_names(config.guards, (config.release,))
        if not config.trace and not config.at_once and config.rates == () and config.most_at_once < 2:
            raise BadInput("a sweep needs at least 2 requests at once")
        for name, values in (("rate", config.rates or ()), ("speed", (config.speed,)), ("time", (config.seconds,))):
            if wrong := [value for value in values if not (isfinite(value) and value > 0)]:
                raise BadInput(f"a {name} is above 0 and finite, not {wrong[0]}")
        self.config, self.seed = config, config.seed
        known = asdict(config)
        known["objective"] = config.objective.to_dict()
        known["trace"] = [list(item) for item in config.trace]
        self.settings = {"model": model, "dtype": dtype, **known}
        tokenizer = engine.models["mllm"].codec.tokenizer
        shared = question(tokenizer, config.shared_tokens, Random(config.seed)) if config.shared_tokens else ""
        self._asker = Asker(engine, shared)
        self._asker.check_fits(config.trace or [config.sizes.item(0.0, Random(0))])

    @property
    def limit(self) -> float | None:
        """A trace takes as long as it says, or as the engine needs: nobody knows beforehand."""
        return None if self.config.trace else self.config.seconds

    def warm_up(self) -> None:
        for guard in self.config.guards:
            self._piece(Turn(Load("closed", 2), (guard,), 1), -1, guard)

    def units(self, done: dict[str, Any]) -> Iterator[Unit]:
        turns: list[Turn] = []
        for turn in self._turns(done):
            turns.append(turn)
            yield from self._pieces(turn, 0)
        for number in count(1):
            due = [
                turn for turn in turns if turn.load.loop != "trace" and number * turn.measured < self.config.requests
            ]
            for turn in Random(f"{self.seed} round {number}").sample(due, len(due)):
                if _spent(done) >= self.config.seconds:
                    return
                yield from self._pieces(turn, number)
            if not due:
                return

    def _turns(self, done: dict[str, Any]) -> Iterator[Turn]:
        """Of a round, in the order of the first one, which has to be over to know what follows."""
        config = self.config
        if config.trace:
            ramp = int(RAMP * len(config.trace))
            load = Load("trace", rate_of(faster(list(config.trace), config.speed)))
            yield Turn(load, config.guards, len(config.trace) - ramp, ramp)
            return
        for level in config.at_once or self._ladder(done):
            yield Turn(Load("closed", level), config.guards, min(max(level, FEWEST), MOST, config.requests))
        if config.rates is None:
            return
        first = _first(done)
        for rate in config.rates or self._parts(first):
            guards = config.guards if config.rates else self._able(first, rate)
            ramp = _whole(rate * max(self._reply(first, guard, rate) for guard in guards), config.burst)
            yield Turn(Load("open", rate), guards, _whole(min(ARRIVING, config.requests), config.burst), ramp)

    def _pieces(self, turn: Turn, number: int) -> Iterator[Unit]:
        where = f"{turn.load.loop} {turn.load.level:g} {number}"
        for guard in Random(f"{self.seed} {where}").sample(turn.guards, len(turn.guards)):
            yield f"{where} {guard}", partial(self._piece, turn, number, guard)

    def _piece(self, turn: Turn, number: int, guard: str) -> dict[str, Any]:
        began = perf_counter()
        config, engine, (load, _, measured, ramp) = self.config, self._asker.engine, turn
        closed = load.loop == "closed"
        items = asked(config.sizes, load, config.burst, seeded(self.seed, load, number))
        if load.loop == "trace":
            items = iter(faster(list(config.trace), config.speed))
        texts = Random(f"{self.seed} texts {load.loop} {load.level:g} {number}")
        asks = (self._asker.ask(item, guard, texts) for item in items)
        # making one takes time
        ready = chain(list(islice(asks, measured + 3 * (int(load.level) if closed else ramp))), asks)
        release: ReleaseMode = "verdict" if guard.startswith("off") else config.release
        if closed:
            driven = closed_loop(engine, ready, int(load.level), measured, release)
        else:
            driven = open_loop(engine, ready, measured, release, ramp=ramp)
        return {**_plain(driven), "ramp": ramp, "took": round(perf_counter() - began, 3)}

    def _ladder(self, done: dict[str, Any]) -> Iterator[int]:
        """1, 2, 4 … until every guard has had its knee two steps before, or half of the time is up, and then what
        lies around the knees."""
        tried: list[int] = []
        level = 1
        while level <= self.config.most_at_once:
            yield level
            tried.append(level)
            level *= 2
            knees = self._knees(_first(done, tried))
            if len(tried) > 2 and max(knees) <= tried[-3]:
                break
            if len(tried) > 1 and _spent(_first(done, tried)) >= 0.5 * self.config.seconds:
                return
        around = {isqrt(best * other) for best in knees for other in tried if other in (best // 2, best * 2)}
        yield from sorted(around - set(tried))

    def _knees(self, done: dict[str, Any]) -> list[int]:
        return [int(knee(self._points(done, guard)).level) for guard in self.config.guards]

    def _best(self, done: dict[str, Any], guard: str) -> float:
        """Requests a second of a guard's best closed loop."""
        return max(point.rate for point in self._points(done, guard))

    def _parts(self, done: dict[str, Any]) -> list[float]:
        best = self._best(done, self.config.guards[0])
        return [float(f"{part * best:.3g}") for part in FRACTIONS]

    def _able(self, done: dict[str, Any], rate: float) -> list[str]:
        """The guards under which so many are served: beyond its best a guard's queue grows, and no load is steady."""
        return [guard for guard in self.config.guards if self._best(done, guard) >= rate]

    def _reply(self, done: dict[str, Any], guard: str, rate: float) -> float:
        """Seconds of a reply in the first closed loop with that rate, or in the last one."""
        points = sorted(self._points(done, guard))
        return next((point.latency for point in points if point.rate >= rate), points[-1].latency)

    def _points(self, done: dict[str, Any], guard: str) -> list[Point]:
        """The closed loops of a guard."""
        return [
            Point(row["level"], row["requests_per_s"], row["e2e_ms"]["p50"] / 1e3)
            for row in self.rows(done)
            if row["guard"] == guard and row["loop"] == "closed"
        ]

    def rows(self, done: dict[str, Any]) -> list[dict[str, Any]]:
        """A row a load and guard, over all rounds."""
        found: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
        for name, result in done.items():
            loop, level, _, guard = name.split(" ")
            found.setdefault((loop, float(level), guard), []).append(result)
        order = {guard: number for number, guard in enumerate(self.config.guards)}
        keys = sorted(found, key=lambda key: (order[key[2]], key[0], key[1]))
        return [self._row(*key, found[key]) for key in keys]

    def _row(self, loop: str, level: float, guard: str, found: list[dict[str, Any]]) -> dict[str, Any]:
        served = [Served(*values) for result in found for values in result["served"]]
        seconds = sum(result["seconds"] for result in found)
        row: dict[str, Any] = {"guard": guard, "loop": loop, "level": level, "n": len(served), "rounds": len(found)}
        row["requests_per_s"] = sum(result["requests"] for result in found) / seconds
        row["tokens_per_s"] = sum(result["tokens"] for result in found) / seconds
        objective = self.config.objective
        met = [objective.met(one.ttft, one.itl, one.e2e) for one in served]
        row["met_share"] = sum(met) / len(met)
        row["goodput_per_s"] = row["requests_per_s"] * row["met_share"]
        for name in MEASURES:
            row[f"{name}_ms"] = _percentiles([getattr(one, name) for one in served])
        row["gap_ms"] = {
            name: round(1e3 * float(np.median([result["gaps"][name] for result in found])), 4)
            for name in found[0]["gaps"]
        }
        rates = [result["requests"] / result["seconds"] for result in found]
        replies = [1e3 * float(np.median([Served(*values).e2e for values in result["served"]])) for result in found]
        row["between_rounds"] = {
            name: {"low": round(min(some), 4), "high": round(max(some), 4)}
            for name, some in (("requests_per_s", rates), ("e2e_ms", replies))
        }
        row["harmful_share"] = sum(one.harmful for one in served) / len(served)
        row["under_way"] = float(np.mean([result["under_way"] for result in found]))
        row["pages"] = max(result["pages"] for result in found)
        row["pool_percent"] = 100.0 * max(result["pool"] for result in found)
        prompt = sum(one.prompt for one in served)
        row["prefix_hit_percent"] = 100.0 * sum(one.cached for one in served) / prompt
        for name in ("evictions", "preemptions", "computed", "steps"):
            row[name] = sum(result[name] for result in found)
        inside, outside = (sum(result[name] for result in found) for name in ("inside", "outside"))
        row["own_overhead_percent"] = 100.0 * outside / (inside + outside)
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}

    def more(self, done: dict[str, Any]) -> dict[str, Any]:
        """knees: by guard, of its closed loops. held: by guard, the greatest rate of an open loop or a trace at which
        95 % of all requests met the objective. step_costs: by guard, `StepCost` pooled over all pieces."""
        rows = self.rows(done)
        knees, held = {}, {}
        costs: dict[str, list[list[Any]]] = {}
        for guard in self.config.guards:
            points = self._points(done, guard)
            if len(points) > 1:
                knees[guard] = {**knee(points)._asdict(), "power": knee(points).power}
            came = [row for row in rows if row["guard"] == guard and row["loop"] != "closed"]
            if came and self.config.objective.to_dict():
                held[guard] = max((row["level"] for row in came if row["met_share"] >= HELD), default=0.0)
            mine = (StepCost(*cost) for name in done if name.endswith(f" {guard}") for cost in done[name]["costs"])
            costs[guard] = [list(cost) for cost in pooled(mine)]
        return {"knees": knees, "held": held, "step_costs": costs}

    def table(self, done: dict[str, Any]) -> RenderableType:
        asked_of = (
            f"{len(self.config.trace)} requests of a trace" if self.config.trace else described(self.config.sizes)
        )
        title = f"{self.settings['model']} {self.settings['dtype']}: {asked_of}"
        return loads_table(title, str(self.config.objective), self.rows(done), self.more(done))


def _first(done: dict[str, Any], levels: Sequence[int] = ()) -> dict[str, Any]:
    """The closed loops of the first round, of these levels only if there are any. All levels, rates and ramps come
    from them, so that they are the same again when a measurement is gone on with."""
    parts = ((name.split(" "), name) for name in done)
    return {
        name: done[name]
        for (loop, level, number, _), name in parts
        if loop == "closed" and number == "0" and (not levels or int(level) in levels)
    }


def _spent(done: dict[str, Any]) -> float:
    """Seconds that pieces took."""
    return float(sum(found["took"] for found in done.values()))


def _whole(requests: float, burst: int) -> int:
    """At least so many, in whole bursts."""
    return burst * max(1, ceil(requests / burst))


def _plain(driven: Driven) -> dict[str, Any]:
    """A run as JSON; gaps: between tokens, in seconds."""
    return {
        "served": [
            [round(value, 5) if isinstance(value, float) else value for value in one] for one in driven.served
        ],
        "gaps": _percentiles(driven.gaps or [0.0], 1.0),
        **{
            name: getattr(driven, name)
            for name in (
                *(
                    "seconds",
                    "requests",
                    "tokens",
                    "steps",
                    "computed",
                    "under_way",
                    "inside",
                    "outside",
                    "pages",
                    "pool",
                ),
                *("evictions", "preemptions"),
            )
        },
        "costs": [list(cost) for cost in driven.costs],
    }


def _percentiles(seconds: list[float], scale: float = 1e3) -> dict[str, float]:
    points = np.percentile(seconds, PERCENTILES) * scale
    return {f"p{percent}": round(float(value), 7) for percent, value in zip(PERCENTILES, points, strict=True)}
