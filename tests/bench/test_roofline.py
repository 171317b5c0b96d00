"""Predicted latencies: worked by hand in one case, right in the limits, held against what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from stockade.bench.commands import app
from stockade.bench.roofline import VARIANTS, Machine, Setup, Shape, Work, h200, matmul_flops, predict
from stockade.bench.roofline_report import Measured, RooflineReport, read_measured, setup_of
from stockade.engine.errors import BadInput, CheckpointMissing

LLAMA_7B = Shape(layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, ffn=11008, vocab=32000)
OPEN_LLAMA_3B = Shape(layers=26, hidden=3200, heads=32, kv_heads=32, head_dim=100, ffn=8640, vocab=32000)
NOTHING = Shape(layers=0, hidden=64, heads=1, kv_heads=1, head_dim=64, ffn=64, vocab=64)
SLOW = Machine("slow", bandwidth=20e9, flops=1e12)


def added(setup: Setup, machine: Machine = SLOW) -> dict[str, float]:
    return {name: cost.added for name, cost in predict(setup, machine).costs.items()}


def test_a_tiny_shape_worked_by_hand() -> None:
    # q 8x4, k and v 8x2, o 4x8, gate, up, down 8x16: 32 + 32 + 32 + 384 = 480 weights in each of two layers
    shape = Shape(layers=2, hidden=8, heads=2, kv_heads=1, head_dim=2, ffn=16, vocab=10)
    work = shape.forward(rows=3, context=5, batch=4, logits=1)
    # bytes: (960 + 80) weights of 2, and 8 tokens of 2 layers x 2 x 1 x 2 numbers of 2 bytes for 4 sequences
    assert work.bytes == 2 * 1040 + 4 * 8 * 16
    # operations: 2 a weight and row; 4 x 2 heads x 2 numbers x 2 layers a pair of tokens, 6 + 7 + 8 pairs; logits
    assert work.flops == 4 * (2 * 960 * 3 + 32 * 21 + 2 * 80)
    machine = Machine("", bandwidth=100.0, flops=1e9, memory_efficiency=0.5, pass_overhead=0.25)
    assert machine.seconds(work) == pytest.approx(work.bytes / 50.0 + 0.25)
    # rank 4 beside in + out of every matrix: 4 x (12 + 10 + 10 + 12 + 3 x 24) in each of two layers
    assert shape.low_rank(rank=4, rows=5) == Work(2.0 * 928, 2.0 * 928 * 5)


@pytest.mark.parametrize(("batch", "milliseconds"), [(1, 3.20), (8, 4.07), (64, 11.06)])
def test_decoding_llama_2_7b_on_an_h200(batch: int, milliseconds: float) -> None:
    work = LLAMA_7B.forward(1, 1023, batch, logits=1)
    assert 1e3 * h200().seconds(work) == pytest.approx(milliseconds, abs=0.01)


def test_a_detector_of_3b_on_an_h200() -> None:
    machine = h200()
    assert 1e3 * machine.seconds(OPEN_LLAMA_3B.forward(256)) == pytest.approx(2.10, abs=0.02)  # bound by computing
    assert 1e3 * machine.seconds(OPEN_LLAMA_3B.forward(32)) == pytest.approx(1.50, abs=0.01)  # by its weights
    cost = predict(Setup(LLAMA_7B, OPEN_LLAMA_3B, answer=256), machine).costs["protector-separate"]
    assert 1e3 * cost.added == pytest.approx(12.1, abs=0.15)
    assert 1e3 * cost.exposed == pytest.approx(1.5, abs=0.02)


def test_the_crossover_lies_where_operations_a_byte_reach_the_ridge() -> None:
    machine = h200()
    assert machine.ridge == pytest.approx(184, abs=1)
    below, above = (LLAMA_7B.forward(rows) for rows in (150, 230))
    assert machine.seconds(below) == pytest.approx(below.bytes / machine.bandwidth)
    assert machine.seconds(above) == pytest.approx(above.flops / machine.flops)
    assert machine.seconds(LLAMA_7B.forward(100)) < 1.01 * machine.seconds(LLAMA_7B.forward(1))
    assert machine.seconds(LLAMA_7B.forward(1000)) > 1.99 * machine.seconds(LLAMA_7B.forward(500))


def test_a_guard_of_nothing_costs_nothing() -> None:
    machine = replace(SLOW, pass_overhead=1e-3)
    assert added(Setup(OPEN_LLAMA_3B, NOTHING, probe_layer=0), machine)["protector-separate"] == 0.0
    assert added(Setup(OPEN_LLAMA_3B, probe_layer=0), machine)["probe"] == 0.0
    riders = predict(Setup(OPEN_LLAMA_3B, rank=0, invocation=0), SLOW).costs["protector-adapter"]
    assert riders.added == riders.exposed  # only the row of the last answer token is left


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_more_of_anything_never_costs_less(name: str, overlap: bool) -> None:
    machine = replace(SLOW, lanes_overlap=overlap)
    setup = Setup(OPEN_LLAMA_3B, answer=96)
    for field in ("question", "answer", "batch"):
        costs = [added(replace(setup, **{field: value}), machine)[name] for value in (32, 64, 128)]
        assert costs == sorted(costs) and costs[0] > 0.0
    for slower in (
        replace(machine, bandwidth=10e9),
        replace(machine, flops=0.5e12),
        replace(machine, pass_overhead=1.0),
    ):
        assert added(setup, slower)[name] >= added(setup, machine)[name]


def test_longer_chunks_read_the_detectors_weights_less_often_but_leave_more_to_the_end() -> None:
    costs = [
        predict(Setup(OPEN_LLAMA_3B, answer=129, chunk=chunk), replace(SLOW, flops=1e15)).costs["protector-separate"]
        for chunk in (16, 32, 64)
    ]
    assert costs[0].added > costs[1].added > costs[2].added
    whole = predict(Setup(OPEN_LLAMA_3B, answer=129, chunk=500), SLOW).costs["protector-separate"]
    assert whole.added == whole.exposed == whole.published


def test_lanes_that_overlap_hide_what_decoding_leaves_idle() -> None:
    setup = Setup(LLAMA_7B, OPEN_LLAMA_3B, batch=64)
    apart, beside = (added(setup, replace(h200(), lanes_overlap=overlap)) for overlap in (False, True))
    assert beside["protector-separate"] < 0.5 * apart["protector-separate"]
    assert beside["ecso"] == apart["ecso"]


def test_the_order_of_the_variants_is_the_papers_point() -> None:
    setup = replace(setup_of("llava-1.5-7b", "open-llama-3b"), chunk=16)
    costs = added(setup, h200())
    assert costs["probe"] < costs["protector-adapter"] < costs["protector-separate"]
    assert costs["ecso-continued"] < costs["ecso"] < 0.25 * predict(setup, h200()).costs["ecso"].published


def test_setups_of_named_shapes() -> None:
    setup = setup_of("llava-1.5-7b", "open-llama-3b")
    assert setup.eyes is not None and (setup.eyes.patches, setup.eyes.layers, setup.image_tokens) == (577, 23, 576)
    assert setup.detector == OPEN_LLAMA_3B and setup.model == replace(LLAMA_7B, vocab=32064)
    assert setup_of("tiny-llama", weight_bytes=4).model.weight_bytes == 4
    with pytest.raises(CheckpointMissing):
        setup_of("/no/such/model")


@pytest.mark.parametrize("wrong", [{"chunk": 0}, {"batch": 0}, {"answer": 0}, {"probe_layer": 99}])
def test_setups_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(BadInput, match="must be"):
        Setup(LLAMA_7B, **wrong)


@pytest.mark.parametrize("wrong", [{"bandwidth": 0.0}, {"memory_efficiency": -1.0}, {"pass_overhead": float("nan")}])
def test_machines_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BadInput, match="must be"):
        replace(SLOW, **wrong)


def test_the_probe_of_this_machine_measures_a_rate() -> None:
    assert 1e8 < matmul_flops(torch.float32, rows=64, size=256, repeats=2) < 1e15


def overhead_json(file: Path, variants: Any) -> Path:
    file.write_text(json.dumps({"benchmark": "overhead", "variants": variants}), encoding="utf-8")
    return file


def test_measured_figures_are_held_against_the_first_prediction(tmp_path: Path) -> None:
    prediction = predict(Setup(OPEN_LLAMA_3B), SLOW)
    twice = 2e3 * prediction.costs["probe"].added
    measured = read_measured(
        overhead_json(
            tmp_path / "overhead.json",
            {
                "off": {"harmless": {"added_ms": 0.0, "added_percent": 0.0}},
                "probe": {"harmless": {"added_ms": {"median": twice, "n": 3}, "added_percent": 1.5}},
            },
        )
    )
    assert measured == {"probe": Measured(twice, 1.5)}
    report = RooflineReport({"here": prediction, "there": predict(Setup(LLAMA_7B), h200())}, measured)
    assert report.to_dict()["measured_over_predicted"] == {"probe": 2.0}


@pytest.mark.parametrize(
    "variants", [{}, None, {"probe": {}}, {"probe": {"harmless": {"added_ms": "much"}}}, {"off": {}}]
)
def test_files_that_hold_nothing_to_compare_are_refused(variants: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"overhead\.json"):
        read_measured(overhead_json(tmp_path / "overhead.json", variants))
    with pytest.raises(BadInput, match="missing"):
        read_measured(tmp_path / "missing")


def test_the_command_prints_both_machines_and_json_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stockade.bench.roofline.read_bandwidth", lambda device: 20e9)  # measuring it takes seconds
    figures = {"harmless": {"added_ms": 3.0, "added_percent": 1.0}}
    file = overhead_json(tmp_path / "overhead.json", {"probe": figures})
    done = CliRunner().invoke(app, ["roofline", "--model", "tiny-llama", "--measured", str(file), "--chunk", "16"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout.splitlines()[-1])
    assert list(document["predicted"]) == ["tiny-llama bf16 on this machine", "llava-1.5-7b bf16 on an H200"]
    assert document["measured_over_predicted"]["probe"] > 0.0
    for prediction in document["predicted"].values():
        assert list(prediction["variants"]) == list(VARIANTS)
    assert "measured" in done.stdout and "protector-separate" in done.stdout
