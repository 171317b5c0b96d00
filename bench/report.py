"""What every measurement ends with: spreads, a table for people, one JSON document as the last line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console, RenderableType

from ..engine.errors import StockadeError
from .document import Document, Session, check_file

WIDTH = 120


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


def begin(console: Console, file: Path | None = None) -> Session:
    """A measurement begins; warns when others use the machine. Raises `BadInput` where `file` cannot be written."""
    check_file(file)
    session = Session.begin()
    warn(console, session.warnings)
    return session


def emit(table: RenderableType, body: dict[str, Any], session: Session, file: Path | None = None) -> None:
    """Print the table and, as the last line of stdout, the document; write that to `file` too.

    body: what a report tells of itself: `benchmark` becomes the document's kind; `model`, `dtype` and `config` its
    settings; `rows`, where it has them, its rows; all else stands beside these.
    """
    rest = dict(body)
    kind, rows = rest.pop("benchmark"), rest.pop("rows", [])
    settings = {name: rest.pop(name) for name in ("model", "dtype") if name in rest} | rest.pop("config", {})
    show(table, session.document(kind, settings, rows, seed=settings.get("seed"), more=rest), file)


def show(table: RenderableType, document: Document, file: Path | None = None) -> None:
    """Print the table, what is wrong with it and, as the last line of stdout, the document without its units; write
    all of that to `file`."""
    console = Console(highlight=False)
    if not console.is_terminal:  # nobody's window is too narrow
        console.width = max(console.width, WIDTH)
    console.print(table)
    warn(Console(stderr=True, highlight=False), document.warnings)
    if file is not None:
        document.write(file)
    print(replace(document, units={}).to_json())


def warn(console: Console, warnings: Iterable[str]) -> None:
    for warning in warnings:
        console.print(f"warning: {warning}", style="bold yellow")
