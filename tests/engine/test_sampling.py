"""The sampler against transformers' logits processors, against its own distribution, and against bad numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stockade.engine.errors import InvalidSampling
from stockade.engine.sampling import (
    MAX_LOGPROBS,
    SamplerRow,
    SamplingParams,
    greedy,
    processed_probs,
    sample,
    uniform,
)

VOCAB = 50


def rows_of(params: SamplingParams, count: int, seen: tuple[int, ...] = (), seed: int = 3) -> list[SamplerRow]:
    return [SamplerRow(params, seen, seed, 0, position) for position in range(count)]


def reference(logits: torch.Tensor, params: SamplingParams, seen: list[int]) -> torch.Tensor:
    """What `generate` would draw from: its processors in its order."""
    chain = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if not params.greedy:
        if params.temperature != 1.0:
            chain.append(TemperatureLogitsWarper(float(params.temperature)))
        if params.top_k:
            chain.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1.0:
            chain.append(TopPLogitsWarper(params.top_p))
        if params.min_p:
            chain.append(MinPLogitsWarper(params.min_p))
    scores = chain(torch.tensor([seen], dtype=torch.long), logits.unsqueeze(0))[0]
    if params.greedy:
        return torch.nn.functional.one_hot(scores.argmax(), VOCAB).float()
    return scores.softmax(-1)


def chi_square(observed: list[float], expected: list[float]) -> float:
    """Probability of counts at least this far from what is expected (Pearson's test)."""
    statistic = sum((seen - due) ** 2 / due for seen, due in zip(observed, expected, strict=True))
    half = torch.tensor([(len(observed) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0]),
    temperature=st.sampled_from([0.0, 1e-3, 0.3, 1.0, 1.7, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 7, VOCAB - 1, VOCAB, VOCAB + 1, 10**6]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-6, 0.05, 0.5, 1.0]),
    penalty=st.sampled_from([0.5, 1.0, 1.3, 100.0]),
    seen=st.lists(st.integers(0, VOCAB - 1), max_size=20),
    rounded=st.booleans(),
)
def test_probabilities_are_those_of_transformers(
    seed: int,
    spread: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
    seen: list[int],
    rounded: bool,
) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * spread
    if rounded:  # ties
        logits = logits.round()
    params = SamplingParams(temperature, top_p, top_k, min_p, penalty)
    want = reference(logits, params, seen)
    before = logits.clone()
    probs = processed_probs(logits, params, seen)
    if top_p < 1.0 and not params.greedy:
        below = reference(logits, replace(params, top_p=1.0, min_p=0.0), seen).sort().values.cumsum(-1)
        assume((below + top_p - 1).abs().min() > 1e-6)  # a sum that rounding decides
        torch.testing.assert_close(probs.sort().values, want.sort().values)  # a sort says which of equals go
    else:
        assert torch.equal(probs, want)
    assert torch.equal(logits, before)


def test_banned_tokens_stay_banned() -> None:
    logits = torch.full((VOCAB,), float("-inf"))
    logits[[4, 9]] = torch.tensor([1.0, 0.0])
    params = SamplingParams(temperature=1.0, top_k=5, top_p=0.99, min_p=0.01, repetition_penalty=1.5)
    drawn = {item.token for item in sample(logits.repeat(200, 1), rows_of(params, 200, (4, 7))) if item}
    assert drawn == {4, 9}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=9),
        SamplingParams(temperature=1.5, top_p=0.8, repetition_penalty=1.4),
        SamplingParams(temperature=1.0, min_p=0.2),
    ],
    ids=["plain", "top-k", "top-p", "min-p"],
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 1.5
    seen = (1, 2, 3)
    count = 4000
    probs = processed_probs(logits, params, seen).double()
    drawn = torch.tensor(
        [item.token for item in sample(logits.repeat(count, 1), rows_of(params, count, seen)) if item]
    )
    counts = drawn.bincount(minlength=VOCAB).double()
    assert counts[probs == 0].sum() == 0
    # rare tokens count together: the test wants at least five expected in each class
    common = probs * count >= 5
    observed, expected = counts[common].tolist(), (probs[common] * count).tolist()
    if float(probs[~common].sum()) * count > 1:
        observed.append(float(counts[~common].sum()))
        expected.append(float(probs[~common].sum()) * count)
    assert chi_square(observed, expected) > 1e-3


def test_uniform_numbers_are_even_and_independent_of_each_other() -> None:
    for numbers in (
        [uniform(seed, 0, 0) for seed in range(3000)],
        [uniform(5, number, 0) for number in range(3000)],
        [uniform(5, 1, position) for position in range(3000)],
    ):
        assert min(numbers) >= 0.0 and max(numbers) < 1.0
        spread = torch.tensor(numbers).histc(20, 0.0, 1.0).tolist()
        assert chi_square(spread, [150.0] * 20) > 1e-3
        neighbors = torch.tensor([numbers[1:], numbers[:-1]])
        assert abs(float(neighbors.corrcoef()[0, 1])) < 0.06
    assert len({uniform(s, p, n) for s in range(10) for p in range(10) for n in range(10)}) == 1000
    assert uniform(2**64 - 1, 0, 0) != uniform(0, 0, 0)


def test_a_row_is_drawn_the_same_in_any_batch() -> None:
    logits = torch.randn(6, 384, generator=torch.Generator().manual_seed(2)) * 3
    params = [
        SamplingParams(temperature=1.0),
        SamplingParams(),
        SamplingParams(temperature=0.5, top_p=0.9, logprobs=2),
        SamplingParams(repetition_penalty=2.0),
        SamplingParams(temperature=1.0, top_k=3),
        SamplingParams(logprobs=0),
    ]
    rows = [SamplerRow(item, [1, 2], 11, index, 4) for index, item in enumerate(params)]
    together = sample(logits, rows)
    for index in range(6):
        alone = sample(logits[index : index + 1], [rows[index]])[0]
        assert alone is not None and together[index] is not None
        assert alone.token == together[index].token  # type: ignore[union-attr]
    backwards = sample(logits.flip(0), rows[::-1])[::-1]
    assert [item and item.token for item in backwards] == [item and item.token for item in together]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 127, 128, 384, 1000, 1280])
def test_greedy_is_argmax_and_takes_the_first_of_equals(vocab: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab)
    for spread in (0.0, 0.6, 40.0):
        logits = (torch.randn(7, vocab, generator=generator) * spread).round().to(dtype)
        first = [row.index(max(row)) for row in logits.float().tolist()]
        assert greedy(logits).tolist() == first
    assert greedy(torch.empty(0, vocab, dtype=dtype)).tolist() == []


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(logprobs=3)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -math.inf])
@pytest.mark.parametrize("vocab", [256, 300])
def test_rows_that_are_not_numbers_give_no_token(params: SamplingParams, bad: float, vocab: int) -> None:
    logits = torch.zeros(3, vocab)
    logits[0, 5] = 1.0
    logits[1, 17 if bad != -math.inf else slice(None)] = bad
    logits[2, 9] = 50.0
    first, second, third = sample(logits, rows_of(params, 3))
    assert second is None
    assert first is not None and third is not None and third.token == 9


def test_a_penalty_that_overflows_gives_no_token() -> None:
    params = SamplingParams(temperature=1e-6, repetition_penalty=1e-30)
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0)) * 1e9
    assert sample(logits, rows_of(params, 1, tuple(range(VOCAB)))) == [None]


def test_the_smallest_temperature_is_nearly_greedy() -> None:
    logits = torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(0))
    drawn = sample(logits, rows_of(SamplingParams(temperature=1e-6), 20))
    assert [item and item.token for item in drawn] == logits.argmax(-1).tolist()


def test_logprobs_are_those_of_the_model() -> None:
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(4)).bfloat16()
    params = SamplingParams(temperature=2.0, top_k=2, repetition_penalty=1.5, logprobs=4)
    want = logits.float().log_softmax(-1)
    for row, item in enumerate(sample(logits, rows_of(params, 2, (1, 2)))):
        assert item is not None and item.logprob == float(want[row, item.token])
        assert [token for token, _ in item.top] == want[row].topk(4).indices.tolist()
        assert [value for _, value in item.top] == want[row].topk(4).values.tolist()
    (only,) = sample(logits[:1], rows_of(SamplingParams(logprobs=0), 1))
    assert only is not None and only.logprob is not None and only.top == ()


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ({"temperature": -0.1}, "temperature must be between 0.0 and 100.0"),
        ({"temperature": 1e-9}, "temperature must be 0 .* or at least 1e-06"),
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"temperature": math.inf}, "temperature must be a finite number"),
        ({"temperature": "1"}, "temperature must be a finite number"),
        ({"temperature": True}, "temperature must be a finite number"),
        ({"top_p": 0.0}, "top_p must be greater than 0"),
        ({"top_p": 1.1}, "top_p must be between 0.0 and 1.0"),
        ({"min_p": -1}, "min_p must be between"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be greater than 0"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": True}, "max_tokens must be a whole number"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"seed": -1}, "seed must be at least 0 and at most"),
        ({"seed": 2**64}, "seed must be at least 0 and at most"),
        ({"logprobs": MAX_LOGPROBS + 1}, f"logprobs must be at least 0 and at most {MAX_LOGPROBS}"),
        ({"stop": ("",)}, "stop must hold non-empty strings"),
        ({"stop": (1,)}, "stop must hold non-empty strings"),
        ({"stop": 5}, "stop must be a string or a list of strings"),
        ({"stop": 0}, "stop must be a string or a list of strings"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids must be at least 0"),
        ({"stop_token_ids": ("a",)}, "stop_token_ids must be a whole number"),
        ({"stop_token_ids": 0}, "stop_token_ids must be a list of token ids"),
        ({"stop_token_ids": "12"}, "stop_token_ids must be a list of token ids"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false"),
    ],
)
def test_impossible_values_are_refused(given: dict[str, Any], allowed: str) -> None:
    with pytest.raises(InvalidSampling, match=allowed):
        SamplingParams(**given)


def test_sequences_are_taken_as_tuples() -> None:
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[7], temperature=1)  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (7,))
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]
    assert SamplingParams(stop=None, stop_token_ids=None).stop == ()  # type: ignore[arg-type]
    assert hash(params) == hash(SamplingParams(stop=("a", "b"), stop_token_ids=(7,), temperature=1))
