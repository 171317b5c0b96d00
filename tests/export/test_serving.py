"""The model repository: configs by the published schema, a graph that loads, the front model run as servers do."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from typer.testing import CliRunner

from stockade.cli import app
from stockade.engine.errors import BadInput
from stockade.export.calibration import passage
from stockade.export.detector_folder import DetectorFolder
from stockade.export.onnx_detector import OnnxDetector
from stockade.export.serving import export_serving

TEXTS = ["yes and no", "a <s> b </s>", "", "ünïcode " * 9, "word " * 600]


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> np.ndarray:
        return self.array


@pytest.fixture
def repository(exported: Callable[..., DetectorFolder], tmp_path: Path) -> Path:
    return export_serving(exported().path, tmp_path / "repository", "triton")


@pytest.fixture
def front(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`model.py` as the Python backend loads it; requests to the detector run its graph in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    session = onnxruntime.InferenceSession(
        str(repository / "detector" / "1" / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )

    class InferenceRequest:
        def __init__(self, model_name: str, requested_output_names: list[str], inputs: list[Tensor]) -> None:
            assert model_name == "detector"
            self.names, self.inputs = requested_output_names, inputs

        def exec(self) -> SimpleNamespace:
            try:
                values = session.run(self.names, {tensor.name: tensor.array for tensor in self.inputs})
            except Exception as error:
                message = str(error)
                return SimpleNamespace(has_error=lambda: True, error=lambda: SimpleNamespace(message=lambda: message))
            found = {name: Tensor(name, value[:, None]) for name, value in zip(self.names, values, strict=True)}
            return SimpleNamespace(has_error=lambda: False, tensors=found)

    utils = ModuleType("triton_python_backend_utils")
    utils.__dict__.update(
        Tensor=Tensor,
        InferenceRequest=InferenceRequest,
        InferenceResponse=lambda output_tensors, error=None: SimpleNamespace(
            tensors={tensor.name: tensor for tensor in output_tensors}, error=error
        ),
        TritonError=str,
        get_input_tensor_by_name=lambda request, name: request.tensors.get(name),
        get_output_tensor_by_name=lambda response, name: response.tensors.get(name),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    spec = importlib.util.spec_from_file_location("front", repository / "guard" / "1" / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({"model_repository": str(repository / "guard"), "model_version": "1"})
    return model


def request(*texts: str, **more: list[str]) -> SimpleNamespace:
    named = {"text": list(texts), **more}
    return SimpleNamespace(
        tensors={
            name: Tensor(name, np.array([[text.encode()] for text in some], np.object_))
            for name, some in named.items()
        }
    )


def test_the_front_model_says_what_the_engines_detector_says(
    front: Any, exported: Callable[..., DetectorFolder]
) -> None:
    detector = OnnxDetector(exported(), threads=1)
    first, second = front.execute([request(TEXTS[0], TEXTS[1]), request(*TEXTS[2:])])
    found = np.concatenate([first.tensors["score"].array, second.tensors["score"].array]).ravel()
    reasons = [item for reply in (first, second) for item in reply.tensors["reason"].array.ravel()]
    passages = [passage(detector.codec, "response", "", text, 10_000) for text in TEXTS]
    want = [
        0.0 if len(ids) > detector.context else detector.score([ids], [pool_from])[0] for ids, pool_from in passages
    ]
    assert found == pytest.approx(want, abs=1e-5)
    assert reasons == [b"", b"", b"", b"", b"too_long"]
    harmful = [bool(x) for reply in (first, second) for x in reply.tensors["harmful"].array.ravel()]
    assert harmful == [not score >= 0.4 for score in want]
    detector.close()


def test_what_cannot_be_scored_is_harmful(front: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    front.vocab_size = 4
    reply = front.execute([request("yes")])[0]
    assert reply.tensors["harmful"].array.all() and reply.tensors["reason"].array[0, 0] == b"unknown tokens"
    front.vocab_size = 384
    for score in (float("nan"), float("inf")):
        monkeypatch.setattr(
            sys.modules["triton_python_backend_utils"],
            "get_output_tensor_by_name",
            lambda response, name, score=score: Tensor(name, np.array([[score]], np.float32)),
        )
        reply = front.execute([request("yes")])[0]
        assert reply.tensors["harmful"].array.all() and reply.tensors["reason"].array[0, 0] == b"nonsense"
    front.detector = "another"  # its request fails
    reply = front.execute([request("yes")])[0]
    assert reply.tensors["harmful"].array.all() and reply.tensors["score"].array[0, 0] == 0


def test_questions_come_one_a_text(front: Any) -> None:
    wrong, right = front.execute([request("yes", "no", question=["why?"]), request("yes", question=["why?"])])
    assert "one question a text" in wrong.error
    assert right.error is None and right.tensors["score"].array[0, 0] > 0


def test_the_configs_are_of_the_published_schema(repository: Path) -> None:
    found = importlib.util.find_spec("tritonclient")
    if found is None:
        pytest.skip("tritonclient, which brings the schema, is not installed")
    from google.protobuf import text_format

    path = Path(next(iter(found.submodule_search_locations or ()))) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None and spec.loader is not None
    schema = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(schema)
    configs = {
        name: text_format.Parse((repository / name / "config.pbtxt").read_text(), schema.ModelConfig())
        for name in ("detector", "guard")
    }
    graph = onnxruntime.InferenceSession(
        str(repository / "detector" / "1" / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    detector = configs["detector"]
    assert [item.name for item in detector.input] == [item.name for item in graph.get_inputs()]
    assert [item.name for item in detector.output] == [item.name for item in graph.get_outputs()]
    assert {schema.DataType.Name(item.data_type) for item in detector.input} == {"TYPE_INT64"}
    assert all(list(item.dims) == [1] and item.HasField("reshape") for item in detector.output)
    for config, backend in ((detector, "onnxruntime"), (configs["guard"], "python")):
        assert config.backend == backend and config.max_batch_size == 16
        assert config.HasField("dynamic_batching")
        assert schema.ModelInstanceGroup.Kind.Name(config.instance_group[0].kind) == "KIND_CPU"
        assert list(config.version_policy.specific.versions) == [1]
    assert [item.optional for item in configs["guard"].input] == [False, True]


def test_sixteen_bits_are_served_on_gpus(exported: Callable[..., DetectorFolder], tmp_path: Path) -> None:
    repository = export_serving(exported("fp16").path, tmp_path / "out", "triton")
    assert "KIND_GPU" in (repository / "detector" / "config.pbtxt").read_text()


def test_kserve_examples_are_what_the_graph_says(exported: Callable[..., DetectorFolder], tmp_path: Path) -> None:
    repository = export_serving(exported().path, tmp_path / "out", "kserve")
    documents = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    asked = {item["name"]: np.asarray([item["data"]]) for item in documents["detector-request.json"]["inputs"]}
    graph = onnxruntime.InferenceSession(
        str(repository / "detector" / "1" / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    logit, score = graph.run(["logit", "score"], asked)
    told = {item["name"]: item for item in documents["detector-response.json"]["outputs"]}
    assert told["logit"]["data"] == pytest.approx(logit, abs=1e-5)
    assert told["score"]["data"] == pytest.approx(score, abs=1e-5)
    for document in documents.values():
        for item in document.get("inputs", document.get("outputs")):
            assert np.asarray([item["data"]]).shape == tuple(item["shape"])
    verdict = {item["name"]: item["data"][0] for item in documents["guard-response.json"]["outputs"]}
    assert verdict["harmful"] is bool(not verdict["score"] >= 0.4)
    assert "kind: InferenceService" in (tmp_path / "out" / "inference-service.yaml").read_text()


def test_what_cannot_be_served_is_refused(exported: Callable[..., DetectorFolder], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="with-past"):
        export_serving(exported("fp32", True).path, tmp_path / "out", "triton")
    with pytest.raises(BadInput, match="triton, kserve"):
        export_serving(exported().path, tmp_path / "out", "sagemaker")  # type: ignore[arg-type]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(BadInput, match="not an empty folder"):
        export_serving(exported().path, tmp_path / "full", "triton")


def test_the_command_writes_a_repository(exported: Callable[..., DetectorFolder], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["export", "serving", str(exported().path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in out.iterdir()) == ["detector", "guard"]
