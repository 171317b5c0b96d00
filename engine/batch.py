"""A step's work as tensors: a ragged batch, deepest sequences first, so that shallow ones leave on the way up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.paged_attention import DecodeGroup, LayerKV, SequenceSpan, Span, causal_mask
from .kv_pages import PagePool
from .scheduler import Work


@dataclass(frozen=True)
class Group:
    """The rows [start, stop) of a batch that run to one depth, in one layout.

    write_rows [stop - start]: where in the pool their keys and values go. spans: for each window of the model's
    layers (None = full attention) who attends to what.
    """

    depth: int
    start: int
    stop: int
    works: list[Work]
    layers: list[LayerKV]
    write_rows: Tensor
    spans: dict[int | None, list[Span]]


@dataclass(frozen=True)
class Batch:
    """tokens, positions: [rows] int64. groups: by falling depth; they cover all rows in order.

    logit_rows: [n] rows whose next-token logits are wanted, all in the deepest group. pool_slots: [rows] slot
    of the running sum that a row's hidden state is added to, -1 for none; None when nothing is pooled.
    """

    tokens: Tensor
    positions: Tensor
    groups: list[Group]
    logit_rows: Tensor
    pool_slots: Tensor | None


def in_batch_order(works: list[Work]) -> list[Work]:
    """By falling depth; in each depth the decoding ones first, those of one size beside each other by place."""

    def key(work: Work) -> tuple[int, bool, int, int]:
        pages = work.sequence.table.pages
        return -work.sequence.model.depth, work.length > 1, len(pages), pages[0].row

    return sorted(works, key=key)


def build_batch(works: list[Work], pool: PagePool, windows: tuple[int | None, ...], device: torch.device) -> Batch:
    """works: as ordered by `in_batch_order`. windows: one entry a layer of the backbone."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logit_rows: list[int] = []
    groups = []
    for depth in sorted({work.sequence.model.depth for work in works}, reverse=True):
        members = [work for work in works if work.sequence.model.depth == depth]
        start = len(tokens)
        write_rows: list[int] = []
        for sequence, first, count in members:
            stop = first + count
            tokens += sequence.tokens[first:stop]
            positions += range(first, stop)
            for row, length in sequence.table.runs(first, stop):
                write_rows += range(row, row + length)
            pooled = sequence.pool_slot is not None and sequence.pool_from is not None
            kept = max(first, min(stop, sequence.pool_from or 0)) if pooled else stop
            slots += [-1] * (kept - first) + [sequence.pool_slot or 0] * (stop - kept)
            if stop == sequence.num_tokens and (sequence.sampling is not None or sequence.words):
                logit_rows.append(len(tokens) - 1)
        layout = members[0].sequence.table.layout
        spans = {window: _spans(members, window, device) for window in set(windows[:depth])}
        rows = torch.tensor(write_rows, device=device)
        groups.append(Group(depth, start, len(tokens), members, pool.layers(layout), rows, spans))
    return Batch(
        torch.tensor(tokens, device=device),
        torch.tensor(positions, device=device),
        groups,
        torch.tensor(logit_rows, device=device, dtype=torch.long),
        torch.tensor(slots, device=device) if any(slot >= 0 for slot in slots) else None,
    )


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
        sequence, start, count = works[index]
        # keys before the first query's window are seen by nobody
        first = 0 if window is None else max(0, start - window + 1)
        stop = start + count
        mask = causal_mask(count, stop - first, window, device) if count > 1 else None
        spans.append(SequenceSpan(row, count, sequence.table.runs(first, stop), mask))
        row += count
        index += 1
    return spans


def _decode_group(works: list[Work], start: int) -> DecodeGroup | None:
    """The longest group at the head of `works`: decoding, one run each, equally many pages, one distance apart."""
    rows: list[int] = []
    pages = len(works[0].sequence.table.pages)
    for work in works:
        table = work.sequence.table
        if work.length > 1 or len(table.pages) != pages or len(table.runs(0, work.start + 1)) > 1:
            break
        row = table.pages[0].row
        if len(rows) > 1 and row - rows[-1] != rows[1] - rows[0]:
            break
        rows.append(row)
    if len(rows) < 2:
        return None
    layout = works[0].sequence.table.layout
    device = works[0].sequence.model.backbone.decoder.device
    lengths = [work.start + 1 for work in works[: len(rows)]]
    longest = max(lengths)
    mask = None
    if min(lengths) < longest:
        beyond = torch.arange(longest, device=device) >= torch.tensor(lengths, device=device).unsqueeze(1)
        mask = torch.zeros(len(rows), longest, dtype=layout.dtype, device=device)
        mask = mask.masked_fill_(beyond, float("-inf"))[:, None, None]
    return DecodeGroup(start, len(rows), rows[0], rows[1] - rows[0], longest, mask)
