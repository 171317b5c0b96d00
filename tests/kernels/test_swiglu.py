"""SwiGLU and GeGLU against their definitions, and bf16 against fp64 no worse than PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from stockade.kernels.swiglu import geglu, swiglu


@pytest.mark.parametrize("shape", [(1, 2), (5, 96), (17, 200), (0, 8)])
def test_it_is_silu_of_the_gate_times_up(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 4
    before = x.clone()
    gate, up = x[:, : shape[1] // 2], x[:, shape[1] // 2 :]
    torch.testing.assert_close(swiglu(*x.chunk(2, -1)), gate * torch.sigmoid(gate) * up)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(1, 2), (5, 96)])
def test_geglu_is_gelus_tanh_form_of_the_gate_times_up(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 4
    gate, up = x.chunk(2, -1)
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    torch.testing.assert_close(geglu(*x.chunk(2, -1)), 0.5 * gate * (1 + torch.tanh(inner)) * up)


@pytest.mark.parametrize("shape", [(1, 2), (5, 96), (17, 3072)])
def test_bf16_is_no_worse_than_pytorch(shape: tuple[int, int]) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 4).bfloat16()
    gate, up = x.chunk(2, -1)
    exact = F.silu(gate.double()) * up.double()
    assert (swiglu(*x.chunk(2, -1)) - exact).norm() <= (F.silu(gate) * up - exact).norm() * 1.01
