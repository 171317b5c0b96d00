"""Tensors in safetensors files and in torch's zip files, read one by one in bounded memory.

Knows files only; what their tensors mean is decided elsewhere. Nothing is unpickled but plain tensors.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointMismatch, CheckpointMissing, CheckpointTruncated, UnsafeCheckpoint

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
SMALLEST_WINDOW = 8 << 20  # bytes


class Stored(NamedTuple):
    """What a header says about a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None  # None: one that holds no plain floating-point numbers
    spelling: str  # the dtype as the file names it

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * (self.dtype.itemsize if self.dtype else 0)


class TensorSource(Protocol):
    """Named tensors of some checkpoint format."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name → shape, known without reading the tensors."""

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor once, on the CPU. A tensor is valid until the next one is asked for."""


class WeightFiles:
    """The tensors of one or several `.safetensors` or torch `.bin` files, as one source."""

    def __init__(self, files: Sequence[Path], rename: Callable[[Iterable[str]], Mapping[str, str]]) -> None:
        """Read the headers. `rename` gives each name to be used and the stored one it stands for; what it leaves out
        is not read. Raises `CheckpointMissing`, `CheckpointTruncated`, `CheckpointMismatch` (a name twice, a dtype
        that is no float), `UnsafeCheckpoint` (a pickle that holds more than tensors)."""
        stored: dict[str, Stored] = {}
        origin: dict[str, Path] = {}
        for file in files:
            for name, header in _open(file).contents().items():
                if name in origin:
                    raise CheckpointMismatch(
                        f"tensor {name!r} is in both {origin[name].name} and {file.name}; it may be in one file"
                    )
                stored[name] = header
                origin[name] = file
        self._entries = [(name, key, stored[key], origin[key]) for name, key in rename(stored).items()]
        for _, key, header, file in self._entries:
            if header.dtype is None:
                raise CheckpointMismatch(
                    f"{file}: {key!r} is stored as {header.spelling}; weights may be {', '.join(FLOATS)} "
                    "(quantized checkpoints only as GGUF)"
                )
        # Largest first: see `read`. Names break ties, so the order does not depend on how files were cut.
        self._entries.sort(key=lambda entry: (-entry[2].nbytes, entry[0]))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, _, stored, _ in self._entries}

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor once, the largest first, in its stored dtype, as a view of a mapped file.

        Mapped pages count as resident memory, so the mappings are dropped after every twentieth of the bytes. And
        where each tensor is copied into memory that was not touched before, the largest first means that its copy
        and its source are in memory together while little else is.
        """
        window = max(SMALLEST_WINDOW, sum(stored.nbytes for _, _, stored, _ in self._entries) // 20)
        opened: dict[Path, _Safetensors | _TorchZip] = {}
        mapped = 0
        for name, key, stored, file in self._entries:
            if mapped and mapped + stored.nbytes > window:
                opened.clear()
                mapped = 0
            if file not in opened:
                opened[file] = _open(file)
            tensor = opened[file].get(key)
            if tuple(tensor.shape) != stored.shape:
                raise CheckpointMismatch(f"{file} changed while it was read")
            mapped += stored.nbytes
            yield name, tensor
            del tensor


def _open(file: Path) -> _Safetensors | _TorchZip:
    if not file.is_file():
        raise CheckpointMissing(f"{file} is not there (or not a file)")
    return _Safetensors(file) if file.suffix == ".safetensors" else _TorchZip(file)


class _Safetensors:
    def __init__(self, file: Path) -> None:
        self._path = file
        try:
            self._file = safe_open(file, framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointTruncated(f"{file} is damaged or cut off, or no safetensors file: {error}") from error

    def contents(self) -> dict[str, Stored]:
        stored = {}
        for name in self._file.keys():  # noqa: SIM118 (no mapping)
            view = self._file.get_slice(name)
            dtype = view.get_dtype()
            stored[name] = Stored(tuple(view.get_shape()), FLOATS.get(dtype), dtype)
        return stored

    def get(self, name: str) -> Tensor:
        try:
            return self._file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointMismatch(f"{self._path} changed while it was read: {error}") from error


class _TorchZip:
    def __init__(self, file: Path) -> None:
        self._path = file
        with open(file, "rb") as start:
            magic = start.read(4)
        if magic.startswith(b"\x80"):
            raise UnsafeCheckpoint(
                f"{file} is a bare pickle, which cannot be read safely and in place; save it as safetensors"
            )
        if magic != b"PK\3\4":
            raise CheckpointTruncated(f"{file} is empty, damaged, or not written by torch.save")
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise UnsafeCheckpoint(
                f"{file} holds more than tensors and was not unpickled; save its weights as safetensors"
            ) from error
        except Exception as error:  # torch raises whatever its unpickler meets in a damaged file
            raise CheckpointTruncated(f"{file} is damaged or cut off: {type(error).__name__}: {error}") from error
        if not isinstance(tensors, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
        ):
            raise CheckpointMismatch(f"{file} holds something else than a dictionary of named tensors")
        self._tensors: dict[str, Tensor] = tensors

    def contents(self) -> dict[str, Stored]:
        stored = {}
        for name, tensor in self._tensors.items():
            if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
                raise CheckpointMismatch(f"{self._path}: {name!r} is not a dense tensor")
            dtype = tensor.dtype if tensor.dtype in FLOATS.values() else None
            stored[name] = Stored(tuple(tensor.shape), dtype, str(tensor.dtype))
        return stored

    def get(self, name: str) -> Tensor:
        try:
            return self._tensors[name].detach()
        except KeyError as error:
            raise CheckpointMismatch(f"{self._path} changed while it was read: no {name!r}") from error
