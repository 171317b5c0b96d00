"""The operations of a fused layer in plain torch, in the signatures of `kernels.triton`. They run where Triton cannot
and its kernels are held against them; they read tables on the host, so that no graph can hold them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .lora import LoraStack, LowRank, add_low_rank_
from .paged_attention import LayerKV, SequenceSpan, Span, causal_mask, widened, write_kv
from .paged_attention import paged_attention as attend
from .ragged import RaggedTables
from .rms_norm import rms_norm
from .rope import rope_
from .swiglu import geglu, swiglu


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, scale: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """residual += scale * x, in place; returns its RMS norm times `weight`, or that of x where there is no residual.

    x, residual, out: [rows, width]; weight: [width]; rounding is that of `rms_norm`.
    """
    if residual is not None:
        x = residual.add_(x, alpha=scale)
    normed = rms_norm(x, weight, eps)
    return normed if out is None else out.copy_(normed)


def rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: LayerKV,
    write_rows: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    kv_scale: Tensor | None = None,
) -> None:
    """Rotate the queries of qkv [rows, heads + 2 * kv_heads, head_dim] in place; write keys and values into pages.

    cos, sin: [rows, 1, head_dim] as of `rope_angles`. write_rows: [rows], -1 for padding, which is written nowhere.
    q_norm, k_norm: [head_dim], of a norm of each head that comes first. kv_scale: [2 * kv_heads] fp32 where the pages
    are fp8; what is stored times the scale is the number.
    """
    kv_heads = cache.kv.shape[0] // 2
    heads = qkv.shape[1] - 2 * kv_heads
    rotated = qkv[:, : heads + kv_heads]
    if q_norm is not None and k_norm is not None:
        rotated[:, :heads] = rms_norm(rotated[:, :heads], q_norm, eps)
        rotated[:, heads:] = rms_norm(rotated[:, heads:], k_norm, eps)
    rope_(rotated, cos, sin)
    kv = qkv[:, heads:]
    kept = write_rows >= 0
    if not bool(kept.all()):
        write_rows, kv = write_rows[kept], kv[kept]
    write_kv(cache, write_rows.long(), kv, kv_scale)


def paged_attention(
    q: Tensor,
    cache: LayerKV,
    tables: RaggedTables,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    kv_scale: Tensor | None = None,
    out: Tensor | None = None,
    sees: Tensor | None = None,
) -> Tensor:
    """Causal attention of q [rows, heads, head_dim] over each sequence's pages -> [rows, heads * head_dim].

    A sequence's rows are the last of its context. Rows of no sequence come out as zeros. window: tokens that a query
    sees, itself included. cap, kv_scale: as of `kernels.paged_attention` and `rope_write`. sees: [rows] int32, how
    many tokens of its context, from the first on, a row sees, where not those up to itself.
    """
    spans: list[Span] = list(spans_of(tables, window, sees))
    if kv_scale is not None and spans:
        cache, spans = widened(cache, spans, kv_scale, q.dtype)
    result = q.new_zeros(len(q), q.shape[1] * q.shape[2]) if out is None else out.zero_()
    if spans:
        found = attend(q, cache, spans, scale, cap)
        result[: len(found)] = found
    return result


def spans_of(tables: RaggedTables, window: int | None, sees: Tensor | None = None) -> list[SequenceSpan]:
    """What the tables say, in the form of the plain path."""
    first_row, size = tables.first_row.tolist(), tables.page_size
    spans = []
    for index, length in enumerate(tables.length.tolist()):
        start, count = first_row[index], first_row[index + 1] - first_row[index]
        if not count:
            continue
        first = 0 if window is None else max(0, length - count - window + 1)  # nobody sees what lies before
        runs: list[tuple[int, int]] = []
        for number, page in enumerate(tables.pages[index, : -(-length // size)].tolist()):
            low, high = max(first, number * size), min(length, (number + 1) * size)
            if low >= high:
                continue
            row = page + low - number * size
            if runs and sum(runs[-1]) == row:
                row, before = runs.pop()
                runs.append((row, before + high - low))
            else:
                runs.append((row, high - low))
        mask = causal_mask(count, length - first, window, tables.length.device) if count > 1 else None
        if sees is not None and count > 1:
            key = torch.arange(first, length, device=sees.device)
            mask = key < sees[start : start + count, None]
            if window is not None:
                mask &= key > torch.arange(length - count, length, device=sees.device)[:, None] - window
        spans.append(SequenceSpan(start, count, tuple(runs), mask))
    return spans


def gated(
    gate: Tensor, up: Tensor | None = None, kind: Literal["silu", "gelu"] = "silu", *, out: Tensor | None = None
) -> Tensor:
    """silu(gate) * up, or gelu(gate) * up, [rows, ffn]; without `up`, gate [rows, 2 * ffn] holds both, gate first."""
    if up is None:
        gate, up = gate.chunk(2, 1)
    wide = geglu(gate, up) if kind == "gelu" else swiglu(gate, up)
    return wide if out is None else out.copy_(wide)


def add_low_rank(y: Tensor, x: Tensor, adapter: Tensor, stack: LoraStack) -> None:
    """y[row] += B[a] A[a] x[row] with a = adapter[row], in place; rows with -1 stay as they are."""
    for index, (a, b) in enumerate(zip(stack.a, stack.b, strict=True)):
        rows = (adapter == index).nonzero().squeeze(1)
        if len(rows):
            add_low_rank_(y, x, rows, LowRank(a.t(), b.t()))


def scatter_features(x: Tensor, rows: Tensor, features: Tensor) -> None:
    """x[rows[i]] = features[i], in place; rows of -1 are padding. x: [tokens, width]; features: [m, width]."""
    kept = rows >= 0
    x.index_copy_(0, rows[kept].long(), features[kept].to(x.dtype))
