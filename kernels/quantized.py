"""Linear maps with weights of 8 bits, for decoding: half the bytes of bf16 to read. The products are torch's own.

fp8: the rows of x become fp8 (e4m3) too, each with its own scale, and `torch._scaled_mm` multiplies them. int8: x
stays as it is and `torch._weight_int8pack_mm` widens the weights on their way.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from . import backend

Kind: TypeAlias = Literal["fp8", "int8"]
FP8 = torch.float8_e4m3fn
LARGEST = {"fp8": 448.0, "int8": 127.0}
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
        if kind == "fp8" and weight.is_cuda and torch.cuda.get_device_capability(weight.device) < (8, 9):
            raise CannotQuantize(f"{torch.cuda.get_device_name(weight.device)} has no fp8; int8 works")
        self.kind, self.bias = kind, bias
        self.weight, self.scale = _by_row(weight, kind)

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, in] -> [rows, out], in x's dtype: bf16 for fp8, any float for int8."""
        if self.kind == "int8":
            y = torch._weight_int8pack_mm(x.contiguous(), self.weight, self.scale.to(x.dtype))
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
    wide = wide / scale.unsqueeze(1)
    if kind == "int8":
        return wide.round().to(torch.int8), scale
    return wide.clamp(-LARGEST[kind], LARGEST[kind]).to(FP8), scale
