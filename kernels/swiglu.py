"""SwiGLU (Shazeer 2020): silu(gate) * up."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [rows, 2 * width], gate first -> [rows, width]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)
