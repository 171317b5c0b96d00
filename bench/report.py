"""What every measurement ends with: spreads, a table for people, one JSON document as the last line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console, RenderableType

from ..engine.errors import StockadeError
from .machine import Machine, this_machine


class WrongPath(StockadeError):
    """A measured run did not do the work it was meant to: its number would mean nothing."""


class Spread(NamedTuple):
    """Median, 10th and 90th percentile of n values."""

    n: int
    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Raises ValueError without values."""
        known = list(values)
        if not known:
            raise ValueError("no values to summarize")
        low, middle, high = np.percentile(known, [10, 50, 90])
        return cls(len(known), float(middle), float(low), float(high))

    def scaled(self, factor: float) -> Spread:
        return Spread(self.n, self.median * factor, self.p10 * factor, self.p90 * factor)

    def to_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in self._asdict().items()}

    def __str__(self) -> str:
        return f"{self.median:,.1f} ({self.p10:,.1f}-{self.p90:,.1f})"


def begin(console: Console) -> Machine:
    """The machine as it is before anything is measured; warns when it is busy."""
    machine = this_machine()
    if machine.warning:
        console.print(f"warning: {machine.warning}", style="bold yellow")
    return machine


def emit(table: RenderableType, document: dict[str, Any], machine: Machine, file: Path | None = None) -> None:
    """Print the table and, as the last line of stdout, the document with the machine; write it to `file` too."""
    whole = {**document, "machine": {**asdict(machine), "warning": machine.warning}}
    Console(highlight=False).print(table)
    text = json.dumps(whole, allow_nan=False)
    if file is not None:
        file.write_text(text + "\n", encoding="utf-8")
    print(text)
