"""`stockade bench training` on a tiny model: a training step is at least as fast as it has to be."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from stockade.cli import app


def test_a_step_is_not_slower_than_a_plain_loops(tmp_path: Path) -> None:
    file = tmp_path / "training.json"
    options = ["--model=tiny-llama", "--answers=24", "--longest=64", "--repeats=3", "--json", str(file)]
    done = CliRunner().invoke(app, ["bench", "training", *options])
    assert done.exit_code == 0, done.output
    assert "plain PyTorch" in done.output
    found = json.loads(file.read_text())
    assert found["tokens_per_second"]["stockade"]["n"] == 3
    assert found["ratio"]["median"] > 0.8  # about 1.5: little padding, no mask
