"""The folder of an exported detector: graph, weights, tokenizer, and `detector.json`, which says what they are.

A folder is read only if every file is the one that was written. This is against damage and mix-ups: whoever can write
`detector.json` can write the rest to match.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from ..engine.errors import CheckpointMismatch, CheckpointMissing, CheckpointTruncated, UnsafeCheckpoint
from ..engine.models.bundles import listed
from ..engine.models.heads import HeadSpec
from ..engine.models.json_file import read_json
from .precision import PRECISIONS, Precision

MANIFEST = "detector.json"
GRAPH = "model.onnx"
CUDA_GRAPH = "model.cuda.onnx"  # computes in 16 bits; only folders of fp16 and bf16 have it
WEIGHTS = "weights.bin"
KIND = "stockade detector"
FORMAT = 1
LABEL = {
    "score": "P(harmless), the sigmoid of logit",
    "harmful": "score < threshold; NaN is harmful too",
    "label 1": "harmless",
}


@dataclass(frozen=True)
class Calibration:
    """How the thresholds were moved from those of the fp32 detector, so that as many texts lie below them.

    texts, beginnings: how many were scored. fp32_threshold, fp32_prefix_threshold: before. agreement: share of the
    texts with the same verdict as before.
    """

    texts: int
    beginnings: int
    fp32_threshold: float
    fp32_prefix_threshold: float | None
    agreement: float


@dataclass(frozen=True)
class DetectorFolder:
    """What `detector.json` says; sizes count tokens or numbers.

    threshold, template, prefix_threshold: as in `HeadSpec`; after recalibration where there is one. sha256 and bytes
    of every file stand in `files`.
    """

    path: Path
    name: str
    threshold: float
    prefix_threshold: float | None
    template: str
    layer: int
    pooling: Literal["last", "mean"]
    norm: bool
    precision: Precision
    with_past: bool
    opset: int
    context: int
    vocab_size: int
    hidden_size: int
    kv_heads: int
    head_dim: int
    calibration: Calibration | None
    versions: Mapping[str, str]
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def spec(self) -> HeadSpec:
        """The head as the engine knows it; it belongs to no backbone of the engine's."""
        return HeadSpec(
            layer=self.layer,
            pooling=self.pooling,
            norm=self.norm,
            template=self.template,
            threshold=self.threshold,
            prefix_threshold=self.prefix_threshold,
        )

    def graph(self, cuda: bool) -> Path:
        return self.path / (CUDA_GRAPH if cuda else GRAPH)


def save_manifest(folder: DetectorFolder) -> None:
    """Write `detector.json` over the files that are in the folder now."""
    document: dict[str, Any] = {"kind": KIND, "format": FORMAT, "label": LABEL, **asdict(folder)}
    del document["path"]
    document["files"] = listed(folder.path)
    (folder.path / MANIFEST).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def load_folder(path: str | Path) -> DetectorFolder:
    """Read `detector.json` and check every file against it.

    Raises `CheckpointMissing` for no such folder or a file that is not there, `CheckpointTruncated` for a file that
    ends early, `CheckpointMismatch` for any other file than was written, one that was added, or another format, and
    `UnsafeCheckpoint` for a name that leads out of the folder.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        raise CheckpointMissing(
            f"{path} is no exported detector: it has no {MANIFEST} (see `stockade export detector`)"
        )
    document = read_json(path / MANIFEST)
    if document.get("kind") != KIND or document.get("format") != FORMAT:
        raise CheckpointMismatch(
            f"{path}/{MANIFEST} is of kind {document.get('kind')!r}, format {document.get('format')!r}; "
            f"this version reads kind {KIND!r}, format {FORMAT}"
        )
    _check_files(path, document.get("files"))
    for key in ("kind", "format", "label"):
        document.pop(key, None)
    try:
        calibration = document.pop("calibration")
        folder = DetectorFolder(path, calibration=calibration and Calibration(**calibration), **document)
    except (KeyError, TypeError) as error:
        raise CheckpointMismatch(f"{path}/{MANIFEST} does not say what a detector is: {error}") from None
    _check_values(folder)
    return folder


def _check_files(path: Path, files: Any) -> None:
    if not isinstance(files, dict) or not {GRAPH, WEIGHTS} <= files.keys():
        raise CheckpointMismatch(f"{path}/{MANIFEST} lists no files; it has to name {GRAPH} and {WEIGHTS} at least")
    for name, entry in files.items():
        if Path(name).name != name:
            raise UnsafeCheckpoint(f"{path}/{MANIFEST} names {name!r}; files lie in the folder itself")
        file = path / name
        if not file.is_file():
            raise CheckpointMissing(f"{path} lacks {name}, which its {MANIFEST} names")
        if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int):
            raise CheckpointMismatch(f"{path}/{MANIFEST} says nothing of {name}")
        if file.stat().st_size < entry["bytes"]:
            raise CheckpointTruncated(f"{file} has {file.stat().st_size:,} bytes of {entry['bytes']:,}")
    found = listed(path)
    found.pop(MANIFEST)
    for name in found:
        if name not in files:
            raise CheckpointMismatch(f"{path} holds {name}, which its {MANIFEST} does not name; take it out")
        if found[name] != files[name]:
            raise CheckpointMismatch(f"{path / name} is not the file that was exported: its SHA-256 differs")


def _check_values(folder: DetectorFolder) -> None:
    """Types as the dataclass names them, and numbers in their range."""
    whole = ("layer", "opset", "context", "vocab_size", "hidden_size", "kv_heads", "head_dim")
    numbers = [folder.threshold] + ([] if folder.prefix_threshold is None else [folder.prefix_threshold])
    fits = (
        all(type(getattr(folder, name)) is int and getattr(folder, name) >= 1 for name in whole)
        and all(type(value) in (int, float) and isfinite(value) and 0 <= value <= 1 for value in numbers)
        and all(type(getattr(folder, name)) is bool for name in ("norm", "with_past"))
        and folder.precision in PRECISIONS
        and isinstance(folder.name, str)
    )
    if not fits:
        raise CheckpointMismatch(f"{folder.path}/{MANIFEST} holds values that no exported detector has")
    _ = folder.spec  # checks template and pooling
