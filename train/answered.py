"""A model's own answers to questions, through the engine: for sets that ask and do not answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..engine.engine import Engine
from ..engine.guards import Guard
from ..engine.models.loader import ModelSet
from ..engine.request import Outcome
from ..engine.sampling import SamplingParams
from .data import Example

OWN_TOKENS = 96  # of an answer that the model itself gives


def answered(
    models: ModelSet,
    questions: Sequence[Example],
    progress: Callable[[str, int, int], None] | None,
    guard: Guard | None = None,
) -> list[Example]:
    """The questions with the model's own answers, greedy; without those whose answer a guard finds harmful."""
    engine = Engine(models=models)
    sampling = SamplingParams(max_tokens=OWN_TOKENS)
    requests = [engine.submit(item.question, guard=guard, sampling=sampling) for item in questions]
    while engine.has_work:
        engine.step()
        done = sum(request.reply is not None for request in requests)
        if progress is not None and done:
            progress("answering", done, len(requests))
    replies = [request.reply for request in requests]
    return [
        replace(item, text=reply.text.strip())
        for item, reply in zip(questions, replies, strict=True)
        if reply is not None and reply.outcome in (Outcome.UNGUARDED, Outcome.CLEAN)
    ]
