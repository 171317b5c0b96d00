"""A measurement as pieces of work that can be interrupted, written down, and gone on with later."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Any, Protocol

from rich.console import RenderableType

from .document import BadDocument, Document
from .machine import commit, this_machine, versions

Unit = tuple[str, Callable[[], Any]]
"""A piece of work: its name, which says all that decides it, and what does it. The result is plain JSON."""


class Plan(Protocol):
    """What is measured, piece by piece. kind, seed: of the document. settings: whatever decides the results, so that
    only a measurement with the same ones is gone on with. limit: seconds that it takes at most, more or less; None
    where the work decides."""

    kind: str
    seed: int

    @property
    def limit(self) -> float | None: ...

    @property
    def settings(self) -> dict[str, Any]: ...

    def warm_up(self) -> None:
        """What comes before the first piece, every time."""

    def units(self, done: dict[str, Any]) -> Iterator[Unit]:
        """The pieces in their order. `done` grows meanwhile, and later pieces may depend on it."""

    def rows(self, done: dict[str, Any]) -> list[dict[str, Any]]: ...

    def more(self, done: dict[str, Any]) -> dict[str, Any]: ...

    def table(self, done: dict[str, Any]) -> RenderableType: ...


def resumed(plan: Plan, earlier: Document) -> dict[str, Any]:
    """What an earlier document has done of a plan. Raises `BadDocument` where that was another measurement, or was
    made elsewhere: figures of both together would mean nothing."""
    own = json.loads(json.dumps(plan.settings))
    now = {"machine": asdict(this_machine()), "versions": versions(), "commit": commit()}
    then = {"machine": earlier.machine, "versions": earlier.versions, "commit": earlier.commit}
    other = [name for name in now if now[name] != then[name]]
    other += [
        f"the setting {name}"
        for name in sorted({*own, *earlier.settings})
        if own.get(name) != earlier.settings.get(name)
    ]
    if other:
        raise BadDocument(
            f"only the same measurement can be gone on with; another one has other {', other '.join(other)}"
        )
    return dict(earlier.units)


def run_units(plan: Plan, done: dict[str, Any], told: Callable[[str, int, int], None] | None = None) -> bool:
    """Do what of a plan is not in `done` yet, and put it there; False where Ctrl-C or SIGTERM came before the end.

    A piece that was interrupted is not in `done`; whatever else is raised goes on.
    """
    try:
        with terminable():
            plan.warm_up()
            for number, (name, do) in enumerate(plan.units(done), 1):
                if name not in done:
                    done[name] = do()
                if told:
                    told(plan.kind, number, max(number, len(done)))
    except KeyboardInterrupt:
        return False
    return True


@contextmanager
def unbroken() -> Iterator[None]:
    """Neither Ctrl-C nor SIGTERM ends what is done meanwhile: writing down what was measured."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM is like Ctrl-C meanwhile. Threads other than the first one get no signals: nothing changes there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
