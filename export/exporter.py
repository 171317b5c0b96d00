"""Exports a detector: opens it, builds its graph, streams its weights, and makes the folder whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import onnx
import torch

from .. import __version__
from ..engine.errors import BadInput, CacheWriteFailed, CheckpointError
from .calibration import CalibrationText, recalibrated
from .detector_folder import CUDA_GRAPH, GRAPH, WEIGHTS, DetectorFolder, load_folder, save_manifest
from .graph import OPSETS, GraphSpec, build_graph
from .precision import FLOATS, PRECISIONS, Precision
from .source import DetectorSource, OpenDetector, open_detector
from .weight_file import offsets_of, write_weights

Progress = Callable[[str, int, int], None]
"""(what is under way, how much is done, how much there is)."""


def export_detector(
    source: DetectorSource,
    out: str | Path,
    *,
    precision: Precision = "fp32",
    with_past: bool = False,
    opset: int = OPSETS[0],
    calibration: Sequence[CalibrationText] = (),
    progress: Progress | None = None,
) -> DetectorFolder:
    """Write a detector as an ONNX folder and return what its `detector.json` says.

    source: what `open_detector` takes. precision: of the weights; int8 and int4 compute matrix products on 8-bit
    inputs, fp16 and bf16 in fp32 on a CPU. with_past: keys and values go in and out, so that a text can be read as it
    grows. calibration: texts on which int8 and int4 get thresholds that flag as many as those of fp32 do; without any
    they keep those.
    Raises `BadInput` for an unknown precision or opset and an `out` that holds something, `CacheWriteFailed`, and the
    types under `CheckpointError`.
    """
    out = Path(out)
    if precision not in PRECISIONS:
        raise BadInput(f"unknown precision {precision!r}; there are {', '.join(PRECISIONS)}")
    if isinstance(opset, bool) or opset not in range(OPSETS[0], OPSETS[1] + 1):
        raise BadInput(f"opset must be from {OPSETS[0]} to {OPSETS[1]}, not {opset!r}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} is there and not an empty folder; name a new one")
    detector = open_detector(source)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise CacheWriteFailed(f"{out} could not be written: {error}") from error
    try:
        new = work / "new"
        _write(detector, new, precision, with_past, opset)
        if calibration and precision in ("int8", "int4"):
            exact = work / "exact"
            _write(detector, exact, "fp32", with_past, opset)
            save_manifest(recalibrated(load_folder(exact), load_folder(new), calibration, progress))
        if out.exists():
            out.rmdir()
        new.rename(out)
    except CheckpointError:  # some are OSErrors too
        raise
    except OSError as error:
        raise CacheWriteFailed(f"{out} could not be written: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return load_folder(out)


def _write(detector: OpenDetector, folder: Path, precision: Precision, with_past: bool, opset: int) -> None:
    spec = GraphSpec(
        detector.config, detector.spec, detector.has_bias, detector.norm_eps, precision, with_past, opset
    )
    folder.mkdir()
    write_weights(folder / WEIGHTS, detector, spec)
    offsets = offsets_of(spec)
    onnx.save(build_graph(spec, WEIGHTS, offsets), folder / GRAPH)
    if FLOATS.get(precision, torch.float32) != torch.float32:
        onnx.save(build_graph(replace(spec, computes=FLOATS[precision]), WEIGHTS, offsets), folder / CUDA_GRAPH)
    detector.tokenizer.save_pretrained(folder)
    config, head = detector.config, detector.spec
    save_manifest(
        DetectorFolder(
            path=folder,
            name=detector.name,
            threshold=head.threshold,
            prefix_threshold=head.prefix_threshold,
            template=head.template,
            layer=head.layer,
            pooling=head.pooling,
            norm=head.norm,
            precision=precision,
            with_past=with_past,
            opset=opset,
            context=config.context,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            kv_heads=config.kv_heads,
            head_dim=spec.head_dim,
            calibration=None,
            versions={"stockade": __version__, "onnx": metadata.version("onnx"), "torch": torch.__version__},
        )
    )
