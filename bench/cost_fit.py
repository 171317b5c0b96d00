"""What a step costs: seconds of a lane's batch as a function of what is in it, fitted to the steps of a measured run.

A model of time only: which tokens are in a step is the business of `replica.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..engine.errors import BadInput
from .document import BadDocument, Document, read_document
from .step_costs import StepCost

TILE = 16  # rows of AMX's tiles, and of the smallest matrix products on GPUs
ENOUGH = 6  # different batches of a lane from which a fit is worth its name
_TOLERANCE = 0.1  # relative error above which a batch counts less: something else wanted the machine


class LaneNotMeasured(BadInput):
    """A run has no steps of the lane whose cost is asked for."""


class StepLoad(NamedTuple):
    """What a lane's batch computes. decode, prefill, guard: rows of texts' next tokens, of prompts, and of what
    judges. read: tokens that decode rows attend to, summed; pairs: the same for all other rows. images: that the
    vision tower encodes."""

    decode: int = 0
    prefill: int = 0
    guard: int = 0
    read: int = 0
    pairs: int = 0
    images: int = 0

    @property
    def rows(self) -> int:
        return self.decode + self.prefill + self.guard


class Demand(NamedTuple):
    """Seconds of memory traffic and of computing that a batch needs of its device, and seconds beside both.

    Alone, a batch takes the longer of the two and `fixed`."""

    memory: float
    compute: float
    fixed: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.memory, self.compute) + self.fixed


class Costs(Protocol):
    """What a batch of a lane costs. source: where that is known from, for people."""

    @property
    def source(self) -> str: ...

    def lane(self, model: str) -> str:
        """The lane that runs a model. Raises `LaneNotMeasured`."""
        ...

    def demand(self, lane: str, load: StepLoad) -> Demand: ...


class LaneFit(NamedTuple):
    """Seconds = base + decode, prefill and guard rows x their prices + images and tiles x theirs. tile: of `TILE`
    rows or fewer, which matrix units multiply at once. error: median relative error over the `batches` it was
    fitted to. unseen: rows that were in none of them; they cost what similar ones do."""

    base: float
    decode: float
    prefill: float
    guard: float
    image: float
    batches: int
    error: float
    unseen: tuple[str, ...] = ()
    tile: float = 0.0

    def seconds(self, load: StepLoad) -> float:
        rows = self.decode * load.decode + self.prefill * load.prefill + self.guard * load.guard
        return self.base + rows + self.image * load.images + self.tile * ceil(load.rows / TILE)

    def slower(self, factor: float) -> LaneFit:
        prices = {name: factor * getattr(self, name) for name in ("base", *_ROWS, "image", "tile")}
        return self._replace(**prices)


@dataclass(frozen=True)
class FittedCosts:
    """Costs by lane, named as the engine names it: its models' names joined by `+`."""

    lanes: Mapping[str, LaneFit]
    source: str

    def lane(self, model: str) -> str:
        for name in self.lanes:
            if model in name.split("+"):
                return name
        raise LaneNotMeasured(
            f"{self.source} has too few steps of {model!r}; it has those of {', '.join(self.lanes)}. Measure with a "
            "guard that uses it, and harmful answers where these are planned for"
        )

    def demand(self, lane: str, load: StepLoad) -> Demand:
        """Measured seconds do not tell what bounds them: a batch is taken to need all of its device."""
        seconds = self.lanes[lane].seconds(load)
        return Demand(seconds, seconds)

    def slower(self, factor: float) -> FittedCosts:
        """The same on a machine that takes so many times as long."""
        return FittedCosts({name: lane.slower(factor) for name, lane in self.lanes.items()}, self.source)

    def to_dict(self) -> dict[str, Any]:
        return {
            name: {
                "base_ms": round(1e3 * fit.base, 4),
                **{f"{rows}_row_us": round(1e6 * getattr(fit, rows), 3) for rows in _ROWS},
                "image_ms": round(1e3 * fit.image, 4),
                "tile_ms": round(1e3 * fit.tile, 4),
                "batches": fit.batches,
                "median_error_percent": round(100.0 * fit.error, 2),
                "unseen": list(fit.unseen),
            }
            for name, fit in self.lanes.items()
        }


_ROWS = ("decode", "prefill", "guard")


def measured_steps(document: Document) -> dict[str, list[StepCost]]:
    """The steps of each piece of a `bench throughput`, in their order. Each has an even part of what the engine took
    beside forward passes, so that all of them add up to the engine's time. Raises `BadDocument` for a document
    without steps."""
    out: dict[str, list[StepCost]] = {}
    for name, unit in document.units.items():
        if not isinstance(unit, Mapping) or "costs" not in unit:
            continue
        try:
            some = [StepCost(*cost) for cost in unit["costs"]]
            batches = sum(cost.batches for cost in some)
            forward = sum(cost.batches * cost.seconds for cost in some)
            host = max(0.0, float(unit["inside"]) - forward) / max(1, batches)
            out[name] = [cost._replace(seconds=cost.seconds + host) for cost in some]
        except (TypeError, KeyError) as error:
            raise BadDocument(f"the steps of {name!r} are not as `bench throughput` writes them: {error!r}") from None
    if not out:
        raise BadDocument(
            f"a run of `bench {document.kind}` has no steps that costs can be fitted to; `bench throughput` has"
        )
    return out


def outside_costs(file: Path, tokens: str = "onnx int8") -> tuple[float, float]:
    """Seconds of a chunk, and of each of its tokens, of the exported detector: a line through what `bench onnx` has
    measured for one answer at a time. tokens: the column. Raises `BadDocument`, and OSError."""
    rows = read_document(file, "onnx").rows
    try:
        points = np.array([(row["tokens"], 1e-3 * row[tokens]) for row in rows if row["batch"] == 1])
        token, chunk = np.polyfit(points[:, 0], points[:, 1], 1)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise BadDocument(f"{file} has no times of `bench onnx` for one answer: {error!r}") from None
    return max(0.0, float(chunk)), max(0.0, float(token))


def fit(steps: Iterable[StepCost], source: str) -> FittedCosts:
    """Prices that are not negative and fit the relative error, batches that others disturbed counting less.

    Raises `LaneNotMeasured` where no lane has enough different batches.
    """
    by_lane: dict[str, list[StepCost]] = defaultdict(list)
    for step in steps:
        if step.seconds > 0:
            by_lane[step.lane].append(step)
    lanes = {name: _fit_lane(some) for name, some in by_lane.items() if len(some) >= ENOUGH}
    if not lanes:
        raise LaneNotMeasured(f"{source} has fewer than {ENOUGH} different batches of any lane: measure more loads")
    return FittedCosts(lanes, source)


def _fit_lane(steps: Sequence[StepCost]) -> LaneFit:
    rows = np.array([[step.decode, step.prefill, step.guard] for step in steps], dtype=float)
    seconds = np.array([step.seconds - step.vision for step in steps])
    batches = np.array([step.batches for step in steps], dtype=float)
    inputs = np.column_stack([np.ones(len(rows)), rows, np.ceil(rows.sum(axis=1) / TILE)])
    # what is frequent decides how long a run takes, but what is rare must be priced too
    weights = np.minimum(batches, 400.0) ** 0.5 / seconds
    prices = _least_squares(inputs, seconds, weights)
    for _ in range(8):  # Huber's weights: squares near, absolute values far away
        error = np.abs(inputs @ prices / seconds - 1.0)
        prices = _least_squares(inputs, seconds, weights * np.sqrt(np.minimum(1.0, _TOLERANCE / (error + 1e-12))))
    errors = np.abs(inputs @ prices / seconds - 1.0)
    base, decode, prefill, guard, tile = prices.tolist()
    unseen = tuple(name for name, column in zip(_ROWS, rows.T, strict=True) if not column.any())
    # rows of a guard go through the same layers as those of a prompt
    if "guard" in unseen:
        guard = prefill
    if "prefill" in unseen:
        prefill = guard
    if "decode" in unseen:
        decode = prefill
    towers = [step.vision for step in steps if step.images and step.vision > 0]
    image = float(np.median(towers)) if towers else 0.0
    return LaneFit(base, decode, prefill, guard, image, int(batches.sum()), float(np.median(errors)), unseen, tile)


def _least_squares(inputs: np.ndarray, target: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """min ||weights (inputs x - target)||, x >= 0, by the active set method of Lawson and Hanson (1974), ch. 23."""
    scale = np.abs(inputs).max(axis=0)
    scale[scale == 0] = 1.0
    a, b = inputs / scale * weights[:, None], target * weights
    x, passive = np.zeros(a.shape[1]), np.zeros(a.shape[1], dtype=bool)
    for _ in range(10 * a.shape[1]):
        gradient = a.T @ (b - a @ x)
        gradient[passive] = -np.inf
        best = int(np.argmax(gradient))
        if gradient[best] <= 1e-9 * np.linalg.norm(b):
            break
        passive[best] = True
        while True:
            tried = np.zeros_like(x)
            tried[passive] = np.linalg.lstsq(a[:, passive], b, rcond=None)[0]
            if not (tried[passive] <= 0).any():
                x = tried
                break
            falling = passive & (tried <= 0)
            step = np.min(x[falling] / (x[falling] - tried[falling]))
            x = x + step * (tried - x)
            passive &= x > 1e-12
            x[~passive] = 0.0
    return x / scale
