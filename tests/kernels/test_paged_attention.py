"""Paged attention against plain attention in fp64: any cut into runs, any part of a batch, any window."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from stockade.kernels.paged_attention import (
    LayerKV,
    SequenceSpan,
    attention_reference,
    causal_mask,
    paged_attention,
    write_kv,
)

CPU = torch.device("cpu")
ROWS = 400


def cache_of(kv_heads: int, dim: int, dtype: torch.dtype, padded: int | None = None) -> LayerKV:
    """A layer's views, full of NaN: whatever is read without having been written shows."""
    kv = torch.full((2 * kv_heads, ROWS, padded or dim), float("nan"), dtype=dtype)[..., :dim]
    return LayerKV(kv, kv[:kv_heads].unsqueeze(0), kv[kv_heads:].unsqueeze(0))


def cut(context: int, pieces: list[int], start: int) -> tuple[tuple[int, int], ...]:
    """Runs for `context` tokens: pieces of the given lengths with gaps between them, the order reversed."""
    runs = []
    at = start
    left = context
    for piece in [*pieces, context]:
        piece = min(piece, left)
        if piece:
            runs.append((at, piece))
            at += piece + 3
            left -= piece
    return tuple(runs)


def store(cache: LayerKV, runs: tuple[tuple[int, int], ...], kv: torch.Tensor) -> None:
    rows = torch.tensor([row + n for row, count in runs for n in range(count)])
    write_kv(cache, rows, kv)


def clip(runs: tuple[tuple[int, int], ...], first: int) -> tuple[tuple[int, int], ...]:
    """Runs without their first tokens, as the batch clips them to a window."""
    rows = [row + n for row, count in runs for n in range(count)][first:]
    out: list[tuple[int, int]] = []
    for row in rows:
        if out and sum(out[-1]) == row:
            out[-1] = (out[-1][0], out[-1][1] + 1)
        else:
            out.append((row, 1))
    return tuple(out)


@settings(max_examples=60, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 3), (9, 3)]),
    dim=st.sampled_from([8, 24, 100]),
    sequences=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 60), st.lists(st.integers(1, 20), max_size=3)),
        min_size=1,
        max_size=3,
    ),
    window=st.sampled_from([None, 1, 7, 500]),
    cap=st.sampled_from([None, None, 0.7, 30.0]),
    seed=st.integers(0, 1000),
)
def test_fp32_equals_plain_attention(
    heads: tuple[int, int],
    dim: int,
    sequences: list[tuple[int, int, list[int]]],
    window: int | None,
    cap: float | None,
    seed: int,
) -> None:
    query_heads, kv_heads = heads
    generator = torch.Generator().manual_seed(seed)
    cache = cache_of(kv_heads, dim, torch.float32, padded=-(-dim // 4) * 4)
    spans, queries, wants = [], [], []
    row = place = 0
    for context, count, pieces in sequences:
        count = min(count, context)
        kv = torch.randn(context, 2 * kv_heads, dim, generator=generator)
        q = torch.randn(count, query_heads, dim, generator=generator)
        runs = cut(context, pieces, place)
        place = sum(runs[-1]) + 5
        store(cache, runs, kv)
        first = 0 if window is None else max(0, context - count - window + 1)
        mask = causal_mask(count, context - first, window, CPU) if count > 1 else None
        spans.append(SequenceSpan(row, count, clip(runs, first), mask))
        keys, values = kv.transpose(0, 1).split(kv_heads)
        wants.append(attention_reference(q, keys, values, dim**-0.5, window, cap))
        queries.append(q)
        row += count
    got = paged_attention(torch.cat(queries), cache, spans, dim**-0.5, cap)
    torch.testing.assert_close(got.double(), torch.cat(wants), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pieces", [[], [17], [1, 30, 2]], ids=["one run", "two runs", "four runs"])
@pytest.mark.parametrize("count", [1, 2, 64])
@pytest.mark.parametrize("dim", [64, 100])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_bf16_is_no_worse_than_pytorch(cap: float | None, dim: int, count: int, pieces: list[int]) -> None:
    context, query_heads, kv_heads = 64, 9, 3
    generator = torch.Generator().manual_seed(dim + count)
    kv = torch.randn(context, 2 * kv_heads, dim, generator=generator).bfloat16()
    q = (torch.randn(count, query_heads, dim, generator=generator) * 2).bfloat16()
    cache = cache_of(kv_heads, dim, torch.bfloat16, padded=-(-dim // 8) * 8)
    runs = cut(context, pieces, 9)
    store(cache, runs, kv)
    mask = causal_mask(count, context, None, CPU) if count > 1 else None
    got = paged_attention(q, cache, [SequenceSpan(0, count, runs, mask)], dim**-0.5, cap)
    keys, values = kv.transpose(0, 1).split(kv_heads)
    exact = attention_reference(q, keys, values, dim**-0.5, cap=cap)
    allowed = torch.ones(count, context, dtype=torch.bool).tril(context - count)
    every_key, every_value = (side.repeat_interleave(3, 0) for side in (keys, values))
    if cap is None:
        sides = (side.unsqueeze(0) for side in (q.transpose(0, 1), every_key, every_value))
        theirs = F.scaled_dot_product_attention(*sides, attn_mask=allowed)[0]
    else:
        scores = cap * torch.tanh(q.transpose(0, 1) @ every_key.transpose(-1, -2) * dim**-0.5 / cap)
        theirs = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ every_value
    error = (theirs.transpose(0, 1).reshape(count, -1) - exact).norm()
    assert got.dtype is torch.bfloat16
    # one query over several runs is merged from parts that torch's kernel has rounded to bf16 already
    merged = count == 1 and len(runs) > 1
    assert (got - exact).norm() <= error * (1.5 if merged else 1.1)


@pytest.mark.parametrize("window", [None, 20])
def test_16_bit_prefills_of_any_length_meet_few_shapes(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps a kernel for every shape that it has met, see `paged_attention._in_tiles`."""
    shapes = set()
    attention = F.scaled_dot_product_attention

    def noted(q: torch.Tensor, keys: torch.Tensor, *others: object, **named: object) -> torch.Tensor:
        shapes.add((q.shape[2], keys.shape[2]))
        return attention(q, keys, *others, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    generator = torch.Generator().manual_seed(0)
    for count, context in ((2, 2), (31, 31), (2, 33), (33, 40), (32, 64), (3, 100), (60, 101)):
        cache = cache_of(2, 64, torch.bfloat16)
        kv = torch.randn(context, 4, 64, generator=generator).bfloat16()
        q = torch.randn(count, 4, 64, generator=generator).bfloat16()
        first = 0 if window is None else max(0, context - count - window + 1)
        runs = cut(context, [17], 3)
        store(cache, runs, kv)
        span = SequenceSpan(0, count, clip(runs, first), causal_mask(count, context - first, window, CPU))
        got = paged_attention(q, cache, [span], 0.125)
        keys, values = kv.transpose(0, 1).split(2)
        want = attention_reference(q, keys, values, 0.125, window)
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)
    assert shapes <= {(rows, columns) for rows in (32, 64) for columns in (64, 128)}


def test_writing_touches_the_named_rows_only() -> None:
    cache = cache_of(2, 100, torch.bfloat16, padded=104)
    kv = torch.randn(3, 4, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    write_kv(cache, torch.tensor([7, 300, 8]), kv)
    assert torch.equal(cache.kv[:, [7, 300, 8]].transpose(0, 1), kv)
    assert int(cache.kv.isnan().all(-1).all(0).sum()) == ROWS - 3
    assert torch.equal(cache.keys[0, :, 300], kv[1, :2]) and torch.equal(cache.values[0, :, 300], kv[1, 2:])


@pytest.mark.parametrize("window", [None, 1, 5, 30])
@pytest.mark.parametrize(("count", "context"), [(1, 1), (1, 30), (4, 30), (30, 30)])
def test_the_mask_says_who_sees_whom(count: int, context: int, window: int | None) -> None:
    mask = causal_mask(count, context, window, CPU)
    seen = [
        [key <= query and (window is None or key > query - window) for key in range(context)]
        for query in range(context - count, context)
    ]
    if mask is None:  # plain causal attention over a square
        assert count == context
        mask = torch.ones(count, context, dtype=torch.bool).tril()
    assert mask.tolist() == seen
