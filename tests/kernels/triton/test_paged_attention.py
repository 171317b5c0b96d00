"""Paged attention in Triton against fp64: ragged batches over a pool whose every other number is NaN."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stockade.engine.kv_pages import KVLayout, PagePool
from stockade.kernels.paged_attention import LayerKV, attention_reference, ragged_reference
from stockade.kernels.ragged import RaggedTables
from stockade.kernels.triton.common import KernelArgumentError, Target, target_of
from stockade.kernels.triton.paged_attention import (
    paged_attention,
    plan,
    scratch_numbers,
    splits_for,
    tile_for,
)
from tests.kernels.triton.bounds import placed

NAN = float("nan")
OTHER = KVLayout(2, 2, 64, torch.float32, 16)  # shares the pool with whatever is tested
# The interpreter cuts a number down to bf16, a GPU rounds it: a unit in the last place instead of half of one.
ROUNDING = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@dataclass
class Batch:
    q: Tensor
    cache: LayerKV
    tables: RaggedTables
    scale: float


def make_batch(
    device: torch.device,
    sequences: list[tuple[int, int]],
    heads: tuple[int, int] = (4, 2),
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    page_size: int = 16,
    padding: int = 0,
    seed: int = 0,
) -> Batch:
    """sequences: (tokens of the context, how many of them are queries). Their pages lie anywhere, among others'.

    padding: sequences without rows, with a row each behind all others. The queries of these are NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    query_heads, kv_heads = heads
    layout = KVLayout(2, kv_heads, dim, dtype, page_size)
    wanted = [layout.pages(context) for context, _ in sequences]
    pool = PagePool(max(1 << 20, 6 * layout.page_bytes * (sum(wanted) + 2)), [layout, OTHER], torch.device("cpu"))
    pool.allocate(OTHER, 3)
    pages = pool.allocate(layout, sum(wanted) + 2)
    assert pages is not None
    places = [pages[index].row for index in torch.randperm(len(pages), generator=generator).tolist()]
    views = pool.layers(layout)
    views[1].kv.fill_(NAN)  # what pads the rows stays
    tables = torch.full((len(sequences) + padding, max(wanted) + 1), -(2**30), dtype=torch.int32)
    for index, ((context, _), count) in enumerate(zip(sequences, wanted, strict=True)):
        tables[index, :count] = torch.tensor([places.pop() for _ in range(count)], dtype=torch.int32)
        kv = torch.randn(context, 2 * kv_heads, dim, generator=generator)
        views[1].kv.view(_bits(dtype))[:, _rows(tables[index], page_size, context)] = (
            kv.to(dtype).view(_bits(dtype)).transpose(0, 1)
        )
    counts = [count for _, count in sequences]
    first_row = list(accumulate(counts, initial=0))
    rows = first_row[-1] + padding
    qkv = torch.full((rows, query_heads + 2 * kv_heads, dim), NAN)
    qkv[: first_row[-1], :query_heads] = torch.randn(first_row[-1], query_heads, dim, generator=generator) * 2
    kv = pool.arena.to(device).view(dtype).as_strided(views[1].kv.shape, views[1].kv.stride(), _offset(views[1].kv))
    half = kv_heads
    return Batch(
        qkv.to(device, dtype)[:, :query_heads],
        LayerKV(kv, kv[:half].unsqueeze(0), kv[half:].unsqueeze(0)),
        RaggedTables(
            torch.tensor(first_row + first_row[-1:] * padding, dtype=torch.int32, device=device),
            torch.tensor([context for context, _ in sequences] + [0] * padding, dtype=torch.int32, device=device),
            tables.to(device),
            page_size,
            max(counts),
            max(context for context, _ in sequences),
        ),
        dim**-0.5,
    )


def _bits(dtype: torch.dtype) -> torch.dtype:
    """Integers as wide: fp8 tensors have no indexing."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]


def _offset(view: Tensor) -> int:
    return int(view.storage_offset())


def _rows(pages: Tensor, page_size: int, context: int) -> Tensor:
    places = torch.arange(context, device=pages.device)
    return pages.long()[places // page_size] + places % page_size


def exact(batch: Batch, **options: object) -> Tensor:
    cache = LayerKV(*(side.cpu() for side in batch.cache))
    tables = RaggedTables(*(part.cpu() if isinstance(part, Tensor) else part for part in batch.tables))
    sees = options.pop("sees", None)
    return ragged_reference(
        batch.q.cpu().double(), cache, tables, batch.scale, sees=None if sees is None else sees.cpu(), **options
    )


def computed(batch: Batch, **options: object) -> Tensor:
    """Into an output of NaN, with scratch of NaN."""
    rows, heads, dim = batch.q.shape
    like = {"dtype": batch.q.dtype, "device": batch.q.device}
    numbers = scratch_numbers(target_of(batch.q.device), heads, batch.cache.kv.shape[0] // 2, dim, batch.q.dtype)
    out = torch.full((rows, heads * dim), NAN, **like)
    scratch = torch.full((numbers,), NAN, device=batch.q.device)
    got = paged_attention(batch.q, batch.cache, batch.tables, batch.scale, **options, out=out, scratch=scratch)
    assert got is out
    return got.cpu().double()


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    unit = ROUNDING[dtype]
    torch.testing.assert_close(got, want, rtol=4 * unit, atol=4 * unit)


texts = st.lists(
    st.tuples(st.sampled_from([1, 15, 16, 17, 40, 64, 65]), st.sampled_from([1, 2, 16, 40])),
    min_size=1,
    max_size=2,
)


@settings(max_examples=15, deadline=None)
@given(
    texts=texts,
    decode=st.booleans(),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (7, 1), (3, 3)]),
    dim=st.sampled_from([8, 24, 64, 100, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    page_size=st.sampled_from([16, 32, 64, 128]),
    window=st.sampled_from([None, None, 1, 18, 500]),
    cap=st.sampled_from([None, None, 3.0]),
    padding=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_any_batch_is_plain_attention(
    texts: list[tuple[int, int]],
    decode: bool,
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    page_size: int,
    window: int | None,
    cap: float | None,
    padding: int,
    seed: int,
    device: torch.device,
) -> None:
    sequences = [(context, 1 if decode else min(context, count)) for context, count in texts]
    batch = make_batch(device, sequences, heads, dim, dtype, page_size, padding, seed)
    got = computed(batch, window=window, cap=cap)
    assert_near(got, exact(batch, window=window, cap=cap), dtype)
    assert not got[len(got) - padding :].any()


@pytest.mark.parametrize(("count", "window"), [(1, None), (1, 150), (20, 150)], ids=["decode", "window", "extend"])
def test_split_contexts_are_merged(count: int, window: int | None, device: torch.device) -> None:
    sequences = [(300, count), (130, count), (count, count)]
    batch = make_batch(device, sequences, (2, 1), dim=100, dtype=torch.bfloat16, page_size=64, padding=1)
    launches, _ = plan(batch.q, batch.cache, batch.tables, batch.scale, window)
    assert launches[0].grid[2] == launches[1].arguments["SPLITS"] == 4
    assert_near(computed(batch, window=window), exact(batch, window=window), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "cap"), [(1, None), (1, 5.0), (40, None)])
def test_the_error_is_no_worse_than_torchs_own(
    count: int, cap: float | None, dtype: torch.dtype, device: torch.device
) -> None:
    """As FlashAttention's tests have it: at most twice that of plain operations in the same dtype, plus rounding."""
    context = 90
    batch = make_batch(device, [(context, count)], (3, 1), 64, dtype, 64)
    want = exact(batch, cap=cap)
    kv = batch.cache.kv[:, _rows(batch.tables.pages[0], 64, context)]
    keys, values = (side.expand(3, -1, -1) for side in kv.split(1))
    scores = batch.q.transpose(0, 1) @ keys.transpose(-1, -2) * batch.scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    allowed = torch.ones(count, context, dtype=torch.bool, device=device).tril(context - count)
    theirs = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ values
    theirs = theirs.transpose(0, 1).flatten(1).cpu().double()
    rounding = ROUNDING[dtype] * want.abs().max()
    assert (computed(batch, cap=cap) - want).abs().max() <= 2 * (theirs - want).abs().max() + rounding


def test_a_launch_may_be_replayed_over_other_tables(device: torch.device) -> None:
    """As a CUDA graph does it: the launches are those of the bucket, whatever the tables hold by then."""
    batch = make_batch(device, [(200, 1), (64, 1), (9, 1), (130, 1)], dtype=torch.float16, page_size=64)
    tables = batch.tables._replace(max_length=256)
    scratch = torch.full((scratch_numbers(target_of(device), 4, 2, 64, torch.float16),), NAN, device=device)
    launches, out = plan(batch.q, batch.cache, tables, batch.scale, scratch=scratch)
    assert len(launches) == 2
    for lengths in ([200, 64, 9, 130], [199, 0, 8, 65], [0, 0, 0, 1]):
        live = [index for index, length in enumerate(lengths) if length]
        tables.length.copy_(torch.tensor(lengths))
        tables.first_row.copy_(torch.tensor(list(accumulate((int(n > 0) for n in lengths), initial=0))))
        out.fill_(NAN)
        for launch in launches:
            launch.run()
        assert_near(out.cpu().double()[: len(live)], exact(batch)[: len(live)], torch.float16)
        assert not out[len(live) :].any()


def test_pages_may_be_shared(device: torch.device) -> None:
    batch = make_batch(device, [(40, 3), (50, 1), (33, 33)], (1, 1), dtype=torch.float16, page_size=16)
    batch.tables.pages[1, :2] = batch.tables.pages[0, :2]
    batch.tables.pages[2, :2] = batch.tables.pages[0, :2]
    assert_near(computed(batch), exact(batch), torch.float16)


def test_rows_of_an_image_see_each_other(device: torch.device) -> None:
    batch = make_batch(device, [(50, 40), (30, 30)], (2, 1), dtype=torch.float16, page_size=32)
    sees = torch.cat((torch.arange(11, 51), torch.arange(1, 31))).int()
    sees[5:25] = 35  # places 15 to 34 of the first text
    sees[40:48] = 8
    sees = sees.to(device)
    for window in (None, 12):
        got, want = computed(batch, sees=sees, window=window), exact(batch, sees=sees, window=window)
        assert_near(got, want, torch.float16)
        assert not torch.allclose(want, exact(batch, window=window))


def test_a_pool_may_have_more_than_2_31_numbers(device: torch.device) -> None:
    """Keys at the arena's beginning, values more than 2^31 numbers behind them, in rows as far from the first."""
    dim, rows = 64, 2**25 + 2**10  # rows * dim > 2^31
    kv = torch.empty(2 * rows * dim, dtype=torch.float8_e4m3fn, device=device).view(2, rows, dim)
    place = rows - 16
    kv[:, place:] = torch.randn(2, 16, dim, generator=torch.Generator().manual_seed(1)).to(device, kv.dtype)
    q = torch.randn(1, 1, dim, device=device)
    parts = [torch.tensor(part, dtype=torch.int32, device=device) for part in ([0, 1], [16], [[place]])]
    batch = Batch(q, LayerKV(kv, kv[None, :1], kv[None, 1:]), RaggedTables(*parts, 16, 1, 16), 0.2)
    scales = torch.tensor([0.5, 2.0], device=device)
    keys, values = (kv[:, place:].float() * scales[:, None, None]).cpu().split(1)
    assert_near(computed(batch, kv_scale=scales), attention_reference(q.cpu(), keys, values, 0.2), torch.float32)


@pytest.mark.parametrize("count", [1, 24], ids=["decode", "extend"])
def test_fp8_pages_have_a_scale_for_each_head(count: int, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 on this GPU")
    batch = make_batch(device, [(60, count), (24, count)], dim=100, dtype=torch.float8_e4m3fn, page_size=32)
    batch.q = torch.randn(batch.q.shape, generator=torch.Generator().manual_seed(4)).to(device)
    scales = torch.tensor([0.5, 1.5, 2.0, 0.25], device=device)
    assert_near(computed(batch, kv_scale=scales), exact(batch, kv_scale=scales), torch.float32)


def test_no_table_asks_for_a_tile_its_kernel_has_no_rows_for() -> None:
    for queries in (1, 2, 5, 33, 2048):
        for group in (1, 3, 8, 16, 71, 128):
            for dtype in (torch.bfloat16, torch.float32):
                tile = tile_for(Target("cuda", 90, 132), queries, group, 128, dtype)
                assert tile.rows >= group and tile.rows & (tile.rows - 1) == 0


@pytest.mark.parametrize("target", [Target("cuda", 90, 132), Target("cuda", 80, 108)], ids=["sm_90", "sm_80"])
def test_few_programs_split_their_contexts_and_many_do_not(target: Target) -> None:
    tile = tile_for(target, 1, 1, 128, torch.bfloat16)
    assert splits_for(target, tile, 32, 1024) == 8  # 32 heads, batch 1: parts of two tiles
    assert splits_for(target, tile, 32, 128) == 1
    assert splits_for(target, tile, 64 * 32, 1 << 20) == 1
    assert splits_for(target, tile, 1, 1 << 20) == 64


@pytest.mark.parametrize("heads", [(32, 32), (28, 4), (1, 1)])
@pytest.mark.parametrize("rows", [1, 3, 40, 700])
def test_the_scratch_of_a_model_suffices_for_any_batch(rows: int, heads: tuple[int, int]) -> None:
    meta = torch.device("meta")
    target = target_of(meta)
    for n in (1, 2, 64, 1000):
        q = torch.empty(rows * n, heads[0], 128, dtype=torch.bfloat16, device=meta)
        kv = torch.empty(2 * heads[1], 1 << 20, 128, dtype=torch.bfloat16, device=meta)
        tables = [torch.empty(*size, dtype=torch.int32, device=meta) for size in ((n + 1,), (n,), (n, 4096))]
        batch = RaggedTables(*tables, 64, rows, 4096 * 64)
        scratch = torch.empty(scratch_numbers(target, *heads, 128, torch.bfloat16), device=meta)
        launches, _ = plan(q, LayerKV(kv, kv[None], kv[None]), batch, 1.0, scratch=scratch)
        assert launches[0].grid[2] == (launches[1].arguments["SPLITS"] if len(launches) > 1 else 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q": torch.zeros(2, 4, 64, dtype=torch.int8)}, "q: its dtype is int8"),
        ({"q": torch.zeros(2, 64, 4).transpose(1, 2)}, "q: its last dimension is not contiguous"),
        ({"q": torch.zeros(2, 8, 64)[:, ::2]}, "q: heads are 128 numbers apart, not 64"),
        ({"q": torch.zeros(2, 3, 64)}, "q: 3 heads cannot be shared by 2 key heads"),
        (
            {"q": torch.zeros(2, 4, 32)},
            r"cache.kv: its shape is \[4, \d+, 64\], not \[2 \* kv_heads, pool rows, 32\]",
        ),
        ({"q": torch.zeros(2, 4, 64).bfloat16()}, "cache.kv: its dtype is float32, not bfloat16 or float8_e4m3fn"),
        ({"kv": torch.zeros(4, 99, 65)[..., :64]}, "cache.kv: rows of 64 numbers are 65 apart"),
        ({"kv": torch.zeros(3, 99, 64)}, "cache.kv: 3 heads are not keys' and as many values'"),
        ({"kv": torch.zeros(4, 99, 64).to(torch.float8_e4m3fn)}, "kv_scale: fp8 pages need the scales"),
        ({"length": torch.zeros(2, dtype=torch.int64)}, "tables.length: its dtype is int64, not int32"),
        ({"first_row": torch.zeros(2, dtype=torch.int32)}, r"tables.first_row: its shape is \[2\], not \[3\]"),
        ({"page_size": 24}, "tables.page_size: 24 is no power of two of at least 16"),
        ({"max_length": 1000}, "tables.max_length: 1000 tokens do not fit into 64 of pages"),
        ({"window": 0}, "window: 0 is less than 1"),
        ({"cap": -1.0}, "cap: -1.0 is not above 0"),
        ({"out": torch.zeros(2, 255)}, r"out: its shape is \[2, 255\], not \[2, 256\]"),
        ({"sees": torch.zeros(3, dtype=torch.int32)}, r"sees: its shape is \[3\], not \[2\]"),
        ({"kv_scale": torch.zeros(2)}, r"kv_scale: its shape is \[2\], not \[4\]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_the_wrong_argument_is_named(change: dict[str, object], said: str, device: torch.device) -> None:
    batch = make_batch(device, [(33, 1), (5, 1)])
    change = {name: placed(part, device) if isinstance(part, Tensor) else part for name, part in change.items()}
    options = {name: value for name, value in change.items() if name in ("window", "cap", "out", "sees", "kv_scale")}
    tables = batch.tables._replace(**{name: value for name, value in change.items() if hasattr(batch.tables, name)})
    kv = change.get("kv", batch.cache.kv)
    with pytest.raises(KernelArgumentError, match=said):
        paged_attention(change.get("q", batch.q), LayerKV(kv, kv, kv), tables, 1.0, **options)


def test_too_little_scratch_is_said(device: torch.device) -> None:
    batch = make_batch(device, [(300, 1)], dtype=torch.float16, page_size=64)
    with pytest.raises(KernelArgumentError, match="scratch: it has 10 numbers; this batch needs 1040"):
        paged_attention(batch.q, batch.cache, batch.tables, 1.0, scratch=torch.zeros(10, device=device))


def test_fp8_pages_are_refused_where_a_gpu_has_no_fp8(device: torch.device) -> None:
    batch = make_batch(device, [(33, 1)], dtype=torch.float8_e4m3fn)
    q, scales = torch.zeros(1, 4, 64, device=device), torch.ones(4, device=device)
    for target in (Target("cuda", 80, 108), Target("hip", "gfx942", 304)):
        with pytest.raises(KernelArgumentError, match=r"cache.kv: fp8 pages need a GPU of sm_89 or newer"):
            plan(q, batch.cache, batch.tables, 1.0, kv_scale=scales, target=target)
