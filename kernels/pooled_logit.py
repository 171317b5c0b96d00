"""The detector's head: pool a sequence's hidden states, norm the pooled row, one dot product a class, sigmoid."""

from __future__ import annotations

import torch
from torch import Tensor

from .rms_norm import rms_norm_reference


def pool_add(hidden: Tensor, slots: Tensor, sums: Tensor) -> None:
    """Add rows of hidden [tokens, width] to the running sums [slots + 1, width] (fp32), in place.

    slots: [tokens] int64, -1 where a token is not pooled; such rows go to the last, discarded slot.
    """
    sums.index_add_(0, slots.where(slots >= 0, sums.shape[0] - 1), hidden.float())


def pooled_logit(
    pooled: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(logit, score) of pooled rows [n, width]: fp32 [n] each, score = sigmoid(logit) = P(harmless).

    weight: [width]; bias: [1] or None. A norm, where the head has one, is applied to the pooled row only.
    """
    if norm_weight is not None:
        pooled = rms_norm_reference(pooled, norm_weight, eps)
    logit = (pooled.float() * weight.float()).sum(-1)
    if bias is not None:
        logit = logit + bias.float()
    return logit, torch.sigmoid(logit)


def pooled_classes(
    pooled: Tensor, weight: Tensor, harm: tuple[int, ...], independent: bool, norm_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(logit, score) of pooled rows [n, width] by a weight [classes, width], of which `harm` are the harmful ones.

    fp32 [n] each, score = sigmoid(logit) = 1 - P(harm). P(harm) is the sum of the harmful classes' softmax over all;
    independent: the largest of their sigmoids, as each class of a multi-label classifier is a question of its own.
    """
    if norm_weight is not None:
        pooled = rms_norm_reference(pooled, norm_weight, eps)
    logits = (pooled.float() @ weight.float().t()).unbind(-1)  # of each class [n]; a list as an index would be copied
    harmful = torch.stack([logits[label] for label in harm], -1)
    if independent:
        logit = -harmful.amax(-1)
    else:
        harmless = torch.stack([logit for label, logit in enumerate(logits) if label not in harm], -1)
        logit = harmless.logsumexp(-1) - harmful.logsumexp(-1)
    return logit, torch.sigmoid(logit)


def pooled_head_reference(
    hidden: Tensor,
    first_row: Tensor,
    count: Tensor,
    pool_start: Tensor,
    slot: Tensor,
    sums: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """What `kernels.triton.pooled_head` does, whose contract this shares, a sequence at a time.

    All in the dtype of `sums`, so that fp64 sums make it exact.
    """
    stops, starts, known, slots = (part.tolist() for part in (first_row, pool_start, count, slot))
    scores = []
    for index, start in enumerate(starts):
        first, stop = stops[index : index + 2]
        pooled = torch.full_like(sums[0], float("nan"))
        if first < stop and start == -1:
            pooled = hidden[stop - 1].to(sums.dtype)
        elif first < stop and known[index] > 0:
            if start < stop:
                before = sums[slots[index]] if known[index] > stop - start else 0
                sums[slots[index]] = before + hidden[start:stop].to(sums.dtype).sum(0)
            pooled = sums[slots[index]] / known[index]
        if norm is not None:
            pooled = pooled * torch.rsqrt(pooled.pow(2).mean() + eps) * norm.to(sums.dtype)
        logit = (pooled * weight.to(sums.dtype)).sum()
        scores.append(torch.sigmoid(logit if bias is None else logit + bias[0].to(sums.dtype)))
    score = torch.stack(scores)
    return score, score.isfinite() & (score >= threshold)
