"""How slow the machine was at each piece of a run, told by the steps of the pieces around it, never by its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .cost_fit import FittedCosts, StepLoad, fit
from .step_costs import StepCost, pooled

NEAR = 3  # pieces of other loads before and after, as many as the guards of a load mostly are

Pieces = Mapping[str, Sequence[StepCost]]
"""The steps of each piece, in the order in which they were run."""


def fit_at_mean_pace(
    pieces: Pieces, source: str, leave_out: Sequence[str] = ()
) -> tuple[FittedCosts, dict[str, float]]:
    """What steps cost at the machine's mean speed, and by piece how many times as long they took around it.

    leave_out: pieces that costs are not fitted to. Raises as `fit` does.
    """
    rough = fit(_at({name: 1.0 for name in pieces if name not in leave_out}, pieces), source)
    paces = _paces(pieces, rough)
    return fit(_at({name: paces[name] for name in pieces if name not in leave_out}, pieces), source), paces


def _at(paces: Mapping[str, float], pieces: Pieces) -> list[StepCost]:
    return pooled(
        cost._replace(seconds=cost.seconds / pace, vision=cost.vision / pace)
        for name, pace in paces.items()
        for cost in pieces[name]
    )


def _paces(pieces: Pieces, costs: FittedCosts) -> dict[str, float]:
    spent = {name: _spent(some, costs) for name, some in pieces.items()}
    took, due = (sum(column) for column in zip(*spent.values(), strict=True))
    names, found = list(pieces), {}
    for at, name in enumerate(names):
        before = [one for one in names[:at] if _load(one) != _load(name)][-NEAR:]
        after = [one for one in names[at:] if _load(one) != _load(name)][:NEAR]
        near, usual = (sum(spent[one][column] for one in (*before, *after)) for column in (0, 1))
        found[name] = near / usual / (took / due) if usual > 0 else 1.0
    return found


def _spent(some: Sequence[StepCost], costs: FittedCosts) -> tuple[float, float]:
    """Seconds that steps took, and that they would in the fit."""
    known = [cost for cost in some if cost.lane in costs.lanes]
    due = (
        costs.lanes[cost.lane].seconds(StepLoad(cost.decode, cost.prefill, cost.guard)) + cost.vision
        for cost in known
    )
    return (
        sum(cost.batches * cost.seconds for cost in known),
        sum(cost.batches * seconds for cost, seconds in zip(known, due, strict=True)),
    )


def _load(name: str) -> str:
    return name.rsplit(" ", 2)[0]
