"""Tiny models that screen each other, forced answers, and loops that ask for one pass; no tests here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from stockade.engine.engine import Engine, Request
from stockade.engine.errors import PassError
from stockade.engine.models.heads import IN_CONTEXT, Head, HeadSpec
from stockade.engine.models.loader import ModelSet
from stockade.engine.models.model import Model
from stockade.engine.passes import Answer, Ask, Decision, Loop
from stockade.engine.request import Outcome, Reply
from stockade.engine.runner import StepResult
from stockade.engine.sampling import SamplingParams
from stockade.engine.scheduler import Lane, Work

PAGE = 16


def head(layer: int, pooling: Literal["last", "mean"], template: str = "response", scale: float = 0.02) -> Head:
    """Random weights whose scores lie around a half."""
    weight = torch.randn(64, generator=torch.Generator().manual_seed(layer)) * scale
    return Head(HeadSpec(layer, pooling, template=template), weight, torch.tensor([0.1]))


def detector_on(model: Model, found: Head, name: str = "detector") -> Model:
    return replace(model, name=name, depth=found.spec.layer, head=found)


def probe_on(mllm: Model, layer: int = 2) -> Model:
    return detector_on(mllm, head(layer, "mean", IN_CONTEXT), "probe")


def with_models(models: ModelSet, **more: Model) -> ModelSet:
    return ModelSet({**models.models, **more}, models.device, models.dtype)


def engine_of(models: ModelSet, pages: int | None = None, **options: Any) -> Engine:
    """An engine whose pool holds so many pages of the largest layout."""
    largest = max(model.layout(PAGE).page_bytes for model in models.models.values())
    return Engine(models=models, tokens_per_page=PAGE, kv_bytes=largest * pages if pages else 16 << 20, **options)


Run = Callable[[Lane, list[Work]], StepResult]


def between(engine: Engine, change: Callable[[Run, Lane, list[Work]], StepResult]) -> None:
    """`change` runs every batch from now on; the first thing it gets is what ran them until now."""
    run = engine.runner.run
    engine.runner.run = lambda lane, works: change(run, lane, works)  # type: ignore[method-assign]


def force(engine: Engine, targets: Mapping[int, Sequence[int]]) -> None:
    """The MLLM's first answer to a request (by id) begins with these tokens: their logits become the largest, or they
    take the places of those that were chosen."""

    @torch.inference_mode()
    def forced(run: Run, lane: Lane, works: list[Work]) -> StepResult:
        result = run(lane, works)
        row = 0
        for work in result.works:
            sequence = work.sequence
            target = targets.get(sequence.order[0], ()) if sequence.draw == 0 and sequence.sampling else ()
            for ahead in range(1 + len(work.drafts)):
                at = sequence.num_tokens - sequence.prompt_tokens + ahead
                if at < len(target) and result.ids is not None:  # chosen already, on the device
                    result.ids[row] = target[at]
                elif at < len(target) and result.logits is not None:
                    result.logits[row, target[at]] = 1e6
                row += 1
        return result

    between(engine, forced)


def submit(
    engine: Engine,
    loop: Loop,
    sampling: SamplingParams | None = None,
    streaming: bool = False,
    salt: str | None = None,
) -> Request:
    return engine.driver.submit(loop, sampling, salt, streaming, guarded=True)


def asking(ask: Ask, found: list[Any]) -> Loop:
    """One pass; what it gives, or the error it ends with, is appended."""
    try:
        found.append((yield ask))
    except PassError as error:
        found.append(error)
    return Decision(Answer(""), Outcome.CLEAN)


def finish(engine: Engine) -> None:
    """Run everything to its end; the pool must be clean after every step."""
    for _ in range(20_000):
        if not engine.has_work:
            break
        engine.step()
        engine.check_integrity()
    assert not engine.has_work
    assert_empty(engine)


def assert_empty(engine: Engine) -> None:
    assert engine.pool.owned_pages == 0
    for lane in engine.lanes:
        assert not lane.running and not lane.waiting
        assert len(lane.free_slots) == lane.max_sequences


def ask(engine: Engine, what: Ask, **options: Any) -> Any:
    """What one pass gives, alone; raises the `BadInput` or `PassError` that it ends with."""
    found: list[Any] = []
    submit(engine, asking(what, found), **options)
    finish(engine)
    if isinstance(found[0], PassError):
        raise found[0]
    return found[0]


def replied(request: Request) -> Reply:
    assert request.reply is not None
    return request.reply
