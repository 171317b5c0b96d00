"""The detector's head in one launch against fp64: ragged batches, sums kept over steps, and nothing else read."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stockade.kernels.pooled_logit import pooled_head_reference, pooled_logit
from stockade.kernels.triton.common import FLOATS, KernelArgumentError
from stockade.kernels.triton.pooled_head import pooled_head
from tests.kernels.triton.bounds import placed

SLOTS = 4
NAN = float("nan")


@dataclass
class Step:
    """One step's arguments: hidden is NaN wherever nothing is pooled, and so are the slots that nobody has."""

    hidden: Tensor
    first_row: Tensor
    count: Tensor
    pool_start: Tensor
    slot: Tensor
    sums: Tensor
    weight: Tensor
    bias: Tensor | None
    norm: Tensor | None
    eps: float = 1e-5
    threshold: float = 0.5

    def arguments(self, device: torch.device) -> dict[str, object]:
        return {
            name: value.to(device, copy=True) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }


def make_step(sequences: list[tuple[int, int | None, int]], width: int, dtype: torch.dtype, head: str) -> Step:
    """sequences: (rows, those before the first pooled one or None for the last token, tokens summed before)."""
    generator = torch.Generator().manual_seed(width + len(sequences))
    rows = [0]
    starts, counts = [], []
    hidden = torch.full((sum(count for count, _, _ in sequences) + 2, width), NAN, dtype=dtype)
    sums = torch.full((SLOTS + 1, width), NAN)
    slots = torch.randperm(SLOTS, generator=generator)[: len(sequences)].int()
    for index, (count, before, known) in enumerate(sequences):
        start = rows[-1] + count - 1 if before is None else rows[-1] + before
        stop = rows[-1] + count
        pooled = max(0, stop - start) if count else 0
        hidden[stop - pooled : stop] = torch.randn(pooled, width, generator=generator).to(dtype)
        if known and before is not None:
            sums[slots[index]] = torch.randn(width, generator=generator) * 3
        rows.append(stop)
        starts.append(-1 if before is None else start)
        counts.append(known + pooled)
    made = (torch.randn(width, generator=generator) for _ in range(3))
    weight, offset, norm = next(made) * width**-0.5, next(made)[:1] * 0.3, next(made) * 0.2 + 1
    return Step(
        hidden,
        *(torch.tensor(part, dtype=torch.int32) for part in (rows, counts, starts)),
        slots,
        sums,
        weight.to(dtype),
        offset.to(dtype) if "bias" in head else None,
        norm.to(dtype) if "norm" in head else None,
    )


sequences = st.lists(
    st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 6)), st.sampled_from([0, 0, 7])),
    min_size=1,
    max_size=SLOTS,
)


@settings(max_examples=25, deadline=None)
@given(
    sequences=sequences,
    width=st.sampled_from([1, 16, 100, 130]),
    dtype=st.sampled_from(FLOATS),
    head=st.sampled_from(["", "bias", "norm", "norm bias"]),
)
def test_scores_and_sums_are_those_of_fp64(
    sequences: list[tuple[int, int | None, int]],
    width: int,
    dtype: torch.dtype,
    head: str,
    device: torch.device,
) -> None:
    step = make_step(sequences, width, dtype, head)
    exact = step.arguments(torch.device("cpu"))
    exact["sums"] = step.sums.double()
    score, harmless = pooled_head_reference(**exact)
    got = step.arguments(device)
    n = len(sequences)
    out = torch.full((n,), NAN, device=device), torch.ones(n, dtype=torch.bool, device=device)
    assert pooled_head(**got, out=out) is not None
    torch.testing.assert_close(out[0].cpu().double(), score, rtol=2e-5, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(got["sums"].cpu().double(), exact["sums"], rtol=1e-6, atol=1e-6, equal_nan=True)
    sure = ~((score - step.threshold).abs() < 1e-5)
    assert torch.equal(out[1].cpu()[sure], harmless[sure])
    for rows, start, said in zip(
        step.first_row.diff().tolist(), step.pool_start.tolist(), out[1].tolist(), strict=True
    ):
        assert not (said and rows == 0), start


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [False, True])
def test_the_error_is_no_worse_than_torchs_own(dtype: torch.dtype, norm: bool, device: torch.device) -> None:
    step = make_step([(1, None, 0)] * SLOTS, 3200, dtype, "norm bias" if norm else "bias")
    exact = step.arguments(torch.device("cpu"))
    exact["sums"] = step.sums.double()
    want = pooled_head_reference(**exact)[0]
    last = step.hidden[step.first_row[1:].long() - 1]
    theirs = pooled_logit(last, step.weight, step.bias, step.norm, step.eps)[1]
    ours = pooled_head(**step.arguments(device))[0]
    assert (ours.cpu() - want).abs().max() <= 2 * (theirs - want).abs().max() + 1e-6


def test_a_mean_taken_in_chunks_is_the_mean_of_all(device: torch.device) -> None:
    """Token by token, in chunks and at once; the first chunk needs no cleared sum."""
    width, tokens = 96, 11
    hidden = torch.randn(tokens, width, generator=torch.Generator().manual_seed(2)).bfloat16().to(device)
    weight = torch.linspace(-0.3, 0.3, width, device=device)

    def scored(cuts: list[int]) -> tuple[float, Tensor]:
        sums = torch.full((2, width), NAN, device=device)
        for first, stop in pairwise(cuts):
            parts = ([0, stop - first], [stop], [0], [0])
            tables = [torch.tensor(part, dtype=torch.int32, device=device) for part in parts]
            score, _ = pooled_head(hidden[first:stop], *tables, sums, weight, None, None, 1e-6, 0.5)
        return float(score), sums[0]

    whole, total = scored([0, tokens])
    for cuts in ([0, 4, 5, tokens], list(range(tokens + 1))):
        score, got = scored(cuts)
        assert score == pytest.approx(whole, abs=1e-6)
        torch.testing.assert_close(got, total, rtol=1e-5, atol=1e-5)


def test_what_is_not_a_number_is_not_harmless(device: torch.device) -> None:
    step = make_step([(2, 0, 0), (2, 0, 0), (2, None, 0)], 64, torch.float32, "bias")
    step.hidden[1, 5] = NAN  # in the first one's mean
    step.hidden[5, 5] = float("inf")  # in the last one's row
    step.weight[5] = 0.0
    step.threshold = 0.0
    score, harmless = pooled_head(**step.arguments(device))
    assert score.isnan().tolist() == [True, False, True]
    assert harmless.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("hidden", torch.zeros(4, 8, dtype=torch.int32), "hidden: its dtype is int32"),
        ("count", torch.zeros(1, dtype=torch.int64), "count: its dtype is int64, not int32"),
        ("first_row", torch.zeros(1, dtype=torch.int32), r"first_row: its shape is \[1\], not \[2\]"),
        ("sums", torch.zeros(2, 9), r"sums: its shape is \[2, 9\], not \[slots \+ 1, 8\]"),
        ("weight", torch.zeros(2, 8), r"weight: its shape is \[2, 8\], not \[8\]"),
        ("norm", torch.zeros(7), r"norm: its shape is \[7\], not \[8\]"),
        ("hidden", torch.zeros(4, 16)[:, ::2], "hidden: it is not contiguous"),
    ],
)
def test_the_wrong_argument_is_named(name: str, value: Tensor, said: str, device: torch.device) -> None:
    step = make_step([(1, 0, 0)], 8, torch.float32, "bias norm")
    with pytest.raises(KernelArgumentError, match=said):
        pooled_head(**{**step.arguments(device), name: placed(value, device)})
