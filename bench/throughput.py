"""How much an engine serves: throughput, latency and goodput by load, in closed loops, open loops or by a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, count, islice
from math import isfinite, isqrt
from random import Random
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from ..engine.engine import Engine
from ..engine.errors import BadInput
from ..engine.passes import ReleaseMode
from .asking import Asker, check_names
from .driving import Driven, Served, closed_loop, open_loop
from .objective import Objective
from .traffic import Item, Sizes, arrivals, faster, rate_of
from .units import Unit
from .workload import question

PERCENTILES = (50, 90, 95, 99)
MEASURES = ("ttft", "itl", "e2e", "queued")
FRACTIONS = (0.5, 0.7, 0.85, 1.0)  # of the first guard's best closed loop: rates of the open ones
LEAST = 16  # requests of an open loop, even where its share of the time is short
HELD = 0.95  # of all requests have to meet an objective that is held
RAMP = 0.1  # of an open loop's requests come first, to an empty engine, and are left out of percentiles


@dataclass(frozen=True)
class ThroughputConfig:
    """at_once: requests under way in the closed loops; () doubles them until the knee is behind, at most
    `most_at_once`, and then looks more closely around it. rates: requests a second of the open loops; () takes parts
    of what the best closed loop of the first guard had, None leaves them out. burst: requests that come at the same
    moment. trace: instead of all these; speed: how much faster than it says. requests: measured at each load at most,
    but as many as are under way. seconds: for all of it, half of them for the closed loops; each load of a kind gets
    the same share of what is left. A trace takes its own time. shared_tokens: of a text that all requests begin with.
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
    repeats: int = 1
    release: ReleaseMode = "verdict"
    shared_tokens: int = 0
    objective: Objective = field(default_factory=Objective)
    seed: int = 0


class Load(NamedTuple):
    """loop: closed, open or trace. level: requests at once, or a second."""

    loop: str
    level: float


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


class ThroughputPlan:
    """A piece of work is one load under one guard; at each load the guards run in an order of its own."""

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
            self._closed("warm-up", guard, 2, 1, 0.0)

    def units(self, done: dict[str, Any]) -> Iterator[Unit]:
        config = self.config
        if config.trace:
            items = faster(list(config.trace), config.speed)
            yield from self._at(Load("trace", rate_of(items)), self._trace)
            return
        for level in config.at_once or self._ladder(done):
            yield from self._at(Load("closed", level), partial(self._sweep, done))
        if config.rates is None:
            return
        rates = config.rates or self._parts(done)
        share = (config.seconds - _spent(done, "closed")) / self._runs(len(rates))
        for rate in rates:
            # who serves least still gets through its requests in its share, and all are asked the same
            served = min(rate, *(max(point.rate for point in self._points(done, guard)) for guard in config.guards))
            requests = min(config.requests, max(LEAST, int(share * served)))
            yield from self._at(Load("open", rate), partial(self._open, requests))

    def _at(self, load: Load, run: Callable[[Load, int, str], dict[str, Any]]) -> Iterator[Unit]:
        """All guards under one load, as often as wanted."""
        for repeat in range(self.config.repeats):
            where = f"{load.loop} {load.level:g} {repeat}"
            for guard in Random(f"{self.seed} {where}").sample(self.config.guards, len(self.config.guards)):
                yield f"{where} {guard}", partial(_timed, partial(run, load, repeat, guard))

    def _runs(self, loads: int) -> int:
        return loads * self.config.repeats * len(self.config.guards)

    def _share(self, done: dict[str, Any]) -> float:
        """Seconds of the next closed loop: of what is left to all of them, as if the sweep went to its end."""
        loads = len(self.config.at_once) or self.config.most_at_once.bit_length() + 2
        runs = self._runs(loads) - sum(name.startswith("closed") for name in done)
        return self._left(done) / max(1, runs)

    def _left(self, done: dict[str, Any]) -> float:
        """Seconds of all closed loops to come."""
        return (1.0 if self.config.rates is None else 0.5) * self.config.seconds - _spent(done, "closed")

    def _ladder(self, done: dict[str, Any]) -> Iterator[int]:
        """1, 2, 4 … until every guard has had its knee two steps before, or the time of the closed loops is up, and
        then what lies around the knees."""
        tried: list[int] = []
        level = 1
        while level <= self.config.most_at_once:
            yield level
            tried.append(level)
            level *= 2
            if len(tried) > 2 and all(self._knee(done, guard).level <= tried[-3] for guard in self.config.guards):
                break
            if len(tried) > 1 and self._left(done) <= 0.0:
                return
        around: set[int] = set()
        for guard in self.config.guards:
            best = int(self._knee(done, guard).level)
            around |= {isqrt(best * other) for other in tried if other in (best // 2, best * 2)}
        yield from sorted(around - set(tried))

    def _parts(self, done: dict[str, Any]) -> list[float]:
        best = max(point.rate for point in self._points(done, self.config.guards[0]))
        return [float(f"{part * best:.3g}") for part in FRACTIONS]

    def _knee(self, done: dict[str, Any], guard: str) -> Point:
        return knee(self._points(done, guard))

    def _points(self, done: dict[str, Any], guard: str) -> list[Point]:
        """The closed loops of a guard so far."""
        return [
            Point(row["level"], row["requests_per_s"], row["e2e_ms"]["p50"] / 1e3)
            for row in self.rows(done)
            if row["guard"] == guard and row["loop"] == "closed"
        ]

    def _sweep(self, done: dict[str, Any], load: Load, repeat: int, guard: str) -> dict[str, Any]:
        return self._closed(
            f"{load.level:g} {repeat}", guard, int(load.level), self.config.requests, self._share(done)
        )

    def _open(self, requests: int, load: Load, repeat: int, guard: str) -> dict[str, Any]:
        random = self._random(load, repeat)
        due = arrivals(load.level, requests, random, self.config.burst)
        return self._arriving([self.config.sizes.item(at, random) for at in due], guard, random)

    def _trace(self, load: Load, repeat: int, guard: str) -> dict[str, Any]:
        return self._arriving(faster(list(self.config.trace), self.config.speed), guard, self._random(load, repeat))

    def _random(self, load: Load, repeat: int) -> Random:
        """The same questions for every guard."""
        return Random(f"{self.seed} {load.loop} {load.level:g} {repeat}")

    def _arriving(self, items: list[Item], guard: str, random: Random) -> dict[str, Any]:
        asks = [self._asker.ask(item, guard, random) for item in items]
        return _plain(open_loop(self._asker.engine, asks, self._release(guard)))

    def _closed(self, where: str, guard: str, at_once: int, requests: int, seconds: float) -> dict[str, Any]:
        random = Random(f"{self.seed} closed {where}")
        asks = (self._asker.ask(self.config.sizes.item(0.0, random), guard, random) for _ in count())
        measured = max(requests, at_once)
        ready = list(islice(asks, measured + 4 * at_once))  # making one takes time
        return _plain(
            closed_loop(
                *(self._asker.engine, chain(ready, asks), at_once, measured, self._release(guard)),
                least=min(measured, max(4, at_once)),
                seconds=seconds,
            )
        )

    def _release(self, guard: str) -> ReleaseMode:
        return "verdict" if guard.startswith("off") else self.config.release

    def rows(self, done: dict[str, Any]) -> list[dict[str, Any]]:
        """A row a load and guard, over all repeats."""
        found: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
        for name, result in done.items():
            loop, level, _, guard = name.split(" ")
            found.setdefault((loop, float(level), guard), []).append(result)
        order = {guard: number for number, guard in enumerate(self.config.guards)}
        keys = sorted(found, key=lambda key: (order[key[2]], key[0], key[1]))
        return [self._row(*key, found[key]) for key in keys]

    def _row(self, loop: str, level: float, guard: str, found: list[dict[str, Any]]) -> dict[str, Any]:
        served = [Served(*values) for result in found for values in result["served"]]
        late = served if loop == "closed" else _after_ramp(found)
        seconds = sum(result["seconds"] for result in found)
        row: dict[str, Any] = {"guard": guard, "loop": loop, "level": level, "n": len(served)}
        row["requests_per_s"] = sum(result["requests"] for result in found) / seconds
        row["tokens_per_s"] = sum(result["tokens"] for result in found) / seconds
        objective = self.config.objective
        met = [objective.met(one.ttft, one.itl, one.e2e) for one in late]
        row["met_share"] = sum(met) / len(met)
        row["goodput_per_s"] = row["requests_per_s"] * row["met_share"]
        for name in MEASURES:
            row[f"{name}_ms"] = _percentiles([getattr(one, name) for one in late])
        row["gap_ms"] = {
            f"p{percent}": round(1e3 * float(np.median([result["gaps"][percent] for result in found])), 4)
            for percent in PERCENTILES
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
        95 % of all requests met the objective. step_costs: by guard, what is in `StepCost`."""
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
            costs[guard] = [
                cost for name, result in done.items() if name.endswith(f" {guard}") for cost in result["costs"]
            ]
        return {"knees": knees, "held": held, "step_costs": costs}

    def table(self, done: dict[str, Any]) -> RenderableType:
        settings, sizes, rows, more = self.settings, self.config.sizes, self.rows(done), self.more(done)
        of = f"{len(self.config.trace)} requests of a trace" if self.config.trace else _described(sizes)
        table = Table(
            title=f"{settings['model']} {settings['dtype']}: {of}",
            caption="ttft: first text; itl: between tokens; hits: prompt tokens found in pages"
            + (f"; good: {self.config.objective}" if settings["objective"] else ""),
        )
        for heading in ("guard", "load"):
            table.add_column(heading, no_wrap=True)
        times = ("ttft", "itl", "reply", "queue")
        for heading in ("req/s", "tok/s", "good/s", *(f"{name} ms" for name in times), "pool %", "hits %"):
            table.add_column(heading, justify="right", no_wrap=True)
        last = None
        for row in rows:
            if last not in (None, row["guard"]):
                table.add_section()
            last = row["guard"]
            table.add_row(
                *(row["guard"], _named(row) + (" ← knee" if _is_knee(row, more) else "")),
                *(f"{row['requests_per_s']:.2f}", f"{row['tokens_per_s']:,.1f}", f"{row['goodput_per_s']:.2f}"),
                *(
                    f"{row[f'{name}_ms']['p50']:,.0f}"
                    + (f" ({row[f'{name}_ms']['p99']:,.0f})" if name in ("ttft", "e2e") else "")
                    for name in MEASURES
                ),
                *(f"{row['pool_percent']:.1f}", f"{row['prefix_hit_percent']:.0f}"),
            )
        asked = {(row["guard"], row["level"]): row["n"] for row in rows if row["loop"] != "closed"}
        held = (
            f"{guard} holds {rate:g} requests/s" + (f" (of {asked[guard, rate]} requests)" if rate else "")
            for guard, rate in more["held"].items()
        )
        return Group(table, *held)


def _timed(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a load gave, and the seconds that it took in all."""
    began = perf_counter()
    found = run()
    return {**found, "took": round(perf_counter() - began, 3)}


def _spent(done: dict[str, Any], loop: str) -> float:
    """Seconds that the loads of a kind took."""
    return float(sum(found["took"] for name, found in done.items() if name.startswith(loop)))


def _plain(driven: Driven) -> dict[str, Any]:
    """A run as JSON; of the gaps between tokens, percentiles 0 to 100."""
    gaps = np.percentile(driven.gaps, range(101)) if driven.gaps else np.zeros(101)
    return {
        "served": [
            [round(value, 6) if isinstance(value, float) else value for value in one] for one in driven.served
        ],
        "gaps": [round(float(gap), 7) for gap in gaps],
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


def _after_ramp(found: list[dict[str, Any]]) -> list[Served]:
    out: list[Served] = []
    for result in found:
        served = sorted(Served(*values) for values in result["served"])  # by arrival
        out += served[int(RAMP * len(served)) :]
    return out


def _percentiles(seconds: list[float]) -> dict[str, float]:
    points = np.percentile(seconds, PERCENTILES) * 1e3
    return {f"p{percent}": round(float(value), 4) for percent, value in zip(PERCENTILES, points, strict=True)}


def _described(sizes: Sizes) -> str:
    seen = f", {sizes.images} images" if sizes.images else ""
    harmful = f", {100 * sizes.harmful:g} % harmful" if sizes.harmful else ""
    return f"{sizes.prompt_tokens} tokens in{seen}, {sizes.answer_tokens} out{harmful}; medians (p99)"


def _named(row: dict[str, Any]) -> str:
    if row["loop"] == "closed":
        return f"{row['level']:g} at once"
    return f"{row['level']:.3g}/s" + (", trace" if row["loop"] == "trace" else "")


def _is_knee(row: dict[str, Any], more: dict[str, Any]) -> bool:
    found = more["knees"].get(row["guard"])
    return row["loop"] == "closed" and found is not None and found["level"] == row["level"]
