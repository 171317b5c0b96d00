"""What the exported detector costs and whether it says the same: ONNX Runtime beside the engine and `transformers`.

Everything runs in one process and in turn, so that ratios compare like with like; memory is of a child process.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
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
from .paired import Contest, Enough, Round, play, shortfall, take_turns
from .units import Unit
from .workload import Sources

QUANTIZED: tuple[Precision, ...] = ("int8", "int4")
PAST = "with past"
SIDES = ("transformers fp32", "engine fp32", "engine bf16", "onnx fp32", "onnx int8", "onnx int4")
COMPARED = (("transformers fp32", "onnx fp32"), ("engine fp32", "onnx int8"), ("engine bf16", "onnx int8"))
CHUNKED = 100  # answers that are read in chunks, too


@dataclass(frozen=True)
class OnnxConfig:
    """lengths: tokens of an answer. batches: answers at once. sidecars: rounds beside a decoding engine. answers: of
    the evaluation set at most. chunk: tokens that a sidecar is given at a time. data: where GPTFuzz lies; None leaves
    out what needs real answers. loaded: folders whose loading is measured.
    """

    lengths: tuple[int, ...] = (32, 128, 256)
    batches: tuple[int, ...] = (1, 8)
    enough: Enough = field(default_factory=Enough)
    sidecars: int = 5
    answers: int = 500
    chunk: int = 32
    decode_tokens: int = 192
    data: Path | None = None
    calibration_texts: int = 150
    seed: int = 0
    loaded: tuple[str, ...] = ("fp32", *QUANTIZED, PAST)


class OnnxPlan:
    """A piece of work is a round of passes of one size, all scores of one variant, one load, or a round beside a
    decoding engine. Folders are exported anew every time."""

    kind = "onnx"

    def __init__(self, sources: Sources, config: OnnxConfig, stack: ExitStack) -> None:
        """stack: closes the detectors in the end. Raises as exporting and reading the data do."""
        self.config, self.seed, self.limit = config, config.seed, config.enough.limit
        self._model, self._folders = sources.name, dict[str, Path]()
        self.settings = {
            "model": sources.name,
            **asdict(config),
            "data": None if config.data is None else str(config.data),
        }
        texts = () if config.data is None else validation_texts(config.data, config.calibration_texts)
        for precision in ("fp32", *QUANTIZED):
            self._folders[precision] = sources.work / f"onnx-{precision}"
            export_detector(sources.name, self._folders[precision], precision=precision, calibration=texts)
        self._folders[PAST] = sources.work / "onnx-past"
        export_detector(sources.name, self._folders[PAST], with_past=True)
        self._detectors = {
            name: stack.enter_context(closing(OnnxDetector(folder))) for name, folder in self._folders.items()
        }
        self._models = {dtype: _detector(sources.name, dtype) for dtype in (torch.float32, torch.bfloat16)}
        self._reference = _transformers(sources.name, self._models[torch.float32].depth)
        self._sizes = {
            Contest(f"{batch} x {length}", COMPARED, partial(self._passes, batch, length)): (batch, length)
            for batch in config.batches
            for length in config.lengths
        }

    def warm_up(self) -> None:
        for contest in self._sizes:
            contest.play(-1)

    def units(self, done: dict[str, Any]) -> Iterator[Unit]:
        yield from play(list(self._sizes), self.config.enough, done)
        if self.config.data is not None:
            yield "scores engine", self._engine_scores
            for name in self._detectors:
                yield f"scores {name}", partial(self._scores, name)
            yield "scores in chunks", self._chunk_scores
        for name in self.config.loaded:
            yield f"loading {name}", partial(_loading, name, self._folders[name])
        for number in range(self.config.sidecars):
            yield f"sidecar {number}", self._sidecar

    def _passes(self, batch: int, length: int, number: int) -> Round:
        """Everybody reads the same answers, twice."""
        random = Random(f"{self.seed} {batch} {length} {number}")
        vocabulary = self._detectors["fp32"].vocab_size
        texts = [[random.randrange(3, vocabulary) for _ in range(length)] for _ in range(batch)]
        zeros = [0] * batch
        runs: tuple[Callable[[], Any], ...] = (
            partial(self._reference, torch.tensor(texts)),
            partial(_forward, self._models[torch.float32], texts),
            partial(_forward, self._models[torch.bfloat16], texts),
            *(partial(self._detectors[name].score, texts, zeros) for name in ("fp32", *QUANTIZED)),
        )
        passes = {name: _Twice(run) for name, run in zip(SIDES, runs, strict=True)}
        take_turns(passes, random)
        return {name: one.seconds for name, one in passes.items()}

    def rows(self, done: dict[str, Any]) -> list[dict[str, Any]]:
        """A row a size: milliseconds of a pass, medians of the rounds; ratios of the same rounds."""
        rows = []
        for contest, (batch, length) in self._sizes.items():
            if not (rounds := contest.rounds(done)):
                continue
            times = {name: round(1e3 * median(sum(one[name]) / 2 for one in rounds), 2) for name in SIDES}
            ratios = contest.ratios(rounds)
            rows.append({"batch": batch, "tokens": length, "n": len(rounds), **times, "ratios": ratios})
        return rows

    def more(self, done: dict[str, Any]) -> dict[str, Any]:
        """quality: how the scores agree with the engine's, and tell. loading, sidecar: see `_loading`, `_decode`."""
        parts = {
            "quality": self._quality(done),
            "loading": [found for name, found in done.items() if name.startswith("loading")],
            "sidecar": self._beside([found for name, found in done.items() if name.startswith("sidecar")]),
        }
        return {name: part for name, part in parts.items() if part}

    def table(self, done: dict[str, Any]) -> RenderableType:
        rows = [
            {**row, "ratios": "", **{pair: ratio["median"] for pair, ratio in row["ratios"].items()}}
            for row in self.rows(done)
        ]
        for row in rows:
            del row["ratios"]
        more = self.more(done)
        return Group(
            _table("Forward passes: milliseconds, and times as long", rows),
            _table("Quality on GPTFuzz's evaluation answers", [more["quality"]] if "quality" in more else []),
            _table("Loading", more.get("loading", [])),
            _table("Beside a decoding engine", [more["sidecar"]] if "sidecar" in more else []),
            shortfall(list(self._sizes), self.config.enough, done),
        )

    # Quality.

    def _examples(self) -> list[Example]:
        assert self.config.data is not None
        examples = [
            item
            for item in read_examples(self.config.data)
            if item.source is Source.GPTFUZZ and item.part is DataPart.TEST
        ]
        Random(self.seed).shuffle(examples)
        return examples[: self.config.answers]

    def _passages(self) -> list[Passage]:
        model = self._models[torch.float32]
        return [passage(model.codec, "response", "", item.text, model.context) for item in self._examples()]

    def _engine_scores(self) -> list[float]:
        return _engine_logits(self._models[torch.float32], self._passages())

    def _scores(self, name: str) -> list[float]:
        passages, found = self._passages(), list[float]()
        for start in range(0, len(passages), 20):
            some = passages[start : start + 20]
            found += self._detectors[name].logits([item.ids for item in some], [item.pool_from for item in some])
        return found

    def _chunk_scores(self) -> list[float]:
        return _in_chunks(self._detectors[PAST], self._passages()[:CHUNKED], Random(self.seed))

    def _quality(self, done: dict[str, Any]) -> dict[str, float | int]:
        found = {name.removeprefix("scores "): values for name, values in done.items() if name.startswith("scores")}
        if "in chunks" not in found:  # it comes last
            return {}
        examples = self._examples()
        whole = torch.sigmoid(torch.tensor(found[PAST][:CHUNKED])).tolist()
        result: dict[str, float | int] = {
            "answers": len(examples),
            "fp32 against engine": _largest(found["fp32"], found["engine"]),
            "with past against engine": _largest(found[PAST], found["engine"]),
            "chunks against one pass (score)": _largest(found["in chunks"], whole),
        }
        for name in ("fp32", *QUANTIZED):
            result[f"AUROC {name}"] = round(_auroc(found[name], examples), 4)
            scores = torch.sigmoid(torch.tensor(found[name], dtype=torch.float64))
            threshold = self._detectors[name].spec.threshold
            result[f"flagged {name}"] = round(float((scores < threshold).double().mean()), 4)
        return result

    # A detector that reads beside a decoding engine.

    def _sidecar(self) -> dict[str, float]:
        """The engine decodes on all cores; then on all but one, with a detector on that one reading what is decoded.
        Seconds."""
        engine = Engine(self._model, device="cpu")
        threads = torch.get_num_threads()
        with closing(OnnxDetector(self._folders[PAST], threads=1)) as detector:
            try:
                alone = _decode(engine, self.config, None)[0]
                torch.set_num_threads(max(1, threads - 1))
                fewer = _decode(engine, self.config, None)[0]
                beside, after, chunk = _decode(engine, self.config, detector)
            finally:
                torch.set_num_threads(threads)
        return {"alone": alone, "fewer": fewer, "beside": beside, "after": after, "chunk": chunk}

    def _beside(self, found: list[dict[str, float]]) -> dict[str, float]:
        if not found:
            return {}
        middle = {name: median(one[name] for one in found) for name in found[0]}
        return {
            "n": len(found),
            "tokens/s on all cores": round(1 / middle["alone"], 1),
            "tokens/s on one less": round(1 / middle["fewer"], 1),
            "tokens/s beside the detector": round(1 / middle["beside"], 1),
            "times slower than on all": round(median(one["beside"] / one["alone"] for one in found), 2),
            "share of cores": round(1 / torch.get_num_threads(), 2),
            "ms after the last token": round(1e3 * middle["after"], 1),
            "ms of a chunk": round(1e3 * middle["chunk"], 1),
        }


@dataclass
class _Twice:
    """The same pass, measured twice."""

    run: Callable[[], Any]
    seconds: list[float] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.seconds) == 2

    def step(self) -> None:
        sleep(0.02)  # threads of one library that still spin would take the cores of the next
        began = perf_counter()
        self.run()
        self.seconds.append(perf_counter() - began)


def _detector(model: str, dtype: torch.dtype) -> Model:
    return load_models(model, model, dtype=dtype, device="cpu").models["detector"]


def _forward(model: Model, texts: list[list[int]]) -> None:
    pooled_states(model, [EnginePassage(ids) for ids in texts], [model.depth])


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


def _engine_logits(model: Model, passages: Sequence[Passage]) -> list[float]:
    assert model.head is not None
    features = pooled_states(model, [EnginePassage(*item) for item in passages], [model.depth])
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
