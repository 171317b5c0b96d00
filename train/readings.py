"""Answers as the tokens that a detector reads, as the engine gives them to it, and what is pooled of their states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.chat import Chat
from ..engine.guards.prompts import detector_text
from ..engine.prepare import first_pooled
from ..engine.text import Codec, Untrusted
from .card import Pooling
from .features import FIRST_BEGINNING, NEXT_BEGINNING


class Reading(NamedTuple):
    """tokens: all of them. pool_from: the first of the answer. active_from: of an activated adapter, the first token
    that it applies to; None for any other."""

    tokens: list[int]
    pool_from: int = 0
    active_from: int | None = None


def text_reading(
    codec: Codec, template: str, question: str, answer: str, most: int, invocation: Sequence[int] = ()
) -> Reading | None:
    """The answer in the text of a detector's template, its end cut where there are more than `most` tokens; None
    where nothing of it is left."""
    text = detector_text(template, question, answer)
    tokens = codec.encode(text.segments, add_special_tokens=True)
    first = first_pooled(codec, text.segments, text.pool_from, tokens)
    return _invoked(tokens[: most - len(invocation)], first, invocation)


def conversation_reading(
    codec: Codec, question: str, answer: str, most: int, invocation: Sequence[int]
) -> Reading | None:
    """The answer where the model gave it, behind its chat prompt, ended as a model ends it unless it is cut; None
    where the prompt leaves it no room."""
    prompt = codec.encode_chat(Chat.single(question))
    end = codec.tokenizer.eos_token_id
    tokens = [*prompt, *codec.encode((Untrusted(answer),), add_special_tokens=False), *([] if end is None else [end])]
    return _invoked(tokens[: most - len(invocation)], len(prompt), invocation)


def _invoked(tokens: list[int], first: int, invocation: Sequence[int]) -> Reading | None:
    if len(tokens) <= first:
        return None
    return Reading([*tokens, *invocation], first, len(tokens) if invocation else None)


def beginnings_of(reading: Reading) -> list[int]:
    """How many of the answer's tokens each of its beginnings has; the whole answer is none of them. An activated
    adapter reads no beginnings."""
    if reading.active_from is not None:
        return []
    return list(range(FIRST_BEGINNING, len(reading.tokens) - reading.pool_from, NEXT_BEGINNING))


def pool(states: Tensor, readings: Sequence[Reading], pooling: Pooling, beginnings: bool) -> tuple[Tensor, Tensor]:
    """states [rows, tokens, hidden] -> pooled [rows, 1 + marks, hidden] in fp32, the whole answer first, and which of
    the marks a row has [rows, marks] bool."""
    ends = [beginnings_of(reading) if beginnings else [] for reading in readings]
    marks = max(map(len, ends))
    weights = torch.zeros(len(readings), 1 + marks, states.shape[1])
    there = torch.zeros(len(readings), marks, dtype=torch.bool)
    for row, (reading, some) in enumerate(zip(readings, ends, strict=True)):
        there[row, : len(some)] = True
        for place, count in enumerate([len(reading.tokens) - reading.pool_from, *some]):
            stop = reading.pool_from + count
            if pooling == "mean":
                weights[row, place, reading.pool_from : stop] = 1 / count
            else:
                weights[row, place, stop - 1] = 1
    return weights.to(states.device) @ states.float(), there.to(states.device)
