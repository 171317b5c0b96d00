"""Which tokens of which sequences run in this step. It moves pages and sequences, and never touches a model."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from typing import NamedTuple

from .errors import DoesNotFit
from .kv_pages import KVLayout, PagePool, PrefixMatch
from .models.model import Backbone
from .sequence import Sequence


class Work(NamedTuple):
    """`length` tokens of a sequence from position `start` on, to be computed in this step."""

    sequence: Sequence
    start: int
    length: int

    @property
    def finishes(self) -> bool:
        """Whether nothing is left to compute after it."""
        return self.start + self.length == self.sequence.num_tokens


class Lane:
    """One backbone's queue: different weights never share a batch, adapters and heads of the same do.

    budget: tokens a step. max_sequences: sequences that hold pages at once.
    """

    def __init__(self, backbone: Backbone, budget: int, max_sequences: int) -> None:
        self.backbone = backbone
        self.budget = budget
        self.max_sequences = max_sequences
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.free_slots = list(range(max_sequences))[::-1]


class Scheduler:
    """First come, first served; passes of older requests go before those of younger ones."""

    def __init__(self, pool: PagePool, lanes: list[Lane]) -> None:
        self.pool = pool
        self.lanes = lanes
        self._lane_of = {id(lane.backbone): lane for lane in lanes}
        self.preemptions = 0

    def check_fits(self, layout: KVLayout, tokens: int) -> None:
        """Raise `DoesNotFit` when a sequence of this length could not run even alone."""
        if layout.pages(tokens) > self.pool.capacity(layout):
            room = self.pool.capacity(layout) * layout.tokens_per_page
            raise DoesNotFit(
                f"{tokens:,} tokens (prompt and max_tokens) need more than the whole page pool, which holds "
                f"{room:,} tokens of this model; shorten the prompt, lower max_tokens or raise kv_bytes"
            )

    def add(self, sequence: Sequence) -> None:
        insort(self._lane(sequence).waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that is finished, failed or aborted; what it computed stays findable."""
        lane = self._lane(sequence)
        if sequence.running:
            self._stop(lane, sequence)
        elif sequence in lane.waiting:
            lane.waiting.remove(sequence)

    def sequences(self) -> Iterator[Sequence]:
        for lane in self.lanes:
            yield from lane.running
            yield from lane.waiting

    def schedule(self, lane: Lane) -> list[Work]:
        """The next batch of a lane: decoding sequences first, then chunks, then newcomers while there is room."""
        works: list[Work] = []
        budget = lane.budget
        for sequence in sorted(lane.running, key=lambda item: (item.remaining > 1, item.order)):
            if budget and sequence.running:
                count = min(sequence.remaining, budget)
                if self._grow(sequence, sequence.num_computed + count):
                    works.append(Work(sequence, sequence.num_computed, count))
                    budget -= count
        # whoever was preempted for an older sequence after it was chosen does not run
        works = [work for work in works if work.sequence.running]
        while budget and lane.waiting and len(lane.running) < lane.max_sequences:
            sequence = lane.waiting[0]
            if not self._admit(lane, sequence):
                if not self._make_way(sequence):
                    break
                works = [work for work in works if work.sequence.running]
                continue
            count = min(sequence.remaining, budget)
            works.append(Work(sequence, sequence.num_computed, count))
            budget -= count
        return works

    def advance(self, work: Work) -> None:
        """Account for computed tokens, and make every page that they filled findable."""
        sequence = work.sequence
        size = sequence.table.layout.tokens_per_page
        first = sequence.num_computed // size
        sequence.num_computed = work.start + work.length
        for index in range(first, sequence.num_computed // size):
            self._publish(sequence, index, index * size, (index + 1) * size)

    # Below: pages of one sequence.

    def _lane(self, sequence: Sequence) -> Lane:
        return self._lane_of[id(sequence.model.backbone)]

    def _publish(self, sequence: Sequence, index: int, start: int, stop: int) -> None:
        pages = sequence.table.pages
        parent = pages[index - 1] if index else sequence.root
        page = self.pool.insert(parent, pages[index], tuple(sequence.content[start:stop]))
        if page is not pages[index]:
            sequence.table.replace(index, page)

    def _admit(self, lane: Lane, sequence: Sequence) -> bool:
        """Give a waiting sequence the pages of all its tokens, beginning with those the pool knows already."""
        layout, pool = sequence.table.layout, self.pool
        match = pool.match(sequence.root, layout, sequence.content[: sequence.reusable])
        borrowed = [*match.pages, match.partial] if match.partial else match.pages
        pool.retain(borrowed)
        after = match.pages[-1] if match.pages else None
        known = len(match.pages)
        room = layout.pages(sequence.limit) - known
        needed = layout.pages(sequence.num_tokens) - known
        fresh = pool.allocate(layout, needed, after, room)
        if fresh is None and match.partial is not None:
            # the page to copy from may be the very one that is missing
            pool.release([match.partial])
            match, borrowed = PrefixMatch(match.pages, None, 0), match.pages
            fresh = pool.allocate(layout, needed, after, room)
        if fresh is None:
            pool.release(borrowed)
            return False
        if match.partial is not None:
            pool.copy_tokens(match.partial, fresh[0], match.partial_tokens)
            pool.release([match.partial])
        sequence.table.extend([*match.pages, *fresh])
        sequence.num_computed = match.tokens
        sequence.running = True
        if sequence.record.started is None:
            sequence.record.cached_tokens = match.tokens
        if sequence.pool_from is not None:
            sequence.pool_slot = lane.free_slots.pop()
        lane.waiting.remove(sequence)
        insort(lane.running, sequence, key=_order)
        return True

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Pages for `tokens` tokens in all, preempting the youngest until there are enough."""
        table = sequence.table
        missing = table.layout.pages(tokens) - len(table.pages)
        if missing <= 0:
            return True
        while True:
            pages = self.pool.allocate(table.layout, missing, table.pages[-1])
            if pages is not None:
                table.extend(pages)
                return True
            victim = max((item for lane in self.lanes for item in lane.running), key=_order)
            self._preempt(victim)
            if victim is sequence:
                return False

    def _make_way(self, sequence: Sequence) -> bool:
        """Preempt the youngest of all lanes for a waiting sequence that is older than everything that runs.

        Without this, younger sequences of other lanes could take turns for ever while it waits for pages.
        """
        running = [item for lane in self.lanes for item in lane.running]
        if not running or min(running, key=_order).order < sequence.order:
            return False
        self._preempt(max(running, key=_order))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's pages; it waits, and computes again what is gone by the time it returns."""
        lane = self._lane(sequence)
        self._stop(lane, sequence)
        insort(lane.waiting, sequence, key=_order)
        sequence.record.preemptions += 1
        self.preemptions += 1

    def _stop(self, lane: Lane, sequence: Sequence) -> None:
        size = sequence.table.layout.tokens_per_page
        index, rest = divmod(sequence.num_computed, size)
        if rest:
            self._publish(sequence, index, index * size, sequence.num_computed)
        self.pool.release(sequence.table.pages)
        sequence.table = type(sequence.table)(sequence.table.layout)
        sequence.num_computed = 0
        sequence.running = False
        sequence.features.clear()
        lane.running.remove(sequence)
        if sequence.pool_slot is not None:
            lane.free_slots.append(sequence.pool_slot)
            sequence.pool_slot = None


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order
