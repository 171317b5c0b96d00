"""Attention of a ragged batch over keys and values that lie in pages.

On the CPU adjacent pages form runs, and a run is read where it lies: a sequence whose pages are adjacent costs
one call of torch's flash kernel and no copy, a scattered one a call per run and a merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantized import FP8
from .ragged import RaggedTables

TILE_ROWS, TILE_COLUMNS = 32, 64


class LayerKV(NamedTuple):
    """One layer's keys and values in the pool, as views; a row is a token's place.

    kv: [2 * kv_heads, rows, head_dim], keys first. keys, values: [1, kv_heads, rows, head_dim].
    """

    kv: Tensor
    keys: Tensor
    values: Tensor


class SequenceSpan(NamedTuple):
    """One sequence's part of a batch: `length` query rows from `start` on, the last tokens of its context.

    runs: (first row, tokens) of its keys and values in order of position, the new tokens included.
    mask: [length, context] bool, true where a query may look; None for a single query (it sees all its runs)
    and for a first chunk (plain causal).
    """

    start: int
    length: int
    runs: tuple[tuple[int, int], ...]
    mask: Tensor | None = None


class DecodeGroup(NamedTuple):
    """Consecutive query rows from `start` on, one a sequence, whose keys and values lie at one distance.

    row: first row of the first sequence; step: rows from one sequence to the next. length: of the longest
    context; every sequence owns as many rows. mask: [length of the group, 1, 1, length] to add to the scores, in
    the queries' dtype; None where all contexts are equally long.
    """

    start: int
    sequences: int
    row: int
    step: int
    length: int
    mask: Tensor | None = None


Span: TypeAlias = SequenceSpan | DecodeGroup


def write_kv(cache: LayerKV, rows: Tensor, kv: Tensor, scale: Tensor | None = None) -> None:
    """Store kv [tokens, 2 * kv_heads, head_dim] (keys first) at `rows` [tokens] of the pool.

    scale: [2 * kv_heads] fp32 of pages of fp8: what is stored times it is the number; beyond the largest, it is that,
    but an infinity becomes NaN, so that nothing finite is computed from it.
    """
    if scale is None:
        cache.kv.index_copy_(1, rows, kv.transpose(0, 1))
        return
    largest = torch.finfo(FP8).max
    narrow = (kv.float() / scale.unsqueeze(1)).clamp(-largest, largest)
    narrow = narrow.masked_fill_(kv.isinf(), float("nan")).to(FP8)
    # torch moves no numbers of 8 bits by an index, but bytes
    cache.kv.view(torch.uint8).index_copy_(1, rows, narrow.view(torch.uint8).transpose(0, 1))


def widened(cache: LayerKV, spans: Sequence[Span], scale: Tensor, dtype: torch.dtype) -> tuple[LayerKV, list[Span]]:
    """What spans read of pages of fp8, side by side in a wider dtype, and the spans over that. scale: as above."""
    runs: list[tuple[int, int]] = []
    moved: list[Span] = []
    row = 0
    for span in spans:
        first = row
        if isinstance(span, DecodeGroup):
            own = [(span.row + index * span.step, span.length) for index in range(span.sequences)]
            moved.append(span._replace(row=first, step=span.length))
        else:
            own = list(span.runs)
            moved.append(span._replace(runs=((first, sum(count for _, count in own)),)))
        runs += own
        row = first + sum(count for _, count in own)
    parts = [cache.kv.narrow(1, start, count).view(torch.uint8) for start, count in runs]
    wide = (torch.cat(parts, 1).view(FP8).float() * scale[:, None, None]).to(dtype)
    keys, values = wide.chunk(2)
    return LayerKV(wide, keys.unsqueeze(0), values.unsqueeze(0)), moved


def paged_attention(
    q: Tensor, cache: LayerKV, spans: Sequence[Span], scale: float, cap: float | None = None
) -> Tensor:
    """Causal attention of each span's queries over its own runs.

    q: [tokens, heads, head_dim], in the order of `spans`, which cover all rows once. Query heads are grouped:
    head h reads key head h // (heads / kv_heads). cap: scores s become cap * tanh(s / cap) before the mask
    (Gemma 2, arXiv 2408.00118); torch's flash kernels have none, so they are then computed as a matrix in fp32.
    Returns [tokens, heads * head_dim].
    """
    kv_heads = cache.keys.shape[1]
    outs = []
    for span in spans:
        if cap is not None:
            outs.append(_capped(q, cache, span, scale, cap))
            continue
        if isinstance(span, DecodeGroup):
            outs.append(_decode_group(q, cache, span, scale, kv_heads))
            continue
        queries = q[span.start : span.start + span.length]
        if span.length == 1:
            outs.append(_decode(queries, cache, span.runs, scale, kv_heads))
        else:
            outs.append(_prefill(queries, cache, span, scale))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _decode(q: Tensor, cache: LayerKV, runs: tuple[tuple[int, int], ...], scale: float, kv_heads: int) -> Tensor:
    # The queries of a key head's group are the rows of one small matrix, so grouped heads cost no copy of the
    # keys and the context is read once (against bf16 bmm at 1k tokens: 84 against 240 us).
    grouped = q.view(1, kv_heads, -1, q.shape[-1])  # [1, kv_heads, group, head_dim]
    if len(runs) == 1:
        row, count = runs[0]
        out = F.scaled_dot_product_attention(
            grouped, cache.keys.narrow(2, row, count), cache.values.narrow(2, row, count), scale=scale
        )
        return out.reshape(1, -1)
    (row, count), *others = runs
    part, lse = _attend_with_lse(grouped, cache.keys.narrow(2, row, count), cache.values.narrow(2, row, count), scale)
    merged = part.float()
    for row, count in others:
        part, part_lse = _attend_with_lse(
            grouped, cache.keys.narrow(2, row, count), cache.values.narrow(2, row, count), scale
        )
        # a softmax over both is the mean of the two, weighted by their shares of the sum
        share = torch.sigmoid(part_lse - lse).unsqueeze(-1)
        merged, lse = torch.lerp(merged, part.float(), share), torch.logaddexp(lse, part_lse)
    return merged.to(q.dtype).reshape(1, -1)


def _decode_group(q: Tensor, cache: LayerKV, group: DecodeGroup, scale: float, kv_heads: int) -> Tensor:
    queries = q[group.start : group.start + group.sequences]
    shape = (group.sequences, kv_heads, group.length, q.shape[-1])
    keys, values = (_every(side, shape, group) for side in (cache.keys, cache.values))
    grouped = queries.view(group.sequences, kv_heads, -1, q.shape[-1])
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=group.mask, scale=scale)
    return out.reshape(group.sequences, -1)


def _every(side: Tensor, shape: tuple[int, ...], group: DecodeGroup) -> Tensor:
    """The keys or values of all sequences of a group, [sequences, kv_heads, length, head_dim], where they lie."""
    _, head, row, _ = side.stride()
    return side.as_strided(shape, (group.step * row, head, row, 1), side.storage_offset() + group.row * row)


def _attend_with_lse(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp of the scores) for [1, heads, rows, head_dim] without a mask."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, keys, values, 0.0, False, scale=scale)
    scores = (q.float() @ keys.float().transpose(-1, -2)) * scale
    return (scores.softmax(-1) @ values.float()).to(q.dtype), scores.logsumexp(-1)


def _prefill(q: Tensor, cache: LayerKV, span: SequenceSpan, scale: float) -> Tensor:
    keys, values = _gathered(cache, span.runs)
    queries, mask = q.transpose(0, 1).unsqueeze(0), span.mask
    if q.device.type == "cpu" and q.dtype is not torch.float32:
        queries, keys, values, mask = _in_tiles(queries, keys, values, mask)
    out = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != keys.shape[1],
    )
    return out[0, :, : span.length].transpose(0, 1).reshape(span.length, -1)


def _in_tiles(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with rows and context filled up to whole tiles, which nobody sees.

    On CPUs with AMX torch compiles a kernel for every shape of its blocks and keeps all of them: a process that meets
    ever new lengths grows by 15 KB with each.
    """
    count, context = q.shape[2], keys.shape[2]
    if mask is None:
        mask = torch.ones(count, context, dtype=torch.bool, device=q.device).tril()
    rows, columns = -count % TILE_ROWS, -context % TILE_COLUMNS
    q = F.pad(q, (0, 0, 0, rows))
    keys, values = (F.pad(side, (0, 0, 0, columns)) for side in (keys, values))
    mask = F.pad(mask, (0, columns, 0, rows))
    mask[count:, 0] = True  # a row that sees nothing has no softmax
    return q, keys, values, mask


def _gathered(cache: LayerKV, runs: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor]:
    """Keys and values of all runs, [1, kv_heads, tokens, head_dim]; a single run where it lies."""
    pieces = [(cache.keys.narrow(2, row, n), cache.values.narrow(2, row, n)) for row, n in runs]
    if len(pieces) == 1:
        return pieces[0]
    keys, values = (torch.cat(side, 2) for side in zip(*pieces, strict=True))
    return keys, values


def _capped(q: Tensor, cache: LayerKV, span: Span, scale: float, cap: float) -> Tensor:
    kv_heads, dim = cache.keys.shape[1], q.shape[-1]
    if isinstance(span, DecodeGroup):
        batch, length = span.sequences, 1
        keys, values = (
            _every(side, (batch, kv_heads, span.length, dim), span) for side in (cache.keys, cache.values)
        )
    else:
        batch, length = 1, span.length
        keys, values = _gathered(cache, span.runs)
    rows = q[span.start : span.start + batch * length]
    grouped = rows.view(batch, length, kv_heads, -1, dim).permute(0, 2, 3, 1, 4)  # [.., kv_heads, group, length, dim]
    scores = grouped.float() @ keys.float().unsqueeze(2).transpose(-1, -2) * (scale / cap)
    scores = scores.tanh_().mul_(cap)  # [batch, kv_heads, group, length, context]
    if isinstance(span, DecodeGroup):
        scores = scores if span.mask is None else scores + span.mask.unsqueeze(1)
    elif length > 1:
        mask = span.mask if span.mask is not None else torch.ones_like(scores[0, 0, 0], dtype=torch.bool).tril()
        scores = scores.masked_fill(~mask, float("-inf"))
    out = scores.softmax(-1) @ values.float().unsqueeze(2)
    return out.permute(0, 3, 1, 2, 4).reshape(batch * length, -1).to(q.dtype)


def causal_mask(count: int, context: int, window: int | None, device: torch.device) -> Tensor | None:
    """Who sees whom when the last `count` of `context` tokens are queries: bool [count, context].

    With a sliding window of w a query sees itself and the w - 1 tokens before it. None where plain causal
    attention over a square says the same.
    """
    if count == context and (window is None or context <= window):
        return None
    query = torch.arange(context - count, context, device=device).unsqueeze(1)
    key = torch.arange(context, device=device).unsqueeze(0)
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    return mask


def attention_reference(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    sees: Tensor | None = None,
) -> Tensor:
    """The same for one sequence in fp64: q [count, heads, dim], keys and values [kv_heads, context, dim].

    sees: [count], how many of its context, from the first on, a query sees, where not those up to itself.
    """
    group = q.shape[1] // keys.shape[0]
    keys, values = (side.double().repeat_interleave(group, 0) for side in (keys, values))
    scores = torch.einsum("qhd,hkd->hqk", q.double(), keys) * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    context = keys.shape[1]
    key = torch.arange(context, device=q.device)
    query = key[context - q.shape[0] :, None]
    allowed = key < (query + 1 if sees is None else sees[:, None])
    if window is not None:
        allowed &= key > query - window
    scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.einsum("hqk,hkd->qhd", scores.softmax(-1), values).flatten(1)


def ragged_reference(
    q: Tensor,
    cache: LayerKV,
    tables: RaggedTables,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    kv_scale: Tensor | None = None,
    sees: Tensor | None = None,
) -> Tensor:
    """What `kernels.triton.paged_attention` does, whose contract this shares, in fp64 and a sequence at a time.

    Returns [rows, heads * head_dim] in q's dtype; fp64 where q is.
    """
    kv_heads = cache.kv.shape[0] // 2
    out = q.new_zeros(q.shape[0], q[0].numel())
    first_row, lengths = tables.first_row.tolist(), tables.length.tolist()
    for index, context in enumerate(lengths):
        start, stop = first_row[index : index + 2]
        if start == stop or not context:
            continue
        places = torch.arange(context, device=q.device)
        rows = tables.pages[index].long()[places // tables.page_size] + places % tables.page_size
        kv = cache.kv[:, rows].double()
        if kv_scale is not None:
            kv = kv * kv_scale.double()[:, None, None]
        keys, values = kv.split(kv_heads)
        limits = None if sees is None else sees[start:stop]
        out[start:stop] = attention_reference(q[start:stop], keys, values, scale, window, cap, limits)
    return out
