"""What the exported detector costs and whether it says the same: ONNX Runtime beside the engine and `transformers`.

Everything runs in one process and in turn, so that ratios compare like with like; memory is of a child process.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table

from ..engine.engine import Engine
from ..engine.models.bundles import smol_folder
from ..engine.models.loader import load_models
from ..engine.models.model import Model
from ..engine.models.shapes import named_config
from ..engine.sampling import SamplingParams
from ..export.calibration import Passage, passage, validation_texts
from ..export.exporter import export_detector
from ..export.onnx_detector import OnnxDetector
from ..export.precision import Precision
from ..kernels.pooled_logit import pooled_logit
from ..train.data import Example, Source, read_examples
from ..train.data import Part as DataPart
from ..train.features import Passage as EnginePassage
from ..train.features import pooled_states
from ..train.fit import auroc

Told = Callable[[str, int, int], None]
QUANTIZED: tuple[Precision, ...] = ("int8", "int4")


@dataclass(frozen=True)
class OnnxConfig:
    """model: a bundle, or a named shape with random weights. lengths: tokens of an answer. batches: answers at once.
    answers: of the evaluation set at most. chunk: tokens that a sidecar is given at a time. data: where GPTFuzz lies;
    None leaves out what needs real answers. loaded: folders whose loading is measured.
    """

    model: str = "smol"
    lengths: tuple[int, ...] = (32, 128, 256)
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 5
    answers: int = 500
    chunk: int = 32
    decode_tokens: int = 192
    data: Path | None = None
    calibration_texts: int = 150
    seed: int = 0
    loaded: tuple[str, ...] = ("fp32", "int8", "int4", "with past")


@dataclass
class OnnxReport:
    """seconds: median of a forward pass by (batch, length) and variant; ratios: median of the same rounds' ratios."""

    config: OnnxConfig
    seconds: list[dict[str, Any]] = field(default_factory=list)
    quality: dict[str, Any] = field(default_factory=dict)
    loading: list[dict[str, Any]] = field(default_factory=list)
    sidecar: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        known = asdict(self)
        data = self.config.data
        known["config"]["data"] = None if data is None else str(data)
        return {"benchmark": "onnx", **known}

    def table(self) -> RenderableType:
        return Group(
            _table("Forward passes: milliseconds, and times as fast", self.seconds),
            _table("Quality on GPTFuzz's evaluation answers", [self.quality] if self.quality else []),
            _table("Loading", self.loading),
            _table("Beside a decoding engine", [self.sidecar]),
        )


def run_onnx(config: OnnxConfig, told: Told) -> OnnxReport:
    """Export a model's detector in every precision and measure. Raises as exporting and reading the data do."""
    report = OnnxReport(config)
    with TemporaryDirectory() as work:
        texts = () if config.data is None else validation_texts(config.data, config.calibration_texts)
        folders: dict[str, Path] = {}
        for precision in ("fp32", *QUANTIZED):
            folders[precision] = Path(work) / precision
            export_detector(config.model, folders[precision], precision=precision, calibration=texts, progress=told)
        folders["with past"] = Path(work) / "past"
        export_detector(config.model, folders["with past"], with_past=True)
        detectors = {name: OnnxDetector(folder) for name, folder in folders.items()}
        models = {dtype: _detector(config.model, dtype) for dtype in (torch.float32, torch.bfloat16)}
        try:
            _measure_speed(config, detectors, models, report, told)
            if config.data is not None:
                report.quality = _quality(config, detectors, models[torch.float32], told)
        finally:
            for detector in detectors.values():
                detector.close()
        report.loading = [_loading(name, folders[name]) for name in config.loaded]
        report.sidecar = _sidecar(config, folders["with past"], told)
    return report


def _detector(model: str, dtype: torch.dtype) -> Model:
    return load_models(model, model, dtype=dtype, device="cpu").models["detector"]


# Speed.


def _measure_speed(
    config: OnnxConfig,
    detectors: dict[str, OnnxDetector],
    models: dict[torch.dtype, Model],
    report: OnnxReport,
    told: Told,
) -> None:
    reference = _transformers(config.model, models[torch.float32].depth)
    random = Random(config.seed)
    sizes = [(batch, length) for batch in config.batches for length in config.lengths]
    for done, (batch, length) in enumerate(sizes):
        told("timing", done, len(sizes))
        vocabulary = detectors["fp32"].vocab_size
        texts = [[random.randrange(3, vocabulary) for _ in range(length)] for _ in range(batch)]
        zeros = [0] * batch
        runs: dict[str, Callable[[], Any]] = {
            "transformers fp32": partial(reference, torch.tensor(texts)),
            "engine fp32": partial(_forward, models[torch.float32], texts),
            "engine bf16": partial(_forward, models[torch.bfloat16], texts),
        }
        runs |= {f"onnx {name}": partial(detectors[name].score, texts, zeros) for name in ("fp32", *QUANTIZED)}
        report.seconds.append({"batch": batch, "tokens": length, **_in_turn(runs, config.repeats)})
    told("timing", len(sizes), len(sizes))


def _forward(model: Model, texts: list[list[int]]) -> None:
    pooled_states(model, [EnginePassage(ids) for ids in texts], [model.depth])


def _in_turn(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Medians in milliseconds, and ratios of the same round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            sleep(0.02)  # threads of one library that still spin would take the cores of the next
            began = perf_counter()
            run()
            seconds[name].append(perf_counter() - began)

    def times(slow: str, fast: str) -> float:
        return round(median(a / b for a, b in zip(seconds[slow][1:], seconds[fast][1:], strict=True)), 2)

    return {
        **{name: round(1e3 * median(values[1:]), 2) for name, values in seconds.items()},
        "fp32 / transformers": times("transformers fp32", "onnx fp32"),
        "int8 / engine fp32": times("engine fp32", "onnx int8"),
        "int8 / engine bf16": times("engine bf16", "onnx int8"),
    }


def _transformers(name: str, depth: int) -> Callable[[torch.Tensor], torch.Tensor]:
    from transformers import AutoModel

    shape = named_config(name)
    if shape is None:
        model = AutoModel.from_pretrained(smol_folder(), dtype=torch.float32).eval()
    else:
        model = AutoModel.from_config(shape, dtype=torch.float32).eval()
    model.layers = model.layers[:depth]
    model.norm = torch.nn.Identity()

    @torch.inference_mode()
    def run(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, use_cache=False).last_hidden_state.mean(1)

    return run


# Quality.


def _quality(
    config: OnnxConfig, detectors: dict[str, OnnxDetector], model: Model, told: Told
) -> dict[str, float | int]:
    assert config.data is not None
    examples = [
        item for item in read_examples(config.data) if item.source is Source.GPTFUZZ and item.part is DataPart.TEST
    ]
    Random(config.seed).shuffle(examples)
    examples = examples[: config.answers]
    passages = [passage(model.codec, "response", "", item.text, model.context) for item in examples]
    engine = _engine_logits(model, passages, told)
    found: dict[str, list[float]] = {}
    for name, detector in detectors.items():
        found[name] = []
        for start in range(0, len(passages), 20):
            some = passages[start : start + 20]
            found[name] += detector.logits([item.ids for item in some], [item.pool_from for item in some])
            told(f"scoring with {name}", len(found[name]), len(passages))
    chunked = _in_chunks(detectors["with past"], passages[:100], Random(config.seed))
    result: dict[str, float | int] = {
        "answers": len(examples),
        "fp32 against engine": _largest(found["fp32"], engine),
        "with past against engine": _largest(found["with past"], engine),
        "chunks against one pass (score)": _largest(
            chunked, [float(torch.sigmoid(torch.tensor(value))) for value in found["with past"][:100]]
        ),
    }
    for name in ("fp32", *QUANTIZED):
        spec = detectors[name].spec
        result[f"AUROC {name}"] = round(_auroc(found[name], examples), 4)
        scores = torch.sigmoid(torch.tensor(found[name], dtype=torch.float64))
        result[f"flagged {name}"] = round(float((scores < spec.threshold).double().mean()), 4)
    return result


def _engine_logits(model: Model, passages: Sequence[Passage], told: Told) -> list[float]:
    assert model.head is not None
    features = pooled_states(
        model, [EnginePassage(*item) for item in passages], [model.depth], progress=lambda a, b: told("engine", a, b)
    )
    head = model.head
    pooled = features.of(model.depth, head.spec.pooling)
    return pooled_logit(pooled, head.weight, head.bias, head.norm_weight, head.norm_eps)[0].tolist()


def _in_chunks(detector: OnnxDetector, passages: Sequence[Passage], random: Random) -> list[float]:
    found = []
    for ids, pool_from in passages:
        reading, fed = detector.open(), 0
        while fed < len(ids):
            end = min(len(ids), fed + random.randint(1, 64))
            reading.feed(fed, ids[:end], pool_from)
            fed = end
        while (score := reading.poll()) is None:
            sleep(0.001)
        found.append(score)
        reading.cancel()
    return found


def _auroc(logits: Sequence[float], examples: Sequence[Example]) -> float:
    values = torch.tensor(logits, dtype=torch.float64)
    harmless = torch.tensor([item.harmless for item in examples])
    return auroc(values[harmless], values[~harmless])


def _largest(left: Sequence[float], right: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


# Loading, and what a sidecar does to a decoding engine.

_CHILD = """
import sys, time
import onnxruntime, torch, transformers
from stockade.export.onnx_detector import OnnxDetector

def kib(name):  # of this program: what getrusage tells begins with the parent's
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))

before = kib("VmRSS")
began = time.perf_counter()
detector = OnnxDetector(sys.argv[1])
took = time.perf_counter() - began
loaded = kib("VmHWM")
detector.score([list(range(3, 131))], [0])
print(took, loaded - before, kib("VmHWM") - before)
"""


def _loading(name: str, folder: Path) -> dict[str, Any]:
    """In a process of its own, on Linux; memory over what its imports need."""
    done = subprocess.run([sys.executable, "-c", _CHILD, str(folder)], capture_output=True, text=True, check=True)
    took, loaded, run = (float(value) for value in done.stdout.split())
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {
        "folder": name,
        "MB": round(size / 1e6),
        "seconds to load": round(took, 2),
        "peak of loading / file": round(loaded * 1024 / size, 2),
        "peak after 128 tokens / file": round(run * 1024 / size, 2),
    }


def _sidecar(config: OnnxConfig, folder: Path, told: Told) -> dict[str, float]:
    """The engine decodes on all cores; then on all but one, with a detector on that one reading what is decoded."""
    engine = Engine(config.model, device="cpu")
    threads = torch.get_num_threads()
    detector = OnnxDetector(folder, threads=1)
    alone, beside, fewer, after, chunks = [], [], [], [], []
    try:
        for round_ in range(config.repeats):
            told("sidecar", round_, config.repeats)
            alone.append(_decode(engine, config, None)[0])
            torch.set_num_threads(max(1, threads - 1))
            fewer.append(_decode(engine, config, None)[0])
            took, wait, chunk = _decode(engine, config, detector)
            beside.append(took)
            after.append(wait)
            chunks.append(chunk)
            torch.set_num_threads(threads)
    finally:
        torch.set_num_threads(threads)
        detector.close()
    told("sidecar", config.repeats, config.repeats)
    return {
        "tokens/s on all cores": round(1 / median(alone), 1),
        "tokens/s on one less": round(1 / median(fewer), 1),
        "tokens/s beside the detector": round(1 / median(beside), 1),
        "times slower than on all": round(median(b / a for a, b in zip(alone, beside, strict=True)), 2),
        "share of cores": round(1 / threads, 2),
        "ms after the last token": round(1e3 * median(after), 1),
        "ms of a chunk": round(1e3 * median(chunks), 1),
    }


def _decode(engine: Engine, config: OnnxConfig, detector: OnnxDetector | None) -> tuple[float, float, float]:
    """Seconds a token, seconds from the last token to the score, seconds of a chunk run alone."""
    sampling = SamplingParams(max_tokens=config.decode_tokens, ignore_eos=True, temperature=0.0)
    request = engine.submit_prompt("The river rose over the meadow and", sampling)
    reading = None if detector is None else detector.open()
    stream: list[int] = []
    fed = 0
    began = perf_counter()
    while request.reply is None:
        engine.step()
        stream.append(len(stream) % 1000 + 3)  # as many tokens as there are steps; which ones makes no difference
        if reading is not None and len(stream) - fed >= config.chunk:
            reading.feed(fed, stream, 0)
            fed = len(stream)
    took = (perf_counter() - began) / max(1, len(stream))
    if reading is None or detector is None:
        return took, 0.0, 0.0
    ended = perf_counter()
    reading.feed(fed, [*stream, 5], 0)
    _wait(reading)
    wait = perf_counter() - ended
    ended = perf_counter()
    reading.feed(len(stream), stream + [5] * config.chunk, 0)
    _wait(reading)
    chunk = perf_counter() - ended
    reading.cancel()
    return took, wait, chunk


def _wait(reading: Any) -> None:
    while reading.poll() is None:
        sleep(0.0005)


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in rows[0] if rows else ():
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    return table
