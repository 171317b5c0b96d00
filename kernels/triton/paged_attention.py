"""Attention of a ragged batch over the page pool: decode with split contexts, and chunks of any length.

A program takes the query heads of one key head for a few rows of one sequence, and a part of its context: grouped
heads are rows of one tile, so keys are read once for all of them. Parts of a context are merged by a second launch,
which costs a microsecond or two in a graph and needs no counters, no order of programs and nothing cleared between
replays. The torch reference is `kernels.paged_attention.ragged_reference`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..paged_attention import LayerKV
from ..quantized import FP8
from ..ragged import RaggedTables
from .common import (
    FLOATS,
    KernelArgumentError,
    Launch,
    Target,
    check,
    check_device,
    check_tensor,
    compute_type,
    tanh,
    target_of,
)

LOG2E = 1.4426950408889634
MAX_DIM = 256
MAX_GROUP = 128  # query heads of a key head
MAX_SPLITS = 64
EMPTY = tl.constexpr(-1.0e30)  # the log-sum of no scores: finite, as exp2(-inf - -inf) is NaN
LEAST_TILES = tl.constexpr(2)  # of a part of a context: fewer would not even fill the loads that are under way


class Tile(NamedTuple):
    """rows: query rows times the heads of a group. keys: tokens of the context at a time, no more than a page has.

    fill: split contexts until there are this many programs a processor, or enough.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    fill: int


def tile_for(target: Target, queries: int, group: int, dim: int, dtype: torch.dtype) -> Tile:
    """The tile for at most `queries` rows a sequence; a table, whose reasons stand beside its lines."""
    wanted = queries * group
    least = max(16, triton.next_power_of_2(group))
    keys = 64 if dim <= 128 else 32  # at dimension 256 tiles of 64 keys leave no room for a second program
    if dtype is torch.float32:
        # Products in fp32 run on the plain cores and hold their operands in registers: for checks, not for speed.
        return Tile(least, 16, 4, 1, 2)
    if wanted <= 16 or queries == 1:
        # Decode is bound by memory: 16 rows are the least of a matrix instruction; a tile of 64 keys at dimension 128
        # is 32 KB under way, and three stages are two such buffers, as the page of the next tile is carried along.
        # AMD's compiler keeps the second buffer in registers. Eight programs a processor are a few waves of them, so
        # that the last wave leaves little idle.
        return Tile(least, keys, 4, 2 if target.backend == "hip" else 3, 8)
    if wanted <= 64:
        # The least of a warp group's instruction (HGMMA); one such group, and room for two programs.
        # At dimension 256 it would spill, and two groups share the columns.
        return Tile(max(64, least), keys, 4 if dim <= 128 else 8, 2, 2)
    if dim <= 128:
        # Two warp groups: with one, 128 rows spill; with 128 keys, nothing is left of 255 registers. Before warp
        # groups products took their operands from registers, and Triton 3.6 spills with 64 keys.
        if target.backend == "cuda" and int(target.arch) < 90:
            return Tile(128, 32, 8, 3, 2)
        return Tile(128, 64, 8, 2 if target.backend == "hip" else 3, 2)
    if target.arch in (90, 100, 103):
        return Tile(128, 32, 8, 2, 2)  # 128 KB, which only these have; with 64 keys it spills
    return Tile(max(64, least), 32, 8, 2, 2)


def paged_attention(
    q: Tensor,
    cache: LayerKV,
    tables: RaggedTables,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    kv_scale: Tensor | None = None,
    out: Tensor | None = None,
    scratch: Tensor | None = None,
    sees: Tensor | None = None,
) -> Tensor:
    """Causal attention of each sequence's rows, the last tokens of its context, over that context in its pages.

    q: [rows, heads, dim], any stride from row to row, dim up to 256. Query head h reads key head
    h // (heads / kv_heads). cache: keys and values [2 * kv_heads, pool rows, dim] in q's dtype, or in fp8 (e4m3) with
    kv_scale [2 * kv_heads] fp32, which they are multiplied by; a head's rows begin at multiples of 16 bytes, and what
    pads them is finite. window: a row sees itself and the window - 1 tokens before it. cap: scores s become
    cap * tanh(s / cap) (Gemma 2, arXiv 2408.00118). sees: [rows] int32, where rows see more than what is up to
    themselves (those of an image see each other): how many tokens of the context, from the first on.
    out: [rows, heads * dim] in q's dtype, returned. Rows that no sequence has get zeros. scratch: fp32, at least
    `scratch_numbers`; allocated where it is None and contexts are split.
    Fastest where a page has a multiple of 64 tokens. Raises `KernelArgumentError`.
    """
    launches, out = plan(q, cache, tables, scale, window, cap, kv_scale, out, scratch, sees)
    for launch in launches:
        launch.run()
    return out


def scratch_numbers(target: Target, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> int:
    """How many fp32 numbers of scratch suffice for any batch of a model of this shape."""
    group = heads // kv_heads
    tiles = [tile_for(target, queries, group, dim, dtype) for queries in (1, max(1, 16 // group), 64, 128)]
    return max(tile.fill * target.processors * tile.rows for tile in tiles) * (dim + 1)


def splits_for(target: Target, tile: Tile, programs: int, max_length: int) -> int:
    """Into how many parts, a power of two, contexts are cut: while processors would idle and parts are worth it."""
    splits = 1
    while (
        2 * splits <= MAX_SPLITS
        and programs * 2 * splits <= tile.fill * target.processors
        and max_length > splits * tile.keys * LEAST_TILES.value
    ):
        splits *= 2
    return splits


def plan(
    q: Tensor,
    cache: LayerKV,
    tables: RaggedTables,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    kv_scale: Tensor | None = None,
    out: Tensor | None = None,
    scratch: Tensor | None = None,
    sees: Tensor | None = None,
    target: Target | None = None,
) -> tuple[list[Launch], Tensor]:
    """The launches of `paged_attention` on a target (None: that of q's device), and where the result will be."""
    target = target or target_of(q.device)
    _check_arguments(q, cache, tables, window, cap, kv_scale, sees, target)
    device, (rows, heads, dim) = q.device, q.shape
    kv_heads, n = cache.kv.shape[0] // 2, len(tables.length)
    group = heads // kv_heads
    if out is None:
        out = torch.empty(rows, heads * dim, dtype=q.dtype, device=device)
    check_tensor("out", out, (rows, heads * dim), (q.dtype,), device)

    decode = tables.max_rows == 1
    tile = tile_for(target, tables.max_rows, group, dim, q.dtype)
    queries = 1 if decode else tile.rows // group
    # rows behind all sequences are a sequence more; of a step in which all decode, they are those of the padding ones
    tiles = n if decode else rows // queries + n + 1
    splits = splits_for(target, tile, tiles * kv_heads, tables.max_length)
    parts = sums = None
    if splits > 1:
        wanted = splits * rows * heads * (dim + 1)
        if scratch is None:
            scratch = torch.empty(wanted, device=device)
        check_tensor("scratch", scratch, ("numbers",), (torch.float32,), device)
        check(len(scratch) >= wanted, f"scratch: it has {len(scratch)} numbers; this batch needs {wanted}")
        parts, sums = scratch[: wanted - splits * rows * heads], scratch[wanted - splits * rows * heads : wanted]

    block = max(16, triton.next_power_of_2(dim))
    launches = [
        Launch(
            _attend,
            (tiles, kv_heads, splits),
            {
                "q": q,
                "kv": cache.kv,
                "first_row": tables.first_row,
                "length": tables.length,
                "pages": tables.pages,
                "sees": sees,
                "kv_scale": kv_scale,
                "out": out,
                "parts": parts,
                "sums": sums,
                "rows": rows,
                "sequences": n,
                "q_stride": q.stride(0),
                "head_stride": cache.kv.stride(0),
                "pages_stride": tables.pages.stride(0),
                # exp2 is cheaper than exp: scores are in units of log2(e)
                "scale": scale * LOG2E if cap is None else scale / cap,
                "cap": None if cap is None else cap * LOG2E,
                "window": window,
                "KV_HEADS": kv_heads,
                "GROUP": group,
                "DIM": dim,
                "LOADED": _loaded(dim, cache.kv),
                "BLOCK_D": block,
                "ROW": cache.kv.stride(1),
                "PAGE": tables.page_size,
                "BLOCK_M": tile.rows,
                "BLOCK_N": min(tile.keys, tables.page_size),
                "QUERIES": queries,
                "DECODE": decode,
                "CT": compute_type(q.dtype),
            },
            tile.warps,
            tile.stages,
        )
    ]
    if splits > 1:
        arguments = {"parts": parts, "sums": sums, "out": out, "rows": rows}
        sizes = {"HEADS": heads, "DIM": dim, "BLOCK_D": block, "SPLITS": splits}
        launches.append(Launch(_merge, (rows, heads), {**arguments, **sizes}, warps=4, stages=1))
    return launches, out


def _loaded(dim: int, kv: Tensor) -> int:
    """How many numbers of a row are read: whole 16 bytes, so that the loads are as wide as they can be."""
    unit = 16 // kv.dtype.itemsize
    return -(-dim // unit) * unit


def _check_arguments(
    q: Tensor,
    cache: LayerKV,
    tables: RaggedTables,
    window: int | None,
    cap: float | None,
    kv_scale: Tensor | None,
    sees: Tensor | None,
    target: Target,
) -> None:
    device = q.device
    check_device("q", q)
    check_tensor("q", q, ("rows", "heads", "dim"), FLOATS, device, contiguous=False)
    rows, heads, dim = q.shape
    check(heads == 1 or q.stride(1) == dim, f"q: heads are {q.stride(1)} numbers apart, not {dim}")
    check(0 < dim <= MAX_DIM, f"q: heads have {dim} dimensions; 1 to {MAX_DIM} are allowed")
    kv = cache.kv
    check_tensor("cache.kv", kv, ("2 * kv_heads", "pool rows", dim), (q.dtype, FP8), device, contiguous=False)
    kv_heads, odd = divmod(len(kv), 2)
    check(not odd and kv_heads > 0, f"cache.kv: {len(kv)} heads are not keys' and as many values'")
    check(heads % kv_heads == 0, f"q: {heads} heads cannot be shared by {kv_heads} key heads")
    check(heads // kv_heads <= MAX_GROUP, f"q: {heads // kv_heads} heads a key head are more than {MAX_GROUP}")
    apart = kv.stride(1)
    check(
        apart * kv.dtype.itemsize % 16 == 0 and apart >= _loaded(dim, kv),
        f"cache.kv: rows of {dim} numbers are {apart} apart, not a multiple of 16 bytes that is no less",
    )
    check(kv.stride(0) * kv.dtype.itemsize % 16 == 0, f"cache.kv: heads are {kv.stride(0)} apart, not whole 16 bytes")
    if kv.dtype is FP8:
        able = target.backend == "cuda" and int(target.arch) >= 89
        check(able, f"cache.kv: fp8 pages need a GPU of sm_89 or newer, not {target.arch}")
        if kv_scale is None:
            raise KernelArgumentError("kv_scale: fp8 pages need the scales of their heads")
    if kv_scale is not None:
        check_tensor("kv_scale", kv_scale, (2 * kv_heads,), (torch.float32,), device)
    n = len(tables.length)
    check_tensor("tables.length", tables.length, (n,), (torch.int32,), device)
    check_tensor("tables.first_row", tables.first_row, (n + 1,), (torch.int32,), device)
    check_tensor("tables.pages", tables.pages, (n, "max_pages"), (torch.int32,), device, contiguous=False)
    size, fit = tables.page_size, tables.pages.shape[1] * tables.page_size
    check(size >= 16 and size & (size - 1) == 0, f"tables.page_size: {size} is no power of two of at least 16")
    check(tables.max_length <= fit, f"tables.max_length: {tables.max_length} tokens do not fit into {fit} of pages")
    check(tables.max_rows > 0, f"tables.max_rows: {tables.max_rows} is less than 1")
    check(window is None or window > 0, f"window: {window} is less than 1")
    check(cap is None or cap > 0, f"cap: {cap} is not above 0")
    if sees is not None:
        check_tensor("sees", sees, (rows,), (torch.int32,), device)


# What differs from step to step must not make another kernel: each would be compiled while requests wait.
@triton.jit(
    do_not_specialize=["rows", "sequences", "pages_stride"],
    do_not_specialize_on_alignment=["first_row", "length", "pages", "sees", "kv_scale", "sums"],
)
def _attend(
    q,
    kv,
    first_row,
    length,
    pages,
    sees,
    kv_scale,
    out,
    parts,
    sums,
    rows,
    sequences,
    q_stride,
    head_stride: tl.int64,
    pages_stride,
    scale,
    cap,
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    LOADED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    QUERIES: tl.constexpr,
    DECODE: tl.constexpr,
    CT: tl.constexpr,
):
    key_head = tl.program_id(1)
    if DECODE:
        sequence = tl.program_id(0)
        row = tl.load(first_row + sequence)
        count = tl.load(first_row + sequence + 1) - row
        context = tl.load(length + sequence)
        first = 0
        if count == 0:
            # the padding sequences share out the rows behind all others
            row = tl.load(first_row + sequences) + sequence - row
            count = tl.where(row < rows, 1, 0)
            context = 0
    else:
        # The last tiles of a text have the most to read, and begin first.
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        sequence = _owner(first_row, sequences, tile, QUERIES)
        row = tl.load(first_row + sequence)
        stop = tl.load(first_row + sequence + 1, mask=sequence < sequences, other=rows)
        context = tl.load(length + sequence, mask=sequence < sequences, other=0)
        count = stop - row
        first = (tile - row // QUERIES - sequence) * QUERIES
    if first >= count:
        return

    in_tile = tl.arange(0, BLOCK_M)
    query = first + in_tile // GROUP
    head = key_head * GROUP + in_tile % GROUP
    real = (in_tile < QUERIES * GROUP) & (query < count)
    position = context - count + query
    last = tl.minimum(first + QUERIES, count) - 1  # query of this tile
    if sees is None:
        limit = position + 1
        highest = context - count + last + 1
    else:
        limit = tl.minimum(tl.load(sees + row + query, mask=real, other=0), context)
        highest = tl.max(limit)
    lowest = 0
    if window is not None:
        lowest = tl.maximum(context - count + first - window + 1, 0)

    heads = KV_HEADS * GROUP
    at_row = (row + first).to(tl.int64)
    into = (query - first) * heads + head
    begin = lowest // BLOCK_N
    end = tl.cdiv(tl.maximum(highest, 0), BLOCK_N)
    if parts is not None:
        split = tl.program_id(2)
        behind = (split.to(tl.int64) * rows + at_row) * heads
        share = tl.maximum(tl.cdiv(end - begin, tl.num_programs(2)), LEAST_TILES)
        begin += split * share
        end = tl.minimum(begin + share, end)
        if begin >= end:
            tl.store(sums + behind + into, tl.full([BLOCK_M], EMPTY, tl.float32), mask=real)
            return

    at_dim = tl.arange(0, BLOCK_D)
    here = q + at_row * q_stride + (query - first)[:, None] * q_stride + head[:, None] * DIM + at_dim[None, :]
    tile_q = tl.load(here, mask=real[:, None] & (at_dim < DIM)[None, :], other=0.0).to(CT)
    keys = kv + key_head.to(tl.int64) * head_stride
    values = keys + KV_HEADS * head_stride
    table = pages + sequence.to(tl.int64) * pages_stride
    score_scale = scale
    if kv_scale is not None:
        score_scale = scale * tl.load(kv_scale + key_head)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], EMPTY, tl.float32)
    weights = tl.zeros([BLOCK_M], tl.float32)
    if DECODE:
        # One row sees all tiles but the last whole, but a second loop would have to fill its own buffers.
        acc, top, weights = _over(
            begin, end, tile_q, keys, values, table, acc, top, weights, score_scale, cap,
            position, limit, window, lowest, highest, True, LOADED, BLOCK_D, ROW, PAGE, BLOCK_N, CT,
        )  # fmt: skip
    else:
        # All rows see whole what lies between the last one's window and the first one's place: no masks there.
        free = begin
        ahead = tl.maximum(tl.minimum((context - count + first + 1) // BLOCK_N, end), begin)
        if window is not None:
            free = tl.cdiv(tl.maximum(context - count + last - window + 1, 0), BLOCK_N)
            free = tl.minimum(tl.maximum(free, begin), ahead)
            acc, top, weights = _over(
                begin, free, tile_q, keys, values, table, acc, top, weights, score_scale, cap,
                position, limit, window, lowest, highest, True, LOADED, BLOCK_D, ROW, PAGE, BLOCK_N, CT,
            )  # fmt: skip
        acc, top, weights = _over(
            free, ahead, tile_q, keys, values, table, acc, top, weights, score_scale, cap,
            position, limit, window, lowest, highest, False, LOADED, BLOCK_D, ROW, PAGE, BLOCK_N, CT,
        )  # fmt: skip
        acc, top, weights = _over(
            ahead, end, tile_q, keys, values, table, acc, top, weights, score_scale, cap,
            position, limit, window, lowest, highest, True, LOADED, BLOCK_D, ROW, PAGE, BLOCK_N, CT,
        )  # fmt: skip

    nothing = weights == 0.0
    weights = tl.where(nothing, 1.0, weights)
    acc /= weights[:, None]
    if kv_scale is not None:
        acc *= tl.load(kv_scale + KV_HEADS + key_head)
    inside = real[:, None] & (at_dim < DIM)[None, :]
    if parts is None:
        tl.store(out + at_row * (heads * DIM) + into[:, None] * DIM + at_dim[None, :], acc, mask=inside)
    else:
        tl.store(parts + behind * DIM + into[:, None] * DIM + at_dim[None, :], acc, mask=inside)
        seen = tl.where(nothing, EMPTY, top + tl.log2(weights))
        tl.store(sums + behind + into, seen, mask=real)


@triton.jit
def _owner(first_row, sequences, tile, QUERIES: tl.constexpr):
    """The sequence of a tile, when sequence i owns those from first_row[i] // QUERIES + i on."""
    low = 0
    high = sequences
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(first_row + middle) // QUERIES + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _over(
    begin,
    end,
    q,
    keys,
    values,
    table,
    acc,
    top,
    weights,
    scale,
    cap,
    position,
    limit,
    window,
    lowest,
    highest,
    MASKED: tl.constexpr,
    LOADED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROW: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CT: tl.constexpr,
):
    """Softmax with a running maximum (Milakov, Gimelshein 2018) over the tiles [begin, end) of a context.

    top: the largest score so far, in units of log2(e). weights: the sum of exp2(score - top). acc: of those, times
    the values.
    """
    at_key = tl.arange(0, BLOCK_N)
    at_dim = tl.arange(0, BLOCK_D)
    offsets = at_key[:, None] * ROW + at_dim[None, :]
    loaded = (at_dim < LOADED)[None, :]
    # A tile's page is read one tile ahead: a load that waits for a load would take a buffer from the pipeline.
    page = tl.load(table + begin * BLOCK_N // PAGE, mask=begin < end, other=0)
    for tile in range(begin, end):
        start = tile * BLOCK_N
        place = (page + start % PAGE).to(tl.int64) * ROW
        page = tl.load(table + (start + BLOCK_N) // PAGE, mask=tile + 1 < end, other=0)
        tile_k = tl.load(keys + place + offsets, mask=loaded, other=0.0)
        scores = tl.dot(q, tl.trans(tile_k.to(CT)), input_precision="ieee") * scale
        if cap is not None:
            scores = cap * tanh(scores)
        key = start + at_key
        if MASKED:
            visible = key[None, :] < limit[:, None]
            if window is not None:
                visible = visible & (key[None, :] > position[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shares = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        weights = weights * fade + tl.sum(shares, 1)
        kept = loaded
        if MASKED:
            # what no row sees may be anything, and 0 times NaN is NaN
            kept = loaded & ((key >= lowest) & (key < highest))[:, None]
        tile_v = tl.load(values + place + offsets, mask=kept, other=0.0)
        acc = tl.dot(shares.to(CT), tile_v.to(CT), acc * fade[:, None], input_precision="ieee")
        top = new_top
    return acc, top, weights


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["sums"])
def _merge(
    parts, sums, out, rows, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr
):
    """One row's head from its parts: their mean, weighted by their shares of the whole sum of weights."""
    place = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    behind = tl.arange(0, SPLITS) * (rows.to(tl.int64) * HEADS) + place
    seen = tl.load(sums + behind)
    share = tl.exp2(seen - tl.max(seen))
    # parts of nothing were not written; NaN is no such
    written = tl.where(seen <= EMPTY, 0, DIM)
    at_dim = tl.arange(0, BLOCK_D)
    part = tl.load(
        parts + behind[:, None] * DIM + at_dim[None, :], mask=at_dim[None, :] < written[:, None], other=0.0
    )
    merged = tl.sum(part * share[:, None], 0) / tl.sum(share)
    tl.store(out + place * DIM + at_dim, merged, mask=at_dim < DIM)
