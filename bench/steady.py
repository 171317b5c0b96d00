"""An engine whose steps take as long as they are told to: a stand-in for measuring the measurements, not a product.

What a benchmark reports of it is known beforehand, so it shows what the benchmark adds, loses or attributes wrongly.
Everything but the time is the real engine's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

from ..engine.engine import Engine
from ..engine.models.loader import ModelSet
from ..engine.request import Reply
from ..engine.running import Request
from ..engine.trace import Recorder, StepWork


class SteadyEngine(Engine):
    """cost: seconds of a step by what it did. submission: seconds of taking a request in. What really takes longer is
    not made shorter."""

    def __init__(
        self, models: ModelSet, cost: Callable[[Sequence[StepWork]], float], submission: float = 0.0, **options: Any
    ) -> None:
        super().__init__(models=models, **options)
        self.cost, self.submission = cost, submission

    def submit(self, *args: Any, **options: Any) -> Request:
        until = perf_counter() + self.submission
        request = super().submit(*args, **options)
        _work_until(until)
        return request

    def step(self) -> list[Reply]:
        began, told = perf_counter(), self.recorder
        self.recorder = own = Recorder()
        replies = super().step()
        self.recorder = told
        _work_until(began + self.cost([work for step in own.steps for work in step.works]))
        if told is not None:
            own.steps[:1] = [replace(step, began=began) for step in own.steps[:1]]
            own.steps[-1:] = [replace(step, ended=perf_counter()) for step in own.steps[-1:]]
            told.steps += own.steps
            told.replies += own.replies
            told.submitted |= own.submitted
        return replies


def _work_until(when: float) -> None:
    """Without sleeping, as a real step does."""
    while perf_counter() < when:
        pass
