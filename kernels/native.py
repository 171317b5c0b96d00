"""Whole decoder layers and linear maps in bf16 on CPUs with AMX: `native.cpp`, compiled on first use.

An option. Where there is no compiler, no AMX or an odd shape, `load` says why, and the plain path runs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Array, Structure, byref, c_double, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .lora import ActiveAdapters, LowRank, Updates
from .paged_attention import LayerKV

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-Wl,--as-needed")
FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16")
MAX_HEAD_DIM = 256
COLUMNS, INPUTS = 16, 32  # of a tile
RANKS = 16  # of a chunk of a low-rank update


class _Matrix(Structure):
    _fields_ = (("tiles", c_void_p), ("bias", c_void_p), ("scales", c_void_p))

    @classmethod
    def of(cls, matrix: PackedMatrix) -> _Matrix:
        return cls(matrix.tiles.data_ptr(), _pointer(matrix.bias), _pointer(matrix.scales))


class _Layer(Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("qkv", "o", "gate", "up", "down")),
        *((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        ("window", c_int64),
    )


class _Shape(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("hidden", "heads", "kv_heads", "dim", "ffn")),
        ("eps", c_double),
        ("scale", c_double),
    )


class _Cache(Structure):
    _fields_ = (("layers", c_void_p), ("head_stride", c_int64), ("row_stride", c_int64), ("rows", c_int64))


class _Update(Structure):
    _fields_ = (("a", c_void_p), ("b", c_void_p), ("chunks", c_int64))


class _Updates(Structure):
    _fields_ = tuple((name, _Update) for name in ("qkv", "o", "wide", "down"))


class _Adapter(Structure):
    _fields_ = (("layers", c_void_p), ("chunks", c_int64))


class _Pool(Structure):
    _fields_ = (("layer", c_int64), ("slot_of", c_void_p), ("sums", c_void_p), ("slots", c_int64))


class PackedMatrix(NamedTuple):
    """A weight [out, in] in tiles, [out / 16, in / 32, 16, 16, 2] bf16, columns padded with zeros; and its bias.

    scales: of the columns, [padded out] fp32, where tiles are int8, the last two dimensions exchanged, and stand for
    themselves times these.
    """

    tiles: Tensor
    bias: Tensor | None
    out_features: int
    scales: Tensor | None = None


class LayerWeights(NamedTuple):
    """One decoder layer. qkv: queries, keys and values of all heads; norms [width] bf16; window None = none."""

    qkv: PackedMatrix
    o: PackedMatrix
    gate: PackedMatrix
    up: PackedMatrix
    down: PackedMatrix
    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int | None


class RaggedSequence(NamedTuple):
    """`length` query rows from `start` on; the first is at `position`.

    runs: (first row, tokens) of its whole context in order of position, the new tokens included.
    """

    start: int
    length: int
    position: int
    runs: Sequence[tuple[int, int]]


class RaggedGroup(NamedTuple):
    """Sequences whose keys and values lie in one layout: `caches` has a view for every layer that runs."""

    caches: Sequence[LayerKV]
    sequences: Sequence[RaggedSequence]


class Native:
    """The compiled library. Every call uses torch's own threads."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._linear = library.stockade_linear
        self._linear.argtypes = (
            *(c_void_p, c_int64, c_int64, c_void_p, c_double, POINTER(_Matrix)),
            *(c_int64, c_void_p, c_int64),
        )
        self._layers = library.stockade_layers
        self._layers.argtypes = (
            *(c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_void_p),
            *(c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64),
            c_int64,
        )

    def linear(self, x: Tensor, matrix: PackedMatrix, norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
        """x [rows, in] bf16 -> [rows, out] bf16; with `norm` [in] it is the RMS norm of x that is multiplied."""
        rows, columns = x.shape
        if x.dtype is not torch.bfloat16 or columns != matrix.tiles.shape[1] * INPUTS:
            raise ValueError(
                f"x is {tuple(x.shape)} {x.dtype}, the matrix takes {matrix.tiles.shape[1] * INPUTS} bf16"
            )
        x = x.contiguous()
        out = x.new_empty(rows, matrix.out_features)
        if rows:
            pointers = _Matrix.of(matrix)
            _check(
                self._linear(
                    *(x.data_ptr(), rows, columns, _pointer(norm), eps, byref(pointers)),
                    *(matrix.out_features, out.data_ptr(), torch.get_num_threads()),
                )
            )
        return out


class NativeLayers:
    """The packed layers of one decoder. heads, kv_heads, head_dim, norm_eps: as in its configuration."""

    def __init__(
        self,
        native: Native,
        layers: Sequence[LayerWeights],
        heads: int,
        kv_heads: int,
        head_dim: int,
        norm_eps: float,
    ) -> None:
        self._native = native
        self._weights = layers  # the library holds pointers into them
        self._hidden = len(layers[0].input_norm)
        self._shape = _Shape(
            *(self._hidden, heads, kv_heads, head_dim, layers[0].gate.out_features),
            *(norm_eps, head_dim**-0.5),
        )
        self._layers = (_Layer * len(layers))()
        for target, layer in zip(self._layers, layers, strict=True):
            for name in ("qkv", "o", "gate", "up", "down"):
                setattr(target, name, _Matrix.of(getattr(layer, name)))
            for name in ("input_norm", "post_norm", "q_norm", "k_norm"):
                setattr(target, name, _pointer(getattr(layer, name)))
            target.window = layer.window or 0
        self._adapters: dict[int, _PackedUpdates] = {}  # by the id of their updates, which they hold

    def pack_adapter(self, updates: Updates) -> None:
        """Bring an adapter's updates into tiles and keep them; `run` does it for those it has not met.

        Raises `ValueError` for an update that does not have the shape of its map.
        """
        if id(updates) not in self._adapters:
            self._adapters[id(updates)] = _PackedUpdates(updates, self._weights)

    def run(
        self,
        first: int,
        last: int,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        write_rows: Tensor,
        groups: Sequence[RaggedGroup],
        adapters: ActiveAdapters | None = None,
        wanted: Tensor | None = None,
        pooled: Mapping[int, Tensor] | None = None,
        sums: Tensor | None = None,
    ) -> None:
        """Run layers [first, last) over x [rows, hidden] bf16 in place; stores the new keys and values.

        angles: (cos, sin) [rows, 1, head_dim] bf16 as of `rope_angles`. write_rows: [rows] int64, where in its
        group's pool a row's keys and values go. groups: their sequences cover all rows. adapters: which rows have
        which. wanted: [rows] bool, the rows whose output anyone reads, None for all; those of the others are
        undefined, their keys and values are stored nevertheless. pooled: by layer, counted from 1, the slots [rows]
        int64 of `sums` [slots, hidden] fp32 that its output is added to, -1 for none; such rows must be wanted.
        Raises `IndexError` where a run, a write or a slot is out of range, before anything is computed.
        """
        cos, sin = angles
        if not (x.is_contiguous() and cos.is_contiguous() and sin.is_contiguous() and write_rows.is_contiguous()):
            raise ValueError("rows and angles must be contiguous")
        if x.dtype is not torch.bfloat16 or cos.dtype is not torch.bfloat16 or x.shape[1] != self._hidden:
            raise ValueError(f"x is {tuple(x.shape)} {x.dtype}; it must be bf16 of {self._hidden}")
        if wanted is not None and not (wanted.dtype is torch.bool and wanted.shape == x.shape[:1]):
            raise ValueError(f"wanted is {tuple(wanted.shape)} {wanted.dtype}; it must be bool, one for each row")
        pools = self._pools(first, last, len(x), pooled or {}, sums)
        adapter_of, packed = self._active(adapters, len(x))
        caches = (_Cache * len(groups))()
        places = []  # the arrays that `caches` points to
        sequences: list[int] = []
        runs: list[int] = []
        for number, group in enumerate(groups):
            place = (c_void_p * last)(*(cache.kv.data_ptr() for cache in group.caches[:last]))
            places.append(place)
            kv = group.caches[0].kv
            caches[number] = _Cache(ctypes.addressof(place), kv.stride(0), kv.stride(1), kv.shape[1])
            for sequence in group.sequences:
                sequences += (*sequence[:3], number, len(runs) // 2, len(sequence.runs))
                for run in sequence.runs:
                    runs += run
        _check(
            self._native._layers(
                *(byref(self._shape), self._layers, first, last, x.data_ptr(), len(x)),
                *(cos.data_ptr(), sin.data_ptr(), write_rows.data_ptr(), caches),
                *((c_int64 * len(sequences))(*sequences), len(sequences) // 6),
                (c_int64 * len(runs))(*runs),
                *(_pointer(adapter_of), packed, len(packed), _pointer(wanted), pools, len(pools)),
                torch.get_num_threads(),
            )
        )

    def _pools(
        self, first: int, last: int, rows: int, pooled: Mapping[int, Tensor], sums: Tensor | None
    ) -> Array[_Pool]:
        here = [(layer, slots) for layer, slots in pooled.items() if first < layer <= last]
        pools = (_Pool * len(here))()
        for index, (layer, slots) in enumerate(here):
            if sums is None or not sums.is_contiguous() or sums.dtype is not torch.float32:
                raise ValueError("pooled rows need contiguous running sums in fp32")
            if not slots.is_contiguous() or slots.dtype is not torch.int64 or slots.shape != (rows,):
                raise ValueError(f"slots are {tuple(slots.shape)} {slots.dtype}; they must be int64, one a row")
            if sums.shape[1] != self._hidden:
                raise ValueError(f"sums are {tuple(sums.shape)}; they must have {self._hidden} columns")
            pools[index] = _Pool(layer, slots.data_ptr(), sums.data_ptr(), len(sums))
        return pools

    def _active(self, adapters: ActiveAdapters | None, rows: int) -> tuple[Tensor | None, Array[_Adapter]]:
        """Which row has which adapter, and the adapters; those that no row has stay empty."""
        if adapters is None:
            return None, (_Adapter * 0)()
        if len(adapters.adapter) != rows:
            raise ValueError(f"{rows} rows, but adapters for {len(adapters.adapter)}")
        packed = (_Adapter * len(adapters.updates))()
        for index in adapters.active:
            updates = adapters.updates[index]
            self.pack_adapter(updates)
            packed[index] = self._adapters[id(updates)].pointers
        return adapters.adapter, packed


class _PackedUpdates:
    """An adapter's updates in the tiles of `native.cpp`; `pointers` is valid as long as this lives."""

    def __init__(self, updates: Updates, weights: Sequence[LayerWeights]) -> None:
        self.updates = updates
        self._tensors: list[Tensor] = []
        self._layers = (_Updates * len(weights))()
        most = 1
        for number, (target, layer) in enumerate(zip(self._layers, weights, strict=True)):
            for name, parts in (("qkv", ("qkv",)), ("o", ("o",)), ("wide", ("gate", "up")), ("down", ("down",))):
                found = [(getattr(layer, part), updates.get((number, part))) for part in parts]
                chunks = max(0 if update is None else -(-update.a.shape[1] // RANKS) for _, update in found)
                if not chunks:
                    continue
                pairs = [_packed_update(update, matrix, chunks) for matrix, update in found]
                a, b = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)
                self._tensors += a, b
                setattr(target, name, _Update(a.data_ptr(), b.data_ptr(), chunks * len(parts)))
                most = max(most, chunks * len(parts))
        self.pointers = _Adapter(ctypes.addressof(self._layers), most)


def _packed_update(update: LowRank | None, matrix: PackedMatrix, chunks: int) -> tuple[Tensor, Tensor]:
    """A and B in tiles, [chunks * 2, in / 32, 16, 16, 2] and [out / 16, chunks, 16, 16, 2] bf16; zeros for None.

    Each number is split in two of bf16, so that the sum keeps 16 bits: what is left of the error of bf16 maps is the
    rounding of their output.
    """
    inputs, outputs = matrix.tiles.shape[1] * INPUTS, matrix.out_features
    a, b = torch.zeros(inputs, chunks * RANKS), torch.zeros(chunks * RANKS, outputs)
    if update is not None:
        rank = update.a.shape[1]
        if (wanted := ((inputs, rank), (rank, outputs))) != (found := (tuple(update.a.shape), tuple(update.b.shape))):
            raise ValueError(f"an update is {found[0]} and {found[1]}; its map takes {wanted[0]} and {wanted[1]}")
        a[:, :rank] = update.a
        b[:rank] = update.b
    high_low_a = torch.stack(_split(a.t().unflatten(0, (chunks, RANKS))), 1)  # [chunks, 2, 16, in]
    high_low_b = torch.stack(_split(b.t().unflatten(1, (chunks, RANKS))), 2)  # [out, chunks, 2, 16]
    return pack(high_low_a.flatten(0, 2)).tiles, pack(high_low_b.flatten(1)).tiles


def _split(values: Tensor) -> tuple[Tensor, Tensor]:
    """Two bf16 tensors whose sum is (nearly) `values`."""
    high = values.bfloat16()
    return high, (values - high).bfloat16()


def packed_elements(out_features: int, in_features: int) -> int:
    """How many numbers the packed form of a weight has."""
    return -(-out_features // COLUMNS) * COLUMNS * in_features


def can_pack(weight: Tensor) -> bool:
    """Whether a weight [out, in] can be cut into tiles."""
    known = weight.dtype in (torch.bfloat16, torch.int8)
    return weight.device.type == "cpu" and known and weight.shape[1] % INPUTS == 0


def pack(
    weight: Tensor, bias: Tensor | None = None, into: Tensor | None = None, scales: Tensor | None = None
) -> PackedMatrix:
    """Cut weight [out, in] into tiles; `into` is where, flat, of its dtype and `packed_elements` numbers. scales: of
    an int8 weight, [out] fp32."""
    out_features, in_features = weight.shape
    panels = -(-out_features // COLUMNS)
    if into is None:
        into = weight.new_empty(packed_elements(out_features, in_features))
    narrow = weight.dtype is torch.int8
    tiles = into.view(panels, in_features // INPUTS, INPUTS // 2, *((2, COLUMNS) if narrow else (COLUMNS, 2)))
    filled = tiles.transpose(-1, -2) if narrow else tiles
    whole = out_features // COLUMNS
    parts = weight.view(out_features, in_features // INPUTS, INPUTS // 2, 2)
    filled[:whole] = parts[: whole * COLUMNS].unflatten(0, (whole, COLUMNS)).permute(0, 2, 3, 1, 4)
    if whole < panels:
        filled[whole].zero_()
        filled[whole, :, :, : out_features - whole * COLUMNS] = parts[whole * COLUMNS :].permute(1, 2, 0, 3)
    if scales is not None:
        scales = torch.nn.functional.pad(scales, (0, panels * COLUMNS - out_features))
    return PackedMatrix(tiles, bias, out_features, scales)


def load(folder: Path) -> Native | str:
    """The library, compiled into `folder` when it is not there yet; or why there is none. Never raises.

    `STOCKADE_NATIVE=0` turns it off. Safe for many processes at once. Warns once when a compiler fails.
    """
    if os.environ.get("STOCKADE_NATIVE") == "0":
        return "turned off by STOCKADE_NATIVE=0"
    return _load(folder)


@functools.cache
def _load(folder: Path) -> Native | str:
    missing = _missing_features()
    if missing:
        return f"this processor or system lacks {missing}"
    openmp = _loaded_openmp()
    if len(openmp) != 1:
        # threads of a second OpenMP library would wait for their turn beside torch's
        return "torch does not use GNU OpenMP here" if not openmp else "several OpenMP libraries are loaded"
    try:
        path = _compiled(folder, openmp[0])
        library = ctypes.CDLL(str(path))
        if _loaded_openmp() != openmp:
            return "the compiled library brought an OpenMP library of its own"
        if library.stockade_init() != 0:
            return "the system does not let this process use AMX"
        return Native(library)
    except FileNotFoundError as error:
        return str(error)
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or error
        warnings.warn(f"the native kernels could not be built, PyTorch runs instead: {told}", stacklevel=2)
        return f"building it failed: {type(error).__name__}"


def _missing_features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "/proc/cpuinfo"
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    return ", ".join(feature for feature in FEATURES if feature not in flags)


def _loaded_openmp() -> list[str]:
    """The OpenMP libraries of GNU that this process has mapped."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if "/" in line}
    return sorted(path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))


def _compiled(folder: Path, openmp: str) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("there is no compiler (g++)")
    version = _run(compiler, "-dumpfullversion")
    flags = (
        *FLAGS,
        *(f"-m{feature.replace('_', '-') if 'amx' in feature else feature.replace('_', '')}" for feature in FEATURES),
    )
    named = "\0".join((SOURCE.read_text(encoding="utf-8"), *flags, version, openmp, sys.platform))
    target = folder / f"native-{hashlib.sha256(named.encode()).hexdigest()[:16]}.so"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            out = Path(made) / target.name
            # linked to the very library that torch has loaded, under whatever name, so that threads are shared
            _run(compiler, *flags, "-o", str(out), str(SOURCE), openmp)
            out.replace(target)
    return target


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.strip()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(code: int) -> None:
    if code == -1:
        raise MemoryError("no memory for the hidden states of a step")
    if code:
        raise IndexError("a row of keys and values lies outside the pool, or a slot outside the running sums")
