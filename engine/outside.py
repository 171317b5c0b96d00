"""Detectors that run outside the engine, on threads of their own: what they are to it, and a text they read.

The engine hands tokens over and asks for scores between steps; it never waits for one while it has anything to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from .models.heads import HeadSpec
from .request import PassRecord
from .text import Codec


class Reading(Protocol):
    """One text that an outside detector reads. on_done: called, in any thread, when `poll` has something new."""

    on_done: Callable[[], None] | None

    def feed(self, keep: int, ids: Sequence[int], pool_from: int) -> None:
        """ids: all tokens of the text so far, the first `keep` as in the last feed; a head that pools the mean reads
        those from `pool_from` on. Returns at once. Raises `PassError` or `BadInput`."""

    def poll(self) -> float | None:
        """P(harmless) of the tokens of the last feed; None while they are under way. Raises `PassError`."""

    def cancel(self) -> None:
        """Nobody asks for it any more."""


@runtime_checkable
class OutsideDetector(Protocol):
    """context: most tokens of a text. incremental: whether a text that grows costs its new tokens only."""

    @property
    def name(self) -> str: ...

    @property
    def spec(self) -> HeadSpec: ...

    @property
    def codec(self) -> Codec: ...

    @property
    def context(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def incremental(self) -> bool: ...

    def open(self) -> Reading: ...

    def close(self) -> None: ...


@dataclass(eq=False)
class OutsideText:
    """A text that an outside detector reads for a pass. idle: whether all that was handed over has its score."""

    reading: Reading
    record: PassRecord
    num_tokens: int = 0
    idle: bool = True
    deadline: float | None = None  # by `time.perf_counter`

    def read(self, keep: int, ids: Sequence[int], pool_from: int, more: bool) -> None:
        """The text is `ids` now, of which it had the first `keep`. more: whether it may still grow."""
        if keep == len(ids) == self.num_tokens:
            return
        self.reading.feed(keep, ids, pool_from)
        self.record.computed_tokens += len(ids) - keep
        self.num_tokens = len(ids)
        self.idle = False

    def poll(self) -> float | None:
        """The score of all that was handed over, once; None while there is none. Raises `PassError`."""
        score = self.reading.poll()
        self.idle = score is not None
        return score

    def stop(self) -> None:
        self.reading.cancel()
