"""A latency objective: what a user may have to wait at most, and how many of the requests have to keep to it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from ..engine.errors import BadInput

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_TERM = re.compile(r"(ttft|itl|e2e)=([0-9.]+)(us|ms|s)")


class Latency(NamedTuple):
    """One request's seconds. ttft: until the first text that may be shown. itl: between two of the answer's tokens, in
    the mean. e2e: until the reply is whole."""

    ttft: float
    itl: float
    e2e: float


class Objective(NamedTuple):
    """Seconds at most; None does not matter. See `Latency`."""

    ttft: float | None = None
    itl: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Of `ttft=1s,itl=100ms,e2e=10s`, or some of these. Raises `BadInput`."""
        found: dict[str, float] = {}
        for term in text.split(","):
            match = _TERM.fullmatch(term.strip())
            if match is None or match[1] in found or match[2].count(".") > 1 or not float(match[2]) > 0:
                raise BadInput(
                    f"an objective is some of ttft=1s,itl=100ms,e2e=10s, each once and above 0, not {text!r}"
                )
            found[match[1]] = float(match[2]) * _UNITS[match[3]]
        return cls(**found)

    def met(self, latency: Latency) -> bool:
        """Whether a request kept to it; NaN does not."""
        return all(bound is None or value <= bound for bound, value in zip(self, latency, strict=True))

    def share_met(self, latencies: Iterable[Latency]) -> float:
        """The part of the requests that kept to it; 0 without any."""
        known = [self.met(latency) for latency in latencies]
        return sum(known) / len(known) if known else 0.0

    def __str__(self) -> str:
        return ",".join(f"{name}={_text(value)}" for name, value in self._asdict().items() if value is not None)


def _text(seconds: float) -> str:
    return f"{seconds:g}s" if seconds >= 1 else f"{1e3 * seconds:g}ms" if seconds >= 1e-3 else f"{1e6 * seconds:g}us"
