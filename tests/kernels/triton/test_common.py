"""Checks of arguments name what is wrong; shared helpers compute what they say."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from stockade.kernels.triton.common import (
    FLOATS,
    KernelArgumentError,
    Launch,
    check_device,
    check_tensor,
    compute_type,
    interpreted,
    tanh,
    target_of,
)


@triton.jit
def _product(x, y, out, CT: tl.constexpr):
    at = tl.arange(0, 16)
    tile = at[:, None] * 16 + at[None, :]
    total = tl.dot(tl.load(x + tile).to(CT), tl.load(y + tile).to(CT), input_precision="ieee")
    tl.store(out + tile, tanh(total))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products_are_right_in_every_dtype(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = ((torch.randn(16, 16, generator=generator) * 0.4).to(device, dtype) for _ in range(2))
    out = torch.full((16, 16), float("nan"), device=device)
    Launch(_product, (1,), {"x": x, "y": y, "out": out, "CT": compute_type(dtype)}).run()
    torch.testing.assert_close(out.double(), torch.tanh(x.double() @ y.double()), rtol=1e-5, atol=1e-6)


@triton.jit
def _tanh(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tanh(tl.load(x + at)))


def test_tanh_saturates_and_keeps_nan(device: torch.device) -> None:
    x = torch.tensor([-1e30, -100.0, -1.0, -1e-3, 0.0, 2.0, 1e30, float("nan")], device=device)
    out = torch.empty_like(x)
    Launch(_tanh, (1,), {"x": x, "out": out, "SIZE": 8}).run()
    torch.testing.assert_close(out, torch.tanh(x), rtol=1e-4, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(3, 5), r"x: its shape is \[3, 5\], not \[rows, 4\]"),
        (torch.zeros(3), r"x: its shape is \[3\], not \[rows, 4\]"),
        (torch.zeros(3, 4, dtype=torch.int32), "x: its dtype is int32, not bfloat16 or float16 or float32"),
        (torch.zeros(3, 4, device="meta"), "x: it is on meta, not on cpu"),
        (torch.zeros(4, 3).t(), "x: it is not contiguous"),
    ],
    ids=["shape", "dimensions", "dtype", "device", "strides"],
)
def test_a_wrong_argument_is_named(tensor: torch.Tensor, said: str) -> None:
    with pytest.raises(KernelArgumentError, match=said):
        check_tensor("x", tensor, ("rows", 4), FLOATS, torch.device("cpu"))


def test_rows_may_lie_apart_where_only_rows_must_be_whole() -> None:
    wide = torch.zeros(3, 8)
    check_tensor("x", wide[:, :4], ("rows", 4), FLOATS, wide.device, contiguous=False)
    with pytest.raises(KernelArgumentError, match="x: its last dimension is not contiguous"):
        check_tensor("x", wide[:, ::2], ("rows", 4), FLOATS, wide.device, contiguous=False)


def test_kernels_run_on_a_cpu_only_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert interpreted()
    check_device("x", torch.zeros(1))
    assert compute_type(torch.bfloat16) is tl.float32
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(KernelArgumentError, match="x: it is on cpu; Triton kernels run on CUDA"):
        check_device("x", torch.zeros(1))
    assert compute_type(torch.bfloat16) is tl.bfloat16


def test_without_a_gpu_decisions_are_an_h200s() -> None:
    assert target_of(torch.device("cpu")) == target_of(torch.device("meta")) == ("cuda", 90, 132)
