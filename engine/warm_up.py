"""Runs a lane's layers over rows of nobody before anything is asked, so that what chunks need is compiled by then: a
first question would wait for seconds, and a guard's time run out. Decoding steps are warmed as they are recorded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from ..kernels.paged_attention import LayerKV
from ..kernels.ragged import RaggedTables
from .batch import sent
from .errors import DoesNotFit
from .models.fused import FusedGroup, FusedPart, RowAdapters

if TYPE_CHECKING:
    from .kv_pages import KVLayout
    from .models.heads import Head
    from .models.model import Backbone

LONG = 129  # rows: more than of the largest tile of a few, in attention and in adapters


def warm_up(backbone: Backbone, layout: KVLayout, caches: list[LayerKV], context: int, heads: Iterable[Head]) -> None:
    """Launch every variant of the fused layers' kernels once, on the current stream. Nothing is written to the pool.

    layout, caches: of the deepest model on this backbone; context: the longest. Raises `DoesNotFit` where the device
    has no memory left for it.
    """
    try:
        _launch_all(backbone, layout, caches, context, heads)
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
            f"{backbone.decoder.device} has no memory left to compute {LONG} tokens; kv_bytes has to be smaller"
        ) from error


def _launch_all(
    backbone: Backbone, layout: KVLayout, caches: list[LayerKV], context: int, heads: Iterable[Head]
) -> None:
    decoder, device = backbone.decoder, backbone.decoder.device
    fused, config = decoder.fused, decoder.config
    assert fused is not None
    pages = sent([[0] * layout.pages(context)], torch.int32, device)
    # one of each tile: of at most 16 rows times the heads of a group, of 64, of more
    for rows in sorted({2, max(2, 64 * config.kv_heads // config.heads), LONG}):
        x = torch.zeros(rows, config.hidden_size, dtype=decoder.dtype, device=device)
        angles = decoder.angles(torch.zeros(rows, dtype=torch.long, device=device))
        first_row, length = (sent(numbers, torch.int32, device) for numbers in ([0, rows], [min(rows, context)]))
        nowhere = torch.full((rows,), -1, device=device)
        stacks = fused.stacks([item.updates for item in backbone.adapters])
        adapters = RowAdapters(torch.zeros(rows, dtype=torch.long, device=device), stacks) if stacks else None
        for longest in (1, context):  # contexts in one part, and in many
            tables = RaggedTables(first_row, length, pages, layout.tokens_per_page, rows, longest)
            group = FusedGroup(0, rows, caches, nowhere, [FusedPart(0, rows, tables)])
            fused.run(0, layout.depth, x, angles, [group], adapters)
        sums, last = torch.zeros(2, config.hidden_size, device=device), torch.zeros_like(length)
        for head in heads:
            if head.labels is None:
                fused.operations.pooled_head(
                    *(x, first_row, length, last, last, sums, head.weight, head.bias, head.norm_weight),
                    *(head.norm_eps, head.spec.threshold),
                )
