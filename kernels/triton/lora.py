"""Low-rank updates of many adapters in one batch, each token by its own: y += B (A x), in two launches.

Nothing is read on the host and nothing is cleared before: the grids depend on shapes alone, and which adapter a token
has, or that it has none, is found on the device. The contract in plain torch is `kernels.lora.low_rank_reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lora import LoraStack
from .common import FLOATS, Launch, check, check_device, check_tensor, compute_type

MAX_RANK = 256
FEW = 128  # rows of a step that decodes, or screens beside decoding
# A few rows have few tiles: eight parts of the sum over inputs give eight times as many programs, each with 1/8 of A
# to read. Where there are many rows the tiles are enough, and 64 rows read A and B a quarter as often as 16.
SPLITS = 8
WIDE = 128  # inputs of a step of the sum, or outputs of a tile; half as many at ranks whose tiles are wide themselves
HIGH_RANK = 128


def add_low_rank(y: Tensor, x: Tensor, adapter: Tensor, stack: LoraStack, scratch: Tensor | None = None) -> None:
    """y[row] += B[a] A[a] x[row] with a = adapter[row], in place; rows with -1 stay as they are, bit for bit.

    y: [rows, out], x: [rows, in], contiguous, of one dtype. adapter: [rows] int32 or int64, below the stack's number
    of adapters (others count as -1). scratch: fp32, of at least `scratch_numbers`, which both launches share; its
    contents do not matter. Sums are fp32; A x is rounded to the stack's dtype, and y once. Raises
    `KernelArgumentError`.
    """
    if scratch is None:
        scratch = torch.empty(scratch_numbers(len(x), stack), device=x.device)
    first, second = plan_shrink(x, adapter, stack, scratch), plan_expand(y, adapter, stack, scratch)
    if len(x):
        first.run()
        second.run()


def scratch_numbers(rows: int, stack: LoraStack) -> int:
    """How many fp32 numbers of scratch `rows` need."""
    return _splits(rows) * rows * stack.a.shape[1]


def plan_shrink(x: Tensor, adapter: Tensor, stack: LoraStack, scratch: Tensor) -> Launch:
    """The launch of A x, in parts of the sum, which it checks."""
    check_device("x", x)
    check_tensor("x", x, ("rows", "in"), FLOATS, x.device)
    rows, inputs = x.shape
    _check(rows, x, adapter, stack, scratch)
    check_tensor("stack.a", stack.a, ("adapters", "rank", inputs), (x.dtype, torch.float32), x.device)
    adapters, rank, _ = stack.a.shape
    splits, tall, wide = _splits(rows), _tall(rows, rank), _wide(rank)
    arguments = {
        **{"x": x, "adapter": adapter, "a": stack.a, "scratch": scratch, "rows": rows, "adapters": adapters},
        **{"IN": inputs, "RANK": rank, "PART": wide * triton.cdiv(inputs, wide * splits)},
        **{"TALL": tall, "BLOCK": wide, "CT": compute_type(stack.a.dtype)},
    }
    stages = 3 if rank <= HIGH_RANK else 2  # what fits into 99 KB, the least that GPUs with bf16 have
    return Launch(_shrink, (triton.cdiv(rows, tall), splits), arguments, _warps(tall), stages)


def plan_expand(y: Tensor, adapter: Tensor, stack: LoraStack, scratch: Tensor) -> Launch:
    """The launch of y += B (A x), which it checks."""
    check_device("y", y)
    check_tensor("y", y, ("rows", "out"), FLOATS, y.device)
    rows, outputs = y.shape
    _check(rows, y, adapter, stack, scratch)
    check_tensor("stack.b", stack.b, (len(stack.a), outputs, stack.a.shape[1]), (stack.a.dtype,), y.device)
    adapters, rank, _ = stack.a.shape
    tall, wide = _tall(rows, rank), _wide(rank)
    arguments = {
        **{"y": y, "adapter": adapter, "b": stack.b, "scratch": scratch, "rows": rows, "adapters": adapters},
        **{"OUT": outputs, "RANK": rank, "SPLITS": _splits(rows)},
        **{"TALL": tall, "BLOCK": wide, "CT": compute_type(stack.a.dtype)},
    }
    grid = triton.cdiv(rows, tall), triton.cdiv(outputs, wide)
    return Launch(_expand, grid, arguments, _warps(tall))


def _check(rows: int, x: Tensor, adapter: Tensor, stack: LoraStack, scratch: Tensor) -> None:
    check_tensor("adapter", adapter, (rows,), (torch.int32, torch.int64), x.device)
    rank = stack.a.shape[1]
    fits = 16 <= rank <= MAX_RANK and rank & (rank - 1) == 0
    check(fits, f"stack.a: a rank of {rank}, not a power of two from 16 to {MAX_RANK}")
    for name, part in (("a", stack.a), ("b", stack.b)):
        check(part.numel() < 1 << 31, f"stack.{name}: {part.numel()} numbers, which 32 bits do not count")
    check_tensor("scratch", scratch, ("numbers",), (torch.float32,), x.device)
    needed = scratch_numbers(rows, stack)
    check(len(scratch) >= needed, f"scratch: {len(scratch)} numbers, of which {rows} rows need {needed}")


def _splits(rows: int) -> int:
    return SPLITS if rows <= FEW else 1


def _wide(rank: int) -> int:
    return WIDE if rank < HIGH_RANK else WIDE // 2


def _warps(tall: int) -> int:
    return 4 if tall == 16 else 8  # 4 would spill in tiles of 64 x 128 on sm_80


def _tall(rows: int, rank: int) -> int:
    """Rows of a tile: 16 is the least that matrix units multiply. At rank 256 more would spill on sm_80."""
    return 16 if rows <= FEW or rank > HIGH_RANK else 64


@triton.jit
def _shrink(
    x,
    adapter,
    a,
    scratch,
    rows,
    adapters,
    IN: tl.constexpr,
    RANK: tl.constexpr,
    PART: tl.constexpr,
    TALL: tl.constexpr,
    BLOCK: tl.constexpr,
    CT: tl.constexpr,
):
    row = tl.program_id(0) * TALL + tl.arange(0, TALL)
    part = tl.program_id(1)
    rank = tl.arange(0, RANK)
    own = tl.load(adapter + row, mask=row < rows, other=-1).to(tl.int32)
    for index in range(0, adapters):
        mine = own == index
        if tl.max(mine.to(tl.int32), 0) > 0:
            total = tl.zeros([TALL, RANK], tl.float32)
            for step in range(0, PART, BLOCK):
                at = part * PART + step + tl.arange(0, BLOCK)
                here = row.to(tl.int64)[:, None] * IN + at[None, :]
                left = tl.load(x + here, mask=mine[:, None] & (at < IN)[None, :], other=0.0)
                there = (index * RANK + rank[None, :]) * IN + at[:, None]
                right = tl.load(a + there, mask=(at < IN)[:, None], other=0.0)
                total = tl.dot(left.to(CT), right.to(CT), total, input_precision="ieee")
            out = (part.to(tl.int64) * rows + row[:, None]) * RANK + rank[None, :]
            tl.store(scratch + out, total, mask=mine[:, None])


@triton.jit
def _expand(
    y,
    adapter,
    b,
    scratch,
    rows,
    adapters,
    OUT: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    TALL: tl.constexpr,
    BLOCK: tl.constexpr,
    CT: tl.constexpr,
):
    row = tl.program_id(0) * TALL + tl.arange(0, TALL)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.arange(0, RANK)
    own = tl.load(adapter + row, mask=row < rows, other=-1).to(tl.int32)
    changed = (own >= 0) & (own < adapters)
    if tl.max(changed.to(tl.int32), 0) == 0:
        return
    total = tl.zeros([TALL, BLOCK], tl.float32)
    for index in range(0, adapters):
        mine = own == index
        if tl.max(mine.to(tl.int32), 0) > 0:
            low = tl.zeros([TALL, RANK], tl.float32)
            for part in range(SPLITS):
                here = (part * rows + row.to(tl.int64)[:, None]) * RANK + rank[None, :]
                low += tl.load(scratch + here, mask=mine[:, None], other=0.0)
            there = (index * OUT + at[None, :]) * RANK + rank[:, None]
            right = tl.load(b + there, mask=(at < OUT)[None, :], other=0.0)
            total = tl.dot(low.to(CT), right.to(CT), total, input_precision="ieee")
    place = y + row.to(tl.int64)[:, None] * OUT + at[None, :]
    inside = changed[:, None] & (at < OUT)[None, :]
    before = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, (before + total).to(y.dtype.element_ty), mask=inside)
