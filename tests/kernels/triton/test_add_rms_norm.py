"""Residual add and norm in one launch against fp64, in the rounding orders of Llama and of Gemma."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stockade.kernels.rms_norm import rms_norm_reference
from stockade.kernels.triton.add_rms_norm import add_rms_norm
from stockade.kernels.triton.common import FLOATS, KernelArgumentError
from tests.kernels.triton.bounds import NAN, assert_as_exact, placed

EPS = 1e-5


def made(rows: int, width: int, dtype: torch.dtype, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + width)
    x, residual = ((torch.randn(rows, width, generator=generator) * 3).to(dtype) for _ in range(2))
    weight = torch.randn(width, generator=generator) * 0.3 + 1
    return x, residual, weight if wide else weight.to(dtype)


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["llama", "gemma"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 100), (2, 576), (2, 3200)])
@pytest.mark.parametrize("scale", [None, 1.0, 0.22])
def test_sum_and_norm_are_those_of_fp64(
    rows: int, width: int, dtype: torch.dtype, wide: bool, scale: float | None, device: torch.device
) -> None:
    x, residual, weight = made(rows, width, dtype, wide)
    total, kept = x, None
    if scale is not None:
        total = residual.clone().add_(x, alpha=scale)
        kept = residual.to(device, copy=True)
    out = torch.full_like(x, NAN, device=device)
    got = add_rms_norm(x.to(device), kept, weight.to(device), EPS, scale=scale or 1.0, out=out)
    assert got is out
    if kept is not None:
        assert_as_exact(kept, residual.double() + scale * x.double(), total)
        total = kept.cpu()  # whose rounding is what is normed
    assert_as_exact(got, exact_norm(total, weight), rms_norm_reference(total, weight, EPS))


@pytest.mark.parametrize("wide", [False, True], ids=["llama", "gemma"])
def test_it_rounds_where_torch_rounds(wide: bool, device: torch.device) -> None:
    """In fp16, whose rounding the interpreter has; another order would differ in a quarter of all numbers."""
    x, residual, weight = made(8, 512, torch.float16, wide)
    kept = residual.to(device, copy=True)
    got = add_rms_norm(x.to(device), kept, weight.to(device), EPS).cpu()
    total = residual + x
    assert torch.equal(kept.cpu(), total)
    assert (got != rms_norm_reference(total, weight, EPS)).float().mean() < 0.01


def test_a_row_of_zeros_stays_zero_and_a_nan_stays_in_its_row(device: torch.device) -> None:
    x, _, weight = made(3, 100, torch.float32, False)
    x[0] = 0.0
    x[1, 7] = NAN
    got = add_rms_norm(x.to(device), None, weight.to(device), EPS).cpu()
    assert (got[0] == 0).all() and got[1].isnan().all() and got[2].isfinite().all()


def test_no_rows_launch_nothing(device: torch.device) -> None:
    empty = torch.empty(0, 64, device=device)
    assert add_rms_norm(empty, empty.clone(), torch.ones(64, device=device), EPS).shape == (0, 64)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("x", torch.zeros(4, 8, dtype=torch.float64), "x: its dtype is float64"),
        ("x", torch.zeros(4, 16)[:, ::2], "x: it is not contiguous"),
        ("x", torch.zeros(1, 1 << 15), "x: rows of 32768; of 1 to 16384"),
        ("residual", torch.zeros(4, 9), r"residual: its shape is \[4, 9\], not \[4, 8\]"),
        ("residual", torch.zeros(4, 8, dtype=torch.bfloat16), "residual: its dtype is bfloat16, not float32"),
        ("weight", torch.zeros(8, dtype=torch.bfloat16), "weight: its dtype is bfloat16"),
        ("out", torch.zeros(8, 4).t(), "out: it is not contiguous"),
    ],
)
def test_the_wrong_argument_is_named(name: str, value: Tensor, said: str, device: torch.device) -> None:
    arguments: dict[str, Any] = {"x": torch.zeros(4, 8), "residual": torch.zeros(4, 8), "weight": torch.ones(8)}
    arguments |= {name: value}
    arguments = {key: placed(part, device) for key, part in arguments.items()}
    with pytest.raises(KernelArgumentError, match=said):
        add_rms_norm(**arguments, eps=EPS)
