"""Which variants of each kernel are compiled ahead of time: launches in the shapes of models that are served.

Their tensors are on "meta": they have a shape and strides, and no numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ..lora import LoraStack
from ..paged_attention import LayerKV
from ..ragged import RaggedTables
from ..sampling import SampledRows, SamplingRows
from . import (
    add_rms_norm,
    gated,
    lora,
    paged_attention,
    pooled_head,
    quantize_rows,
    rope_write,
    sample,
    scatter_features,
)
from .common import Launch, Target

META = torch.device("meta")
BF16, FP8 = torch.bfloat16, paged_attention.FP8
PAGE = 64  # tokens


class Variant(NamedTuple):
    """launches: for a target. fp8: whether it needs a GPU that has it.

    copy_bits: where tiles are copied to shared memory, the least that each copy brings for a thread. groups: whether
    its products must be those of warp groups where there are such (HGMMA).
    """

    kernel: str
    what: str
    launches: Callable[[Target], list[Launch]]
    fp8: bool = False
    copy_bits: int | None = None
    groups: bool = False


class Attention(NamedTuple):
    """A model's attention: query heads, key heads, their dimension, and what else makes another kernel."""

    heads: int
    kv_heads: int
    dim: int
    window: int | None = None
    cap: float | None = None
    dtype: torch.dtype = BF16
    pages: torch.dtype = BF16

    def pool(self) -> Tensor:
        """One layer's keys and values, rows padded to 16 bytes."""
        unit = 16 // self.pages.itemsize
        padded = -(-self.dim // unit) * unit
        return _empty(2 * self.kv_heads, 2**22, padded, dtype=self.pages)[..., : self.dim]

    def launches(self, target: Target, sequences: int, queries: int, context: int) -> list[Launch]:
        rows, kv = sequences * queries, self.pool()
        qkv = _empty(rows, self.heads + 2 * self.kv_heads, self.dim, dtype=self.dtype)
        tables = RaggedTables(
            _ids(sequences + 1), _ids(sequences), _ids(sequences, context // PAGE), PAGE, queries, context
        )
        return paged_attention.plan(
            qkv[:, : self.heads],
            LayerKV(kv, kv[None, : self.kv_heads], kv[None, self.kv_heads :]),
            tables,
            self.dim**-0.5,
            self.window,
            self.cap,
            _empty(2 * self.kv_heads, dtype=torch.float32) if self.pages is FP8 else None,
            target=target,
        )[0]


MODELS = {
    "32 x 64": Attention(32, 32, 64),
    "9/3 x 64": Attention(9, 3, 64),
    "32 x 80": Attention(32, 32, 80),
    "32 x 96": Attention(32, 32, 96),
    "32 x 100": Attention(32, 32, 100),
    "32 x 112": Attention(32, 32, 112),
    "32 x 128": Attention(32, 32, 128),
    "28/4 x 128": Attention(28, 4, 128),
    "32/8 x 128, window": Attention(32, 8, 128, window=4096),
    "16/8 x 256, window, cap": Attention(16, 8, 256, window=4096, cap=50.0),
    "32 x 128, fp8 pages": Attention(32, 32, 128, pages=FP8),
    "32 x 100, fp8 pages": Attention(32, 32, 100, pages=FP8),
    "32 x 128, fp32": Attention(32, 32, 128, dtype=torch.float32, pages=torch.float32),
}
PREFILL = ("32 x 64", "32 x 100", "32 x 128", "28/4 x 128", "32/8 x 128, window", "16/8 x 256, window, cap")


def all_variants() -> Iterator[Variant]:
    """Those of every kernel, in the order of the table."""
    yield from _attention()
    yield from _pooled_head()
    yield from _fusions()
    yield from _adapters()
    yield from _sampler()


def _attention() -> Iterator[Variant]:
    for name, model in MODELS.items():
        fp8 = model.pages is FP8
        # Of fp8 values a warp's matrix instruction takes 8 bytes of a row a thread, and Triton copies them as it
        # takes them. Products in fp32 are no matter of speed, and copy nothing ahead.
        bits = None if model.dtype is torch.float32 else 64 if fp8 else 128
        yield Variant("attention, decode", name, _batch(model, 8, 1, 0), fp8, bits)
    for name in (*PREFILL, "32 x 128, fp8 pages"):
        model = MODELS[name]
        fp8 = model.pages is FP8
        yield Variant("attention, prefill", name, _batch(model, 1, 2048, 0), fp8, 128, groups=True)
    yield Variant(
        "attention, chunks of 32", "32 x 128", _batch(MODELS["32 x 128"], 8, 32, 0), False, 128, groups=True
    )
    for name in ("32 x 100", "32 x 128"):
        yield Variant("attention, merge", name, _batch(MODELS[name], 1, 1, 1))


def _batch(model: Attention, sequences: int, queries: int, index: int) -> Callable[[Target], list[Launch]]:
    return lambda target: model.launches(target, sequences, queries, 4096)[index : index + 1]


def _pooled_head() -> Iterator[Variant]:
    for width in (576, 3200, 4096):
        sums, weights, n = _empty(65, width, dtype=torch.float32), _empty(width), 64
        tables = _ids(n + 1), _ids(n), _ids(n), _ids(n)
        launch, _, _ = pooled_head.plan(
            _empty(512, width), *tables, sums, weights, _empty(1), weights, eps=1e-6, threshold=0.5
        )
        yield _one("pooled head", f"{width}, norm, bias", launch)


def _fusions() -> Iterator[Variant]:
    for width in (576, 3200, 4096):
        x = _empty(64, width)
        yield _one("add, RMS norm", str(width), add_rms_norm.plan(x, x, _empty(width), 1e-6, 1.0, x))
    for name in ("32 x 64", "32 x 100", "32 x 128", "16/8 x 256, window, cap", "32 x 128, fp8 pages"):
        model = MODELS[name]
        yield _one("rotate, write", name, _rope_write(model, None), model.pages is FP8)
    yield _one("rotate, write", "28/4 x 128, norms", _rope_write(MODELS["28/4 x 128"], _empty(128)))
    for kind in ("silu", "gelu"):
        gate, up = _empty(64, 2 * 11008).chunk(2, 1)
        yield _one("gate", f"{kind}, 11008", gated.plan(gate, up, kind, _empty(64, 11008)))
    features = scatter_features.plan(_empty(1024, 4096), _ids(576), _empty(576, 4096))
    yield _one("scatter features", "4096", features)
    quantized = quantize_rows.plan(_empty(64, 4096), _empty(64, 4096, dtype=FP8), _empty(64, dtype=torch.float32))
    yield _one("quantize rows to fp8", "4096", quantized, fp8=True)


def _rope_write(model: Attention, norm: Tensor | None) -> Launch:
    kv, angles, rows = model.pool(), _empty(64, 1, model.dim), _ids(64)
    scales = _empty(2 * model.kv_heads, dtype=torch.float32) if model.pages is FP8 else None
    qkv = _empty(64, model.heads + 2 * model.kv_heads, model.dim)
    return rope_write.plan(qkv, angles, angles, kv, rows, norm, norm, 1e-6, scales)


def _adapters() -> Iterator[Variant]:
    for rank, rows in product(
        (16, 64, 256), (64, 1024)
    ):  # queries, keys and values as one have three adapters' ranks
        stack = LoraStack(_empty(2, rank, 4096), _empty(2, 12288, rank))
        scratch = _empty(lora.scratch_numbers(rows, stack), dtype=torch.float32)
        what = f"rank {rank}, {rows} rows of 4096"
        yield _one("adapters, shrink", what, lora.plan_shrink(_empty(rows, 4096), _ids(rows), stack, scratch))
        yield _one("adapters, expand", what, lora.plan_expand(_empty(rows, 12288), _ids(rows), stack, scratch))


def _sampler() -> Iterator[Variant]:
    dtypes = {"top_k": torch.int32, "seed": torch.int64, "pass_index": torch.int32, "position": torch.int32}
    columns = (_empty(8, dtype=dtypes.get(name, torch.float64)) for name in SamplingRows._fields)
    out = SampledRows(_ids(8), _empty(8, dtype=torch.float32))
    yield _one("sample", "32000", sample.plan(_empty(8, 32000), SamplingRows._make(columns), out))


def _one(kernel: str, what: str, launch: Launch, fp8: bool = False) -> Variant:
    """One launch, the same for every target."""
    return Variant(kernel, what, lambda target: [launch], fp8)


def _empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=META)


def _ids(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.int32)
