"""RMS norm: the fast form against the plain one, and bf16 against fp64 no worse than PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from stockade.kernels.rms_norm import rms_norm, rms_norm_reference

SHAPES = [(1, 1), (1, 576), (7, 100), (3, 5, 24), (0, 64), (33, 4096)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * 3 + 0.5
    return x.to(dtype), torch.randn(shape[-1], generator=generator).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_equals_the_reference(shape: tuple[int, ...]) -> None:
    x, weight = inputs(shape, torch.float32)
    before = x.clone()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), rtol=1e-6, atol=1e-6)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape])
def test_bf16_is_no_worse_than_pytorch(shape: tuple[int, ...]) -> None:
    x, weight = inputs(shape, torch.bfloat16)
    exact = F.rms_norm(x.double(), shape[-1:], weight.double(), 1e-5)
    theirs = rms_norm_reference(x, weight, 1e-5)
    ours = rms_norm(x, weight, 1e-5)
    assert ours.dtype is torch.bfloat16
    assert (ours - exact).norm() <= (theirs - exact).norm() * 1.01


@pytest.mark.parametrize("shape", [(1, 576), (7, 100)])
def test_a_weight_in_fp32_meets_the_row_before_it_is_rounded(shape: tuple[int, ...]) -> None:
    x, _ = inputs(shape, torch.bfloat16)
    weight = 1 + torch.randn(shape[-1], generator=torch.Generator().manual_seed(1)) * 0.01
    exact = F.rms_norm(x.double(), shape[-1:], weight.double(), 1e-5)
    for norm in (rms_norm, rms_norm_reference):
        ours = norm(x, weight, 1e-5)
        assert ours.dtype is torch.bfloat16
        torch.testing.assert_close(ours, exact.bfloat16(), rtol=0.01, atol=0)
        assert (ours - exact).norm() < 0.8 * (norm(x, weight.bfloat16(), 1e-5) - exact).norm()


def test_views_of_a_wider_row_are_normed_in_their_last_axis() -> None:
    wide, weight = torch.randn(5, 6, 24, generator=torch.Generator().manual_seed(0)), torch.ones(24)
    torch.testing.assert_close(rms_norm(wide[:, 1:3], weight, 1e-6), rms_norm_reference(wide[:, 1:3], weight, 1e-6))


def test_a_row_of_zeros_stays_zero_and_nan_stays_nan() -> None:
    x = torch.zeros(2, 8)
    x[1, 3] = float("nan")
    out = rms_norm(x, torch.ones(8), 1e-6)
    assert (out[0] == 0).all() and out[1].isnan().all()
