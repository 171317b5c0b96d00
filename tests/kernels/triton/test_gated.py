"""Gated activations in one launch against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stockade.kernels.swiglu import geglu, swiglu
from stockade.kernels.triton.common import FLOATS, KernelArgumentError
from stockade.kernels.triton.gated import gated
from tests.kernels.triton.bounds import NAN, assert_as_exact, placed


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["silu", "gelu"])
@pytest.mark.parametrize(("rows", "ffn"), [(1, 1), (3, 100), (2, 2080)])
def test_it_is_that_of_fp64_whether_gate_and_up_are_one_or_two(
    rows: int, ffn: int, dtype: torch.dtype, kind: str, device: torch.device
) -> None:
    both = (torch.randn(rows, 2 * ffn, generator=torch.Generator().manual_seed(ffn)) * 4).to(dtype)
    gate, up = both.chunk(2, 1)
    wide = F.silu(gate.double()) if kind == "silu" else F.gelu(gate.double(), approximate="tanh")
    out = torch.full((rows, ffn), NAN, dtype=dtype, device=device)
    got = gated(both.to(device), kind=kind, out=out)
    assert got is out
    assert_as_exact(got, wide * up.double(), (swiglu if kind == "silu" else geglu)(gate, up))
    apart = gated(gate.contiguous().to(device), up.to(device), kind)  # rows of one are twice as far apart
    assert torch.equal(apart, got)


def test_it_saturates_and_keeps_nan(device: torch.device) -> None:
    gate = torch.tensor([[-1e4, -200.0, 200.0, 1e4, NAN]], device=device)
    for kind in ("silu", "gelu"):
        got = gated(gate, torch.full_like(gate, 2.0), kind).cpu()
        assert got[0, :4].tolist() == [0.0, 0.0, 400.0, 2e4] and got[0, 4].isnan()


def test_no_rows_launch_nothing(device: torch.device) -> None:
    assert gated(torch.empty(0, 64, device=device)).shape == (0, 32)


@pytest.mark.parametrize(
    ("gate", "up", "kind", "said"),
    [
        (torch.zeros(4, 7), None, "silu", "gate: it has 7 columns"),
        (torch.zeros(4, 8, dtype=torch.int32), None, "silu", "gate: its dtype is int32"),
        (torch.zeros(4, 8), torch.zeros(4, 7), "silu", r"up: its shape is \[4, 7\], not \[4, 8\]"),
        (torch.zeros(4, 8), torch.zeros(8, 4).t(), "silu", "up: its last dimension is not contiguous"),
        (torch.zeros(4, 8), None, "relu", "kind: 'relu', not silu or gelu"),
    ],
)
def test_the_wrong_argument_is_named(
    gate: Tensor, up: Tensor | None, kind: str, said: str, device: torch.device
) -> None:
    gate, up = placed(gate, device), None if up is None else placed(up, device)
    with pytest.raises(KernelArgumentError, match=said):
        gated(gate, up, kind)
