"""The Triton kernels at real shapes, against the bandwidth of a copy and the torch operations they replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.paged_attention import LayerKV
from ..kernels.pooled_logit import pool_add, pooled_logit
from ..kernels.ragged import RaggedTables
from ..kernels.rope import rope_angles
from .gpu_parts import Figure, Sizes
from .gpu_timing import seconds

PAGE = 64
EPS = 1e-5
COPIES = 4  # of the inputs: together more than any cache
DTYPE = torch.bfloat16


def copy_bandwidth(sizes: Sizes, device: torch.device) -> float:
    """Bytes/s, read and written, of a copy far larger than the caches."""
    source, target = (torch.zeros(sizes.buffer, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * sizes.buffer / seconds([lambda: target.copy_(source)], device, sizes.repeats).median


def fusions(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """Residual add + RMSNorm, RoPE + KV write, SwiGLU, at many rows: bytes moved against those of a copy."""
    from ..kernels.triton.add_rms_norm import add_rms_norm  # there is no Triton everywhere
    from ..kernels.triton.gated import gated
    from ..kernels.triton.rope_write import rope_write

    bandwidth = copy_bandwidth(sizes, device)
    rows, heads, dim = sizes.rows, sizes.heads, sizes.head_dim
    yield Figure("fusions", "copy", bandwidth / 1e9, "GB/s")

    def measured(name: str, moved: int, make: Callable[[], Callable[[], object]]) -> Iterator[Figure]:
        took = seconds([make() for _ in range(COPIES)], device, sizes.repeats)
        rate = 2 * moved / took.median  # bf16
        yield Figure("fusions", f"{name}, {rows} tokens", rate / 1e9, "GB/s")
        yield Figure("fusions", f"{name}, of copy", 100 * rate / bandwidth, "%", 75.0, False)

    def norm() -> Callable[[], object]:
        x, residual, out = (_random(device, rows, sizes.hidden) for _ in range(3))
        weight = _random(device, sizes.hidden)
        return lambda: add_rms_norm(x, residual, weight, EPS, out=out)

    def gate() -> Callable[[], object]:
        both, out = _random(device, rows, 2 * sizes.ffn), _random(device, rows, sizes.ffn)
        return lambda: gated(both, out=out)

    def rope() -> Callable[[], object]:
        qkv, cache = _random(device, rows, 3 * heads, dim), _cache(device, heads, rows, dim)
        frequencies = 10000.0 ** -(torch.arange(0, dim, 2, device=device) / dim)
        angles = rope_angles(torch.arange(rows, device=device), frequencies, 1.0, DTYPE)
        places = torch.arange(rows, device=device)
        return lambda: rope_write(qkv, *angles, cache, places)

    yield from measured("add + norm", 4 * rows * sizes.hidden, norm)
    yield from measured("gate", 3 * rows * sizes.ffn, gate)
    yield from measured("rope + write", rows * (6 * heads * dim + dim), rope)


def decode_attention(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """One query a sequence, over pages anywhere in the pool."""
    bandwidth = copy_bandwidth(sizes, device)
    yield Figure("decode attention", "copy", bandwidth / 1e9, "GB/s")
    for context in sizes.contexts:
        yield from _decode_attention(sizes, context, bandwidth, device)


def _decode_attention(sizes: Sizes, context: int, bandwidth: float, device: torch.device) -> list[Figure]:
    """At one length of all contexts, against the copy and torch on gathered keys and values."""
    from ..kernels.triton.paged_attention import paged_attention

    n, heads, dim = sizes.sequences, sizes.heads, sizes.head_dim
    pages = -(-context // PAGE)
    cache = _cache(device, heads, n * pages * PAGE, dim)
    q, out = _random(device, n, heads, dim), torch.empty(n, heads * dim, dtype=DTYPE, device=device)
    tables = _tables(device, [1] * n, [context] * n, shuffled=True)
    ours = seconds([lambda: paged_attention(q, cache, tables, dim**-0.5, out=out)], device, sizes.repeats)
    keys, values = (
        side[0].view(heads, n, pages * PAGE, dim)[:, :, :context].transpose(0, 1).contiguous()
        for side in (cache.keys, cache.values)
    )
    wide = q.unsqueeze(2)
    theirs = seconds([lambda: F.scaled_dot_product_attention(wide, keys, values)], device, sizes.repeats)
    rate = 2 * (2 * n * context * heads * dim) / ours.median
    part, what = "decode attention", f"{n} x {context}"
    return [
        Figure(part, what, ours.median * 1e6, "us"),
        Figure(part, f"{what}, of copy", 100 * rate / bandwidth, "%", 80.0, False),
        Figure(part, f"{what}, torch's time", theirs.median / ours.median, "x", 1.5, False),
    ]


def prefill_attention(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """A long causal prompt: pages anywhere, pages in a row, and torch without pages."""
    from ..kernels.triton.paged_attention import paged_attention

    n, heads, dim = sizes.prefill, sizes.heads, sizes.head_dim
    cache = _cache(device, heads, -(-n // PAGE) * PAGE, dim)
    q, out = _random(device, n, heads, dim), torch.empty(n, heads * dim, dtype=DTYPE, device=device)
    flops = 4 * heads * dim * (n * (n + 1) / 2)
    took = {}
    for name, shuffled in (("pages anywhere", True), ("pages in a row", False)):
        tables = _tables(device, [n], [n], shuffled)
        run = partial(paged_attention, q, cache, tables, dim**-0.5, out=out)
        took[name] = seconds([run], device, sizes.repeats).median
    keys, values = cache.keys[:, :, :n], cache.values[:, :, :n]
    wide = q.transpose(0, 1).unsqueeze(0)
    theirs = [lambda: F.scaled_dot_product_attention(wide, keys, values, is_causal=True)]
    took["torch"] = seconds(theirs, device, sizes.repeats).median
    part = "prefill attention"
    for name, one in took.items():
        target = 350.0 if name[0] == "p" else None
        yield Figure(part, f"{n} tokens, {name}", flops / one / 1e12, "TFLOP/s", target, False)
    yield Figure(part, "pages anywhere, time", 100 * took["pages anywhere"] / took["pages in a row"], "%", 110.0)


def pooled_head(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """One row each of many sequences, summed, pooled, normed, scored and compared; against torch's operations."""
    from ..kernels.triton.pooled_head import pooled_head as kernel

    n, width = sizes.pooled, sizes.pooled_width
    hidden, weight, norm, bias = (_random(device, *size) for size in ((n, width), (width,), (width,), (1,)))
    sums = torch.zeros(n + 1, width, device=device)
    slots = torch.arange(n, device=device)
    first_row = torch.arange(n + 1, dtype=torch.int32, device=device)
    count = torch.full((n,), 9, dtype=torch.int32, device=device)
    slot = slots.int()
    out = torch.empty(n, device=device), torch.empty(n, dtype=torch.bool, device=device)

    def torchs() -> Tensor:
        pool_add(hidden, slots, sums)
        pooled = sums[slots] / count.unsqueeze(1)
        _, score = pooled_logit(pooled, weight, bias, norm, EPS)
        return score.isfinite() & (score >= 0.5)

    tables = first_row, count, slot, slot  # of a step of one row each, row i is where sequence i's pooled rows begin
    ours = seconds([lambda: kernel(hidden, *tables, sums, weight, bias, norm, EPS, 0.5, out)], device, sizes.repeats)
    theirs = seconds([torchs], device, sizes.repeats)
    what = f"{n} x {width}"
    yield Figure("pooled head", what, ours.median * 1e6, "us", 10.0)
    yield Figure("pooled head", f"{what}, torch's time", theirs.median / ours.median, "x", 5.0, False)


def _random(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=DTYPE, device=device).normal_()


def _cache(device: torch.device, heads: int, rows: int, dim: int) -> LayerKV:
    kv = _random(device, 2 * heads, rows, dim)
    return LayerKV(kv, kv[None, :heads], kv[None, heads:])


def _tables(device: torch.device, rows: list[int], lengths: list[int], shuffled: bool) -> RaggedTables:
    """Sequences of one length; their pages in order, or anywhere."""
    pages = -(-max(lengths) // PAGE)
    count = len(rows) * pages
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)) if shuffled else torch.arange(count)
    first = torch.tensor([0, *rows]).cumsum(0)
    return RaggedTables(
        first.int().to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        (order * PAGE).view(len(rows), pages).int().to(device),
        *(PAGE, max(rows), max(lengths)),
    )
