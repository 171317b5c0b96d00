"""The detector's head in one launch: pool, norm of the pooled row, one dot product, sigmoid, threshold.

A program a sequence. It reads the rows that are pooled and no other; the arithmetic is fp32 from the load on. The
torch reference is `kernels.pooled_logit.pooled_head_reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, Launch, check, check_device, check_tensor

MAX_WIDTH = 16384
LAST = tl.constexpr(-1)  # in the place of a first pooled row: pool the last row, keep no sum


def pooled_head(
    hidden: Tensor,
    first_row: Tensor,
    count: Tensor,
    pool_start: Tensor,
    slot: Tensor,
    sums: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    threshold: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(score, harmless) of each of n sequences of a ragged batch, and the running sums of this step, in place.

    hidden: [rows, width], the output of the head's layer, un-normed. first_row: [n + 1] int32, a sequence's rows are
    [first_row[i], first_row[i + 1]). pool_start: [n] int32, the first row of the batch that is pooled, the rest of
    the sequence's rows with it; -1: its last row alone is, and no sum is kept. slot: [n] int32, where in sums
    [slots + 1, width] fp32 its sum is. count: [n] int32, the tokens in the sum, this step's included; where they are
    all of this step the sum begins anew, whatever was there. weight: [width]; bias: [1] or None; norm: [width] or
    None, an RMSNorm of the pooled row (eps, arXiv 1910.07467).
    Returns score [n] fp32 = sigmoid(logit) = P(harmless) and harmless [n] bool = isfinite(score) and
    score >= threshold, in `out` if given. A sequence without rows, or with nothing pooled yet, has the score NaN and
    is not harmless. Raises `KernelArgumentError`.
    """
    launch, score, harmless = plan(
        hidden, first_row, count, pool_start, slot, sums, weight, bias, norm, eps, threshold, out
    )
    launch.run()
    return score, harmless


def plan(
    hidden: Tensor,
    first_row: Tensor,
    count: Tensor,
    pool_start: Tensor,
    slot: Tensor,
    sums: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    threshold: float,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Launch, Tensor, Tensor]:
    """The launch of `pooled_head`, and where its results will be."""
    device, n = hidden.device, len(count)
    width = hidden.shape[-1]
    check_device("hidden", hidden)
    check_tensor("hidden", hidden, ("rows", width), FLOATS, device)
    check(0 < width <= MAX_WIDTH, f"hidden: rows have {width} numbers; 1 to {MAX_WIDTH} are allowed")
    check_tensor("first_row", first_row, (n + 1,), (torch.int32,), device)
    for name, tensor in (("count", count), ("pool_start", pool_start), ("slot", slot)):
        check_tensor(name, tensor, (n,), (torch.int32,), device)
    check_tensor("sums", sums, ("slots + 1", width), (torch.float32,), device)
    check_tensor("weight", weight, (width,), FLOATS, device)
    if bias is not None:
        check_tensor("bias", bias, (1,), FLOATS, device)
    if norm is not None:
        check_tensor("norm", norm, (width,), FLOATS, device)
    if out is None:
        out = torch.empty(n, device=device), torch.empty(n, dtype=torch.bool, device=device)
    score, harmless = out
    check_tensor("out[0]", score, (n,), (torch.float32,), device)
    check_tensor("out[1]", harmless, (n,), (torch.bool,), device)
    launch = Launch(
        _pooled_head,
        (n,),
        {
            "hidden": hidden,
            "first_row": first_row,
            "count": count,
            "pool_start": pool_start,
            "slot": slot,
            "sums": sums,
            "weight": weight,
            "bias": bias,
            "norm": norm,
            "score": score,
            "harmless": harmless.view(torch.uint8),
            "eps": eps,
            "threshold": threshold,
            "WIDTH": width,
            "BLOCK": triton.next_power_of_2(width),
        },
        # A row of 4096 is 16 numbers a thread: 8 warps hide the latency of a few rows, which is all there is to wait
        # for, and more would only make the sum over the row longer.
        warps=8,
    )
    return launch, score, harmless


@triton.jit
def _pooled_head(
    hidden,
    first_row,
    count,
    pool_start,
    slot,
    sums,
    weight,
    bias,
    norm,
    score,
    harmless,
    eps,
    threshold,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0)
    stop = tl.load(first_row + sequence + 1)
    has_rows = stop > tl.load(first_row + sequence)
    start = tl.load(pool_start + sequence)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH  # together with a scalar condition a bound, as the interpreter's scalar bools are no masks
    if start == LAST:
        last = hidden + (stop - 1).to(tl.int64) * WIDTH
        pooled = tl.load(last + at, mask=at < tl.where(has_rows, WIDTH, 0), other=0.0).to(tl.float32)
        tokens = has_rows.to(tl.int32)
    else:
        tokens = tl.where(has_rows, tl.load(count + sequence), 0)
        rows = tl.where(has_rows, tl.maximum(stop - start, 0), 0)
        place = sums + tl.load(slot + sequence).to(tl.int64) * WIDTH
        pooled = tl.load(place + at, mask=at < tl.where(tokens > rows, WIDTH, 0), other=0.0)
        row = hidden + start.to(tl.int64) * WIDTH
        for _ in range(rows):
            pooled += tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
            row += WIDTH
        tl.store(place + at, pooled, mask=at < tl.where(rows > 0, WIDTH, 0))
    pooled /= tl.where(tokens > 0, tokens.to(tl.float32), float("nan"))  # nothing pooled: no score
    if norm is not None:
        pooled *= tl.rsqrt(tl.sum(pooled * pooled) / WIDTH + eps)
        pooled *= tl.load(norm + at, mask=inside, other=0.0).to(tl.float32)
    logit = tl.sum(pooled * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32))
    if bias is not None:
        logit += tl.load(bias).to(tl.float32)
    result = 1.0 / (1.0 + tl.exp2(-logit * 1.4426950408889634))  # log2(e)
    tl.store(score + sequence, result)
    # NaN is not >= anything, and a sigmoid is never infinite: this is isfinite(score) and score >= threshold
    tl.store(harmless + sequence, (result >= threshold).to(tl.uint8))
