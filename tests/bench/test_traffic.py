"""Arrivals have their rate, traces are read or refused with a reason, objectives mean what they say."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockade.bench.objective import BadObjective, Objective
from stockade.bench.traffic import BadTrace, Item, Sizes, arriving, faster, rate_of, read_trace
from stockade.engine.errors import BadInput

HEADER = "arrival,prompt_tokens,images,answer_tokens"


@pytest.mark.parametrize("burst", [1, 5])
def test_arrivals_have_their_rate_and_come_in_bursts(burst: int) -> None:
    def due_of(seed: int) -> list[float]:
        return [item.arrival for item in islice(arriving(Sizes(), Random(seed), 20.0, burst), 4000)]

    due = due_of(0)
    assert due[0] == 0.0 and due == sorted(due) and len(due) == 4000
    assert (len(due) - burst) / due[-1] == pytest.approx(20.0, rel=0.1)
    assert len(set(due)) == 4000 // burst
    gaps = [later - sooner for sooner, later in zip(due[::burst], due[burst::burst], strict=False)]
    mean = sum(gaps) / len(gaps)
    # the variance of exponential intervals is the square of their mean
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.2)
    assert due == due_of(0) != due_of(1)


@pytest.mark.parametrize(("rate", "burst"), [(0.0, 1), (-1.0, 1), (float("nan"), 1), (float("inf"), 1), (1.0, 0)])
def test_rates_that_are_none_are_refused(rate: float, burst: int) -> None:
    with pytest.raises(BadInput, match="rate"):
        next(arriving(Sizes(), Random(0), rate, burst))


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 99), st.integers(0, 3), st.integers(2, 99)), min_size=1))
def test_a_trace_survives_both_formats(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple]) -> None:
    folder = tmp_path_factory.mktemp("traces", numbered=True)
    table = "\n".join(f"{at!r},{tokens},{images},{answer},1" for at, tokens, images, answer in rows)
    (folder / "a.csv").write_text(f"{HEADER},harmful\n{table}\n")
    names = ("arrival", "prompt_tokens", "images", "answer_tokens")
    lines = [
        "{" + ", ".join(f'"{name}": {value!r}' for name, value in zip(names, row, strict=True)) + ', "harmful": true}'
        for row in rows
    ]
    (folder / "a.jsonl").write_text("\n\n".join(lines))
    items = read_trace(folder / "a.csv")
    assert items == read_trace(folder / "a.jsonl")
    first = min(row[0] for row in rows)
    wanted = [Item(at - first, tokens, images, answer, True) for at, tokens, images, answer in rows]
    assert sorted(items) == sorted(wanted) and items[0].arrival == 0.0
    assert [item.arrival for item in items] == sorted(item.arrival for item in items)


def test_a_trace_may_run_faster() -> None:
    items = [Item(at, 1, 0, 2) for at in (0.0, 1.0, 2.0)]
    assert rate_of(items) == 1.0 and rate_of(faster(items, 4.0)) == 4.0
    assert rate_of(items[:1]) == 0.0


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.csv", "", "lacks 'arrival'"),
        ("a.csv", f"{HEADER}\n", "no requests"),
        ("a.csv", "arrival,prompt_tokens,answer_tokens\n0,1,2\n", "lacks 'images'"),
        ("a.csv", f"{HEADER},when\n0,1,0,2,3\n", "unknown 'when'"),
        ("a.csv", f"{HEADER},arrival\n0,1,0,2,3\n", "repeats 'arrival'"),
        ("a.csv", f"{HEADER}\n0,1,0\n", "line 2"),
        ("a.csv", f"{HEADER}\n0,1,0,2,9\n", "line 2"),
        ("a.csv", f"{HEADER}\n0,1,0,2\nsoon,1,0,2\n", "line 3"),
        ("a.csv", f"{HEADER}\n0,1.5,0,2\n", "whole numbers"),
        ("a.csv", f"{HEADER}\n0,0,0,2\n", "prompt_tokens must be at least 1"),
        ("a.csv", f"{HEADER}\n0,1,-1,2\n", "images must be at least 0"),
        ("a.csv", f"{HEADER}\nnan,1,0,2\n", "number of seconds"),
        ("a.csv", f"{HEADER},harmful\n0,1,0,2,maybe\n", "true or false"),
        ("a.jsonl", "[1, 2]", "not a JSON object"),
        ("a.jsonl", '{"arrival": 0,', "line 1: not a JSON object"),
        ("a.jsonl", '{"arrival": 0, "prompt_tokens": 1, "images": 0}', "lacks 'answer_tokens'"),
        ("a.jsonl", '{"arrival": 0, "prompt_tokens": true, "images": 0, "answer_tokens": 2}', "whole numbers"),
        ("a.jsonl", '{"arrival": null, "prompt_tokens": 1, "images": 0, "answer_tokens": 2}', "line 1"),
    ],
)
def test_a_wrong_trace_is_refused_with_the_reason(name: str, text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadTrace, match=reason):
        read_trace(tmp_path / name)


def test_sizes_draw_harmful_requests_at_their_rate() -> None:
    random, sizes = Random(0), Sizes(5, 1, 6, harmful=0.25)
    items = [sizes.item(0.0, random) for _ in range(2000)]
    assert sum(item.harmful for item in items) == pytest.approx(500, rel=0.1)
    for wrong in ({"prompt_tokens": 0}, {"images": -1}, {"answer_tokens": 1}, {"harmful": 1.1}):
        with pytest.raises(BadInput, match=next(iter(wrong))):
            Sizes(**wrong)


def test_an_objective_is_met_at_its_bounds() -> None:
    objective = Objective.parse("ttft=1s, itl=100ms,e2e=10")
    assert objective == Objective(1.0, 0.1, 10.0)
    assert objective.met(1.0, 0.1, 10.0)
    for missed in ((1.01, 0.1, 10.0), (1.0, 0.11, 10.0), (1.0, 0.1, 10.1), (float("nan"), 0.1, 1.0)):
        assert not objective.met(*missed)
    assert Objective().met(9e9, 9e9, 9e9)
    assert Objective.parse("itl=250us").to_dict() == {"itl": pytest.approx(2.5e-4)}


@pytest.mark.parametrize(
    "text",
    ["", "ttft", "ttft=", "ttft=fast", "tpot=1s", "ttft=1s,ttft=2s", "ttft=1h", "ttft=0", "e2e=1.2.3s", "itl=-1s"],
)
def test_an_objective_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadObjective):
        Objective.parse(text)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_trace_that_is_no_text_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(b"arrival\xff\xfe\x80")
    with pytest.raises(BadTrace, match="no text"):
        read_trace(file)
