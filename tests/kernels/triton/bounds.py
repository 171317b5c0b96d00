"""How far a kernel's result may be from the exact one."""

from __future__ import annotations

import torch
from torch import Tensor

NAN = float("nan")


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of this shape and these strides, which copying may change, on a device; its numbers do not matter."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def assert_as_exact(got: Tensor, want: Tensor, torchs: Tensor) -> None:
    """got: the kernel's; want: in fp64; torchs: by torch in got's dtype. Allowed: twice torch's error and a rounding.

    A rounding is a whole unit of the last place: the interpreter cuts what does not fit into bf16.
    """
    assert got.dtype == torchs.dtype and got.shape == want.shape and got.isfinite().all()
    error = (got.cpu().double() - want).abs()
    allowed = 2 * (torchs.double() - want).abs().max() + torch.finfo(got.dtype).eps * want.abs() + 1e-7
    assert (error <= allowed).all(), f"off by {float((error - allowed).max()):.3g} more than allowed"
