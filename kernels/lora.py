"""Low-rank updates (LoRA, Hu et al. 2021) of some rows of a batch, each row by its own adapter: y += B (A x).

Plain torch for every device; which rows use which adapter is found once a batch and serves all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """The update of one linear map, on its device, both parts transposed. The adapter's scale is part of `b`.

    On the CPU it stays in fp32 under a bf16 map, as `peft` keeps it, and is faster so: 576 -> 960 by rank 16 takes
    26 us for one row and 69 us for 32 on two cores; in bf16, where oneDNN sets up each call anew, 96 and 90.
    """

    a: Tensor  # [in, rank]
    b: Tensor  # [rank, out]


class LoraStack(NamedTuple):
    """The updates of one linear map by all adapters of a batch, side by side: what kernels read that find a row's
    adapter on the device. a: [adapters, rank, in]; b: [adapters, out, rank], zero behind an adapter's own rank."""

    a: Tensor
    b: Tensor


def stacked(updates: Sequence[LowRank | None]) -> LoraStack | None:
    """The stack of the adapters' updates, None for one that leaves this map alone; None where all of them do.

    The rank is that of the largest, up to a power of two of at least 16: what matrix units multiply.
    """
    present = [update for update in updates if update is not None]
    if not present:
        return None
    rank = max(16, 1 << (max(update.a.shape[1] for update in present) - 1).bit_length())
    first = present[0]
    a = first.a.new_zeros(len(updates), rank, first.a.shape[0])
    b = first.b.new_zeros(len(updates), first.b.shape[1], rank)
    for index, update in enumerate(updates):
        if update is not None:
            own = update.a.shape[1]
            a[index, :own], b[index, :, :own] = update.a.t(), update.b.t()
    return LoraStack(a, b)


Rows: TypeAlias = slice | Tensor
"""Adjacent rows of a batch, or the indices [n] int64 of scattered ones."""

Updates: TypeAlias = Mapping[tuple[int, str], LowRank]
"""What one adapter changes: (layer, part of the layer) -> its update."""


def add_low_rank_(y: Tensor, x: Tensor, rows: Rows, update: LowRank) -> None:
    """y[rows] += B (A x[rows]), in place; all other rows stay as they are, bit for bit.

    x: [n, in]; y: [n, out], both in the map's dtype. Adjacent rows are read and written where they lie.
    """
    delta = x[rows].to(update.a.dtype) @ update.a @ update.b
    if isinstance(rows, slice):
        y[rows].add_(delta)
    else:
        y.index_copy_(0, rows, y[rows].add_(delta))


class ActiveAdapters:
    """Which rows of one batch are changed by which adapter.

    adapter, updates: as given. active: the indices of the adapters that some row has.
    """

    def __init__(self, adapter: Tensor, updates: Sequence[Updates], device: torch.device) -> None:
        """adapter: [rows] int64 on the CPU, an index into `updates` or -1 for none."""
        self.adapter, self.updates, self._device = adapter, updates, device
        self.active: list[int] = []
        self._groups: list[tuple[Rows, Updates]] = []
        for index in adapter.unique().tolist():
            if index < 0:
                continue
            self.active.append(index)
            rows = (adapter == index).nonzero().squeeze(1)
            first, last = int(rows[0]), int(rows[-1])
            adjacent = last - first + 1 == len(rows)
            self._groups.append((slice(first, last + 1) if adjacent else rows.to(device), updates[index]))

    @classmethod
    def of(cls, adapter: Tensor, updates: Sequence[Updates], device: torch.device) -> ActiveAdapters | None:
        """As the constructor, but None when no row has an adapter: the batch then runs as if there were none."""
        return cls(adapter, updates, device) if bool((adapter >= 0).any()) else None

    def first(self, rows: int) -> ActiveAdapters | None:
        """For the batch's first `rows` rows, when the others leave it; None when none of them has an adapter."""
        return self.of(self.adapter[:rows], self.updates, self._device)

    def add_(self, layer: int, part: str, y: Tensor, x: Tensor) -> None:
        """Add what the rows' adapters change to y [rows, out], in place; y is the output of a layer's part for
        x [rows, in]."""
        for rows, updates in self._groups:
            update = updates.get((layer, part))
            if update is not None:
                add_low_rank_(y, x, rows, update)


def low_rank_reference(y: Tensor, x: Tensor, adapter: Sequence[int], updates: Sequence[LowRank | None]) -> Tensor:
    """The same row by row in fp64, out of place: adapter [rows], -1 for none."""
    out = y.double()
    for row, index in enumerate(adapter):
        update = updates[index] if index >= 0 else None
        if update is not None:
            out[row] += x[row].double() @ update.a.double() @ update.b.double()
    return out
