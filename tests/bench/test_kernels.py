"""`bench kernels`: every way of an operation gives its exact result, and bytes and operations are counted rightly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from stockade.bench import kernels
from stockade.bench.commands import app
from stockade.bench.document import read_document
from stockade.bench.kernel_cases import OPERATIONS, REFERENCE, Cases, KernelSizes
from stockade.bench.kernels import KernelsConfig, KernelsPlan, seconds
from stockade.bench.roofline import Shape
from stockade.engine.errors import BadInput

SHAPE = Shape(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=32, ffn=96, vocab=100)
SIZES = KernelSizes(rows=(1, 3), contexts=(64,), chunk=8, cold_bytes=100_000)
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_way_gives_the_exact_result(operation: str, dtype: torch.dtype) -> None:
    with torch.inference_mode():
        for case in Cases(SHAPE, SIZES, CPU, dtype).all((operation,)):
            assert REFERENCE in case.ways and case.operation == operation
            exact = case.exact().double()
            for way in case.ways.values():
                for _ in range(3):  # other inputs every time, of the same work
                    way.run()
                error = (way.result().double() - exact).abs().max() / exact.abs().max()
                assert error < (1e-5 if dtype is torch.float32 else 3e-2), case.name


def test_bytes_and_operations_worked_by_hand() -> None:
    cases = Cases(SHAPE, SIZES, CPU, torch.bfloat16)
    work = {
        name: next(case.work for case in cases.all((name,)) if f"{rows} x" in case.what)
        for name, rows in (("linear", 3), ("swiglu", 3), ("attention_decode", 3), ("pooled_logit", 3))
    }
    assert (work["linear"].bytes, work["linear"].flops) == (2 * (64 * 192 + 3 * (64 + 192)), 2 * 3 * 64 * 192)
    assert work["swiglu"].bytes == 2 * 3 * 3 * 96
    # three sequences of 64 tokens with keys and values of 2 heads of 32; queries in, outputs out
    assert work["attention_decode"].bytes == 2 * (3 * 64 * 2 * 2 * 32 + 2 * 3 * 4 * 32)
    assert work["attention_decode"].flops == 4 * 3 * 4 * 32 * 64
    assert work["pooled_logit"].bytes == 4 * (3 * 64 + 64)
    layer = next(iter(cases.all(("layer",)))).work  # one row after 64: weights once, 65 tokens of keys and values
    assert layer.bytes == 2 * (64 * 128 + 2 * 64 * 64 + 128 * 64 + 3 * 64 * 96) + 65 * 2 * 2 * 32 * 2


def test_a_part_of_the_ceiling_is_the_least_time_over_the_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "read_bandwidth", lambda device, repeats: 1e9)
    plan = KernelsPlan(SHAPE, KernelsConfig(SIZES, 3, 1e-5, ("swiglu",)), "tiny", CPU, torch.float32)
    assert [name for name, _ in plan.units({})] == ["ceilings", *(f"swiglu, {rows} x 96" for rows in (1, 3, 8))]
    done: dict[str, Any] = {name: do() for name, do in plan.units({})}
    row = next(row for row in plan.rows(done) if (row["what"], row["way"]) == ("3 x 96", "torch"))
    took = row["us"]["median"] * 1e-6
    assert row["bound"] == "memory" and row["us"]["n"] == 3
    assert row["of_ceiling_percent"] == pytest.approx(100 * (4 * 3 * 3 * 96 / 1e9) / took, rel=1e-2)
    done["ceilings"]["flops"] = 1e6  # so slow that the operations take longer than the bytes
    row = next(row for row in plan.rows(done) if (row["what"], row["way"]) == ("3 x 96", "torch"))
    assert row["bound"] == "compute"
    assert row["of_ceiling_percent"] == pytest.approx(100 * (5 * 3 * 96 / 1e6) / took, rel=1e-2)
    assert plan.table(done).row_count == 6 and plan.rows({}) == []


def test_seconds_are_of_one_call() -> None:
    calls = []
    assert 0.0 < seconds(lambda: calls.append(0), 7, CPU) < 1.0 and len(calls) == 7


def test_the_command_measures_every_operation(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "read_bandwidth", lambda device, repeats: 1e10)  # measuring it takes seconds
    file = tmp_path / "kernels.json"
    done = CliRunner().invoke(app, ["kernels", "--profile", "ci", "--model", "tiny-llama", "--json", str(file)])
    assert done.exit_code == 0, done.output
    document = read_document(file, "kernels")
    assert {row["operation"] for row in document.rows} == set(OPERATIONS)
    assert document.settings["shape"]["hidden"] == 64 and document.more["ceilings"]["bandwidth"] == 1e10
    with pytest.raises(BadInput, match="rms_norm"):
        CliRunner().invoke(app, ["kernels", "--operation", "nothing"], catch_exceptions=False)


def test_where_triton_runs_it_is_one_of_the_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCKADE_KERNELS", "triton")  # in its interpreter
    with torch.inference_mode():
        attention = ("attention_decode", "attention_prefill")
        others = ("rms_norm", "rope_write", "swiglu", "lora", "pooled_head")
        for case in Cases(SHAPE, SIZES, CPU, torch.float16).all((*attention, *others)):
            exact = case.exact().double()
            ours = {name: way for name, way in case.ways.items() if name.startswith("triton")}
            assert len(ours) == (2 if case.operation in attention else 1)
            for way in ours.values():
                assert (way.result().double() - exact).abs().max() / exact.abs().max() < 3e-3, case.name
