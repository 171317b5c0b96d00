"""A step's work as tensors: a ragged batch, deepest sequences first, so that shallow ones leave on the way up."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from ..kernels.lora import ActiveAdapters
from ..kernels.native import RaggedGroup, RaggedSequence
from ..kernels.paged_attention import DecodeGroup, LayerKV, SequenceSpan, Span, causal_mask
from ..kernels.ragged import RaggedTables
from .kv_pages import PagePool
from .models.fused import FusedGroup, FusedPart
from .models.model import Backbone
from .scheduler import Work
from .sequence import Sequence


@dataclass(frozen=True)
class Group:
    """The rows [start, stop) of a batch that run to one depth, in one layout.

    write_rows [stop - start]: where in the pool their keys and values go. Who attends to what is said in three forms:
    `spans` for the plain path, `ragged` for the native kernels, `fused` for fused layers.
    """

    depth: int
    start: int
    stop: int
    works: list[Work]
    layers: list[LayerKV]
    write_rows: Tensor
    _spans: dict[int | None, list[Span]] = field(default_factory=dict)

    def spans(self, window: int | None) -> list[Span]:
        """The spans of layers with this window (None = full attention)."""
        if window not in self._spans:
            self._spans[window] = _spans(self.works, window, self.write_rows.device)
        return self._spans[window]

    def ragged(self) -> RaggedGroup:
        sequences = []
        row = self.start
        for work in self.works:
            runs = work.sequence.table.runs(0, work.start + work.rows)
            sequences.append(RaggedSequence(row, work.rows, work.start, runs))
            row += work.rows
        return RaggedGroup(self.layers, sequences)

    @cached_property
    def fused(self) -> FusedGroup:
        decoding = sum(work.rows == 1 for work in self.works)  # which stand first
        device = self.write_rows.device
        parts, start = [], 0
        for works in (self.works[:decoding], self.works[decoding:]):
            if works:
                stop = start + sum(work.rows for work in works)
                parts.append(FusedPart(start, stop, _tables(works, device), _sees(works, device)))
                start = stop
        return FusedGroup(self.start, self.stop, self.layers, self.write_rows, parts)


@dataclass(frozen=True)
class Batch:
    """tokens: [rows] int64. positions: the rows' rotary positions [rows] int64, or [3, rows] (time, height, width)
    where a row is an image's with a grid. groups: by falling depth; they cover all rows in order.

    logit_rows: [n] rows whose next-token logits are wanted, all in the deepest group. pooled: by layer, what its
    output is added to: slots [rows] of the running sums, -1 for none. adapters: which rows have which; None when no
    row has one.
    """

    tokens: Tensor
    positions: Tensor
    groups: list[Group]
    logit_rows: Tensor
    pooled: dict[int, Tensor]
    adapters: ActiveAdapters | None


def in_batch_order(works: list[Work]) -> list[Work]:
    """By falling depth; in each depth the decoding ones first, those of one size beside each other by place."""

    def key(work: Work) -> tuple[int, int, bool, int, int]:
        table = work.sequence.table
        return -work.sequence.depth, -table.layout.depth, work.rows > 1, len(table.pages), table.pages[0].row

    return sorted(works, key=key)


def build_batch(works: list[Work], pool: PagePool, device: torch.device) -> Batch:
    """works: as ordered by `in_batch_order`."""
    tokens: list[int] = []
    positions: list[int] = []
    grids: list[tuple[int, Tensor]] = []  # (first row, positions [3, n])
    adapters: list[int] = []
    logit_rows: list[int] = []
    pooled: dict[int, list[tuple[int, int, int]]] = {}  # layer -> (first row, row after the last, slot)
    groups = []
    for (depth, layout), some in groupby(works, lambda work: (work.sequence.depth, work.sequence.table.layout)):
        members = list(some)
        start = len(tokens)
        write_rows: list[int] = []
        for work in members:
            sequence, first, last = work.sequence, work.start, work.start + work.rows
            begin = len(tokens)
            tokens += work.tokens
            positions += sequence.positions(first, last)
            grids += sequence.grids(first, last, begin)
            for row, length in sequence.table.runs(first, last):
                write_rows += range(row, row + length)
            if sequence.pool_slot is not None and sequence.pool_from is not None:
                kept = max(first, min(last, sequence.pool_from))
                layer = (sequence.tap or sequence.model).depth
                pooled.setdefault(layer, []).append((begin + kept - first, len(tokens), sequence.pool_slot))
            index, active = sequence.model.adapter, sequence.adapted_from
            base = work.rows if index is None or active is None else max(0, min(work.rows, active - first))
            adapters += [-1] * base + [-1 if index is None else index] * (work.rows - base)
            if work.finishes and sequence.wants_logits:
                logit_rows += range(begin + work.length - 1, len(tokens))
        rows = sent(write_rows, torch.long, device)
        groups.append(Group(depth, start, len(tokens), members, pool.layers(layout), rows))
    return Batch(
        sent(tokens, torch.long, device),
        sent(_positions(positions, grids), torch.long, device),
        groups,
        sent(logit_rows, torch.long, device),
        {layer: _slots(len(tokens), parts, device) for layer, parts in pooled.items()},
        _active(adapters, works[0].sequence.model.backbone, device) if max(adapters) >= 0 else None,
    )


def _positions(text: list[int], grids: list[tuple[int, Tensor]]) -> Tensor:
    positions = torch.tensor(text)
    if not grids:
        return positions
    positions = positions.repeat(3, 1)
    for row, grid in grids:
        positions[:, row : row + grid.shape[1]] = grid
    return positions


def _active(adapters: list[int], backbone: Backbone, device: torch.device) -> ActiveAdapters | None:
    return ActiveAdapters.of(torch.tensor(adapters), [item.updates for item in backbone.adapters], device)


def _slots(rows: int, parts: list[tuple[int, int, int]], device: torch.device) -> Tensor:
    slots = [-1] * rows
    for first, last, slot in parts:
        slots[first:last] = [slot] * (last - first)
    return sent(slots, torch.long, device)


def sent(numbers: Many[Any] | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers on a device. On a GPU nothing waits for it, as it would for what is not pinned: for
    the copy, and for all that was launched before."""
    tensor = torch.as_tensor(numbers, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _tables(works: list[Work], device: torch.device) -> RaggedTables:
    pages = [[page.row for page in work.sequence.table.pages] for work in works]
    width = max(map(len, pages))
    lengths = [work.start + work.rows for work in works]
    first_row = list(accumulate((work.rows for work in works), initial=0))
    return RaggedTables(
        first_row=sent(first_row, torch.int32, device),
        length=sent(lengths, torch.int32, device),
        pages=sent([rows + [0] * (width - len(rows)) for rows in pages], torch.int32, device),
        page_size=works[0].sequence.table.layout.tokens_per_page,
        max_rows=max(work.rows for work in works),
        max_length=max(lengths),
    )


def _sees(works: list[Work], device: torch.device) -> Tensor | None:
    """How many tokens each row sees, where rows of an image see those behind them, too; None where none does."""
    seen: list[int] = []
    both_ways = False
    for work in works:
        sequence, start, stop = work.sequence, work.start, work.start + work.rows
        own = list(range(start + 1, stop + 1))
        for placed in sequence.images_between(start, stop) if sequence.whole_images else ():
            rows = [placed.start + at for at in (placed.image.place.rows >= 0).nonzero().flatten().tolist()]
            both_ways = True
            for row in rows:
                if start <= row < stop:
                    own[row - start] = rows[-1] + 1
        seen += own
    return sent(seen, torch.int32, device) if both_ways else None


def _spans(works: list[Work], window: int | None, device: torch.device) -> list[Span]:
    spans: list[Span] = []
    row = 0
    index = 0
    while index < len(works):
        group = _decode_group(works[index:], row) if window is None else None
        if group is not None:
            spans.append(group)
            row += group.sequences
            index += group.sequences
            continue
        sequence, start, count = works[index].sequence, works[index].start, works[index].rows
        # keys before the first query's window are seen by nobody
        first = 0 if window is None else max(0, start - window + 1)
        stop = start + count
        mask = causal_mask(count, stop - first, window, device) if count > 1 else None
        if count > 1 and sequence.whole_images:
            mask = _both_ways(sequence, mask, first, start, stop, window, device)
        spans.append(SequenceSpan(row, count, sequence.table.runs(first, stop), mask))
        row += count
        index += 1
    return spans


def _both_ways(
    sequence: Sequence,
    mask: Tensor | None,
    first: int,
    start: int,
    stop: int,
    window: int | None,
    device: torch.device,
) -> Tensor:
    """A causal mask [stop - start, stop - first] in which rows of an image see those behind them, too."""
    if mask is None:
        mask = torch.ones(stop - start, stop - first, dtype=torch.bool, device=device).tril(start - first)
    for placed in sequence.images_between(start, stop):
        rows = (placed.image.place.rows >= 0).nonzero().squeeze(1).to(device) + placed.start
        queries = rows[rows >= start]
        seen = rows >= first  # what lies before that, a window hides from all
        near = queries[:, None] - rows[None, seen] < (window or stop)
        mask[(queries - start)[:, None], (rows[seen] - first)[None]] = near
    return mask


def _decode_group(works: list[Work], start: int) -> DecodeGroup | None:
    """The longest group at the head of `works`: decoding, one run each, equally many pages, one distance apart."""
    rows: list[int] = []
    pages = len(works[0].sequence.table.pages)
    for work in works:
        table = work.sequence.table
        if work.rows > 1 or len(table.pages) != pages or len(table.runs(0, work.start + 1)) > 1:
            break
        row = table.pages[0].row
        if len(rows) > 1 and row - rows[-1] != rows[1] - rows[0]:
            break
        rows.append(row)
    if len(rows) < 2:
        return None
    decoder = works[0].sequence.model.backbone.decoder
    device = decoder.device
    lengths = [work.start + 1 for work in works[: len(rows)]]
    longest = max(lengths)
    mask = None
    if min(lengths) < longest:
        beyond = torch.arange(longest, device=device) >= torch.tensor(lengths, device=device).unsqueeze(1)
        mask = torch.zeros(len(rows), longest, dtype=decoder.dtype, device=device)
        mask = mask.masked_fill_(beyond, float("-inf"))[:, None, None]
    return DecodeGroup(start, len(rows), rows[0], rows[1] - rows[0], longest, mask)
