"""Scales of keys and values in pages of fp8, one a layer and head, measured when a model is loaded.

Not read from checkpoints: those that hold scales have one a tensor, for whatever range their writer's fp8 had.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels.quantized import FP8
from ..errors import CannotQuantize
from .dense import dense

if TYPE_CHECKING:
    from .decoder import Decoder

# The spacing of e4m3 grows with its numbers, so room above what was seen costs no precision but of the smallest.
HEADROOM = 2.0
SMALLEST = 1e-30  # that a head is scaled to: one over the scale has to be a number of fp32
# Prose, numbers, code, other scripts, a table: what makes keys and values large differs from head to head.
TEXT = """The old lighthouse keeper counted 1,024 steps; at 3:45 p.m. on 12 March 1987 he wrote: "Wind NW, 7 knots."
def mean(values): return sum(values) / max(1, len(values))  # never divides by zero
Les enfants jouent dans le jardin. Der Zug nach München fährt um acht Uhr ab. ¿Qué hora es? 你好世界 Привет!
| item | price | | tea | $2.50 | | bread | €3.10 |
Question: why is the sky blue? Answer: short waves are scattered more than long ones, in proportion to 1/λ^4."""


@torch.inference_mode()
def measured(decoder: Decoder, ids: list[int]) -> Tensor:
    """[layers, 2 * kv_heads] fp32, keys' first: what a stored number is multiplied by, from one pass over a text.

    Raises `CannotQuantize` where that computes numbers that are not finite.
    """
    largest = torch.zeros(decoder.depth, 2 * decoder.config.kv_heads, device=decoder.device)

    def note(index: int, kv: Tensor) -> None:
        largest[index] = kv.float().abs().amax((0, 2))

    dense(decoder, ids, note)
    if not bool(largest.isfinite().all()):
        raise CannotQuantize(
            "kv_dtype='fp8': keys and values of plain text are not all finite, so they have no scales"
        )
    return torch.where(largest > SMALLEST, largest, 1.0) * (HEADROOM / torch.finfo(FP8).max)
