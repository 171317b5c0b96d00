"""The pooled head: running sums and the dot product against plain arithmetic in fp64."""

import pytest
import torch

from stockade.kernels.pooled_logit import pool_add, pooled_logit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 64, 100])
def test_rows_are_added_to_their_slots_only(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    hidden = torch.randn(40, width, generator=generator).to(dtype)
    slots = torch.randint(-1, 3, (40,), generator=generator)
    sums = torch.ones(5, width)
    pool_add(hidden, slots, sums)
    for slot in range(4):  # slot 3 got nothing
        want = 1.0 + hidden[slots == slot].double().sum(0)
        torch.testing.assert_close(sums[slot].double(), want, rtol=1e-6, atol=1e-5)


def test_a_sum_in_pieces_is_the_sum_of_all() -> None:
    hidden = torch.randn(300, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    whole, pieces = torch.zeros(2, 64), torch.zeros(2, 64)
    slots = torch.zeros(300, dtype=torch.long)
    pool_add(hidden, slots, whole)
    for first in range(0, 300, 7):
        pool_add(hidden[first : first + 7], slots[first : first + 7], pieces)
    torch.testing.assert_close(whole[0], pieces[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_score_is_the_sigmoid_of_the_dot_product(dtype: torch.dtype, norm: bool, bias: bool) -> None:
    generator = torch.Generator().manual_seed(8)
    pooled = torch.randn(6, 100, generator=generator).to(dtype)
    weight = (torch.randn(100, generator=generator) * 0.2).to(dtype)
    scale = torch.randn(100, generator=generator).to(dtype) if norm else None
    offset = torch.tensor([0.7]) if bias else None
    logit, score = pooled_logit(pooled, weight, offset, scale, 1e-5)
    x = pooled.double()
    if scale is not None:
        x = (x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()) * scale.double()
    want = (x * weight.double()).sum(-1) + (0.7 if bias else 0.0)
    assert logit.dtype is score.dtype is torch.float32
    tolerance = 1e-5 if dtype is torch.float32 else 0.05 if norm else 1e-3
    torch.testing.assert_close(logit.double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(score, torch.sigmoid(logit))


def test_nan_stays_nan_so_that_it_counts_as_harmful() -> None:
    pooled = torch.zeros(1, 4)
    pooled[0, 2] = float("nan")
    assert pooled_logit(pooled, torch.ones(4), None, None, 1e-6)[1].isnan().all()
