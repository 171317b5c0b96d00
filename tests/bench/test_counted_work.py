"""The work of a fixed small workload under every guard, counted: what CI can gate on, as no clock is in it.

A change that makes the engine compute more, or less, fails here until `counted_work.json` says so too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from stockade.bench.asking import Asker
from stockade.bench.traffic import Item
from stockade.bench.variants import PATHS, bench_models
from stockade.bench.workload import sources
from stockade.engine import answers
from stockade.engine.engine import Engine
from stockade.engine.models.loader import ModelSet
from stockade.engine.sampling import Sampled, SamplerRow, SamplingParams
from stockade.engine.trace import Recorder

WANTED = Path(__file__).with_name("counted_work.json")
GUARDS = (
    *("off", "protector-separate", "protector-alarmed", "protector-adapter", "probe", "ecso", "ecso-continued"),
    *("protector-as-published", "ecso-as-published"),
)
CASES = [(guard, path) for guard in GUARDS for path in (PATHS[:1] if guard == "off" else PATHS)]
ANSWER = 48
TEXT = "the river runs by the old mill and the garden, "


@pytest.fixture(scope="module")
def models() -> Iterator[ModelSet]:
    with sources("tiny-llava") as weights:
        yield bench_models(weights, torch.float32)


@pytest.fixture(autouse=True)
def one_text(monkeypatch: pytest.MonkeyPatch, models: ModelSet) -> None:
    """Every pass writes the same text, whatever the random weights of this version of everything would say."""
    ids = models.models["mllm"].codec.encode_text(TEXT)[1:]

    def sample(logits: torch.Tensor, rows: list[SamplerRow]) -> list[Sampled | None]:
        assert len(logits) == len(rows)
        return [Sampled(ids[row.position % len(ids)]) for row in rows]

    monkeypatch.setattr(answers, "sample", sample)


def counted(models: ModelSet, guard: str, path: str) -> dict[str, Any]:
    """Two requests at once, each with an image of its own."""
    engine = Engine(models=models, device="cpu", kv_bytes=64 << 20, tokens_per_page=16, max_batch_tokens=128)
    engine.recorder = Recorder()
    asker, random = Asker(engine), Random(0)
    sampling = SamplingParams(max_tokens=ANSWER, ignore_eos=True)
    requests = []
    for _ in range(2):
        ask = asker.ask(Item(0.0, 12, 1, ANSWER, path == PATHS[1]), guard, random)
        requests.append(engine.submit(ask.messages, guard=ask.guard, sampling=sampling))
    pages = 0
    while engine.has_work:
        engine.step()
        pages = max(pages, engine.pool.owned_pages)
    engine.check_integrity()
    replies = [request.reply for request in requests]
    records = [record for reply in replies for record in reply.passes]
    roles: Counter[str] = Counter()
    for step in engine.recorder.steps:
        for work in step.works:
            roles[work.role] += work.tokens
    return {
        "outcome": replies[0].outcome.value,
        "passes": [record.label for record in replies[0].passes],
        "steps": engine.steps,
        "batches": len(engine.recorder.steps),
        "computed": dict(sorted(roles.items())),
        "cached": sum(record.cached_tokens for record in records),
        "accepted_drafts": sum(record.accepted for record in records),
        "wasted": sum(reply.trace.wasted_tokens for reply in replies),
        "pages": pages,
        "images": engine.runner.images_encoded,
    }


@pytest.mark.parametrize(("guard", "path"), CASES)
def test_the_work_is_what_it_was(guard: str, path: str, models: ModelSet) -> None:
    found = counted(models, guard, path)
    wanted = json.loads(WANTED.read_text(encoding="utf-8"))[guard][path]
    assert found == wanted, f"{WANTED.name} has other counts for {guard}, {path}; found: {json.dumps(found)}"


def test_nothing_is_counted_that_is_not_tested() -> None:
    wanted = json.loads(WANTED.read_text(encoding="utf-8"))
    assert [(guard, path) for guard, paths in wanted.items() for path in paths] == CASES
