"""How long one request takes, alone on the machine: by its sizes, its guard and when its text may leave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from random import Random
from typing import Any, NamedTuple, cast

import numpy as np
from rich.table import Table

from ..engine.engine import Engine
from ..engine.errors import BadInput
from ..engine.passes import ReleaseMode
from .asking import Asker, check_names
from .driving import open_loop
from .traffic import Item
from .units import Unit
from .variants import AS_PUBLISHED, PATHS

PERCENTILES = (50, 90, 95, 99)
MEASURES = ("ttft", "first_token", "itl", "e2e", "guard")


@dataclass(frozen=True)
class LatencyConfig:
    """Every combination is measured `repeats` times. harmful: on the harmful path, too; without a guard there is
    none."""

    prompt_tokens: tuple[int, ...] = (64,)
    images: tuple[int, ...] = (0,)
    answer_tokens: tuple[int, ...] = (64,)
    guards: tuple[str, ...] = ("off", "protector-adapter", "probe", "ecso")
    releases: tuple[str, ...] = ("verdict",)
    harmful: bool = False
    repeats: int = 20
    seed: int = 0


class Cell(NamedTuple):
    """One combination."""

    prompt_tokens: int
    images: int
    answer_tokens: int
    guard: str
    path: str
    release: str

    @property
    def item(self) -> Item:
        return Item(0.0, self.prompt_tokens, self.images, self.answer_tokens, self.path == PATHS[1])

    @property
    def name(self) -> str:
        return "/".join(str(part) for part in self)


class LatencyPlan:
    """A piece of work is one round: one request of every combination, in an order of its own, each with a question
    that nobody asked before and an empty cache."""

    kind = "latency"
    limit = None

    def __init__(self, engine: Engine, config: LatencyConfig, model: str, dtype: str) -> None:
        """Raises `BadInput` for names that are none, and as `Asker.check_fits` does."""
        check_names(config.guards, config.releases)
        self.config, self.seed = config, config.seed
        self.cells = list(_cells(config))
        if not self.cells:
            raise BadInput(
                "no guard here can release its text so: a guard that comes at the end knows only `verdict`"
            )
        self.settings = {"model": model, "dtype": dtype, **asdict(config)}
        self._asker = Asker(engine)
        self._asker.check_fits([cell.item for cell in self.cells])

    def warm_up(self) -> None:
        self._round(-1)

    def units(self, done: dict[str, Any]) -> Iterator[Unit]:
        for number in range(self.config.repeats):
            yield f"round {number}", partial(self._round, number)

    def _round(self, number: int) -> dict[str, dict[str, Any]]:
        random = Random(f"{self.seed} {number}")
        out = {}
        for cell in random.sample(self.cells, len(self.cells)):
            ask = self._asker.ask(cell.item, cell.guard, random)
            release = "verdict" if cell.release == "live" else cast(ReleaseMode, cell.release)
            driven = open_loop(self._asker.engine, [ask], 1, release)
            (served,) = driven.served
            out[cell.name] = {
                **{name: round(getattr(served, name), 7) for name in MEASURES if name != "itl"},
                "gaps": [round(gap, 7) for gap in driven.gaps],
                "prompt": served.prompt,
                "computed": driven.computed,
                "steps": driven.steps,
                "outside": round(driven.outside / (driven.inside + driven.outside), 6),
            }
        return out

    def rows(self, done: dict[str, Any]) -> list[dict[str, Any]]:
        """A row a combination: milliseconds, percentiles of the rounds (of all gaps between tokens, for itl)."""
        rounds = list(done.values())
        return [self._row(cell, [found[cell.name] for found in rounds]) for cell in self.cells] if rounds else []

    def _row(self, cell: Cell, found: list[dict[str, Any]]) -> dict[str, Any]:
        row: dict[str, Any] = {**cell._asdict(), "n": len(found)}
        for name in MEASURES:
            values = [gap for one in found for gap in one["gaps"]] if name == "itl" else [one[name] for one in found]
            low, *points, high = np.percentile(values, [0, *PERCENTILES, 100]) * 1e3
            row[f"{name}_ms"] = {
                "n": len(values),
                "min": round(float(low), 4),
                **{f"p{percent}": round(float(value), 4) for percent, value in zip(PERCENTILES, points, strict=True)},
                "max": round(float(high), 4),
            }
        row["computed_tokens"] = found[-1]["computed"]
        row["steps"] = found[-1]["steps"]
        return row

    def more(self, done: dict[str, Any]) -> dict[str, Any]:
        """own_overhead_percent: of the time that passed while requests were under way, what measuring took."""
        shares = [one["outside"] for found in done.values() for one in found.values()]
        return {"own_overhead_percent": round(100.0 * float(np.median(shares)), 3) if shares else None}

    def table(self, done: dict[str, Any]) -> Table:
        settings, rows, more = self.settings, self.rows(done), self.more(done)
        table = Table(
            title=f"{settings['model']} {settings['dtype']}: one request at a time, "
            f"n = {rows[0]['n'] if rows else 0}, ms: median (p99)",
            caption=f"measuring took {more['own_overhead_percent']} % of the time; percentiles of few runs are their "
            "extremes",
        )
        table.add_column("guard")
        table.add_column("release")
        for heading in ("in, images, out", "first text", "between tokens", "whole reply", "after the answer"):
            table.add_column(heading, justify="right")
        for row in rows:
            cells = [row[f"{name}_ms"] for name in ("ttft", "itl", "e2e", "guard")]
            table.add_row(
                row["guard"] + (", harmful" if row["path"] == PATHS[1] else ""),
                row["release"],
                f"{row['prompt_tokens']}, {row['images']}, {row['answer_tokens']}",
                *(f"{cell['p50']:,.1f} ({cell['p99']:,.1f})" for cell in cells),
            )
        return table


def _cells(config: LatencyConfig) -> Iterator[Cell]:
    sizes = product(config.prompt_tokens, config.images, config.answer_tokens, config.guards)
    for prompt_tokens, images, answer_tokens, guard in sizes:
        for release in _releases(guard, config.releases):
            harmful = config.harmful and release in ("verdict", "window")
            for path in PATHS if harmful else PATHS[:1]:
                yield Cell(prompt_tokens, images, answer_tokens, guard, path, release)


def _releases(guard: str, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the wanted ways of release that a guard can do; without one, text leaves as it comes."""
    if guard.startswith("off"):
        return ("live",)
    able = {"verdict"}
    if not guard.endswith(AS_PUBLISHED):
        able.add("audit")
    if guard in ("protector-separate", "probe"):  # the others come when the answer has ended
        able.add("window")
    return tuple(release for release in wanted if release in able)
