"""One text through a decoder without pages: slow and plain, for what is measured rather than served."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels.paged_attention import attention_reference

if TYPE_CHECKING:
    from .decoder import Decoder


@torch.inference_mode()
def dense(decoder: Decoder, ids: Sequence[int], stored: Callable[[int, Tensor], None] | None = None) -> Tensor:
    """Hidden states [tokens, hidden] after the last layer, un-normed.

    stored: told of every layer, by its number, what pages would hold, [tokens, 2 * kv_heads, head_dim], keys first.
    """
    config = decoder.config

    def attend(index: int, qkv: Tensor) -> Tensor:
        q, kv = qkv.split((config.heads, 2 * config.kv_heads), 1)
        if stored is not None:
            stored(index, kv)
        keys, values = kv.transpose(0, 1).chunk(2)
        scale, window, cap = config.attention_scale, config.windows[index], config.attention_cap
        return attention_reference(q, keys, values, scale, window, cap).to(q.dtype)

    x = decoder.embed(torch.tensor(ids, device=decoder.device))
    angles = decoder.angles(torch.arange(len(ids), device=decoder.device))
    for index in range(decoder.depth):
        x = decoder.block(index, x, angles, attend)
    return x
