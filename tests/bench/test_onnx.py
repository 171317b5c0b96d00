"""`bench onnx` on a few short texts: everything is measured, and what it compares agrees."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from stockade.cli import app

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


def test_bench_onnx_measures_speed_loading_and_a_sidecar() -> None:
    done = CliRunner().invoke(app, ["bench", "onnx", "--model", "tiny-llama", "--quick"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout.strip().splitlines()[-1])
    assert [(row["batch"], row["tokens"], row["n"]) for row in document["rows"]] == [(1, 16, 1), (2, 16, 1)]
    assert all(row[name] > 0 for row in document["rows"] for name in ("onnx fp32", "onnx int8", "engine bf16"))
    for row in document["rows"]:
        ratio = row["ratios"]["engine bf16 / onnx int8"]["median"]
        assert ratio == pytest.approx(row["engine bf16"] / row["onnx int8"], rel=0.1)
    assert [row["folder"] for row in document["loading"]] == ["fp32"]
    assert document["sidecar"]["ms of a chunk"] > 0 and document["command"]
