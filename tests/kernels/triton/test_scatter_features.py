"""Features of images go to their tokens' rows and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stockade.kernels.triton.common import FLOATS, KernelArgumentError
from stockade.kernels.triton.scatter_features import scatter_features
from tests.kernels.triton.bounds import placed


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("width", [1, 100, 1056])
def test_rows_are_replaced_and_padding_is_skipped(
    width: int, dtype: torch.dtype, index: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(width)
    x, features = (torch.randn(6, width, generator=generator).to(dtype) for _ in range(2))
    rows = torch.tensor([4, -1, 0, 3, 6, -1], dtype=index)  # 6: behind the last
    want = x.clone()
    want[[4, 0, 3]] = features[[0, 2, 3]]
    got = x.to(device)
    scatter_features(got, rows.to(device), features.to(device))
    assert torch.equal(got.cpu(), want)


def test_features_are_rounded_to_the_embeddings_dtype(device: torch.device) -> None:
    x = torch.zeros(2, 33, dtype=torch.float16, device=device)
    features = torch.randn(1, 33, generator=torch.Generator().manual_seed(0))
    scatter_features(x, torch.tensor([1], device=device), features.to(device))
    assert torch.equal(x[1].cpu(), features[0].half()) and not x[0].any()


def test_no_features_launch_nothing(device: torch.device) -> None:
    x = torch.ones(2, 4, device=device)
    scatter_features(x, torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, 4, device=device))
    assert (x == 1).all()


@pytest.mark.parametrize(
    ("x", "rows", "features", "said"),
    [
        (torch.zeros(4, 16)[:, ::2], torch.zeros(1).long(), torch.zeros(1, 8), "x: it is not contiguous"),
        (torch.zeros(4, 8), torch.zeros(1), torch.zeros(1, 8), "rows: its dtype is float32, not int32 or int64"),
        (
            torch.zeros(4, 8),
            torch.zeros(1).long(),
            torch.zeros(2, 8),
            r"features: its shape is \[2, 8\], not \[1, 8\]",
        ),
    ],
)
def test_the_wrong_argument_is_named(
    x: Tensor, rows: Tensor, features: Tensor, said: str, device: torch.device
) -> None:
    x, rows, features = (placed(part, device) for part in (x, rows, features))
    with pytest.raises(KernelArgumentError, match=said):
        scatter_features(x, rows, features)
