"""Contestants that do the same work in turn, in short pieces, until their ratios are known closely enough.

A machine that is slow for seconds is slow for all of them meanwhile. A round is one piece of work that everybody did,
and rounds are what medians and intervals are of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from random import Random
from typing import Any, Protocol, TypeVar

from ..engine.errors import BadInput
from .estimates import Estimate
from .report import Spread
from .units import Unit

ROUND = ", round "  # in the name of a unit, between a contest's name and the round's number
Round = dict[str, list[float]]
"""Seconds of each contestant's pieces, in order."""
Key = TypeVar("Key")


class Steps(Protocol):
    """Work between its first step and its last; its clock stands still between steps."""

    @property
    def done(self) -> bool: ...

    def step(self) -> None: ...


def take_turns(working: Mapping[Key, Steps], random: Random) -> None:
    """Step all of them in turn until all are done: in an order drawn anew, then in its reverse, so that neither who
    comes first nor a machine that slows down favors anybody."""
    while left := [key for key, one in working.items() if not one.done]:
        order = random.sample(left, len(left))
        for key in (*order, *reversed(order)):
            if not working[key].done:
                working[key].step()


@dataclass(frozen=True)
class Enough:
    """When to end: after `least` rounds of a contest, once the 95 % intervals of its ratios lie within ± `tolerance`
    of the medians; or, whatever is known by then, when all rounds together took `limit` seconds, one
    of each at least."""

    least: int = 6
    tolerance: float = 0.025
    limit: float = 600.0

    def __post_init__(self) -> None:
        """Raises `BadInput`."""
        values = self.least, self.tolerance, self.limit
        if not all(isfinite(value) and value > 0 for value in values):
            raise BadInput(f"rounds, a tolerance and a time are above 0 and finite, not {values}")


@dataclass(frozen=True)
class Contest:
    """compared: of which contestants' times the ratios are, one over the other. play: one round, by its number; what
    it gives is JSON, of which `seen` makes the round."""

    name: str
    compared: Sequence[tuple[str, str]]
    play: Callable[[int], Any]
    seen: Callable[[Any], Round] = dict

    def rounds(self, done: Mapping[str, Any]) -> list[Round]:
        """Those that were played, of a measurement's units."""
        return [self.seen(found) for unit, found in done.items() if unit.rpartition(ROUND)[0] == self.name]

    def ratio(self, rounds: Sequence[Round], over: str, under: str) -> Estimate:
        """How many times as long `over` takes. Raises ValueError without rounds."""
        return Estimate.of(sum(found[over]) / sum(found[under]) for found in rounds)

    def ratios(self, rounds: Sequence[Round]) -> dict[str, dict[str, float]]:
        """All of them for a document; within_percent: how far the interval reaches from the median at most."""
        return {
            f"{over} / {under}": {**found.to_dict(), "within_percent": round(100.0 * within(found), 2)}
            for over, under in self.compared
            if (found := self.ratio(rounds, over, under))
        }

    def rows(self, done: Mapping[str, Any], tokens: int) -> list[dict[str, Any]]:
        """A document's row of the first pair, none before the first round. tokens: that each of the two made, or
        read, in a round; ratio: of the rounds' own ratios."""
        if not (rounds := self.rounds(done)):
            return []
        over, under = self.compared[0]
        rates = {one: Spread.of(tokens / sum(found[one]) for found in rounds).to_dict() for one in (under, over)}
        ratio = self.ratios(rounds)[f"{over} / {under}"]
        return [{"workload": self.name, "n": len(rounds), "tokens_per_s": rates, "ratio": ratio}]

    def known(self, rounds: Sequence[Round], tolerance: float) -> bool:
        return all(within(self.ratio(rounds, *pair)) <= tolerance for pair in self.compared)


def within(estimate: Estimate) -> float:
    """How far from its median the interval reaches at most, as a part of the median."""
    return max(estimate.high - estimate.median, estimate.median - estimate.low) / abs(estimate.median)


def interval(ratio: Mapping[str, float]) -> str:
    """Of a document's ratio."""
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def play(contests: Sequence[Contest], enough: Enough, done: Mapping[str, Any]) -> Iterator[Unit]:
    """Rounds of all contests in turn, as units of a plan, until there are enough of them in `done`."""
    number = 0
    while due := [
        contest
        for contest in contests
        if number < enough.least or not contest.known(contest.rounds(done)[:number], enough.tolerance)
    ]:
        for contest in due:
            spent = sum(sum(map(sum, found.values())) for one in contests for found in one.rounds(done))
            if number and spent >= enough.limit:
                return
            yield f"{contest.name}{ROUND}{number}", partial(contest.play, number)
        number += 1


def shortfall(contests: Sequence[Contest], enough: Enough, done: Mapping[str, Any]) -> str:
    """Which ratios are not as closely known as they were to be, in words; nothing where all are."""
    loose = []
    for contest in contests:
        for pair, found in contest.ratios(contest.rounds(done)).items() if contest.rounds(done) else ():
            if found["within_percent"] > 100.0 * enough.tolerance:
                loose.append(f"{contest.name}, {pair} to ± {found['within_percent']:.1f} %")
    wanted = f"wanted was ± {100.0 * enough.tolerance:g} %, or {enough.limit:,.0f} s"
    return f"{wanted}; known are {'; '.join(loose)}" if loose else ""
