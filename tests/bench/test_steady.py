"""What the measurements report of an engine whose steps take known times: those times, and hardly anything else.

All clocks count this thread's own work here, so that nobody else's disturbs them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from random import Random
from statistics import median
from time import thread_time
from typing import Any

import pytest
import torch

from stockade.bench import driving, steady
from stockade.bench.capacity_check import compare
from stockade.bench.document import Document
from stockade.bench.latency import LatencyConfig, LatencyPlan
from stockade.bench.overhead import Questions, question_for_all
from stockade.bench.overhead_report import OverheadConfig, figures
from stockade.bench.published import Lengths
from stockade.bench.side_by_side import Run
from stockade.bench.steady import SteadyEngine
from stockade.bench.step_costs import StepCost
from stockade.bench.throughput import ThroughputConfig, ThroughputPlan
from stockade.bench.traffic import Sizes
from stockade.bench.units import run_units
from stockade.bench.variants import bench_models, engine_variants
from stockade.bench.workload import sources
from stockade.engine.models.loader import ModelSet
from stockade.engine.trace import StepWork

STEP, GUARD, SUBMIT = 0.04, 0.1, 0.004  # seconds of a step, of what a guard has in one, of taking a request in
TOKENS = 6


def cost(works: Sequence[StepWork]) -> float:
    return STEP + GUARD * any(work.label != "answer" for work in works)


@pytest.fixture(autouse=True)
def own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("stockade.") and hasattr(module, "perf_counter"):
            monkeypatch.setattr(module, "perf_counter", thread_time)


@pytest.fixture(scope="module")
def models() -> Any:
    with sources("tiny-llama") as weights:
        yield bench_models(weights, torch.float32)


def test_latency_reports_the_steps_and_the_guard(models: ModelSet) -> None:
    config = LatencyConfig((8,), (0,), (TOKENS,), ("off", "ecso"), repeats=5)
    plan = LatencyPlan(SteadyEngine(models, cost, SUBMIT), config, "steady", "float32")
    done: dict[str, Any] = {}
    assert run_units(plan, done)
    off, ecso = plan.rows(done)
    for row, guard in ((off, 0.0), (ecso, STEP + GUARD)):
        assert row["first_token_ms"]["p50"] == near(1e3 * (SUBMIT + STEP))
        assert row["itl_ms"]["p50"] == near(1e3 * STEP)
        assert row["e2e_ms"]["p50"] == near(1e3 * (SUBMIT + TOKENS * STEP + guard))
        assert row["guard_ms"]["p50"] == near(1e3 * guard)
        assert row["steps"] == TOKENS + (guard > 0)
    # unguarded text is shown as it comes (a byte may wait for the rest of its character), guarded text at the end
    assert off["ttft_ms"]["p50"] < 0.8 * off["e2e_ms"]["p50"]
    assert ecso["ttft_ms"]["p50"] == ecso["e2e_ms"]["p50"]
    assert plan.more(done)["own_overhead_percent"] <= 1.0


class Clock:
    """Time that passes only where it is told to: a run of minutes takes seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds + 1e-9  # so that a moment waited for is over, however it was rounded

    def wait_until(self, when: float) -> None:
        self.now = max(self.now, when)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    for name, module in list(sys.modules.items()):
        if name.startswith("stockade.") and hasattr(module, "perf_counter"):
            monkeypatch.setattr(module, "perf_counter", found)
    monkeypatch.setattr(driving, "sleep", found.wait)
    monkeypatch.setattr(steady, "_work_until", found.wait_until)
    return found


@pytest.mark.parametrize("at_once", [1, 4])
def test_throughput_reports_the_rate_of_the_steps(at_once: int, models: ModelSet, clock: Clock) -> None:
    config = ThroughputConfig(("off",), Sizes(8, 0, TOKENS), (at_once,), rates=None, requests=24)
    plan = ThroughputPlan(SteadyEngine(models, cost, SUBMIT), config, "steady", "float32")
    done: dict[str, Any] = {}
    assert run_units(plan, done)
    (row,) = plan.rows(done)
    assert row["n"] == 24 and row["rounds"] == 6 and row["preemptions"] == 0
    # in the time of a request as many are taken in as are under way
    seconds = TOKENS * STEP + at_once * SUBMIT
    assert row["tokens_per_s"] == near(at_once * TOKENS / seconds)
    assert row["under_way"] == pytest.approx(at_once * TOKENS * STEP / seconds, rel=0.05)  # while steps ran
    costs = [StepCost(*cost) for cost in plan.more(done)["step_costs"]["off"]]
    assert min(cost.seconds for cost in costs) == near(STEP)
    assert sum(cost.batches for cost in costs) == row["steps"]


def test_loads_that_take_turns_compare_on_a_machine_that_is_slow_at_times(models: ModelSet, clock: Clock) -> None:
    """It takes 1.4 times as long for 10 seconds, and then again: every load meets both."""

    def unsteady(works: Sequence[StepWork]) -> float:
        rows = sum(work.tokens for work in works)
        return (0.01 + 0.0005 * rows) * (1.4 if clock.now % 20.0 < 10.0 else 1.0)

    config = ThroughputConfig(("off", "probe"), Sizes(16, 0, 8), (1, 4, 8), rates=(12.0,), seconds=40.0)
    plan = ThroughputPlan(SteadyEngine(models, unsteady), config, "steady", "float32")
    done: dict[str, Any] = {}
    assert run_units(plan, done)
    rows = plan.rows(done)
    for guard in config.guards:
        closed = [row for row in rows if row["guard"] == guard and row["loop"] == "closed"]
        for name in ("level", "requests_per_s", "under_way"):
            assert [row[name] for row in closed] == sorted(row[name] for row in closed)
        latencies = [row["e2e_ms"]["p50"] for row in closed]
        assert latencies == sorted(latencies) and min(row["rounds"] for row in closed) >= 5
        for row in closed:
            rates = row["between_rounds"]["requests_per_s"]
            assert rates["low"] < row["requests_per_s"] < rates["high"] <= 1.5 * rates["low"]
    load = dict.fromkeys(("load_before", "load_during", "load_after"), 0.0)
    known = ("throughput", json.loads(json.dumps(plan.settings)), rows, {}, {}, None, "", "then", 1.0)
    document = Document(*known, **load, quiet=True, seed=0, units=done)
    errors = [[abs(error) for error in one.errors] for one in compare(document)]
    assert all(median(column) < 0.05 for column in zip(*errors, strict=True)), errors
    assert max(map(max, errors)) < 0.15


def test_overhead_reports_what_the_guard_adds(models: ModelSet) -> None:
    lengths = Lengths(TOKENS, 2, 2, 2)
    config = OverheadConfig(repeats=2, harmful_repeats=1, prompt_tokens=8, lengths=lengths)
    variants = engine_variants(lengths, ("protector-separate", "ecso"))
    engines = [SteadyEngine(models, cost, SUBMIT) for _ in range(3)]
    questions = Questions(models.models["mllm"].codec.tokenizer, 8, False, Random(0))
    runs: dict[Any, dict[int, Run]] = {(v.name, v.path): {} for v in variants}
    for repeat in (-1, 0, 1):  # the first one warms up
        for key, run in question_for_all(config, variants, engines, questions, repeat).items():
            if repeat >= 0:
                runs[key][repeat] = run
    made = figures(variants, runs, {})
    # the detector has a lane of its own, which runs in the step that ends the answer; the judge comes in the next one
    for name, passes, added in (
        ("protector-separate", ("answer", "screen"), GUARD),
        ("ecso", ("answer", "judge"), STEP + GUARD),
    ):
        found = made[name]["harmless"]
        assert found.passes == passes
        assert found.added.median == near(added)
        assert made[name]["harmful"].added.median > found.added.median


def near(value: float) -> Any:
    return pytest.approx(value, rel=0.02)
