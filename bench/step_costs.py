"""What the steps of a run took, by what was in them: the measurements that a model of the engine is fitted to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median
from typing import NamedTuple

from ..engine.trace import StepRecord

_GUARD = ("screen", "score", "judge", "speculative")


class StepCost(NamedTuple):
    """One lane's batches with the same rows. decode: rows that decode any text, prefill: that read a prompt; guard:
    that a detector, a judge or speculation reads. images: whether the vision tower ran. seconds: median of so
    many batches, the tower included; vision: median of the tower's part."""

    lane: str
    decode: int
    prefill: int
    guard: int
    images: bool
    batches: int
    seconds: float
    vision: float


def step_costs(steps: Sequence[StepRecord]) -> list[StepCost]:
    found: dict[tuple[str, int, int, int, bool], list[StepRecord]] = defaultdict(list)
    for step in steps:
        rows = {"decode": 0, "prefill": 0, "guard": 0}
        for work in step.works:
            rows["guard" if work.role in _GUARD else work.role] += work.tokens
        found[step.lane, rows["decode"], rows["prefill"], rows["guard"], step.vision > 0].append(step)
    return [
        StepCost(
            *key,
            batches=len(same),
            seconds=round(median(step.ended - step.began for step in same), 7),
            vision=round(median(step.vision for step in same), 7),
        )
        for key, same in sorted(found.items())
    ]


def pooled(costs: Iterable[StepCost]) -> list[StepCost]:
    """The same batches of several runs as one: in the mean over all of them, since a machine that was slow in one of
    the runs counts for as long as it was."""
    found: dict[tuple[str, int, int, int, bool], list[StepCost]] = defaultdict(list)
    for cost in costs:
        found[cost.lane, cost.decode, cost.prefill, cost.guard, cost.images].append(cost)
    out = []
    for key, same in sorted(found.items()):
        batches = sum(cost.batches for cost in same)
        seconds, vision = (
            round(sum(cost.batches * getattr(cost, name) for cost in same) / batches, 7)
            for name in ("seconds", "vision")
        )
        out.append(StepCost(*key, batches, seconds, vision))
    return out
