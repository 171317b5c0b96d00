"""Sampling parameters, and the sampler that turns rows of logits into tokens.

Random numbers are counter-based: a draw depends on (seed, pass, output position) and on nothing else, so the
same request gives the same tokens in any batch, at any step, preempted or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.sampling import SamplingRows
from .errors import InvalidSampling

MAX_LOGPROBS = 20
MAX_DRAFT_TOKENS = 64
MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    temperature: 0 is greedy; logits are divided by it otherwise.
    top_p, top_k (0 = all), min_p: keep the nucleus, the k likeliest, those with p >= min_p * p_max.
    repetition_penalty: logits of tokens seen in prompt or output are divided (if positive) or multiplied by it.
    max_tokens: generated tokens; None = up to the end of the context. max_length counts the prompt too.
    stop: strings that end the text and are not part of it. stop_token_ids: the same for ids.
    ignore_eos: the model's end tokens do not stop the text (benchmarks).
    draft_tokens: at most so many tokens a step are guessed from what was said before (prompt lookup) and verified;
    the output stays the same, token for token, and guessing pauses where it does not pay. 0 = none.
    seed: None = drawn once per request. logprobs: log-probabilities of the n likeliest tokens (before
    penalties and temperature) beside the chosen one's, up to 20.

    Raises `InvalidSampling` for values outside their range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = 256
    max_length: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    draft_tokens: int = 0
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        for name, value, items in (
            ("stop", stop, "a string or a list of strings"),
            ("stop_token_ids", self.stop_token_ids, "a list of token ids"),
        ):
            if value is not None and not isinstance(value, list | tuple | set | frozenset):
                raise InvalidSampling(f"{name} must be {items}, not {value!r}")
            object.__setattr__(self, name, tuple(value or ()))
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.0, 100.0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
                raise InvalidSampling(f"{name} must be a finite number, not {value!r}")
            if not low <= value <= high:
                raise InvalidSampling(f"{name} must be between {low} and {high}, not {value}")
        if 0.0 < self.temperature < MIN_TEMPERATURE:
            raise InvalidSampling(
                f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}, not {self.temperature}: "
                "logits divided by less are no longer numbers"
            )
        if self.top_p == 0.0:
            raise InvalidSampling("top_p must be greater than 0: 0 keeps no token at all")
        if self.repetition_penalty == 0.0:
            raise InvalidSampling("repetition_penalty must be greater than 0; 1 means no penalty")
        _check_int("top_k", self.top_k, 0)
        _check_int("draft_tokens", self.draft_tokens, 0, MAX_DRAFT_TOKENS)
        _check_int("max_tokens", self.max_tokens, 1, optional=True)
        _check_int("max_length", self.max_length, 1, optional=True)
        _check_int("seed", self.seed, 0, 2**64 - 1, optional=True)
        _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise InvalidSampling("stop must hold non-empty strings")
        for token in self.stop_token_ids:
            _check_int("stop_token_ids", token, 0)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidSampling(f"ignore_eos must be true or false, not {self.ignore_eos!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


class SamplerRow(NamedTuple):
    """What the sampler must know of one row: parameters, what was seen, where the random numbers are."""

    params: SamplingParams
    seen: Sequence[int]  # prompt and output tokens; read only when there is a repetition penalty
    seed: int
    pass_index: int
    position: int  # of the token to draw, counted from the first generated one


class Sampled(NamedTuple):
    token: int
    logprob: float | None = None  # of `token`, when asked for
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, rows: Sequence[SamplerRow]) -> list[Sampled | None]:
    """Choose one token for each row of `logits` [rows, vocab], any float dtype; None where they are not numbers.

    Rows without random choice or penalty share one argmax. The others follow the order of `transformers`:
    repetition penalty, temperature, top-k, top-p, min-p, then one draw by inverse distribution function.
    """
    best = greedy(logits)
    # the maximum of a row with a NaN is NaN
    finite = logits.gather(1, best.unsqueeze(1)).squeeze(1).isfinite().tolist()
    plain = best.tolist()
    out: list[Sampled | None] = []
    for index, row in enumerate(rows):
        params = row.params
        if not finite[index]:
            out.append(None)
            continue
        token: int | None = plain[index]
        if not params.greedy or params.repetition_penalty != 1.0:
            token = _choose(logits[index].float(), row)
        if token is None:
            out.append(None)
            continue
        if params.logprobs is None:
            out.append(Sampled(token))
            continue
        logprobs = logits[index].float().log_softmax(-1)
        top = logprobs.topk(params.logprobs)
        pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        out.append(Sampled(token, float(logprobs[token]), pairs))
    return out


def sample_ids(logits: Tensor, rows: SamplingRows) -> Tensor:
    """The same without penalties and log-probabilities, from parameters that are tensors: ids [rows] int32, -1 where
    there are no numbers. The reference of the kernel that does so without asking the host."""
    columns = (column.tolist() for column in rows)
    asked = [
        SamplerRow(SamplingParams(heat, top_p, top_k, min_p), (), seed & _MASK, draw, position)
        for heat, top_k, top_p, min_p, seed, draw, position in zip(*columns, strict=True)
    ]
    found = [-1 if item is None else item.token for item in sample(logits, asked)]
    return torch.tensor(found, dtype=torch.int32, device=logits.device)


def greedy(logits: Tensor) -> Tensor:
    """argmax over the last axis of [rows, vocab], the first of equals.

    In two levels: the maximum of a block vectorizes, `argmax` does not (16 rows of 49,152 in bf16 on two
    cores: 2.4 ms in one call, 0.5 ms like this).
    """
    rows, vocab = logits.shape
    block = 128
    if logits.device.type != "cpu" or vocab % block or not rows:
        return logits.argmax(-1)
    blocks = logits.view(rows, vocab // block, block)
    best = blocks.amax(-1).argmax(-1)
    inside = blocks[torch.arange(rows), best].argmax(-1)
    return best * block + inside


def processed_probs(logits: Tensor, params: SamplingParams, seen: Sequence[int]) -> Tensor:
    """The distribution that is drawn from: fp32 [vocab] from fp32 logits [vocab]."""
    if params.repetition_penalty != 1.0 and len(seen):
        ids = torch.tensor(sorted(set(seen)), device=logits.device)
        ids = ids[ids < logits.shape[-1]]
        picked = logits[ids]
        penalty = params.repetition_penalty
        logits = logits.index_put((ids,), torch.where(picked < 0, picked * penalty, picked / penalty))
    if params.greedy:
        probs = torch.zeros_like(logits)
        probs[int(logits.argmax())] = 1.0
        return probs
    logits = logits / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        kth = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if params.top_p < 1.0:
        logits = _nucleus(logits, 1.0 - params.top_p)
    if params.min_p > 0.0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < params.min_p * probs.max(), float("-inf"))
    return logits.softmax(-1)


def _nucleus(logits: Tensor, tail: float) -> Tensor:
    """Drop the least likely tokens while all that are dropped weigh at most `tail` together.

    Tokens of at most tail / (2 vocab) are among them, whatever the others are: only the rest needs sorting (49,152
    tokens take 5 ms to sort, what is left of a language model's a tenth of that).
    """
    probs = logits.softmax(-1)
    likely = probs > tail / (2 * len(probs))
    order = logits[likely].sort(stable=True).indices  # of equal ones the first go first
    drop = probs.masked_fill(likely, 0.0).sum() + probs[likely][order].cumsum(-1) <= tail
    drop[-1:] = False
    kept = likely.nonzero().squeeze(1)[order[~drop]]
    return torch.full_like(logits, float("-inf")).index_copy(0, kept, logits[kept])


def uniform(seed: int, pass_index: int, position: int) -> float:
    """A number in [0, 1) that depends on its three arguments only (splitmix64 over the mixed counters)."""
    state = seed & _MASK
    for value in (pass_index, position):
        state = _splitmix64((state ^ _splitmix64((value + 1) & _MASK)) & _MASK)
    return (state >> 11) * (1.0 / (1 << 53))


def _choose(logits: Tensor, row: SamplerRow) -> int | None:
    """The token drawn; None where the processed logits overflow, so that there is no distribution."""
    probs = processed_probs(logits, row.params, row.seen)
    if row.params.greedy:
        return int(probs.argmax())
    cumulative = probs.double().cumsum(-1)
    total = float(cumulative[-1])
    if not isfinite(total):
        return None
    draw = uniform(row.seed, row.pass_index, row.position) * total
    index = int(torch.searchsorted(cumulative, draw, right=True))
    # a draw that rounds up to the total falls past the last token with any probability
    return min(index, int(probs.nonzero()[-1]))


_MASK = (1 << 64) - 1


def _splitmix64(value: int) -> int:
    """Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _check_int(name: str, value: int | None, low: int, high: int | None = None, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidSampling(f"{name} must be a whole number, not {value!r}")
    if value < low or (high is not None and value > high):
        raise InvalidSampling(f"{name} must be at least {low}{f' and at most {high}' if high else ''}, not {value}")
