"""Eyes in a file of their own: what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from stockade.engine.errors import CheckpointMismatch, CheckpointMissing, CheckpointTruncated
from stockade.engine.models.eyes import read_eyes
from stockade.engine.models.loader import load_models
from stockade.engine.models.shapes import image_processor_for

TEXT = LlamaConfig(hidden_size=576)


def test_a_file_that_holds_no_eyes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "eyes.safetensors"
    with pytest.raises(CheckpointMissing):
        read_eyes(file, TEXT)
    file.write_bytes(b"no tensors")
    with pytest.raises(CheckpointTruncated):
        read_eyes(file, TEXT)
    processor = image_processor_for(224).to_json_string()
    for metadata in ({}, {"config": "{}"}, {"config": "[", "processor": processor}):
        save_file({"weight": torch.zeros(1)}, file, metadata)
        with pytest.raises(CheckpointMismatch, match="no eyes"):
            read_eyes(file, TEXT)


def test_a_model_that_has_eyes_gets_no_others(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match="its own"):
        load_models((tmp_path / "eyes.safetensors", "tiny-llava"))
