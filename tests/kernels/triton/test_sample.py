"""The sampler on the device chooses the engine's tokens, row by row, ties and draws included."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch import Tensor

from stockade.engine.sampling import SamplerRow, SamplingParams, processed_probs, uniform
from stockade.engine.sampling import sample as engine_sample
from stockade.kernels.sampling import SampledRows, SamplingRows
from stockade.kernels.triton.common import FLOATS, KernelArgumentError
from stockade.kernels.triton.sample import sample
from tests.kernels.triton.bounds import NAN, placed

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the NaN that the interpreter computes


def on_device(rows: list[SamplerRow], device: torch.device) -> SamplingRows:
    def column(dtype: torch.dtype, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    params = [row.params for row in rows]
    return SamplingRows(
        column(torch.float64, [item.temperature for item in params]),
        column(torch.int32, [item.top_k for item in params]),
        column(torch.float64, [item.top_p for item in params]),
        column(torch.float64, [item.min_p for item in params]),
        column(torch.int64, [row.seed - (1 << 64) * (row.seed >> 63) for row in rows]),
        column(torch.int32, [row.pass_index for row in rows]),
        column(torch.int32, [row.position for row in rows]),
    )


def drawn(logits: Tensor, rows: list[SamplerRow], device: torch.device) -> list[int]:
    """What the kernel chooses, which must have overwritten what was there."""
    out = SampledRows(
        torch.full((len(rows),), -7, dtype=torch.int32, device=device), torch.full((len(rows),), NAN, device=device)
    )
    assert sample(logits.to(device), on_device(rows, device), out) is out
    return out.ids.tolist()


def wanted(logits: Tensor, rows: list[SamplerRow]) -> list[int]:
    return [-1 if found is None else found.token for found in engine_sample(logits, rows)]


def any_rows(count: int, random: Random) -> list[SamplerRow]:
    """Every mixture of parameters."""
    return [
        SamplerRow(
            SamplingParams(
                temperature=random.choice([0.0, 0.3, 0.7, 1.0, 1.0, 1.9]),
                top_k=random.choice([0, 0, 1, 2, 40, 10_000]),
                top_p=random.choice([1.0, 1.0, 0.95, 0.8, 0.5, 0.01, random.uniform(0.05, 1.0)]),
                min_p=random.choice([0.0, 0.0, 0.02, 0.3, 1.0]),
            ),
            (),
            random.getrandbits(64),
            random.randrange(12),
            random.randrange(3000),
        )
        for _ in range(count)
    ]


def near_an_edge(logits: Tensor, row: SamplerRow) -> bool:
    """Whether a change in the seventh place of a sum or a draw gives another token."""
    if row.params.greedy:
        return False
    draw = uniform(row.seed, row.pass_index, row.position)
    tokens = set()
    for change in (-3e-7, 0.0, 3e-7):
        params = row.params
        if params.top_p < 1.0:
            top_p = min(1.0, max(1e-9, params.top_p + change))
            params = SamplingParams(
                temperature=params.temperature, top_k=params.top_k, top_p=top_p, min_p=params.min_p
            )
        edges = processed_probs(logits.float(), params, ()).double().cumsum(0)
        for shift in (-3e-7, 0.0, 3e-7):
            goal = torch.tensor((draw + shift) * float(edges[-1]), dtype=torch.float64)
            tokens.add(int(torch.searchsorted(edges, goal, right=True)))
    return len(tokens) > 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_thousands_of_rows_are_the_engines(dtype: torch.dtype, kind: str, device: torch.device) -> None:
    """Ties: logits of nine values, so that every threshold falls among equals."""
    random, count, vocab = Random(f"{dtype} {kind}"), 384, 220
    rows = any_rows(count, random)
    logits = torch.randn(count, vocab, generator=torch.Generator().manual_seed(len(kind))) * 2.5
    logits = (logits.round().clamp(-4, 4) * 0.7 if kind == "ties" else logits).to(dtype)
    got, want = drawn(logits, rows, device), wanted(logits, rows)
    other = [index for index in range(count) if got[index] != want[index]]
    assert all(near_an_edge(logits[index], rows[index]) for index in other) and len(other) <= count // 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_vocabularies_larger_than_a_block(dtype: torch.dtype, device: torch.device) -> None:
    rows = any_rows(16, Random(5))
    logits = (torch.randn(16, 9001, generator=torch.Generator().manual_seed(5)) * 2).to(dtype)
    padded = torch.full((16, 9100), NAN, dtype=dtype)  # rows apart, with NaN between them
    padded[:, :9001] = logits
    assert drawn(padded[:, :9001], rows, device) == wanted(logits, rows)


def test_a_row_gives_the_same_token_in_any_batch(device: torch.device) -> None:
    rows = any_rows(130, Random(2))  # more than share a program in the interpreter
    logits = torch.randn(130, 77, generator=torch.Generator().manual_seed(2))
    together = drawn(logits, rows, device)
    for index in (0, 64, 129):
        assert drawn(logits[index : index + 1], rows[index : index + 1], device) == together[index : index + 1]


def test_draws_follow_the_distribution_of_their_counter(device: torch.device) -> None:
    """With equal logits the token drawn is the draw itself: floor(uniform * vocab)."""
    places = [(0, 0, 0), (2**64 - 1, 0, 1), (2**63, 7, 0), (12345, 2**31 - 2, 2**31 - 2), (1, 1, 1)]
    rows = [SamplerRow(SamplingParams(temperature=1.0), (), *place) for place in places]
    want = [int(uniform(*place) * 4096) for place in places]
    assert drawn(torch.zeros(len(rows), 4096), rows, device) == want


def test_the_first_of_equals_is_greedy(device: torch.device) -> None:
    logits = torch.full((2, 5000), -1.0)
    logits[0, [17, 18, 4999]] = 3.0
    logits[1] = -3e38
    rows = [SamplerRow(SamplingParams(), (), 0, 0, 0)] * 2
    assert drawn(logits, rows, device) == [17, 0]


def test_negative_zero_equals_zero(device: torch.device) -> None:
    """Top-1 keeps all that equal the largest."""
    logits = torch.tensor([[-0.0, 0.0, -5.0, -0.0]])
    rows = [SamplerRow(SamplingParams(temperature=1.0, top_k=1), (), seed, 0, 0) for seed in range(40)]
    got = drawn(logits.expand(40, 4).contiguous(), rows, device)
    assert set(got) == {0, 1, 3} and got == wanted(logits.expand(40, 4), rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_no_numbers_give_none(dtype: torch.dtype, device: torch.device) -> None:
    inf = float("inf")
    logits = torch.zeros(7, 9, dtype=dtype)
    logits[0, 3] = NAN
    logits[1, 3] = inf
    logits[2] = -inf
    logits[3, 1:] = -inf  # one token is left
    logits[4] = 3e38  # overflows when divided by the temperature
    logits[5] = -3e38
    params = SamplingParams(temperature=0.5, top_p=0.9, top_k=3, min_p=0.1)
    for some in (params, SamplingParams(temperature=0.5), SamplingParams()):
        rows = [SamplerRow(some, (), 3, 0, 0)] * 7
        got = drawn(logits, rows, device)
        assert got == wanted(logits, rows)
        assert got[:4] == [-1, -1, -1, 0] and (got[4] == -1) is (not some.greedy)


def test_logprobs_are_of_the_chosen_token_before_temperature(device: torch.device) -> None:
    rows = any_rows(50, Random(9))
    logits = torch.randn(50, 333, generator=torch.Generator().manual_seed(9)) * 3
    logits[7, 0] = NAN
    ids, logprobs = sample(logits.to(device), on_device(rows, device))
    want = logits.double().log_softmax(-1).gather(1, ids.cpu().long().clamp(0).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprobs.cpu().double(), want, rtol=1e-6, atol=2e-6, equal_nan=True)
    assert logprobs[7].isnan() and ids[7] == -1


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("logits", torch.zeros(2, 8).double(), "logits: its dtype is float64"),
        ("logits", torch.zeros(8, 2).t(), "logits: its last dimension is not contiguous"),
        ("temperature", torch.zeros(2), "rows.temperature: its dtype is float32, not float64"),
        ("seed", torch.zeros(3).long(), r"rows.seed: its shape is \[3\], not \[2\]"),
        ("position", torch.zeros(2).long(), "rows.position: its dtype is int64, not int32"),
    ],
)
def test_the_wrong_argument_is_named(name: str, value: Tensor, said: str, device: torch.device) -> None:
    rows = on_device(any_rows(2, Random(0)), device)
    logits = value if name == "logits" else torch.zeros(2, 8)
    rows = rows if name == "logits" else rows._replace(**{name: value.to(device)})
    with pytest.raises(KernelArgumentError, match=said):
        sample(placed(logits, device), rows)
