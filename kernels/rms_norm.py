"""Root-mean-square norm (Zhang, Sennrich 2019) in the rounding order of Llama."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., width] / rms(x) * weight [width], in x's dtype; sums and the scale are fp32.

    The row is rounded to x's dtype before it meets the weight, as `transformers` does.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    scale = torch.addcmul(torch.full_like(norm, eps), norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
    return (x * scale).to(x.dtype).mul_(weight)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same, spelled out."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight
