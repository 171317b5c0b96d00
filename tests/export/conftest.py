"""Tiny detectors: classifiers of every family, and a head with a mean and a bias on a random language model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

from stockade.engine.models.heads import Head, HeadSpec, save_head
from stockade.engine.models.loader import load_models
from stockade.export.detector_folder import DetectorFolder
from stockade.export.exporter import export_detector


@pytest.fixture(scope="session")
def mean_head(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(head file, its model): after layer 2 of 3, mean pooling, with a bias and both thresholds."""
    base = checkpoint("llama-gqa")
    model = load_models(base, dtype=torch.float32, device="cpu").models["mllm"]
    weight = torch.randn(64, generator=torch.Generator().manual_seed(3))
    spec = HeadSpec(2, "mean", threshold=0.4, prefix_threshold=0.1, backbone_hash=model.backbone.content_hash)
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_head(Head(spec, weight, torch.tensor([0.3])), path)
    return path, base


@pytest.fixture(scope="session")
def exported(mean_head: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., DetectorFolder]:
    """exported(precision, with_past) -> the folder of `mean_head`, made once."""
    made: dict[tuple[str, bool], DetectorFolder] = {}

    def export(precision: str = "fp32", with_past: bool = False) -> DetectorFolder:
        if (precision, with_past) not in made:
            out = tmp_path_factory.mktemp("exported") / "detector"
            made[precision, with_past] = export_detector(mean_head, out, precision=precision, with_past=with_past)
        return made[precision, with_past]

    return export
