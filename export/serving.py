"""A detector folder as a model repository for Triton Inference Server, and for KServe on top of it.

Two models: `detector`, the graph as it is, and `guard`, which takes text. Neither starts nor needs a server here.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx

from ..engine.errors import BadInput, CacheWriteFailed, CheckpointError
from ..engine.guards.prompts import detector_before
from ..engine.text import segments_text
from .detector_folder import GRAPH, WEIGHTS, DetectorFolder, load_folder
from .onnx_detector import OnnxDetector
from .session import KEY_TYPES

Target = Literal["triton", "kserve"]
TARGETS: tuple[Target, ...] = get_args(Target)
DETECTOR, GUARD = "detector", "guard"
MAX_BATCH = 16
_QUEUE_MICROSECONDS = 2000  # that a request waits for others to run with
_VERSION = "1"
_EXAMPLE = "Mix the flour with water and let the dough rest for an hour."
_KINDS = {"INT64": "TYPE_INT64", "FP32": "TYPE_FP32", "BOOL": "TYPE_BOOL", "BYTES": "TYPE_STRING"}


def export_serving(folder: str | Path, out: str | Path, target: Target) -> Path:
    """Write the repository of a detector folder; `kserve` adds an InferenceService and requests with their responses.

    fp16 and bf16 run on GPUs, the others on CPUs. Returns the repository. Raises `BadInput` for another target, an
    `out` that holds something and a folder with past (its state is not the server's to keep), and as `load_folder`.
    """
    out = Path(out)
    if target not in TARGETS:
        raise BadInput(f"unknown target {target!r}; there are {', '.join(TARGETS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} is there and not an empty folder; name a new one")
    known = load_folder(folder)
    if known.with_past:
        raise BadInput(f"{known.path} keeps a past, which a server does not; export the detector without --with-past")
    repository = out / "models" if target == "kserve" else out
    try:
        _write_detector(known, repository / DETECTOR)
        _write_guard(known, repository / GUARD)
        if target == "kserve":
            (out / "inference-service.yaml").write_text(_inference_service(), encoding="utf-8")
            for name, document in _examples(known).items():
                (out / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except CheckpointError:  # some are OSErrors too
        raise
    except OSError as error:
        raise CacheWriteFailed(f"{out} could not be written: {error}") from error
    return repository


def _write_detector(folder: DetectorFolder, model: Path) -> None:
    """The server knows no inputs with a default, so pool_mask is one without."""
    (model / _VERSION).mkdir(parents=True)
    cuda = folder.precision in KEY_TYPES
    graph = onnx.load(folder.graph(cuda), load_external_data=False)
    for tensor in list(graph.graph.initializer):
        if tensor.name == "pool_mask":
            graph.graph.initializer.remove(tensor)
    onnx.save(graph, model / _VERSION / GRAPH)
    _link(folder.path / WEIGHTS, model / _VERSION / WEIGHTS)
    text = _config(
        DETECTOR,
        {"backend": "onnxruntime"},
        dict.fromkeys(_inputs(folder), ("INT64", "-1", "")),
        dict.fromkeys(("logit", "score"), ("FP32", "1", "reshape { shape: [ ] }")),
        "KIND_GPU" if cuda else "KIND_CPU",
    )
    (model / "config.pbtxt").write_text(text, encoding="utf-8")


def _write_guard(folder: DetectorFolder, model: Path) -> None:
    (model / _VERSION).mkdir(parents=True)
    shutil.copyfile(Path(__file__).with_name("triton_model.py"), model / _VERSION / "model.py")
    shutil.copyfile(folder.path / "tokenizer.json", model / _VERSION / "tokenizer.json")
    before = detector_before(folder.template, "{question}")
    settings = {
        "detector": DETECTOR,
        "threshold": folder.threshold,
        "context": folder.context,
        "vocab_size": folder.vocab_size,
        "pooling": folder.pooling,
        "before": segments_text(before) if before else None,
        "max_batch": MAX_BATCH,
    }
    (model / _VERSION / "settings.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    text = _config(
        GUARD,
        {"backend": "python"},
        {"text": ("BYTES", "1", ""), "question": ("BYTES", "1", "optional: true")},
        {"score": ("FP32", "1", ""), "harmful": ("BOOL", "1", ""), "reason": ("BYTES", "1", "")},
        "KIND_CPU",
    )
    (model / "config.pbtxt").write_text(text, encoding="utf-8")


def _inputs(folder: DetectorFolder) -> list[str]:
    return ["input_ids", "attention_mask", *(["pool_mask"] if folder.pooling == "mean" else [])]


def _config(
    name: str,
    settings: Mapping[str, str],
    inputs: Mapping[str, tuple[str, str, str]],
    outputs: Mapping[str, tuple[str, str, str]],
    kind: str,
) -> str:
    """A `ModelConfig` as protobuf text. inputs, outputs: name -> (type of the protocol, dimensions, what else)."""
    lines = [f'name: "{name}"', *(f'{key}: "{value}"' for key, value in settings.items())]
    lines.append(f"max_batch_size: {MAX_BATCH}")
    for field, tensors in (("input", inputs), ("output", outputs)):
        for tensor, (datatype, dims, rest) in tensors.items():
            lines.append(
                f'{field} {{ name: "{tensor}" data_type: {_KINDS[datatype]} dims: [ {dims} ]{rest and " " + rest} }}'
            )
    lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {_QUEUE_MICROSECONDS} }}")
    lines.append(f"instance_group {{ count: 1 kind: {kind} }}")
    lines.append(f"version_policy {{ specific {{ versions: [ {_VERSION} ] }} }}")
    return "\n".join(lines) + "\n"


def _inference_service() -> str:
    return f"""apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: stockade-{GUARD}
spec:
  predictor:
    model:
      modelFormat:
        name: triton
      protocolVersion: v2
      # where the folder `models` was put: a bucket, a volume claim …
      storageUri: pvc://models/stockade
"""


def _examples(folder: DetectorFolder) -> dict[str, dict[str, Any]]:
    """Requests and responses of both models in the Open Inference Protocol: what the graph says of one text."""
    from .calibration import passage

    detector = OnnxDetector(folder, threads=1)
    try:
        ids, pool_from = passage(detector.codec, folder.template, "", _EXAMPLE, folder.context)
        logit, score = detector.logits([ids], [pool_from])[0], detector.score([ids], [pool_from])[0]
    finally:
        detector.close()
    rows = {
        "input_ids": ids,
        "attention_mask": [1] * len(ids),
        "pool_mask": [int(index >= pool_from) for index in range(len(ids))],
    }
    scores = [_tensor("logit", "FP32", [logit]), _tensor("score", "FP32", [score])]
    harmful = not (np.isfinite(score) and score >= folder.threshold)
    verdict = [
        _tensor("score", "FP32", [score]),
        _tensor("harmful", "BOOL", [harmful]),
        _tensor("reason", "BYTES", [""]),
    ]
    return {
        f"{DETECTOR}-request.json": {"id": "1", "inputs": [_tensor(n, "INT64", rows[n]) for n in _inputs(folder)]},
        f"{DETECTOR}-response.json": _response(DETECTOR, scores),
        f"{GUARD}-request.json": {"id": "1", "inputs": [_tensor("text", "BYTES", [_EXAMPLE])]},
        f"{GUARD}-response.json": _response(GUARD, verdict),
    }


def _tensor(name: str, datatype: str, data: list[Any]) -> dict[str, Any]:
    return {"name": name, "shape": [1, len(data)], "datatype": datatype, "data": data}


def _response(model: str, outputs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": "1", "model_name": model, "model_version": _VERSION, "outputs": outputs}


def _link(source: Path, target: Path) -> None:
    """The same bytes under another name, without copying where the file system allows."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
