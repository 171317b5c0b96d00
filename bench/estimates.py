"""Medians with confidence intervals, by bootstrap: for differences and ratios of pairs that few runs have to show."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

_RESAMPLES = 4000


class Estimate(NamedTuple):
    """The median of n values, and the 95 % interval that it lies in (percentile bootstrap, Efron 1979)."""

    n: int
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Estimate:
        """The same values give the same interval. Raises ValueError without values."""
        known = np.asarray(list(values), dtype=float)
        if not known.size:
            raise ValueError("no values to estimate from")
        drawn = np.random.default_rng(0).integers(0, known.size, (_RESAMPLES, known.size))
        low, high = np.percentile(np.median(known[drawn], axis=1), [2.5, 97.5])
        return cls(known.size, float(np.median(known)), float(low), float(high))

    @classmethod
    def of_mean(cls, values: Iterable[float], over: Iterable[float] | None = None) -> Estimate:
        """The mean in the median's place: for what happens in few of the runs and has to count by how often. over:
        the mean divided by that of these, one for each value. Raises ValueError without values."""
        known = np.asarray(list(values), dtype=float)
        if not known.size:
            raise ValueError("no values to estimate from")
        by = np.ones_like(known) if over is None else np.asarray(list(over), dtype=float)
        drawn = np.random.default_rng(0).integers(0, known.size, (_RESAMPLES, known.size))
        low, high = np.percentile(known[drawn].sum(axis=1) / by[drawn].sum(axis=1), [2.5, 97.5])
        return cls(known.size, float(known.sum() / by.sum()), float(low), float(high))

    def scaled(self, factor: float) -> Estimate:
        low, high = sorted((self.low * factor, self.high * factor))
        return Estimate(self.n, self.median * factor, low, high)

    def to_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in self._asdict().items()}

    def __str__(self) -> str:
        digits = 1 if abs(self.median) >= 10 else 2
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"
