"""SwiGLU (Shazeer 2020): silu(gate) * up."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [rows, width] -> [rows, width]."""
    return F.silu(gate).mul_(up)
