"""Arrivals, traces and latency objectives."""

from __future__ import annotations

from math import nan
from pathlib import Path

import numpy as np
import pytest

from stockade.bench.arrivals import Arrival, BadTrace, bursts, poisson, read_trace
from stockade.bench.objective import Latency, Objective
from stockade.engine.errors import BadInput


def test_poisson_arrivals_come_at_the_rate_and_know_nothing_of_each_other():
    times = poisson(5.0, 40_000, np.random.default_rng(0))
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.2, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_bursts_keep_the_mean_rate_whatever_share_of_them_comes(share: float):
    times = bursts(5.0, 8, 40_000, np.random.default_rng(0), share)
    assert len(times) / times[-1] == pytest.approx(5.0, rel=0.05)
    groups = np.unique(times, return_counts=True)[1]
    expected = 8 * share / (1 - (1 - share) ** 8)
    assert groups.mean() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("rate", "size", "share"), [(0.0, 4, 1.0), (nan, 4, 1.0), (1.0, 0, 1.0), (1.0, 4, 0.0)])
def test_rates_and_bursts_that_are_none_are_refused(rate: float, size: int, share: float):
    with pytest.raises(BadInput):
        bursts(rate, size, 10, np.random.default_rng(0), share)


def test_a_trace_is_read_from_csv_and_from_json_lines(tmp_path: Path):
    table = tmp_path / "t.csv"
    table.write_text("arrival,prompt_tokens,images,answer_tokens,harmful\n2.5,64,1,128,1\n0,32,0,16,\n")
    lines = tmp_path / "t.jsonl"
    lines.write_text(
        '{"arrival": 2.5, "prompt_tokens": 64, "images": 1, "answer_tokens": 128, "harmful": true}\n\n'
        '{"arrival": 0, "prompt_tokens": 32, "images": 0, "answer_tokens": 16}\n'
    )
    expected = [Arrival(0.0, 32, 0, 16, None), Arrival(2.5, 64, 1, 128, True)]
    assert read_trace(table) == expected
    assert read_trace(lines) == expected


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("arrival,prompt_tokens,images\n0,1,0\n", "missing: answer_tokens"),
        ("arrival,prompt_tokens,images,answer_tokens,colour\n0,1,0,1,red\n", "unknown: colour"),
        ("arrival,prompt_tokens,images,answer_tokens\n0,many,0,1\n", "line 2"),
        ("arrival,prompt_tokens,images,answer_tokens\n-1,1,0,1\n", "at least 0"),
        ("arrival,prompt_tokens,images,answer_tokens\nnan,1,0,1\n", "at least 0"),
        ("arrival,prompt_tokens,images,answer_tokens\n0,1,-1,1\n", "images"),
        ("arrival,prompt_tokens,images,answer_tokens,harmful\n0,1,0,1,perhaps\n", "0 or 1"),
        ("arrival,prompt_tokens,images,answer_tokens\n", "no requests"),
    ],
)
def test_a_trace_with_wrong_columns_or_values_says_which(tmp_path: Path, text: str, complaint: str):
    file = tmp_path / "t.csv"
    file.write_text(text)
    with pytest.raises(BadTrace, match=complaint):
        read_trace(file)


def test_an_objective_is_parsed_printed_and_kept_or_not():
    objective = Objective.parse("ttft=1s, itl=100ms")
    assert objective == Objective(1.0, 0.1, None)
    assert Objective.parse(str(objective)) == objective
    assert objective.met(Latency(1.0, 0.1, 99.0))
    assert not objective.met(Latency(1.01, 0.1, 1.0))
    assert not objective.met(Latency(nan, 0.1, 1.0))
    assert objective.share_met([Latency(0.5, 0.05, 1.0), Latency(2.0, 0.05, 1.0)]) == 0.5
    assert objective.share_met([]) == 0.0


@pytest.mark.parametrize("text", ["", "ttft", "ttft=1", "ttft=0s", "ttft=1s,ttft=2s", "p99=1s", "e2e=1.2.3s"])
def test_what_is_no_objective_is_refused(text: str):
    with pytest.raises(BadInput, match="an objective is"):
        Objective.parse(text)
