"""Scores of an answer's beginnings: the threshold for a text still being written, and what it finds in time.

A beginning never is the whole answer; `features.py` says where beginnings end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .fit import threshold_at


def prefix_threshold(logits: Tensor, owners: Tensor, harmless: Tensor, share: float) -> float:
    """The logit with at most `share` of the harmless answers below it at any of their beginnings.

    logits, owners: [beginnings], the answer of each by number. harmless: [answers] bool; one that is too short to
    have a beginning counts, too, and is never below.
    """
    lowest = torch.full((len(harmless),), torch.inf).scatter_reduce(0, owners, logits, "amin")
    return threshold_at(lowest[harmless], share)


def found_after(logits: Tensor, owners: Tensor, lengths: Tensor, answers: int, threshold: float) -> Tensor:
    """For each answer the tokens of its first beginning below the threshold [answers], infinity where none is.

    lengths: [beginnings], their tokens.
    """
    below = logits < threshold
    found = torch.full((answers,), torch.inf)
    return found.scatter_reduce(0, owners[below], lengths[below].to(found.dtype), "amin")
