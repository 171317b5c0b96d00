"""Memory advice changes where bytes lie, never what they are."""

from __future__ import annotations

import torch

from stockade.kernels.huge_pages import HUGE_PAGE, collapse, prefer
from stockade.kernels.linear import Linear


def test_collapsing_keeps_every_byte() -> None:
    tensors = [torch.randn(600, 601) for _ in range(8)]
    copies = [tensor.clone() for tensor in tensors]
    assert 0 <= collapse(tensors) <= sum(tensor.nbytes for tensor in tensors) // HUGE_PAGE + len(tensors)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


def test_a_packed_linear_multiplies_the_same_after_collapsing() -> None:
    weight = torch.randn(1024, 768).bfloat16()
    linear = Linear(weight.clone())
    linear.pack()
    x = torch.randn(3, 768).bfloat16()
    before = linear(x)
    collapse([linear.weight])
    assert torch.equal(linear(x), before)


def test_preferring_leaves_a_tensor_usable() -> None:
    tensor = torch.empty(4 * HUGE_PAGE, dtype=torch.uint8)
    prefer(tensor)
    tensor.fill_(7)
    assert int(tensor.sum()) == 7 * 4 * HUGE_PAGE
    prefer(torch.empty(3))
