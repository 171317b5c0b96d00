"""y = x @ w.T + b, with the weight packed once into the layout the machine multiplies fastest.

Not for training: a packed weight cannot be read back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native as tiles
from .native import Native, PackedMatrix
from .quantized import Kind, QuantizedLinear
from .rms_norm import rms_norm

# The number of rows oneDNN is told to expect. It picks the blocking; 16 costs a single row nothing (77 against
# 94 us for 960 x 576 in bf16 on two cores when told 1) and keeps batched decoding and prefill fast.
EXPECTED_ROWS = 16


class Linear:
    """A frozen linear map. `weight` is [out, in]; `bias` [out] or None; both of one dtype on one device.

    `pack()` replaces the weight by a copy in tiles for the native kernels, or in oneDNN's own blocks where oneDNN
    supports the dtype, which saves the reordering that `F.linear` does at every call.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.packed = False
        self.matrix: PackedMatrix | None = None
        self.quantized: QuantizedLinear | None = None
        self._native: Native | None = None

    def quantize(self, kind: Kind) -> None:
        """Replace the weight by one of 8 bits, before it is packed. Raises `CannotQuantize`."""
        self.quantized = QuantizedLinear(self.weight, kind, self.bias)
        self.weight = self.quantized.weight

    def halves(self) -> tuple[Linear, Linear]:
        """The map to the first half of the outputs and that to the second, over the same memory; not packed."""
        biases = (None, None) if self.bias is None else self.bias.chunk(2)
        first, second = (Linear(*half) for half in zip(self.weight.chunk(2), biases, strict=True))
        if self.quantized is not None:
            first.quantized, second.quantized = self.quantized.halves()
        return first, second

    def pack(self, native: Native | None = None, into: Tensor | None = None) -> None:
        """native: multiply by the native kernels, where the shape allows it. into: as of `native.pack`."""
        if self.packed:
            return
        if native is not None and tiles.can_pack(self.weight):
            scales = None if self.quantized is None else self.quantized.scale
            self.matrix = tiles.pack(self.weight, self.bias, into, scales)
            self.weight, self.quantized, self._native, self.packed = self.matrix.tiles, None, native, True
        elif can_pack(self.weight):
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, EXPECTED_ROWS)
            self.packed = True

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, in] -> [rows, out]."""
        if self._native is not None and self.matrix is not None:
            return self._native.linear(x, self.matrix)
        if self.quantized is not None:
            return self.quantized(x)
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def after_norm(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """The map of x's RMS norm."""
        if self._native is not None and self.matrix is not None and norm.dtype is x.dtype:
            return self._native.linear(x, self.matrix, norm, eps)
        return self(rms_norm(x, norm, eps))


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can keep this weight in its own layout and multiply it without converting it."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype is torch.float32
