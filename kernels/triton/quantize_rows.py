"""The rows of a map's input as fp8 (e4m3) with a scale each, in one launch.

The contract in plain torch is `kernels.quantized.quantize_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quantized import FP8
from .common import FLOATS, Launch, check, check_device, check_tensor

MAX_WIDTH = 32768


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(fp8 [rows, width], scale [rows] fp32) of x [rows, width], contiguous: what is stored times the scale is the
    number, and the largest of a row becomes 448. Raises `KernelArgumentError`."""
    out = torch.empty_like(x, dtype=FP8), torch.empty(len(x), device=x.device)
    launch = plan(x, *out)
    if x.numel():
        launch.run()
    return out


def plan(x: Tensor, out: Tensor, scale: Tensor) -> Launch:
    """The launch of these arguments, which it checks."""
    check_device("x", x)
    check_tensor("x", x, ("rows", "width"), FLOATS, x.device)
    rows, width = x.shape
    check(0 < width <= MAX_WIDTH, f"x: rows of {width}; of 1 to {MAX_WIDTH} fit into one program")
    check_tensor("out", out, (rows, width), (FP8,), x.device)
    check_tensor("scale", scale, (rows,), (torch.float32,), x.device)
    block = triton.next_power_of_2(width)
    arguments = {"x": x, "out": out, "scale": scale, "WIDTH": width, "BLOCK": block}
    # 16 numbers a thread, which are one 16-byte store
    return Launch(_quantize_rows, (rows,), arguments, warps=min(16, max(1, block // 512)))


@triton.jit
def _quantize_rows(x, out, scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < WIDTH
    value = tl.load(x + row * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), 0)
    strange = tl.max((value != value).to(tl.int32), 0)  # `max` passes a NaN over
    factor = tl.where(largest > 0.0, largest, 1.0) / 448.0
    factor = tl.where(strange > 0, float("nan"), factor)
    narrow = value / factor
    narrow = tl.where(narrow > 448.0, 448.0, tl.where(narrow < -448.0, -448.0, narrow))
    tl.store(out + row * WIDTH + at, narrow.to(out.dtype.element_ty), mask=inside)
    tl.store(scale + row, factor)
