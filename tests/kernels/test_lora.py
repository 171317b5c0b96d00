"""Low-rank updates of a batch's rows against a plain loop over the rows in fp64."""

from __future__ import annotations

import pytest
import torch

from stockade.kernels.lora import ActiveAdapters, LowRank, Updates, low_rank_reference

CPU = torch.device("cpu")
IN, OUT = 40, 56
BATCHES = {
    "nobody": [-1, -1, -1],
    "one row": [-1, 0, -1],
    "everybody": [1] * 9,
    "adjacent": [-1] * 3 + [0] * 4 + [2] * 2,
    "scattered": [0, -1, 0, 2, 1, -1, 1, 2, 0],
    "one and nobody in turns": [0, -1] * 5,
}


def adapters(dtype: torch.dtype = torch.float32) -> list[Updates]:
    """Three adapters of different ranks for a part called "p" of layer 0."""
    generator = torch.Generator().manual_seed(3)
    return [
        {
            (0, "p"): LowRank(
                torch.randn(IN, rank, generator=generator).to(dtype),
                torch.randn(rank, OUT, generator=generator).to(dtype),
            )
        }
        for rank in (1, 4, 16)
    ]


def tensors(rows: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x, y = torch.randn(rows, IN, generator=generator), torch.randn(rows, OUT, generator=generator)
    return x.to(dtype), y.to(dtype)


def updated(adapter: list[int], updates: list[Updates], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    out = y.clone()
    active = ActiveAdapters.of(torch.tensor(adapter), updates, CPU)
    assert (active is None) == (max(adapter) < 0)
    if active is not None:
        active.add_(0, "p", out, x)
    return out


@pytest.mark.parametrize("batch", BATCHES)
def test_each_row_gets_its_own_adapter_and_others_keep_their_bits(batch: str) -> None:
    adapter, updates = BATCHES[batch], adapters()
    x, y = tensors(len(adapter))
    want = low_rank_reference(y, x, adapter, [update[0, "p"] for update in updates])
    out = updated(adapter, updates, x, y)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    untouched = torch.tensor(adapter) < 0
    assert torch.equal(out[untouched], y[untouched])
    assert not torch.isclose(out[~untouched], y[~untouched]).all(1).any()


def test_scattered_rows_equal_adjacent_ones() -> None:
    x, y = tensors(8)
    scattered = updated([0, -1] * 4, adapters(), x, y)[::2]
    assert torch.equal(scattered, updated([0] * 4, adapters(), x[::2], y[::2]))


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", BATCHES)
def test_bf16_rows_are_no_worse_than_pytorchs(batch: str, kept: torch.dtype) -> None:
    """Whether the update is kept in fp32 or in bf16."""
    adapter, updates = BATCHES[batch], adapters(kept)
    x, y = tensors(len(adapter), torch.bfloat16)
    pairs = [update[0, "p"] for update in updates]
    want = low_rank_reference(y, x, adapter, pairs)
    plain = [
        y[row] if index < 0 else y[row] + x[row] @ pairs[index].a.bfloat16() @ pairs[index].b.bfloat16()
        for row, index in enumerate(adapter)
    ]
    out = updated(adapter, updates, x, y)
    assert out.dtype is torch.bfloat16
    assert (out.double() - want).norm() <= 1.02 * (torch.stack(plain).double() - want).norm()


def test_parts_an_adapter_leaves_alone_stay_as_they_are() -> None:
    x, y = tensors(4)
    active = ActiveAdapters.of(torch.tensor([0, 1, 0, -1]), adapters(), CPU)
    assert active is not None
    for layer, part in ((1, "p"), (0, "q")):
        out = y.clone()
        active.add_(layer, part, out, x)
        assert torch.equal(out, y)


def test_an_adapter_that_overflows_stays_in_its_rows() -> None:
    updates = adapters()
    updates[1] = {(0, "p"): LowRank(updates[1][0, "p"].a * float("inf"), updates[1][0, "p"].b)}
    x, y = tensors(4)
    out = updated([0, 1, -1, 0], updates, x, y)
    assert not out[1].isfinite().any()
    assert torch.equal(out[[0, 2, 3]], updated([0, -1, -1, 0], updates, x, y)[[0, 2, 3]])


def test_rows_that_leave_a_batch_take_their_adapters_along() -> None:
    x, y = tensors(6)
    active = ActiveAdapters.of(torch.tensor([-1, 0, 1, 0, 2, 2]), adapters(), CPU)
    assert active is not None
    shorter = active.first(3)
    assert shorter is not None
    out = y[:3].clone()
    shorter.add_(0, "p", out, x[:3])
    assert torch.equal(out, updated([-1, 0, 1], adapters(), x[:3], y[:3]))
    assert active.first(1) is None
