"""Gated activations (Shazeer 2020) in one launch: SwiGLU, and GeGLU with the tanh approximation of gelu.

The contract in plain torch is `kernels.swiglu`.
"""

from __future__ import annotations

from typing import Literal

import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, Launch, check, check_device, check_tensor

BLOCK = 2048  # of 4 warps: 16 numbers a thread, two 16-byte loads of each operand under way
KINDS = ("silu", "gelu")


def gated(
    gate: Tensor, up: Tensor | None = None, kind: Literal["silu", "gelu"] = "silu", *, out: Tensor | None = None
) -> Tensor:
    """silu(gate) * up, or gelu(gate) * up, [rows, ffn]; fp32 inside, rounded once.

    gate, up: [rows, ffn] of one dtype, rows any distance apart; without `up`, gate is [rows, 2 * ffn] and holds both,
    the gate first. out: [rows, ffn], contiguous. Raises `KernelArgumentError`.
    """
    check_tensor("gate", gate, ("rows", "ffn"), FLOATS, gate.device, contiguous=False)
    if up is None:
        check(gate.shape[1] % 2 == 0, f"gate: it has {gate.shape[1]} columns, which are no gate and up of one size")
        gate, up = gate.chunk(2, 1)
    out = gate.new_empty(gate.shape) if out is None else out
    launch = plan(gate, up, kind, out)
    if out.numel():
        launch.run()
    return out


def plan(gate: Tensor, up: Tensor, kind: str, out: Tensor) -> Launch:
    """The launch of these arguments, which it checks."""
    check_device("gate", gate)
    rows, ffn = gate.shape
    check_tensor("up", up, (rows, ffn), (gate.dtype,), gate.device, contiguous=False)
    check_tensor("out", out, (rows, ffn), (gate.dtype,), gate.device)
    check(kind in KINDS, f"kind: {kind!r}, not {' or '.join(KINDS)}")
    arguments = {
        **{"gate": gate, "up": up, "out": out, "gate_stride": gate.stride(0), "up_stride": up.stride(0)},
        **{"FFN": ffn, "BLOCK": BLOCK, "GELU": kind == "gelu"},
    }
    return Launch(_gated, (rows, triton.cdiv(ffn, BLOCK)), arguments)


@triton.jit
def _gated(gate, up, out, gate_stride, up_stride, FFN: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < FFN
    left = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        # gelu(x) = x (1 + tanh u) / 2 = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3)
        power = 1.5957691216057308 * (left + 0.044715 * left * left * left)
    else:
        power = left
    # exp overflows to inf, and 1 / inf is the 0 that it stands for
    result = left * (1.0 / (1.0 + tl.exp(-power))) * right
    tl.store(out + row * FFN + at, result.to(out.dtype.element_ty), mask=inside)
