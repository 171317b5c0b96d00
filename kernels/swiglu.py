"""Gated activations (Shazeer 2020): SwiGLU, silu(gate) * up, and GeGLU with the tanh approximation of gelu."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [rows, width] -> [rows, width]."""
    return F.silu(gate).mul_(up)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [rows, width] -> [rows, width]."""
    return F.gelu(gate, approximate="tanh").mul_(up)
