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
    assert [(row["batch"], row["tokens"]) for row in document["seconds"]] == [(1, 16), (2, 16)]
    assert all(row[name] > 0 for row in document["seconds"] for name in ("onnx fp32", "onnx int8", "engine bf16"))
    assert [row["folder"] for row in document["loading"]] == ["fp32"]
    assert document["sidecar"]["ms of a chunk"] > 0 and document["command"]
