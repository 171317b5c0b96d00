"""The packed linear map against `F.linear`, at every number of rows it may see."""

import pytest
import torch
import torch.nn.functional as F

from stockade.kernels.linear import Linear, can_pack

SHAPES = [(1, 1), (7, 100), (96, 64), (33, 576), (130, 48)]


def maps(shape: tuple[int, int], dtype: torch.dtype, bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(sum(shape))
    weight = (torch.randn(shape, generator=generator) * 0.3).to(dtype)
    return weight, torch.randn(shape[0], generator=generator).to(dtype) if bias else None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 16, 17, 100])
def test_packed_fp32_equals_plain(rows: int, shape: tuple[int, int], bias: bool) -> None:
    weight, offset = maps(shape, torch.float32, bias)
    linear = Linear(weight.clone(), offset)
    linear.pack()
    linear.pack()  # a second time changes nothing
    assert linear.packed == can_pack(weight)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows))
    torch.testing.assert_close(linear(x), F.linear(x, weight, offset), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 16, 33])
def test_packed_bf16_is_no_worse_than_pytorch(rows: int, shape: tuple[int, int], bias: bool) -> None:
    weight, offset = maps(shape, torch.bfloat16, bias)
    linear = Linear(weight.clone(), offset)
    linear.pack()
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).bfloat16()
    exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    theirs = (F.linear(x, weight, offset) - exact).norm()
    assert (linear(x) - exact).norm() <= theirs * 1.02 + exact.norm() * 1e-4


def test_half_precision_stays_plain() -> None:
    assert not can_pack(torch.zeros(4, 4, dtype=torch.float16))
    assert not can_pack(torch.zeros(4, 4, dtype=torch.float64))


def test_rows_are_independent_of_each_other_within_rounding() -> None:
    weight, _ = maps((96, 64), torch.float32, False)
    linear = Linear(weight)
    linear.pack()
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(9))
    alone = torch.cat([linear(row.unsqueeze(0)) for row in x])
    torch.testing.assert_close(linear(x), alone, rtol=1e-5, atol=1e-5)
