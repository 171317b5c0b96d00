"""y = x @ w.T + b, with the weight packed once into the layout the machine multiplies fastest.

Not for training: a packed weight cannot be read back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The number of rows oneDNN is told to expect. It picks the blocking; 16 costs a single row nothing (77 against
# 94 us for 960 x 576 in bf16 on two cores when told 1) and keeps batched decoding and prefill fast.
EXPECTED_ROWS = 16


class Linear:
    """A frozen linear map. `weight` is [out, in]; `bias` [out] or None; both of one dtype on one device.

    On a CPU whose oneDNN supports the dtype, `pack()` replaces the weight by oneDNN's own blocked copy, which
    saves the reordering that `F.linear` does at every call.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.packed = False

    def pack(self) -> None:
        if not self.packed and can_pack(self.weight):
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, EXPECTED_ROWS)
            self.packed = True

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, in] -> [rows, out]."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN can keep this weight in its own layout and multiply it without converting it."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype is torch.float32
