"""Who runs when: budgets, order, preemption, and that the oldest always gets on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stockade.engine.engine import Engine
from stockade.engine.errors import DoesNotFit
from stockade.engine.guards import Guard
from stockade.engine.models.heads import Head, HeadSpec
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.sampling import SamplingParams
from stockade.engine.scheduler import Work

PAGE = 16


@pytest.fixture(scope="module")
def models(checkpoint: Callable[[str], Path]) -> ModelSet:
    return load_models(
        checkpoint("llama-gqa"), checkpoint("classifier"), checkpoint("llama-mha-tied"), dtype=torch.float32
    )


def engine_of(models: ModelSet, pages: int | None = None, **options: Any) -> Engine:
    """An engine whose pool holds so many pages of the language model (a slab a layout at least)."""
    layout = models.models["mllm"].layout(PAGE)
    slabs = 8 << 20 if pages is None else pages * layout.page_bytes
    return Engine(models=models, tokens_per_page=PAGE, kv_bytes=slabs, **options)


def text_only(models: ModelSet) -> ModelSet:
    return ModelSet({"mllm": models.models["mllm"]}, models.device, models.dtype)


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 380, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=True)


def watch(engine: Engine) -> list[list[Work]]:
    """Every batch that runs from now on."""
    batches: list[list[Work]] = []
    run = engine.runner.run

    def watched(lane: Any, works: list[Work]) -> Any:
        batches.append(list(works))
        return run(lane, works)

    engine.runner.run = watched  # type: ignore[method-assign]
    return batches


def test_no_step_computes_more_than_the_budget_or_holds_more_sequences_than_allowed(models: ModelSet) -> None:
    engine = engine_of(models, max_batch_tokens=24, max_sequences=3)
    batches = watch(engine)
    engine.generate([prompt(n, n) for n in (50, 1, 30, 7, 25, 2, 90)], greedy(12))
    assert max(sum(work.length for work in works) for works in batches) == 24
    assert max(len(works) for works in batches) == 3
    assert all(work.length >= 1 for works in batches for work in works)
    assert all(len({id(work.sequence) for work in works}) == len(works) for works in batches)


def test_decoding_goes_on_while_a_long_prompt_is_computed_in_chunks(models: ModelSet) -> None:
    engine = engine_of(models, max_batch_tokens=16, max_sequences=4)
    first = engine.submit_prompt(prompt(5), greedy(40))
    engine.step()
    second = engine.submit_prompt(prompt(150, 1), greedy(1))
    batches = watch(engine)
    while second.reply is None:
        engine.step()
    assert len(batches) >= 10
    assert all(works[0].sequence.order[0] == first.id and works[0].length == 1 for works in batches)
    assert all(works[1].length == 15 for works in batches[:-1])


def test_first_come_first_served(models: ModelSet) -> None:
    engine = engine_of(models, max_sequences=1)
    requests = [engine.submit_prompt(prompt(9, n), greedy(3)) for n in range(4)]
    finished = []
    while engine.has_work:
        finished += [reply.id for reply in engine.step()]
    assert finished == [request.id for request in requests]


def test_the_youngest_is_preempted_and_the_oldest_never(models: ModelSet) -> None:
    engine = engine_of(text_only(models), pages=10)
    requests = [engine.submit_prompt(prompt(20, n), greedy(60)) for n in range(4)]
    batches = watch(engine)
    while engine.has_work:
        engine.step()
        engine.check_integrity()
    preemptions = [request.passes[0].preemptions for request in requests]
    assert preemptions[0] == 0 and sum(preemptions) == engine.scheduler.preemptions > 0
    assert preemptions[-1] == max(preemptions)
    oldest = [works for works in batches if requests[0].id in {work.sequence.order[0] for work in works}]
    assert batches[: len(oldest)] == oldest  # it ran in every step from the first to its last
    assert engine.pool.owned_pages == 0


def test_a_request_that_can_never_fit_is_refused_when_it_comes(models: ModelSet) -> None:
    engine = engine_of(text_only(models), pages=4)
    with pytest.raises(DoesNotFit, match=r"66 tokens .* holds 64 tokens of this model; shorten .* raise kv_bytes"):
        engine.submit_prompt(prompt(10), greedy(56))
    assert not engine.has_work
    assert len(engine.generate([prompt(10)], greedy(54))[0].token_ids) == 54


def test_a_request_as_large_as_the_pool_runs_although_a_page_it_begins_with_is_cached(models: ModelSet) -> None:
    engine = engine_of(text_only(models), pages=4)
    engine.generate([prompt(8)], greedy(1))
    for known in (8, 24, 40):  # a partial hit in the first, second and third page
        request = engine.submit_prompt([*prompt(known, 0)[: known - 4], *prompt(60 - known + 4, known)], greedy(4))
        for _ in range(20):
            engine.step()
        assert request.reply is not None and len(request.reply.token_ids) == 4
    engine.check_integrity()


def test_a_guards_pass_gets_its_pages_however_many_younger_requests_come(models: ModelSet) -> None:
    """Its layout needs a whole slab, and younger answers take turns in the pages of every one."""
    mllm, other = models.models["mllm"], models.models["detoxifier"]
    head = Head(HeadSpec(2, "last", threshold=0.0), torch.ones(64) / 64)
    detector = replace(other, name="detector", depth=2, head=head)
    both = ModelSet({"mllm": mllm, "detector": detector}, models.device, models.dtype)
    engine = engine_of(both, pages=64, max_sequences=48)
    assert engine.pool.slab_bytes == 2 * mllm.layout(PAGE).page_bytes
    guarded = engine.submit("Who?", guard=Guard.protector(detoxifier=None, template="response"), sampling=greedy(25))
    others = [engine.submit_prompt(prompt(10, n), greedy(10 + n % 27)) for n in range(40)]
    for number in range(80):
        if guarded.reply is not None:
            break
        others += [engine.submit_prompt(prompt(10, number), greedy(10 + number % 27)) for _ in range(2)]
        engine.step()
        engine.check_integrity()
    assert guarded.reply is not None and not guarded.reply.error
    assert any(request.reply is None for request in others)
    for request in others:
        if request.reply is None:
            engine.abort(request.id)
    assert engine.pool.owned_pages == 0


def test_waiting_requests_hold_no_pages(models: ModelSet) -> None:
    engine = engine_of(models, max_sequences=1)
    for n in range(3):
        engine.submit_prompt(prompt(40, n), greedy(4))
    engine.step()
    assert engine.pool.owned_pages == models.models["mllm"].layout(PAGE).pages(40)
    assert [len(lane.waiting) for lane in engine.lanes] == [2, 0, 0]
