"""Two detectors, the dear one asked only where the cheap one is unsure, and how to set both to a budget."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import NamedTuple, TypeAlias

from ..chat import Chat
from ..errors import Aborted, InvalidGuard
from ..passes import Answer, ModelTraits, Screen
from ..request import Verdict
from .detectors import (
    Detector,
    Judging,
    bound,
    check_number,
    is_probability,
    is_sound,
    reason_of,
    screen_of,
)
from .heads import BaseHead

Pairs: TypeAlias = Sequence[tuple[float, float]]
"""For each text, P(harmless) by the cheap and by the dear detector."""


class Calibration(NamedTuple):
    """Where a cascade decides, and its rates on the texts that this was chosen with.

    asked: the share of harmless texts for which the dear detector is asked.
    """

    band: tuple[float, float]
    dear_threshold: float
    false_positives: float
    true_positives: float
    asked: float


@dataclass(frozen=True)
class Cascade:
    """Asks `dear` only where `cheap` is unsure.

    band: (low, high). A text to which `cheap` gives less than low is harmful, one to which it gives high or more is
    harmless; between them, and where `cheap` fails, the verdict of `dear` counts. dear_threshold: what `dear` is
    held against; None: its own.

    Raises `InvalidGuard` for parts that are no detectors, a band that is none, or a `cheap` that would stop an
    answer which `dear` might find harmless.
    """

    cheap: Detector
    dear: Detector
    band: tuple[float, float]
    dear_threshold: float | None = None
    name: str = "cascade"

    def __post_init__(self) -> None:
        for part in (self.cheap, self.dear):
            if not isinstance(part, Detector):
                raise InvalidGuard(f"a cascade needs two detectors, not {part!r}")
        band = self.band
        if not (isinstance(band, tuple) and len(band) == 2 and all(is_probability(value) for value in band)):
            raise InvalidGuard(f"band must be two numbers from 0 to 1, not {band!r}")
        if band[0] > band[1]:
            raise InvalidGuard(f"band must rise, not fall from {band[0]} to {band[1]}")
        if self.dear_threshold is not None:
            check_number("dear_threshold", self.dear_threshold)
        if isinstance(self.cheap, BaseHead) and self.cheap.stop_below is not None and self.cheap.stop_below > band[0]:
            raise InvalidGuard(f"stop_below must be at most the low end of the band, {band[0]}")

    @property
    def incremental(self) -> bool:
        return self.cheap.incremental

    def bind(self, traits: Mapping[str, ModelTraits]) -> Cascade:
        """The cascade with both detectors bound; raises as they do."""
        return replace(self, cheap=bound(self.cheap, traits), dear=bound(self.dear, traits))

    def screening(self, chat: Chat) -> Screen | None:
        """The cheap detector's screen; what is not clear to it alone is not clear."""
        screen = screen_of(self.cheap, chat)
        return None if screen is None else replace(screen, threshold=self.band[1])

    def judge(self, chat: Chat, answer: Answer) -> Judging:
        low, high = self.band
        first = yield from self._ask_cheap(chat, answer)
        said = f"{self.cheap.name} {first.error or format(first.score, '.3f')}"
        if first.error is None and first.score < low:
            return Verdict(first.score, low, self.name, detail=f"{said}, below the band")
        if first.error is None and first.score >= high:
            return Verdict(first.score, high, self.name, detail=f"{said}, above the band")
        verdict = yield from self.dear.judge(chat, answer)
        if not is_sound(verdict) or verdict.error is not None:
            return verdict
        threshold = verdict.threshold if self.dear_threshold is None else self.dear_threshold
        return Verdict(verdict.score, threshold, self.name, detail=f"{said}, {self.dear.name} asked")

    def _ask_cheap(self, chat: Chat, answer: Answer) -> Judging:
        try:
            verdict = yield from self.cheap.judge(chat, answer)
        except Aborted:
            raise
        except Exception as error:
            return Verdict.failed(self.cheap.name, reason_of(error))
        return verdict if is_sound(verdict) else Verdict.failed(self.cheap.name, "nonsense")

    def calibrated(self, harmless: Pairs, harmful: Pairs, budget: float, asked: float = 0.2) -> Cascade:
        """The cascade with band and dear threshold as `calibrate` finds them; raises as it does."""
        found = calibrate(harmless, harmful, budget, asked)
        return replace(self, band=found.band, dear_threshold=found.dear_threshold)


def calibrate(harmless: Pairs, harmful: Pairs, budget: float, asked: float = 0.2) -> Calibration:
    """The band and the dear threshold that find most of the harmful texts within a budget of false positives.

    harmless, harmful: held-out texts. budget: the share of harmless ones that may be called harmful. asked: the
    share of them for which the dear detector may be asked. The allowed false positives are divided between the cheap
    detector (all below the band) and the dear one in every way there is, the band being as wide as `asked` allows; of
    ways that find as much, the one with fewer false positives counts, then the one that asks less. Takes
    O(budget n (n + m)) steps for n harmless and m harmful texts.

    Raises `InvalidGuard` for shares and scores outside [0, 1], and where either list is empty.
    """
    for name, share in (("budget", budget), ("asked", asked)):
        if not is_probability(share):
            raise InvalidGuard(f"{name} must be a share from 0 to 1, not {share!r}")
    if not harmless or not harmful:
        raise InvalidGuard("a calibration needs scores of harmless and of harmful texts")
    if not all(is_probability(score) for pair in (*harmless, *harmful) for score in pair):
        raise InvalidGuard("a calibration needs scores from 0 to 1")
    cheap = sorted(score for score, _ in harmless)
    allowed, may_ask = floor(budget * len(cheap)), floor(asked * len(cheap))
    best: tuple[tuple[int, int, int], Calibration] | None = None
    for spent in range(allowed + 1):
        low = _at_most_below(cheap, spent)
        below = bisect_left(cheap, low)
        high = _at_most_below(cheap, below + may_ask)
        unsure = sorted(dear for score, dear in harmless if low <= score < high)
        threshold = _at_most_below(unsure, allowed - below)
        wrong, found = (
            sum(score < low or (score < high and dear < threshold) for score, dear in texts)
            for texts in (harmless, harmful)
        )
        rank = (found, -wrong, -len(unsure))
        if best is None or rank > best[0]:
            rates = (wrong / len(harmless), found / len(harmful), len(unsure) / len(harmless))
            best = rank, Calibration((low, high), threshold, *rates)
    assert best is not None
    return best[1]


def _at_most_below(scores: Sequence[float], count: int) -> float:
    """The highest threshold in [0, 1] below which at most `count` of the sorted scores lie."""
    return scores[count] if count < len(scores) else 1.0
