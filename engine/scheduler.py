"""Which tokens of which sequences run in this step. It moves pages and sequences, and never touches a model."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from collections.abc import Sequence as Many
from typing import NamedTuple

from .errors import DoesNotFit
from .flight import Flight
from .kv_pages import KVLayout, Page, PagePool, PrefixMatch
from .models.model import Backbone
from .sequence import Sequence


class Work(NamedTuple):
    """`length` tokens of a sequence from position `start` on, to be computed in this step, and guesses after them."""

    sequence: Sequence
    start: int
    length: int
    drafts: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        return self.length + len(self.drafts)

    @property
    def stop(self) -> int:
        """Position behind its last known token."""
        return self.start + self.length

    @property
    def tokens(self) -> list[int]:
        return [*self.sequence.tokens[self.start : self.stop], *self.drafts]

    @property
    def finishes(self) -> bool:
        """Whether nothing is left to compute after it."""
        return self.stop == self.sequence.num_tokens


class Lane:
    """One backbone's queue: different weights never share a batch, adapters and heads of the same do.

    budget: tokens a step. max_sequences: sequences that hold pages at once. free_rows: how many rows a step may have
    before it takes longer than with one, because reading the weights takes as long: drafts and whatever else is
    optional run in these only.
    """

    def __init__(self, backbone: Backbone, name: str, budget: int, max_sequences: int, free_rows: int) -> None:
        self.backbone = backbone
        self.name = name
        self.budget = budget
        self.max_sequences = max_sequences
        self.free_rows = free_rows
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.free_slots = list(range(max_sequences))[::-1]
        self.flights: list[Flight] = []  # batches launched and not landed, oldest first
        self.landed = 0.0  # when the last one was taken in (`time.perf_counter`)
        self.blocked = False  # no one that waits can start before something ends
        self.decoding = 0  # sequences that decode in the batch scheduled last
        self.spare_rows = free_rows  # free rows that the next batch is likely to leave over


class Scheduler:
    """First come, first served; passes of older requests go before those of younger ones.

    Pages that a batch in flight may still read or write are not given to others: they are held until it has landed.
    """

    def __init__(self, pool: PagePool, lanes: list[Lane]) -> None:
        self.pool = pool
        self.lanes = lanes
        self._lane_of = {id(lane.backbone): lane for lane in lanes}
        self.preemptions = 0
        self._held: list[tuple[set[Flight], list[Page]]] = []  # until these have landed

    def check_fits(self, layout: KVLayout, tokens: int) -> None:
        """Raise `DoesNotFit` when a sequence of this length could not run even alone."""
        if layout.pages(tokens) > self.pool.capacity(layout):
            room = self.pool.capacity(layout) * layout.tokens_per_page
            raise DoesNotFit(
                f"{tokens:,} tokens (prompt and max_tokens) need more than the whole page pool, which holds "
                f"{room:,} tokens of this model; shorten the prompt, lower max_tokens or raise kv_bytes"
            )

    def lane(self, backbone: Backbone) -> Lane:
        return self._lane_of[id(backbone)]

    def add(self, sequence: Sequence) -> None:
        lane = self._lane(sequence)
        insort(lane.waiting, sequence, key=_urgency)
        lane.blocked = False

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that is finished, failed or aborted; what it computed stays findable."""
        lane = self._lane(sequence)
        if sequence.running:
            self._stop(lane, sequence)
        elif sequence in lane.waiting:
            lane.waiting.remove(sequence)

    def require(self, sequence: Sequence) -> None:
        """From now on a sequence is not optional."""
        sequence.optional = False
        lane = self._lane(sequence)
        lane.blocked = False
        for queue in (lane.waiting, lane.running):
            if sequence in queue:
                queue.remove(sequence)
                insort(queue, sequence, key=_urgency)

    def sequences(self) -> Iterator[Sequence]:
        for lane in self.lanes:
            yield from lane.running
            yield from lane.waiting

    def held_pages(self) -> Iterator[list[Page]]:
        """Block tables that have ended and whose pages a batch in flight may still use."""
        return (pages for _, pages in self._held)

    def schedule(self, lane: Lane) -> list[Work]:
        """The next batch of an idle lane: decoding sequences first, then chunks, then newcomers while there is room;
        in rows that cost nothing then drafts, and at last what is optional."""
        works: list[Work] = []
        budget = lane.budget
        for sequence in sorted(lane.running, key=lambda item: (item.remaining > 1, item.order)):
            count = sequence.chunk(budget)
            wanted = count and not sequence.optional and sequence.running
            if wanted and self._grow(sequence, sequence.num_computed + count):
                works.append(Work(sequence, sequence.num_computed, count))
                budget = max(0, budget - count)
        # whoever was preempted for an older sequence after it was chosen does not run
        works = [work for work in works if work.sequence.running]
        while budget and lane.waiting and not lane.waiting[0].optional:
            sequence = lane.waiting[0]
            if len(lane.running) >= lane.max_sequences:
                last = max(lane.running, key=_urgency)
                if not last.optional:
                    lane.blocked = True
                    break
                self._preempt(last)
            if not self._admit(lane, sequence):
                if not self._make_way(sequence):
                    lane.blocked = True
                    break
                works = [work for work in works if work.sequence.running]
                continue
            count = sequence.chunk(budget)
            works.append(Work(sequence, sequence.num_computed, count))
            budget = max(0, budget - count)
        lane.decoding = sum(work.sequence.decoding for work in works)
        lane.spare_rows = lane.free_rows - lane.decoding
        return self._add_optional(lane, self._add_drafts(lane, works))

    def follow(self, lane: Lane) -> list[Work]:
        """The decoding step behind the batch in flight, whose tokens nobody knows yet; none where it would not be
        what `schedule` gives once they are known, but for sequences that they end: these compute a row for nothing.
        """
        (flight,) = lane.flights
        if flight.result.ids is None or (lane.waiting and not lane.blocked):
            return []
        chosen = {work.sequence for work in flight.result.works} - flight.dropped
        works = []
        for sequence in lane.running:
            if not sequence.remaining:
                continue
            if sequence not in chosen or sequence.optional or not sequence.device_can_choose:
                return []
            if sequence.pool_slot is not None:  # a row for nothing would be added to its sum
                return []
            if sequence.num_tokens + 1 < sequence.limit:
                works.append(Work(sequence, sequence.num_tokens, 1))
        if not all(self._extend(work.sequence, work.stop) for work in works):
            return []
        lane.decoding = len(works)
        lane.spare_rows = lane.free_rows - lane.decoding
        return works

    def landed(self, flight: Flight) -> None:
        """A batch has ended: what was held for it alone is free."""
        if not self._held:
            return
        held, self._held = self._held, []
        for flights, pages in held:
            flights.discard(flight)
            if flights:
                self._held.append((flights, pages))
            else:
                self.pool.release(pages)

    def advance(self, work: Work) -> None:
        """Account for computed tokens, and make every page that they filled findable. Drafts do not count yet."""
        self._advance(work.sequence, work.stop)

    def accept(self, sequence: Sequence, drafts: int) -> None:
        """So many drafts came true, and are tokens of the sequence now: what was computed of them counts."""
        self._advance(sequence, sequence.num_computed + drafts)

    def roll_back(self, sequence: Sequence, keep: int) -> None:
        """Cut a sequence to its first `keep` tokens.

        A page that can be found is never written again, a running sum is known at some lengths only, and a score
        needs its last token: some kept tokens are computed once more.
        """
        sequence.cut(keep)
        for flight in self._lane(sequence).flights:
            if any(work.sequence is sequence and work.stop >= keep for work in flight.works):
                self._drop(flight, sequence)
        if keep > sequence.num_computed:
            return
        pages, size = sequence.table.pages, sequence.table.layout.tokens_per_page
        pooled = sequence.pool_from
        last = max(0, keep - 1)
        known = [last] if pooled is None or last <= pooled else [pooled, *sequence.sums]
        writable = [n for n in known if n <= last and (n % size == 0 or pages[n // size].content is None)]
        start = max(writable, default=min(known) // size * size)
        sequence.num_computed = start
        sequence.rolled_back = True
        sequence.sums = {length: total for length, total in sequence.sums.items() if length <= start}
        first = sequence.table.layout.pages(start)
        self._release(pages[first:])
        sequence.table.cut(first)

    def replace_tail(self, sequence: Sequence, keep: int, tokens: Many[int]) -> None:
        """An open sequence's tokens become `tokens`, of which it has the first `keep` already.

        Raises `DoesNotFit`.
        """
        if keep < sequence.num_tokens:
            self.roll_back(sequence, keep)
        for token in tokens[keep:]:
            sequence.append(token)
        self.check_fits(sequence.table.layout, sequence.num_tokens)

    # Below: what may run where it costs nothing.

    def _add_drafts(self, lane: Lane, works: list[Work]) -> list[Work]:
        spare = min(lane.free_rows, lane.budget) - sum(work.length for work in works)
        out = []
        for work in works:
            drafts = work.sequence.drafts[: max(0, spare)]
            if drafts and work.finishes and self._extend(work.sequence, work.stop + len(drafts)):
                work = work._replace(drafts=tuple(drafts))
                spare -= len(drafts)
            out.append(work)
        return out

    def _add_optional(self, lane: Lane, works: list[Work]) -> list[Work]:
        spare = min(lane.free_rows, lane.budget) - sum(work.rows for work in works)
        if spare <= 0:
            return works
        optional = [sequence for sequence in lane.running if sequence.optional and sequence.remaining]
        if len(lane.running) < lane.max_sequences:
            newcomer = next((sequence for sequence in lane.waiting if sequence.optional and sequence.remaining), None)
            required = lane.waiting and not lane.waiting[0].optional
            if newcomer is not None and not required and self._admit(lane, newcomer):
                optional.append(newcomer)
        for sequence in optional:
            count = sequence.chunk(spare)
            if 0 < count <= spare and self._extend(sequence, sequence.num_computed + count):
                works.append(Work(sequence, sequence.num_computed, count))
                spare -= count
        return works

    # Below: what batches in flight still use.

    def _drop(self, flight: Flight, sequence: Sequence) -> None:
        """What a batch in flight computes of a sequence counts for nothing: it will be computed once more."""
        flight.drop(sequence)
        # what it adds to the running sum has to go, and a sum that it notes is of tokens that are gone
        sequence.rolled_back = True
        sequence.sums = {length: total for length, total in sequence.sums.items() if length <= sequence.num_computed}

    def _release(self, pages: list[Page]) -> None:
        flights = {flight for lane in self.lanes for flight in lane.flights}
        if flights:
            self._held.append((flights, pages))
        else:
            self.pool.release(pages)
        self._unblock()

    def _settle(self) -> bool:
        """Wait until no batch uses what is held; whether anything was."""
        if not self._held:
            return False
        for lane in self.lanes:
            for flight in lane.flights:
                flight.wait()
        held, self._held = self._held, []
        for _, pages in held:
            self.pool.release(pages)
        return True

    def _unblock(self) -> None:
        for lane in self.lanes:
            lane.blocked = False

    # Below: pages of one sequence.

    def _lane(self, sequence: Sequence) -> Lane:
        return self.lane(sequence.model.backbone)

    def _advance(self, sequence: Sequence, computed: int) -> None:
        sequence.record.computed_tokens += computed - sequence.num_computed
        if sequence.closes:  # its last token went through some layers only
            return
        size = sequence.table.layout.tokens_per_page
        first = sequence.num_computed // size
        sequence.num_computed = computed
        for index in range(first, computed // size):
            self._publish(sequence, index, index * size, (index + 1) * size)

    def _publish(self, sequence: Sequence, index: int, start: int, stop: int) -> None:
        pages = sequence.table.pages
        parent = pages[index - 1] if index else sequence.root
        own = pages[index]
        page = self.pool.insert(parent, own, tuple(sequence.content[start:stop]))
        if page is not own:
            sequence.table.replace(index, page)
            self._release([own])

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
        if fresh is None and self._settle():
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
        insort(lane.running, sequence, key=_urgency)
        return True

    def _extend(self, sequence: Sequence, tokens: int) -> bool:
        """Pages for `tokens` tokens in all, if they can be had without taking any from others."""
        table = sequence.table
        missing = table.layout.pages(tokens) - len(table.pages)
        if missing <= 0:
            return True
        pages = self.pool.allocate(table.layout, missing, table.pages[-1] if table.pages else None)
        if pages is not None:
            table.extend(pages)
        return pages is not None

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Pages for `tokens` tokens in all, preempting the least urgent until there are enough."""
        while not self._extend(sequence, tokens):
            if self._settle():
                continue
            victim = max((item for lane in self.lanes for item in lane.running), key=_urgency)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _make_way(self, sequence: Sequence) -> bool:
        """Preempt the least urgent of all lanes for a waiting sequence that is older than all that must run.

        Without this, younger sequences of other lanes could take turns for ever while it waits for pages.
        """
        running = [item for lane in self.lanes for item in lane.running]
        if not running:
            return False
        victim = max(running, key=_urgency)
        if not victim.optional and min(running, key=_urgency).order < sequence.order:
            return False
        self._preempt(victim)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's pages; it waits, and computes again what is gone by the time it returns."""
        lane = self._lane(sequence)
        self._stop(lane, sequence)
        insort(lane.waiting, sequence, key=_urgency)
        sequence.record.preemptions += 1
        self.preemptions += 1

    def _stop(self, lane: Lane, sequence: Sequence) -> None:
        size = sequence.table.layout.tokens_per_page
        index, rest = divmod(sequence.num_computed, size)
        if rest:
            self._publish(sequence, index, index * size, sequence.num_computed)
        for flight in lane.flights:
            self._drop(flight, sequence)
        self._release(sequence.table.pages)
        sequence.table = type(sequence.table)(sequence.table.layout)
        sequence.num_computed = 0
        sequence.rolled_back = False
        sequence.sums.clear()
        sequence.running = False
        sequence.features.clear()
        lane.running.remove(sequence)
        if sequence.pool_slot is not None:
            lane.free_slots.append(sequence.pool_slot)
            sequence.pool_slot = None


def _urgency(sequence: Sequence) -> tuple[bool, tuple[int, int, int]]:
    return sequence.optional, sequence.order
