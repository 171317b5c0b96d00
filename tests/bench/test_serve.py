"""`bench serve` on a tiny random model: its figures are there and mean what they say."""

from __future__ import annotations

from stockade.bench.serve import ServeConfig, run_serve
from stockade.bench.workload import sources


def test_the_server_is_measured_against_the_bare_engine() -> None:
    config = ServeConfig(requests=4, at_once=2, pairs=2, prompt_tokens=8, answer_tokens=6, idle=12)
    with sources("tiny-llama", None, None) as weights:
        report = run_serve(weights, config)
    assert set(report.overhead) == {"whole replies", "streamed as cleared"}
    assert report.bare.n == 2 and report.bare.median > 0
    assert all(spread.n == 2 and spread.median < 100 for spread in report.overhead.values())
    assert 0 < report.health["median"] <= report.health["p99"]
    assert report.idle_steps == 0
    assert report.to_dict()["config"]["idle"] == 12 and report.table().row_count == 6
