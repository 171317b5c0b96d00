"""A batch between its launch and the arrival of what it found: on a GPU the host goes on meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .runner import StepResult
    from .scheduler import Work
    from .sequence import Sequence


@dataclass(eq=False)
class Flight:
    """works: as they were launched. result: what the runner gave for them, perhaps not readable yet. began: seconds
    of `time.perf_counter`; vision: of them in the vision tower.

    dropped: sequences that have changed since, so that what was computed of them counts for nothing.
    """

    works: list[Work]
    result: StepResult
    began: float
    vision: float
    dropped: set[Sequence] = field(default_factory=set)

    @property
    def has_ended(self) -> bool:
        """Whether its result can be read without waiting."""
        return self.result.arrival is None or self.result.arrival.event.query()

    def wait(self) -> None:
        """Until it has ended."""
        if self.result.arrival is not None:
            self.result.arrival.event.synchronize()

    def drop(self, sequence: Sequence) -> None:
        if any(work.sequence is sequence for work in self.works):
            self.dropped.add(sequence)
