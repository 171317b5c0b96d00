"""Steps in which every sequence decodes, over buffers that stay where they are: who has which row, what the buffers
hold, and when a CUDA graph can run it all. Every other batch goes through `batch`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Many
from itertools import product
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..kernels.paged_attention import LayerKV
from ..kernels.ragged import RaggedTables
from ..kernels.sampling import SamplingRows
from .batch import sent
from .errors import DoesNotFit
from .kv_pages import KVLayout
from .models.fused import FusedGroup, FusedPart, RowAdapters, Stacks
from .models.language_model import LanguageModel
from .sequence import BlockTable, Sequence

if TYPE_CHECKING:
    from .scheduler import Work


class Graph(Protocol):
    """A step as the device has recorded it."""

    def replay(self) -> None: ...


Sampler = Callable[[Tensor, SamplingRows], Tensor]
"""(logits [n, vocab], rows) -> ids [n] int32, -1 where a row holds no numbers to choose by."""


class Shape(NamedTuple):
    """What one graph can run: a batch of `rows`, padding included, with no context beyond `length`, sums of the
    outputs of layer `pooled`, if any, and adapters of rows, if `adapted`."""

    rows: int
    length: int
    pooled: int | None = None
    adapted: bool = False


class Row(NamedTuple):
    """A sequence's place in a decoding step: it computes the token at `start`, which is `token`, or, where that is
    not known here yet, the one that row `source` of the batch before chose."""

    sequence: Sequence
    start: int
    token: int
    source: int


class Shapes:
    """The shapes that batches of a lane are rounded up to."""

    def __init__(self, most_rows: int, context: int, taps: Many[int] = (), adapters: bool = False) -> None:
        """most_rows: sequences at once. context: the longest. taps: layers that heads on an answer's own states
        read. adapters: whether any row may have one."""
        # A step takes as long for one row as for 8, nearly, and padding to the next multiple costs a few percent.
        sizes = [1, 2, 4, *range(8, 64, 8), *range(64, most_rows, 32), most_rows]
        self.rows = sorted({size for size in sizes if size <= most_rows})
        self.lengths = [1024 << 2 * power for power in range(16) if 1024 << 2 * power < context] + [context]
        self.taps = (None, *sorted(set(taps)))
        self.adapted = (False, True) if adapters else (False,)

    def all(self) -> list[Shape]:
        """Those of plain answers first; the largest of a kind first, so that the memory of its graph is enough for
        the others."""
        kinds = product(self.taps, self.adapted)
        sizes = list(product(self.rows[::-1], self.lengths[::-1]))
        return [Shape(*size, *kind) for kind in kinds for size in sizes]

    def fitting(self, rows: int, length: int, pooled: int | None = None, adapted: bool = False) -> Shape:
        at_rows, at_length = bisect_left(self.rows, rows), bisect_left(self.lengths, length)
        return Shape(self.rows[at_rows], self.lengths[at_length], pooled, adapted)


class _Columns(NamedTuple):
    """Views into one flat buffer, tensors on the device and arrays on the host; [rows] each, but first_row [rows + 1]
    and pages [rows, pages]."""

    seed: Any  # int64
    temperature: Any  # fp64, as the next two
    top_p: Any
    min_p: Any
    token: Any  # int32, as all that follow
    source: Any
    position: Any
    write_row: Any
    length: Any
    slot: Any
    adapter: Any
    top_k: Any
    pass_index: Any
    draw: Any
    first_row: Any
    pages: Any


class _Owner(NamedTuple):
    """Whose a row of the buffers is, and which state of its table was written."""

    sequence: Sequence
    table: BlockTable
    version: int


_WIDE, _NARROW = 4, 10  # columns of 8 bytes, and of 4
START_SECONDS = 10.0


class Buffers:
    """The columns of up to `rows` rows on the device, and twice on the host: while one copy travels, or waits to,
    the other is written. A step is one copy from host to device."""

    def __init__(self, rows: int, pages: int, device: torch.device) -> None:
        # columns begin at 16 bytes, so that kernels may read them as vectors
        self._rows, self._pages = -(-rows // 8) * 8, -(-pages // 4) * 4
        self._head = _WIDE * self._rows + (_NARROW * self._rows + self._rows + 4) // 2
        words = self._head + self._rows * self._pages // 2
        self._device = torch.zeros(words, dtype=torch.int64, device=device)
        pinned = device.type == "cuda"
        self._host = [torch.zeros(words, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self.columns = self._cut(self._device)
        # what is written here travels to the device
        self._written = [_Columns(*(column.numpy() for column in self._cut(flat))) for flat in self._host]
        for to in self._written:
            to.top_p[:] = 1.0  # padding that was never anyone's is a valid, greedy row
        self._owners: list[list[_Owner | None]] = [[None] * self._rows for _ in range(2)]

    def _cut(self, flat: Tensor) -> _Columns:
        rows = self._rows
        seed, *wide = flat[: _WIDE * rows].split(rows)
        narrow = flat[_WIDE * rows :].view(torch.int32)
        columns = narrow[: _NARROW * rows].split(rows)
        first_row = narrow[_NARROW * rows :][: rows + 1]
        pages = flat[self._head :].view(torch.int32).view(rows, self._pages)
        parts = [seed, *(column.view(torch.float64) for column in wide), *columns, first_row, pages]
        return _Columns(*parts)

    def fill(self, side: int, batch: Many[Row], rows: int) -> None:
        """Write a batch into host buffer `side`, padded to `rows`, and send it to the device. What belongs to a
        sequence for long is written when it comes to its row, a page's place when the sequence gets it."""
        to, owners = self._written[side], self._owners[side]
        padding = rows - len(batch)
        varying: list[tuple[int, ...]] = []
        for index, row in enumerate(batch):
            sequence, table = row.sequence, row.sequence.table
            owner = owners[index]
            if owner is None or owner.sequence is not sequence:
                self._settle(to, index, sequence)
            if owner != (now := _Owner(sequence, table, table.version)):
                to.pages[index, : len(table.pages)] = [page.row for page in table.pages]
                owners[index] = now
            page, within = divmod(row.start, table.layout.tokens_per_page)
            pooled = sequence.pool_slot is not None and row.start >= (sequence.pool_from or 0)
            varying.append(
                (
                    row.token,
                    row.source,
                    next(iter(sequence.positions(row.start, row.start + 1))),
                    table.pages[page].row + within,
                    row.start + 1,
                    sequence.pool_slot if pooled and sequence.pool_slot is not None else -1,
                    _adapter(sequence, row.start),
                    row.start + 1 - sequence.prompt_tokens,
                )
            )
        varying += [(0, -1, 0, -1, 0, -1, -1, 0)] * padding
        for column, numbers in zip(
            (to.token, to.source, to.position, to.write_row, to.length, to.slot, to.adapter, to.draw),
            zip(*varying, strict=True),
            strict=True,
        ):
            column[:rows] = numbers
        to.first_row[: rows + 1] = np.minimum(np.arange(rows + 1), len(batch))
        used = self._head + rows * self._pages // 2
        self._device[:used].copy_(self._host[side][:used], non_blocking=True)

    def _settle(self, to: _Columns, index: int, sequence: Sequence) -> None:
        params = sequence.sampling
        assert params is not None
        to.seed[index] = _signed(sequence.seed)
        to.temperature[index], to.top_p[index], to.min_p[index] = params.temperature, params.top_p, params.min_p
        to.top_k[index], to.pass_index[index] = params.top_k, sequence.draw


class Decoding:
    """The decoding steps of one model on all its layers, in one layout."""

    def __init__(
        self,
        decoder: LanguageModel,
        layout: KVLayout,
        caches: list[LayerKV],
        sums: Tensor,
        shapes: Shapes,
        sampler: Sampler,
        adapters: int,
        stacks: Stacks,
    ) -> None:
        """sums: running sums of its lane. adapters: how many `stacks` holds."""
        self._decoder = decoder
        self._layout = layout
        self._caches = caches
        self._sums = sums
        self._sampler = sampler
        self.shapes = shapes
        self._adapters, self._stacks = adapters, stacks
        most = max(shapes.rows)
        self._buffers = Buffers(most, layout.pages(max(shapes.lengths)), decoder.device)
        self.ids = torch.zeros(most, dtype=torch.int32, device=decoder.device)  # chosen last
        pinned = decoder.device.type == "cuda"
        # the host reads one while the batch behind it writes the other
        self._ids_on_host = [torch.zeros(most, dtype=torch.int32, pin_memory=pinned) for _ in range(2)]
        self._side = 0
        self._graphs: dict[Shape, Graph | None] = {}
        self._records = False
        self._memory: Any = None  # that graphs share

    def shape_of(self, works: Many[Work]) -> Shape | None:
        """The shape of a batch; None where it is no such step, or its tokens cannot be chosen on the device."""
        if len(works) > max(self.shapes.rows) or not all(map(self._decodes, works)):
            return None
        taps = {sequence.tap.depth for work in works if (sequence := work.sequence).tap is not None}
        if len(taps) > 1:
            return None
        adapted = any(_adapter(work.sequence, work.start) >= 0 for work in works)
        longest = max(work.stop for work in works)
        return self.shapes.fitting(len(works), longest, next(iter(taps), None), adapted)

    def _decodes(self, work: Work) -> bool:
        sequence = work.sequence
        return (
            work.rows == 1
            and work.stop >= sequence.num_tokens  # beyond, where the last token is not known yet
            and sequence.depth == self._decoder.depth
            and sequence.table.layout == self._layout
            and (sequence.model.adapter is None or sequence.model.adapter < self._adapters)
            and not sequence.scored
            and sequence.device_can_choose
            and not (sequence.images and any(sequence.images_between(work.start, work.stop)))
        )

    def run(self, shape: Shape, batch: Many[Row]) -> Tensor:
        """Compute a batch and choose its tokens, [rows of the batch] int32 on the host, there when the device is
        done. Of two batches the host must have read the first before a third runs."""
        if self._records and shape not in self._graphs:
            self._record_late(shape)
        self._side ^= 1
        self._buffers.fill(self._side, batch, shape.rows)
        graph = self._graphs.get(shape)
        if graph is None:
            self._compute(shape)
        else:
            graph.replay()
        return self._sent(len(batch))

    def choose(self, works: Many[Work], logits: Tensor) -> Tensor | None:
        """The tokens of any batch's logits [n, vocab], as `run` gives them; None where the host has to choose."""
        if any(work.drafts or not work.sequence.device_can_choose for work in works):
            return None
        self._side ^= 1
        self.ids[: len(works)] = self._sampler(logits, sampling_rows(works, logits.device))
        return self._sent(len(works))

    def _sent(self, count: int) -> Tensor:
        return self._ids_on_host[self._side][:count].copy_(self.ids[:count], non_blocking=True)

    def capture(self, seconds: float = START_SECONDS) -> None:
        """Run the steps of all shapes as graphs from now on. They are recorded here for about so long; whatever is
        left, which taps, adapters and long contexts may multiply, when a batch first has that shape.

        On the current stream, as `run`. Raises `DoesNotFit` where the GPU has no memory for them.
        """
        began = perf_counter()
        self._records = True
        try:
            for shape in self.shapes.all():
                if perf_counter() - began >= seconds:
                    break
                self._record(shape)
        except torch.OutOfMemoryError as error:
            raise DoesNotFit(
                f"after {len(self._graphs)} graphs of decoding steps the GPU has no memory for another; lower "
                f"kv_bytes, or max_sequences, which is {max(self.shapes.rows)}"
            ) from error

    def _record_late(self, shape: Shape) -> None:
        """Record a graph while a batch may be under way, whose tokens the next one may need. A shape for which there
        is no memory runs without one."""
        chosen = self.ids.clone()
        torch.cuda.current_stream().synchronize()  # the host's buffers have been read
        try:
            self._record(shape)
        except torch.OutOfMemoryError:
            self._graphs[shape] = None
        self.ids.copy_(chosen)

    def _record(self, shape: Shape) -> None:
        """Record the graph of a shape. It runs before, on rows of nobody, so that its kernels are compiled and
        loaded, and their workspaces there."""
        self._buffers.fill(0, (), shape.rows)
        self._compute(shape)
        self._graphs[shape] = self._recorded(shape)

    def _recorded(self, shape: Shape) -> Graph:
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Graphs of one stream never run at once, so they share their memory. What other threads do meanwhile, a
        # detector outside or another engine, is no part of it, and no error.
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(graph, pool=self._memory, stream=stream, capture_error_mode="thread_local"):
            self._compute(shape)
        return graph

    def _compute(self, shape: Shape) -> None:
        """All that a step does on the device: it reads the buffers, writes `ids`, and waits for nothing."""
        rows, decoder = shape.rows, self._decoder
        columns = _Columns(*(column[:rows] for column in self._buffers.columns))
        known = columns.source < 0
        tokens = torch.where(known, columns.token, self.ids[columns.source.clamp(min=0).long()])
        x = decoder.embed(tokens.clamp(min=0).long())  # a row without a token fails when that is known
        tables = RaggedTables(
            self._buffers.columns.first_row[: rows + 1],
            columns.length,
            columns.pages,
            self._layout.tokens_per_page,
            max_rows=1,
            max_length=shape.length,
        )
        group = FusedGroup(0, rows, self._caches, columns.write_row, [FusedPart(0, rows, tables)])
        pooled = {} if shape.pooled is None else {shape.pooled: columns.slot}
        adapters = RowAdapters(columns.adapter, self._stacks) if shape.adapted else None
        angles = decoder.angles(columns.position)
        assert decoder.fused is not None
        decoder.fused.run(0, decoder.depth, x, angles, [group], adapters, pooled, self._sums)
        chosen = self._sampler(
            decoder.logits(x),
            SamplingRows(
                columns.temperature,
                columns.top_k,
                columns.top_p,
                columns.min_p,
                columns.seed,
                columns.pass_index,
                columns.draw,
            ),
        )
        self.ids[:rows] = chosen


def sampling_rows(works: Many[Work], device: torch.device) -> SamplingRows:
    """What a sampler is told of the last rows of works that it can choose for."""
    sequences = [work.sequence for work in works]
    params = [sequence.sampling for sequence in sequences if sequence.sampling is not None]

    def column(dtype: torch.dtype, numbers: list[float] | list[int]) -> Tensor:
        return sent(numbers, dtype, device)

    return SamplingRows(
        column(torch.float64, [one.temperature for one in params]),
        column(torch.int32, [one.top_k for one in params]),
        column(torch.float64, [one.top_p for one in params]),
        column(torch.float64, [one.min_p for one in params]),
        column(torch.int64, [_signed(sequence.seed) for sequence in sequences]),
        column(torch.int32, [sequence.draw for sequence in sequences]),
        column(torch.int32, [work.stop - work.sequence.prompt_tokens for work in works]),
    )


def _adapter(sequence: Sequence, position: int) -> int:
    """The adapter of a token; -1 where it has none."""
    index, active = sequence.model.adapter, sequence.adapted_from
    return -1 if index is None or active is None or position < active else index


def _signed(seed: int) -> int:
    """The bits of an unsigned number of 64 bits as a signed one."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
