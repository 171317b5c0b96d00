"""Adapters of a batch, token by token, against fp64; rows without one stay as they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stockade.kernels.lora import LoraStack, LowRank, low_rank_reference, stacked
from stockade.kernels.triton.common import FLOATS, KernelArgumentError
from stockade.kernels.triton.lora import FEW, add_low_rank, scratch_numbers
from tests.kernels.triton.bounds import NAN, assert_as_exact


def updates_of(ranks: list[int], inputs: int, outputs: int, dtype: torch.dtype) -> list[LowRank | None]:
    """rank 0: an adapter that leaves this map alone."""
    generator = torch.Generator().manual_seed(sum(ranks) + inputs)
    made: list[LowRank | None] = []
    for rank in ranks:
        a = (torch.randn(inputs, rank, generator=generator) * inputs**-0.5).to(dtype)
        made.append(LowRank(a, (torch.randn(rank, outputs, generator=generator) * 0.5).to(dtype)) if rank else None)
    return made


def check(
    adapter: list[int], ranks: list[int], inputs: int, outputs: int, dtype: torch.dtype, device: torch.device
) -> None:
    updates = updates_of(ranks, inputs, outputs, dtype)
    stack = stacked(updates)
    assert stack is not None
    generator = torch.Generator().manual_seed(len(adapter))
    x, y = (torch.randn(len(adapter), size, generator=generator).to(dtype) for size in (inputs, outputs))
    want = low_rank_reference(y, x, adapter, updates)
    torchs = y.clone()
    for row, index in enumerate(adapter):
        if index >= 0 and (update := updates[index]) is not None:
            torchs[row] += x[row] @ update.a @ update.b
        elif index < 0:
            x[row] = NAN  # which must not reach another row
    got = y.to(device, copy=True)
    stack = LoraStack(*(part.to(device) for part in stack))
    scratch = torch.full((scratch_numbers(len(adapter), stack),), NAN, device=device)
    add_low_rank(got, x.to(device), torch.tensor(adapter, device=device), stack, scratch)
    assert_as_exact(got, want, torchs)
    without = [row for row, index in enumerate(adapter) if index < 0]
    assert torch.equal(got.cpu()[without], y[without])


@settings(max_examples=8, deadline=None)
@given(
    adapter=st.lists(st.sampled_from([-1, -1, 0, 1, 2]), min_size=1, max_size=20),
    ranks=st.permutations([4, 16, 0]),
    inputs=st.sampled_from([64, 100, 576]),
    outputs=st.sampled_from([32, 130]),
    dtype=st.sampled_from(FLOATS),
)
def test_each_row_gets_its_own_adapters_update(
    adapter: list[int], ranks: list[int], inputs: int, outputs: int, dtype: torch.dtype, device: torch.device
) -> None:
    check(adapter, ranks, inputs, outputs, dtype, device)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_many_rows_take_larger_tiles(dtype: torch.dtype, device: torch.device) -> None:
    check([-1] * 40 + [1] * 70 + [0] * (FEW - 60), [40, 8], 160, 136, dtype, device)


@pytest.mark.parametrize("rows", [3, FEW + 2])
def test_high_ranks_take_narrower_tiles(rows: int, device: torch.device) -> None:
    check([-1, *[0, 1] * rows][:rows], [130, 200], 96, 70, torch.float32, device)


def test_an_index_that_is_no_adapters_counts_as_none(device: torch.device) -> None:
    stack = stacked(updates_of([4], 32, 32, torch.float32))
    assert stack is not None
    stack = LoraStack(*(part.to(device) for part in stack))
    y = torch.ones(3, 32, device=device)
    add_low_rank(y, torch.ones(3, 32, device=device), torch.tensor([1, -5, 7], device=device), stack)
    assert (y == 1).all()


def test_what_is_no_number_reaches_its_own_row_only(device: torch.device) -> None:
    stack = stacked(updates_of([4, 4], 32, 32, torch.float32))
    assert stack is not None
    stack = LoraStack(*(part.to(device) for part in stack))
    x, y = torch.ones(3, 32, device=device), torch.zeros(3, 32, device=device)
    x[1, 5] = NAN
    add_low_rank(y, x, torch.tensor([0, 0, 1], device=device), stack)
    assert y.isnan().all(1).tolist() == [False, True, False] and y[[0, 2]].isfinite().all()


def test_maps_that_no_adapter_changes_have_no_stack() -> None:
    assert stacked([None, None]) is None and stacked([]) is None


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("x", torch.zeros(2, 33), r"stack.a: its shape is \[1, 16, 32\], not \[adapters, rank, 33\]"),
        ("y", torch.zeros(3, 32), r"adapter: its shape is \[2\], not \[3\]"),
        ("adapter", torch.zeros(2), "adapter: its dtype is float32"),
        ("scratch", torch.zeros(9), "scratch: 9 numbers, of which 2 rows need 256"),
        (
            "stack",
            LoraStack(torch.zeros(1, 8, 32), torch.zeros(1, 32, 8)),
            "stack.a: a rank of 8, not a power of two",
        ),
        ("stack", LoraStack(torch.zeros(1, 16, 32), torch.zeros(2, 32, 16)), r"stack.b: its shape is \[2, 32, 16\]"),
    ],
)
def test_the_wrong_argument_is_named(name: str, value: Tensor | LoraStack, said: str, device: torch.device) -> None:
    arguments = {
        "y": torch.zeros(2, 32, device=device),
        "x": torch.zeros(2, 32, device=device),
        "adapter": torch.zeros(2, dtype=torch.int32, device=device),
        "stack": LoraStack(torch.zeros(1, 16, 32, device=device), torch.zeros(1, 32, 16, device=device)),
    }
    moved = value.to(device) if isinstance(value, Tensor) else LoraStack(*(part.to(device) for part in value))
    with pytest.raises(KernelArgumentError, match=said):
        add_low_rank(**{**arguments, name: moved})
