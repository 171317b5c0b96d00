"""AdamW that takes orthogonal steps for matrices, and so fewer of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MOMENTUM = 0.95
# Of the polynomial x -> a x + b x^3 + c x^5 that brings singular values near 1 in five rounds (Jordan et al., Muon,
# 2024), and of a step's size, so that rates are about AdamW's (Liu et al., "Muon is scalable for LLM training", 2025)
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ROUNDS = 5
_SIZE = 0.2


class Muon(torch.optim.AdamW):
    """Muon for parameters of two dimensions, AdamW for the others.

    torch's own Muon makes matrices orthogonal in bf16, which takes 30 times longer on processors that lack it.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Gradients of matrices are gone afterwards."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.ndim != 2 or matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    # AdamW looks for a number of steps in every state that it loads
                    state |= {"momentum": torch.zeros_like(matrix), "step": torch.zeros(())}
                momentum: Tensor = state["momentum"].mul_(_MOMENTUM).add_(matrix.grad)
                direction = orthogonal(matrix.grad + _MOMENTUM * momentum)
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(direction, alpha=-group["lr"] * _SIZE * max(matrix.shape) ** 0.5)
                matrix.grad = None
        return super().step(closure)


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest matrix whose singular values are equal, 0.7 to 1.2, [rows, columns]."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.t()).t()
    # All rounds are polynomials of the small square matrix, and multiply the large one once.
    matrix = matrix / (matrix.norm() + 1e-7)
    square = matrix @ matrix.t()
    identity = torch.eye(len(square), dtype=square.dtype, device=square.device)
    whole = identity
    for _ in range(_ROUNDS):
        factor = _A * identity + _B * square + _C * (square @ square)
        whole = factor @ whole
        square = factor @ square @ factor
    return whole @ matrix
