"""Residual add and RMSNorm (Zhang, Sennrich 2019) in one launch: what a layer does between two of its maps.

The contract in plain torch is `add_` and `kernels.rms_norm.rms_norm_reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, Launch, check, check_device, check_tensor

MAX_WIDTH = 16384


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, *, scale: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """residual += scale * x, in place; returns residual / rms(residual) * weight (of x itself where there is none).

    x, residual, out: [rows, width], contiguous, of one dtype. weight: [width], of that dtype, or fp32. All is fp32
    inside; the sum is rounded to x's dtype before it is normed, and the normed row to the weight's before they meet:
    with a weight of x's dtype as Llama rounds, with an fp32 one as Gemma does. Raises `KernelArgumentError`.
    """
    out = torch.empty_like(x) if out is None else out
    launch = plan(x, residual, weight, eps, scale, out)
    if x.shape[0]:
        launch.run()
    return out


def plan(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, scale: float, out: Tensor) -> Launch:
    """The launch of these arguments, which it checks."""
    check_device("x", x)
    check_tensor("x", x, ("rows", "width"), FLOATS, x.device)
    rows, width = x.shape
    check(0 < width <= MAX_WIDTH, f"x: rows of {width}; of 1 to {MAX_WIDTH} fit into one program")
    if residual is not None:
        check_tensor("residual", residual, (rows, width), (x.dtype,), x.device)
    check_tensor("weight", weight, (width,), (x.dtype, torch.float32), x.device)
    check_tensor("out", out, (rows, width), (x.dtype,), x.device)
    block = triton.next_power_of_2(width)
    arguments = {
        **{"x": x, "residual": x if residual is None else residual, "weight": weight, "out": out},
        **{"eps": eps, "scale": scale, "WIDTH": width, "BLOCK": block, "ADD": residual is not None},
    }
    # 16 numbers a thread: two 16-byte loads of each operand under way, and no row is read twice
    return Launch(_add_rms_norm, (rows,), arguments, warps=min(16, max(1, block // 512)))


@triton.jit
def _add_rms_norm(x, residual, weight, out, eps, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    here = tl.program_id(0).to(tl.int64) * WIDTH + at
    value = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        total = tl.load(residual + here, mask=inside, other=0.0).to(tl.float32) + scale * value
        rounded = total.to(residual.dtype.element_ty)
        tl.store(residual + here, rounded, mask=inside)
        value = rounded.to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    normed = normed.to(weight.dtype.element_ty).to(tl.float32) * factor
    tl.store(out + here, normed.to(out.dtype.element_ty), mask=inside)
