"""The exported detector against the engine's, in fp32: the same logits, however texts are batched, padded or cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stockade.engine.models.loader import load_models
from stockade.engine.models.model import Model
from stockade.export.detector_folder import DetectorFolder
from stockade.export.exporter import export_detector
from stockade.export.onnx_detector import OnnxDetector
from stockade.export.source import EXPORTED
from stockade.kernels.pooled_logit import pooled_logit
from stockade.train.features import Passage, pooled_states
from tests.conftest import FAMILIES, VOCAB

TOLERANCE = 1e-4
LENGTHS = (1, 2, 17, 40, 70)


def texts(seed: int = 0) -> list[list[int]]:
    random = Random(seed)
    return [[random.randrange(3, VOCAB - 4) for _ in range(length)] for length in LENGTHS]


def engine_logits(model: Model, some: list[list[int]], pool_from: list[int]) -> list[float]:
    head = model.head
    assert head is not None
    passages = [Passage(ids, first) for ids, first in zip(some, pool_from, strict=True)]
    found = pooled_states(model, passages, [model.depth]).of(model.depth, head.spec.pooling)
    return pooled_logit(found, head.weight, head.bias, head.norm_weight, head.norm_eps)[0].tolist()


def session_of(folder: DetectorFolder) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(folder.graph(False)), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("with_past", [False, True])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name.startswith(EXPORTED)])
def test_a_classifier_of_every_family_gives_the_engines_logits(
    family: str, with_past: bool, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoint(f"classifier-{family}")
    model = load_models(checkpoint("llama-gqa"), source, dtype=torch.float32, device="cpu").models["detector"]
    detector = OnnxDetector(export_detector(source, tmp_path / "out", with_past=with_past), threads=1)
    want = engine_logits(model, texts(), [0] * len(LENGTHS))
    assert detector.logits(texts(), [0] * len(LENGTHS)) == pytest.approx(want, abs=TOLERANCE)
    if with_past:
        for ids, logit in zip(texts(), want, strict=True):
            reading = detector.open()
            for end in (len(ids) // 3, len(ids) // 2, len(ids)):
                if end:
                    reading.feed(min(end, len(reading._ids)), ids[:end], 0)
            assert waited(reading) == pytest.approx(1 / (1 + np.exp(-logit)), abs=TOLERANCE)
    detector.close()


def waited(reading: object) -> float:
    from threading import Event

    done = Event()
    reading.on_done = done.set  # type: ignore[attr-defined]
    for _ in range(1000):
        score = reading.poll()  # type: ignore[attr-defined]
        if score is not None:
            return score
        done.wait(0.01)
    raise AssertionError("no score within ten seconds")


def test_a_mean_head_pools_from_where_it_is_told(
    mean_head: tuple[Path, Path], exported: Callable[..., DetectorFolder]
) -> None:
    head, base = mean_head
    model = load_models(base, head, dtype=torch.float32, device="cpu").models["detector"]
    pool_from = [0, 1, 5, 39, 10]
    want = engine_logits(model, texts(), pool_from)
    for with_past in (False, True):
        detector = OnnxDetector(exported("fp32", with_past), threads=1)
        assert detector.logits(texts(), pool_from) == pytest.approx(want, abs=TOLERANCE)
        detector.close()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000))
def test_no_padding_changes_a_logit(seed: int, exported: Callable[..., DetectorFolder]) -> None:
    """On the left, on the right, in holes; whatever ids stand there."""
    session, random = session_of(exported()), Random(seed)
    some = texts(seed)
    width = max(LENGTHS) + random.randrange(9)
    ids = np.asarray([[random.randrange(VOCAB) for _ in range(width)] for _ in some], np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(some):
        places = sorted(random.sample(range(width), len(text)))
        ids[row, places], mask[row, places] = text, 1
    padded = session.run(["logit"], {"input_ids": ids, "attention_mask": mask})[0]
    alone = [
        session.run(["logit"], {"input_ids": np.asarray([text]), "attention_mask": np.ones((1, len(text)), np.int64)})
        for text in some
    ]
    assert padded == pytest.approx(np.asarray(alone).ravel(), abs=TOLERANCE)


def test_a_row_without_tokens_is_nan_and_leaves_the_others_alone(exported: Callable[..., DetectorFolder]) -> None:
    session = session_of(exported())
    ids = np.asarray([[5, 6, 7], [5, 6, 7]])
    both = session.run(["logit", "score"], {"input_ids": ids, "attention_mask": np.asarray([[1, 1, 1], [0, 0, 0]])})
    alone = session.run(["logit"], {"input_ids": ids[:1], "attention_mask": np.ones((1, 3), np.int64)})[0]
    assert both[0][0] == pytest.approx(alone[0], abs=TOLERANCE)
    assert np.isnan(both[0][1]) and np.isnan(both[1][1])


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
def test_other_precisions_stay_close_and_do_not_depend_on_the_batch(
    precision: str, exported: Callable[..., DetectorFolder]
) -> None:
    zeros = [0] * len(LENGTHS)
    exact, other = OnnxDetector(exported(), threads=1), OnnxDetector(exported(precision), threads=1)
    want, found = exact.logits(texts(), zeros), other.logits(texts(), zeros)
    allowed = {"fp16": 0.01, "bf16": 0.05, "int8": 0.2, "int4": 1.0}[precision] * np.std(want)
    assert 0 < max(abs(a - b) for a, b in zip(want, found, strict=True)) < allowed
    alone = [other.logits([ids], [0])[0] for ids in texts()]
    assert found == pytest.approx(alone, abs=TOLERANCE)
    exact.close()
    other.close()


def test_sixteen_bits_are_half_as_large_and_computing_in_them_is_close(
    exported: Callable[..., DetectorFolder], tmp_path: Path
) -> None:
    size = {name: (exported(name).path / "weights.bin").stat().st_size for name in ("fp32", "fp16", "bf16")}
    assert size["fp16"] == size["bf16"] < 0.85 * size["fp32"]  # what aligns tensors counts in a model this small
    folder = exported("fp16")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # the CPU runs the graph for CUDA too, with casts that the runtime puts in
    cuda = onnxruntime.InferenceSession(str(folder.graph(True)), options, providers=["CPUExecutionProvider"])
    feed = {"input_ids": np.asarray([texts()[3]]), "attention_mask": np.ones((1, LENGTHS[3]), np.int64)}
    want = session_of(folder).run(["logit"], feed)[0]
    assert cuda.run(["logit"], feed)[0] == pytest.approx(want, abs=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("with_past", [False, True])
def test_the_graph_is_sound_and_fused(
    precision: str, with_past: bool, exported: Callable[..., DetectorFolder], tmp_path: Path
) -> None:
    folder = exported(precision, with_past)
    onnx.checker.check_model(str(folder.graph(False)), full_check=True)
    model = onnx.load(folder.graph(False), load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    assert [d.dim_param for d in inferred.graph.output[0].type.tensor_type.shape.dim] == ["batch"]
    kinds = [node.op_type for node in model.graph.node]
    layers = folder.layer
    assert kinds.count("GroupQueryAttention") == layers
    assert kinds.count("SkipSimplifiedLayerNormalization") == 2 * layers - 1
    assert kinds.count("RMSNormalization") == 1
    assert kinds.count("QuickGelu") == layers
    assert not {"RotaryEmbedding", "Cos", "Sin", "Softmax", "Sqrt"} & set(kinds)
    linear = {"int8": "MatMulIntegerToFloat", "int4": "MatMulNBits"}.get(precision, "MatMul")
    assert kinds.count(linear) == 5 * layers + (linear == "MatMul")


@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="needs a GPU and onnxruntime-gpu",
)
@pytest.mark.parametrize("with_past", [False, True])
def test_cuda_gives_the_cpus_scores(with_past: bool, exported: Callable[..., DetectorFolder]) -> None:
    folder = exported("fp16", with_past)
    cpu = OnnxDetector(folder)
    cuda = OnnxDetector(folder, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    zeros = [0] * len(LENGTHS)
    assert cuda.score(texts(), zeros) == pytest.approx(cpu.score(texts(), zeros), abs=0.02)
    reading = cuda.open()
    for end in (10, 40):
        reading.feed(end and 10, texts()[3][:end], 0)
    assert waited(reading) == pytest.approx(cpu.score([texts()[3]], [0])[0], abs=0.02)
    cpu.close()
    cuda.close()
