"""Prompts with the texts that should follow them: their tokens, and the loss of the targets alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.text import Codec, Untrusted


class Target(NamedTuple):
    """tokens: prompt, then target. target_from: the target's first. active_from: of an activated adapter, the first
    token that it applies to; None for any other."""

    tokens: list[int]
    target_from: int
    active_from: int | None = None


def target(codec: Codec, prompt: Sequence[int], text: str, invocation: Sequence[int] = ()) -> Target:
    """The text behind a prompt, ended as a model ends its answer; the invocation stands between, as the engine puts
    it there."""
    end = codec.tokenizer.eos_token_id
    tokens = codec.encode((Untrusted(text),), add_special_tokens=False)
    first = len(prompt) + len(invocation)
    ended = [] if end is None else [end]
    return Target([*prompt, *invocation, *tokens, *ended], first, len(prompt) if invocation else None)


def target_loss(
    states: Tensor, head: nn.Module, targets: Sequence[Target], states_from: Sequence[int] | None = None
) -> Tensor:
    """Mean cross entropy of the target tokens alone, each told from the states before it. states [rows, tokens,
    hidden], normed, padded on the right; head: hidden states to logits. states_from: the token that a row's first
    state is of, 0 if not given. No other row of logits is computed."""
    rows = [row for row, item in enumerate(targets) for _ in range(item.target_from, len(item.tokens))]
    firsts = states_from or [0] * len(targets)
    places = [
        place - 1 - first
        for item, first in zip(targets, firsts, strict=True)
        for place in range(item.target_from, len(item.tokens))
    ]
    wanted = torch.tensor([token for item in targets for token in item.tokens[item.target_from :]])
    logits = head(states[rows, places])  # [targets, vocabulary]
    return F.cross_entropy(logits.float(), wanted.to(logits.device))
