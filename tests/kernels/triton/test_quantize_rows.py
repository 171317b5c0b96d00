"""Rows as fp8 in one launch, against torch's own cast."""

from __future__ import annotations

import pytest
import torch

from stockade.kernels.quantized import FP8, _by_row
from stockade.kernels.triton.common import FLOATS, KernelArgumentError
from stockade.kernels.triton.quantize_rows import quantize_rows
from tests.kernels.triton.bounds import NAN

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the NaN that the interpreter computes


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("width", [1, 100, 3200])
def test_rows_and_scales_are_torchs(width: int, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("no fp8 here")
    x = (torch.randn(4, width, generator=torch.Generator().manual_seed(width)) * 9).to(dtype)
    if device.type == "cpu":
        # the interpreter's cast to fp8 does not round: numbers that fp8 has, times powers of two
        x = x.to(FP8).float() * torch.tensor([[0.5], [1.0], [2.0], [0.25]])
        x[:, 0] = torch.tensor([224.0, 448.0, -896.0, 112.0])
        x = x.to(dtype)
    x[1] = 0.0
    want, scale = _by_row(x, "fp8")
    got, found = quantize_rows(x.to(device))
    torch.testing.assert_close(found.cpu(), scale, rtol=1e-6, atol=0)
    # a division may be off by a last place of fp32, which rounds to another fp8 once in a while
    assert (got.cpu().float() != want.float()).float().mean() < 0.01


def test_a_row_with_a_nan_has_no_scale(device: torch.device) -> None:
    x = torch.ones(3, 16, device=device)
    x[1, 3], x[2, 3] = NAN, float("inf")
    assert quantize_rows(x)[1].isfinite().tolist() == [True, False, False]


def test_the_wrong_argument_is_named(device: torch.device) -> None:
    with pytest.raises(KernelArgumentError, match="x: its dtype is float64"):
        quantize_rows(torch.zeros(2, 2, dtype=torch.float64, device=device))
    with pytest.raises(KernelArgumentError, match="x: rows of 65536"):
        quantize_rows(torch.zeros(1, 65536, device=device))
