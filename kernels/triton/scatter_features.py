"""Puts the features of images in the places of their tokens' embeddings, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, Launch, check_device, check_tensor

BLOCK = 1024


def scatter_features(x: Tensor, rows: Tensor, features: Tensor) -> None:
    """x[rows[i]] = features[i], in place, rounded to x's dtype; what is no row of x (-1: padding) is skipped.

    x: [tokens, width], contiguous. rows: [m] int32 or int64, each at most once. features: [m, width], contiguous, any
    float dtype. Raises `KernelArgumentError`.
    """
    launch = plan(x, rows, features)
    if features.numel():
        launch.run()


def plan(x: Tensor, rows: Tensor, features: Tensor) -> Launch:
    """The launch of these arguments, which it checks."""
    check_device("x", x)
    check_tensor("x", x, ("tokens", "width"), FLOATS, x.device)
    tokens, width = x.shape
    check_tensor("rows", rows, ("m",), (torch.int32, torch.int64), x.device)
    check_tensor("features", features, (len(rows), width), FLOATS, x.device)
    arguments = {"x": x, "rows": rows, "features": features, "tokens": tokens, "WIDTH": width, "BLOCK": BLOCK}
    return Launch(_scatter, (len(rows), triton.cdiv(width, BLOCK)), arguments)


@triton.jit
def _scatter(x, rows, features, tokens, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    item = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + item).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tl.where((row >= 0) & (row < tokens), WIDTH, 0)
    value = tl.load(features + item * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + row * WIDTH + at, value.to(x.dtype.element_ty), mask=inside)
