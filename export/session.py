"""A detector's graph in ONNX Runtime: opens it, and runs batches with keys and values that stay where they are.

It knows arrays; texts, queues and threads are the detector's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, NamedTuple

import numpy as np

from ..engine.errors import BadInput, CheckpointMismatch, MissingExtra, PassError
from .detector_folder import DetectorFolder

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
KEY_TYPES = {"fp16": (10, 2), "bf16": (16, 2)}  # on CUDA: ONNX's number of the type, and its bytes
FP32 = (1, 4)


class State(NamedTuple):
    """What a text's beginning left behind: its tokens, the sum of its pooled rows [hidden], how many they are, its
    logit and P(harmless)."""

    tokens: int
    pooled: np.ndarray
    pooled_count: float
    logit: float
    score: float


class Row(NamedTuple):
    """A text to run: its tokens from `past` on, the first pooled one (an index into the whole text), what its past
    left behind."""

    ids: Sequence[int]
    past: State
    pool_from: int


@dataclass(eq=False)
class Cache:
    """Keys and values of one text: a row of an array that may hold other texts' too.

    The array is [2 * layers, texts, kv_heads, capacity, bytes of a head]. address: of the row's first layer; step:
    bytes from a layer's keys to its values, and so on.
    """

    owner: Any  # a NumPy array, or an OrtValue on CUDA
    row: int
    address: int
    step: int
    capacity: int


def runtime() -> Any:
    """onnxruntime. Raises `MissingExtra` with the command that installs it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra(
            "exported detectors need ONNX Runtime: pip install 'stockade[onnx]', or 'stockade[onnx-gpu]' for CUDA"
        ) from error
    return onnxruntime


class Session:
    """The graph of a folder on a device. threads: that compute one batch; None leaves it to ONNX Runtime.

    Raises `BadInput` for a provider that is unknown, not installed or cannot run the folder, `CheckpointMismatch`
    for a graph that does not load, and `MissingExtra`.
    """

    def __init__(self, folder: DetectorFolder, providers: Sequence[str] | None, threads: int | None) -> None:
        ort = runtime()
        names = self._providers(ort, folder, providers)
        self.folder = folder
        self.cuda = CUDA in names
        self._ort = ort
        self._type, self._bytes = KEY_TYPES[folder.precision] if self.cuda else FP32
        self._mean = folder.pooling == "mean"
        options = ort.SessionOptions()
        options.log_severity_level = 3  # else it warns that pool_mask may be left out
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(str(folder.graph(self.cuda)), options, providers=names)
        except Exception as error:  # the runtime's types are private
            raise CheckpointMismatch(f"ONNX Runtime {ort.__version__} cannot load {folder.path}: {error}") from error
        found = self._session.get_providers()
        if self.cuda and CUDA not in found:
            raise BadInput(f"CUDA did not start; ONNX Runtime would run on {', '.join(found)} instead")

    def _providers(self, ort: Any, folder: DetectorFolder, providers: Sequence[str] | None) -> list[str]:
        there = [name for name in (CPU, CUDA) if name in ort.get_available_providers()]
        names = [CPU] if providers is None else list(providers)
        if not names or not set(names) <= set(there):
            raise BadInput(f"providers must be some of {', '.join(there)} here, not {', '.join(names) or 'none'}")
        if CUDA in names and folder.precision not in KEY_TYPES:
            raise BadInput(
                f"{CUDA} runs folders of {' and '.join(KEY_TYPES)} (it has no other attention); "
                f"{folder.path} is {folder.precision}"
            )
        return names

    def start(self) -> State:
        """Of a text of which nothing has run."""
        return State(0, np.zeros(self.folder.hidden_size if self._mean else 0, np.float32), 0.0, nan, nan)

    def run(self, rows: Sequence[Row], caches: Sequence[Cache] | None = None) -> list[State]:
        """Run texts as one batch, each from its past on; caches, where the folder has a past: one a text, which are
        rows of one array in this order unless it is one text. A past and several texts do not go together.

        Raises `PassError` where ONNX Runtime fails.
        """
        length = max(len(row.ids) - row.past.tokens for row in rows)
        ids, mask, pooled = (np.zeros((len(rows), length), np.int64) for _ in range(3))
        for index, row in enumerate(rows):
            new = row.ids[row.past.tokens :]
            ids[index, : len(new)] = new
            mask[index, : len(new)] = 1
            pooled[index, max(0, row.pool_from - row.past.tokens) :] = 1
        feed = {"input_ids": ids, "attention_mask": mask}
        if self._mean:
            feed["pool_mask"] = pooled
        try:
            if caches is None:
                logits, scores = self._session.run(["logit", "score"], feed)
                sums, counts = None, None
            else:
                logits, scores, sums, counts = self._run_bound(feed, rows, caches)
        except Exception as error:  # the runtime's types are private
            raise PassError(f"ONNX Runtime failed: {str(error)[:200]}") from error
        return [
            State(
                len(row.ids),
                row.past.pooled if sums is None else sums[index],
                row.past.pooled_count if counts is None else float(counts[index]),
                float(logits[index]),
                float(scores[index]),
            )
            for index, row in enumerate(rows)
        ]

    def _run_bound(self, feed: dict[str, np.ndarray], rows: Sequence[Row], caches: Sequence[Cache]) -> Any:
        """Keys and values are bound as inputs and outputs at once: the new ones are written behind the old."""
        folder, first = self.folder, caches[0]
        feed["past_length"] = np.asarray([row.past.tokens for row in rows], np.int64)
        if self._mean:
            feed["pooled_sum"] = np.stack([row.past.pooled for row in rows])
            feed["pooled_count"] = np.asarray([row.past.pooled_count for row in rows], np.float32)
        binding = self._session.io_binding()
        for name, value in feed.items():
            binding.bind_cpu_input(name, value)
        small = ["logit", "score", *(["present_sum", "present_count"] if self._mean else [])]
        for name in small:
            binding.bind_output(name, "cpu")
        shape = [len(rows), folder.kv_heads, first.capacity, folder.head_dim]
        device = "cuda" if self.cuda else "cpu"
        for index in range(2 * folder.layer):
            place = f"{index // 2}.{('key', 'value')[index % 2]}"
            address = first.address + index * first.step
            binding.bind_input(f"past_key_values.{place}", device, 0, self._type, shape, address)
            binding.bind_output(f"present.{place}", device, 0, self._type, shape, address)
        self._session.run_with_iobinding(binding)
        return [value.numpy() for value in binding.get_outputs()[: len(small)]] + [None] * (4 - len(small))

    def caches(self, texts: int, capacity: int) -> list[Cache]:
        """Room for the keys and values of texts that will run as one batch."""
        folder = self.folder
        shape = (2 * folder.layer, texts, folder.kv_heads, capacity, folder.head_dim * self._bytes)
        if self.cuda:
            return _rows(self._ort.OrtValue.ortvalue_from_shape_and_type(shape, np.uint8, "cuda", 0), shape)
        return _rows(np.empty(shape, np.uint8), shape)

    def enlarged(self, cache: Cache, capacity: int) -> Cache:
        """A text's keys and values with more room. They are copied (on CUDA by way of the host): if the room doubles
        every time, that is seldom."""
        array = cache.owner.numpy() if self.cuda else cache.owner
        layers, _, heads, old, width = array.shape
        larger = np.empty((layers, 1, heads, capacity, width), np.uint8)
        larger[:, 0, :, :old] = array[:, cache.row]
        owner = self._ort.OrtValue.ortvalue_from_numpy(larger, "cuda", 0) if self.cuda else larger
        return _rows(owner, larger.shape)[0]


def _rows(owner: Any, shape: tuple[int, ...]) -> list[Cache]:
    _, texts, heads, capacity, width = shape
    address = owner.ctypes.data if isinstance(owner, np.ndarray) else owner.data_ptr()
    size = heads * capacity * width
    return [Cache(owner, row, address + row * size, texts * size, capacity) for row in range(texts)]
