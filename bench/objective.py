"""What users are promised: bounds on a request's latency, and how many requests keep them (goodput).

Goodput, requests a second that meet the objective, is DistServe's measure (Zhong et al., arXiv 2401.09670).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from ..engine.errors import BadInput

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0}


class BadObjective(BadInput):
    """A latency objective names something unknown, or no time."""


@dataclass(frozen=True)
class Objective:
    """Seconds at most, None: whatever. ttft: until the first text is shown. itl: between two tokens of the answer, in
    the mean of a request. e2e: until the reply is whole."""

    ttft: float | None = None
    itl: float | None = None
    e2e: float | None = None

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Of "ttft=1s,itl=100ms,e2e=10s", any of them; a number without a unit is seconds. Raises `BadObjective`."""
        bounds: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            found = re.fullmatch(r"([0-9.]+)\s*([a-z]*)", value.strip())
            if name not in cls.__dataclass_fields__ or name in bounds or not found or found[2] not in _UNITS:
                raise BadObjective(
                    f"an objective is some of {', '.join(f'{known}=TIME' for known in cls.__dataclass_fields__)}, "
                    f"each once, with a comma between and a TIME as 100ms or 1.5s, not {text!r}"
                )
            try:
                bounds[name] = float(found[1]) * _UNITS[found[2]]
            except ValueError:
                raise BadObjective(f"{value!r} is no time") from None
            if not bounds[name] > 0 or not isfinite(bounds[name]):
                raise BadObjective(f"a bound is above 0, not {value!r}")
        return cls(**bounds)

    def met(self, ttft: float, itl: float, e2e: float) -> bool:
        """Whether a request with these seconds keeps it; at a bound it does."""
        pairs = ((ttft, self.ttft), (itl, self.itl), (e2e, self.e2e))
        return all(bound is None or seconds <= bound for seconds, bound in pairs)

    def to_dict(self) -> dict[str, Any]:
        return {name: bound for name, bound in asdict(self).items() if bound is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name} ≤ {bound:g} s" for name, bound in self.to_dict().items())
