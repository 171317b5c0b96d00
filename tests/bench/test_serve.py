"""`bench serve` on a tiny random model: its figures are there and mean what they say."""

from __future__ import annotations

from typing import Any

import pytest

from stockade.bench.serve import ServeConfig, ServePlan
from stockade.bench.units import run_units
from stockade.bench.workload import sources


def test_the_server_is_measured_against_the_bare_engine() -> None:
    config = ServeConfig(requests=4, at_once=2, pairs=2, prompt_tokens=8, answer_tokens=6, idle=12)
    done: dict[str, Any] = {}
    with sources("tiny-llama", None, None) as weights:
        plan = ServePlan(weights, config)
        assert run_units(plan, done)
    bare, *ways = plan.rows(done)
    assert [row["way"] for row in ways] == ["whole replies", "streamed as cleared"]
    assert bare["lost_percent"]["median"] == 0 and bare["tokens_per_s"]["median"] > 0
    for row in ways:
        lost = [100 * (1 - seconds["bare engine"] / seconds[row["way"]]) for seconds in _seconds(done)]
        assert row["n"] == 2 and row["lost_percent"]["median"] == pytest.approx(sum(lost) / 2, abs=1e-3)
    more = plan.more(done)
    assert 0 < more["health_ms"]["p50"] <= more["health_ms"]["p99"]
    assert more["idle_steps"] == 0
    plan.table({"pair 0": done["pair 0"]})  # of what an interrupted run has


def _seconds(done: dict[str, Any]) -> list[dict[str, float]]:
    return [found["seconds"] for name, found in done.items() if name.startswith("pair")]
