"""Rotary position embedding (Su et al. 2021) in the half-split form of Llama, in place."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [tokens, heads, head_dim] in place by its tokens' angles.

    cos, sin: [tokens, 1, head_dim] in x's dtype: from `rope_angles` (sin carries the sign of each half).
    """
    swapped = x.roll(x.shape[-1] // 2, -1)
    return x.mul_(cos).addcmul_(swapped, sin)


def rope_angles(positions: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin) [tokens, 1, head_dim] of positions [tokens], or [tokens, head_dim / 2] where every frequency has its
    own; inv_freq is fp32 [head_dim / 2].

    The first half of sin is negated: x1' = x1 cos - x2 sin, x2' = x2 cos + x1 sin.
    """
    angles = (positions if positions.dim() == 2 else positions.unsqueeze(1)).float() * inv_freq
    cos, sin = angles.cos() * scaling, angles.sin() * scaling
    return torch.cat((cos, cos), -1).to(dtype).unsqueeze(1), torch.cat((-sin, sin), -1).to(dtype).unsqueeze(1)


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same out of place, as `transformers` writes it; `sin` signed as by `rope_angles`."""
    half = x.shape[-1] // 2
    signed = torch.cat((-sin[..., :half], sin[..., half:]), -1)
    rotated = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos + rotated * signed
