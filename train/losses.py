"""What training minimizes, as functions of logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def harm_loss(logits: Tensor, harmless: Tensor) -> Tensor:
    """Binary cross entropy of logits [n] of P(harmless) with labels [n] (1 = harmless), as MLLM-Protector has it."""
    return F.binary_cross_entropy_with_logits(logits.float(), harmless.float())


def pairwise_loss(preferred: Tensor, other: Tensor, harmless: Tensor) -> Tensor:
    """The released script's loss of pairs: 2 (BCE(j) + BCE(k)) - log sigmoid(r_j - r_k), BCE and the last term each a
    mean over pairs.

    preferred, other: logits r_j, r_k [pairs]; harmless: their own labels [pairs, 2].
    """
    entropies = harm_loss(preferred, harmless[:, 0]) + harm_loss(other, harmless[:, 1])
    return 2 * entropies - F.logsigmoid(preferred.float() - other.float()).mean()


def streaming_loss(whole: Tensor, beginnings: Tensor, harmless: Tensor) -> Tensor:
    """Binary cross entropy of the lowest logit that an answer ever has: what a guard acts on that reads along, since
    an answer that was once found harmful stays so.

    whole: [n]; beginnings: [n, marks], infinity where an answer has none; harmless: [n].
    """
    return harm_loss(torch.minimum(whole, beginnings.amin(1)), harmless)
