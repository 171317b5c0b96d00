"""Linear maps with weights of 8 bits, for decoding: half the bytes of bf16 to read. The products are torch's own.

fp8: the rows of x become fp8 (e4m3) too, each with its own scale, and `torch._scaled_mm` multiplies them. int8: x
stays as it is, and the weights are widened on their way, or, for many rows, before: a copy of one map at a time costs
less than a product that is not the matrix units'. CPUs with AMX have `native` instead.
"""

from __future__ import annotations

from copy import copy
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend

Kind: TypeAlias = Literal["fp8", "int8"]
FP8 = torch.float8_e4m3fn
LARGEST = {"fp8": 448.0, "int8": 127.0}
FP8_CAPABILITY = (8, 9)  # of the first GPUs that multiply it
# Rows of bf16 on a CPU up to which torch widens weights as it multiplies: for 1, 4 and 16 rows of 576 by 1536 that
# took 105, 184 and 783 us, with a copy 680, 650 and 610; in fp32 it never won (1514 against 470 us for one row).
FEW = 8
MULTIPLE = 16  # of inputs and outputs, for the matrix units


class CannotQuantize(ValueError):
    """A weight that has no form of 8 bits here, or a product that this device cannot make of it."""


class QuantizedLinear:
    """A frozen linear map. weight: [out, in], fp8 or int8; scale: [out] fp32, weight * scale is the number; bias:
    [out] or None."""

    def __init__(self, weight: Tensor, kind: Kind, bias: Tensor | None = None) -> None:
        """Quantize a weight [out, in], each row to its own largest number.

        Raises `CannotQuantize` for numbers that are not finite, for sizes that 16 does not divide, and for fp8 on a
        GPU without it (before sm_89).
        """
        if weight.dim() != 2 or any(size % MULTIPLE for size in weight.shape):
            raise CannotQuantize(
                f"a weight of {list(weight.shape)}; two sizes that {MULTIPLE} divides can be quantized"
            )
        if not bool(weight.isfinite().all()):
            raise CannotQuantize("a weight with numbers that are not finite")
        if kind == "fp8" and weight.is_cuda and torch.cuda.get_device_capability(weight.device) < FP8_CAPABILITY:
            raise CannotQuantize(f"{torch.cuda.get_device_name(weight.device)} has no fp8; int8 works")
        self.kind, self.bias = kind, bias
        self.weight, self.scale = _by_row(weight, kind)

    def halves(self) -> tuple[QuantizedLinear, QuantizedLinear]:
        """The map to the first half of the outputs and that to the second, over the same memory."""
        first, second = copy(self), copy(self)
        first.weight, second.weight = self.weight.chunk(2)
        first.scale, second.scale = self.scale.chunk(2)
        if self.bias is not None:
            first.bias, second.bias = self.bias.chunk(2)
        return first, second

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, in] -> [rows, out], in x's dtype: bf16 for fp8, any float for int8."""
        if self.kind == "int8":
            scale = self.scale.to(x.dtype)
            if x.dtype is torch.bfloat16 and len(x) <= FEW and not x.is_cuda:
                y = torch._weight_int8pack_mm(x.contiguous(), self.weight, scale)
            elif x.dtype is torch.float16:  # whose largest is soon reached by sums before their scale
                y = F.linear(x, (self.weight.float() * self.scale.unsqueeze(1)).to(x.dtype))
            else:
                y = F.linear(x, self.weight.to(x.dtype)).mul_(scale)
        else:
            if x.dtype is not torch.bfloat16:
                raise CannotQuantize(f"x is {x.dtype}; a map with fp8 weights takes bfloat16")
            narrow, scale = quantize_rows(x.contiguous())
            y = torch._scaled_mm(
                narrow,
                self.weight.t(),
                scale_a=scale.unsqueeze(1),
                scale_b=self.scale.unsqueeze(0),
                out_dtype=x.dtype,
            )
        return y if self.bias is None else y.add_(self.bias)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(fp8 [rows, in], scale [rows] fp32) of x [rows, in]: each row's largest number becomes 448.

    A row with a number that is not finite has a scale that is not, so that nothing finite is computed from it.
    """
    if backend.chosen(x.device) == "triton":
        from .triton.quantize_rows import quantize_rows as launch

        return launch(x)
    return _by_row(x, "fp8")


def _by_row(x: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    wide = x.float()
    largest = wide.abs().amax(1)
    scale = torch.where(largest > 0, largest, 1.0) / LARGEST[kind]
    if kind == "int8":
        scale = scale.bfloat16().float()  # as products in bf16 read it; no number becomes 127.5 by that
        return (wide / scale.unsqueeze(1)).round().to(torch.int8), scale
    wide = wide / scale.unsqueeze(1)
    return wide.clamp(-LARGEST[kind], LARGEST[kind]).to(FP8), scale
