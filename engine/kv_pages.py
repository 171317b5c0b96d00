"""One pool of pages for the keys and values of all models, and the index that finds a prefix again.

    arena   |-------- slab 0 --------|-------- slab 1 --------|-------- slab 2 --------| ...
    slab    owned by one layout at a time, cut into that layout's pages; goes back when its last page is free
    page    free        in no table, no content           (slab.free)
            owned       refs > 0: in one or more block tables, perhaps in the prefix index too
            cached      refs = 0 but in the prefix index: evicted when space is needed, oldest leaf first

The prefix index is a tree of pages: a page's children continue its text. Looking up compares the tokens
themselves, so there is no hash to collide; whoever holds a page holds its parents, so a page without holders
has descendants without holders, and releasing tails first keeps every child older than its parent.
"""

from __future__ import annotations

import math
import re
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..kernels.huge_pages import prefer
from ..kernels.paged_attention import LayerKV
from .errors import DoesNotFit, StockadeError


class PoolCorrupted(StockadeError):
    """`check_integrity` found pages that are not accounted for: a defect of this engine."""


@dataclass(frozen=True)
class KVLayout:
    """The shape of one model's keys and values; models of one shape and depth may share slabs.

    Rows of a head are padded to 16 bytes with zeros, so that a vector load never straddles two rows.
    """

    depth: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    tokens_per_page: int

    @property
    def row_bytes(self) -> int:
        return -(-self.head_dim * self.dtype.itemsize // 16) * 16

    @property
    def page_bytes(self) -> int:
        return 2 * self.depth * self.kv_heads * self.row_bytes * self.tokens_per_page

    def pages(self, tokens: int) -> int:
        """How many pages hold this many tokens."""
        return -(-tokens // self.tokens_per_page)


@dataclass(eq=False, slots=True)
class Page:
    """One page. `row` is the place of its first token in the layer views of its layout.

    content: the tokens in it once they are final and findable, else None. A content shorter than the page is
    the end of a finished text and has no children.
    """

    layout: KVLayout
    slab: int
    index: int
    row: int
    refs: int = 1
    content: tuple[int, ...] | None = None
    parent: Page | PrefixRoot | None = None
    children: dict[tuple[int, ...], Page] = field(default_factory=dict)
    last_used: int = 0


@dataclass(eq=False, slots=True, weakref_slot=True)
class PrefixRoot:
    """Where texts of one layout, one set of weights and one salt begin."""

    children: dict[tuple[int, ...], Page] = field(default_factory=dict)


class PrefixMatch(NamedTuple):
    """The longest known beginning of a text: whole pages, then `partial_tokens` tokens of one more page."""

    pages: list[Page]
    partial: Page | None
    partial_tokens: int

    @property
    def tokens(self) -> int:
        whole = len(self.pages) * self.pages[0].layout.tokens_per_page if self.pages else 0
        return whole + self.partial_tokens


class _Slab:
    """A slab while a layout owns it. `free` has one byte a page, 1 = free.

    hoped_for: for a held page, up to where its sequence hopes to grow; others begin there only in need.
    """

    def __init__(self, layout: KVLayout, pages: int) -> None:
        self.layout = layout
        self.free = bytearray(b"\x01" * pages)
        self.hoped_for: dict[int, int] = {}
        self.cached: set[Page] = set()
        self.owned = 0

    @property
    def empty(self) -> bool:
        return not self.owned and not self.cached


class PagePool:
    """The arena and who owns which part of it.

    kv_bytes: size of the arena in bytes. layouts: every layout that will be used. zeroed: whether pages are zeroed
    before they are given out, which attention in plain torch needs. Raises `DoesNotFit` when the arena cannot give
    each layout one slab, or is more than the device has left.
    """

    def __init__(self, kv_bytes: int, layouts: Iterable[KVLayout], device: torch.device, zeroed: bool = True) -> None:
        self.layouts = list(dict.fromkeys(layouts))
        # Slabs begin at a whole row of every layout, so that a token's place is one number per layout.
        unit = math.lcm(*(layout.row_bytes for layout in self.layouts))
        largest = max(layout.page_bytes for layout in self.layouts)
        wanted = max(largest, min(kv_bytes // 32, 64 << 20))
        self.slab_bytes = -(-wanted // unit) * unit
        count = kv_bytes // self.slab_bytes
        if count < len(self.layouts):
            raise DoesNotFit(
                f"kv_bytes={kv_bytes:,} is too small: {len(self.layouts)} layouts need at least "
                f"{len(self.layouts) * self.slab_bytes:,} bytes"
            )
        try:
            self.arena = torch.empty(count * self.slab_bytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise DoesNotFit(f"kv_bytes={kv_bytes:,} is more than {device} has left") from error
        prefer(self.arena)
        # Plain torch reads sequences of unequal length in one call, the shorter ones up to the end of their last page
        # behind a mask; a mask does not stop a NaN, so the rest of a page must hold numbers.
        self._zero_fresh = zeroed
        self.slabs: list[_Slab | None] = [None] * count
        self._all_rows = {layout: self._rows(layout) for layout in self.layouts}
        self._views = {layout: self._layer_views(layout) for layout in self.layouts}
        self._lru: dict[KVLayout, OrderedDict[Page, None]] = {layout: OrderedDict() for layout in self.layouts}
        # A root lives as long as a page or a sequence names it: salts may come without end.
        self._roots: WeakValueDictionary[Hashable, PrefixRoot] = WeakValueDictionary()
        self._clock = 0
        self.evictions = 0

    # What a reader of keys and values needs.

    def layers(self, layout: KVLayout) -> list[LayerKV]:
        """The layer views of a layout, over the whole arena; index them with rows of its own pages only."""
        return self._views[layout]

    def copy_tokens(self, source: Page, target: Page, tokens: int) -> None:
        """Copy the first `tokens` tokens of a page, all layers at once; both may be given away afterwards."""
        rows = self._all_rows[source.layout]
        rows[:, target.row : target.row + tokens] = rows[:, source.row : source.row + tokens]
        if self.arena.is_cuda:  # others work on streams of their own
            torch.cuda.current_stream().synchronize()

    # Pages.

    def capacity(self, layout: KVLayout) -> int:
        """Pages of this layout that the whole arena can hold."""
        return len(self.slabs) * self._pages_per_slab(layout)

    def available(self, layout: KVLayout) -> int:
        """Pages that `allocate` could give now, evicting whatever nobody holds."""
        pages = 0
        for slab in self.slabs:
            if slab is None or not slab.owned:
                pages += self._pages_per_slab(layout)
            elif slab.layout == layout:
                pages += len(slab.free) - slab.owned
        return pages

    def allocate(self, layout: KVLayout, count: int, after: Page | None = None, room: int = 0) -> list[Page] | None:
        """`count` fresh pages, the caller's alone, or None (and nothing changed) when there are not enough.

        after: the page they continue; adjacent pages are read as one run. room: how many pages the caller may
        come to need from here on, for which it would like to find the neighbors free.
        """
        if count > self.available(layout):
            return None
        pages: list[Page] = []
        for taken in range(count):
            room_left = max(count, room) - taken
            number, index = self._find(layout, after, room_left)
            page = self._take(number, index, layout)
            if after is None or (after.slab, after.index + 1) != (number, index):
                self._slab(page).hoped_for[index] = index + room_left
            pages.append(page)
            after = page
        return pages

    def retain(self, pages: Sequence[Page]) -> None:
        for page in pages:
            if page.refs == 0:
                slab = self._slab(page)
                slab.cached.remove(page)
                slab.owned += 1
                del self._lru[page.layout][page]
            page.refs += 1

    def release(self, pages: Sequence[Page]) -> None:
        """Give back one reference to each page of a block table, given in order from the first token on."""
        self._clock += 1
        for page in reversed(pages):
            if page.refs < 1:
                raise PoolCorrupted("a page was released more often than it was taken")
            page.refs -= 1
            if page.refs:
                continue
            slab = self._slab(page)
            slab.owned -= 1
            slab.hoped_for.pop(page.index, None)
            page.last_used = self._clock
            if page.content is None:
                self._free(page)
            else:
                slab.cached.add(page)
                self._lru[page.layout][page] = None

    # Prefixes.

    def root(self, layout: KVLayout, weights: str, salt: str | None) -> PrefixRoot:
        """Where to look for texts computed in this layout by the weights with this content hash."""
        return self._roots.setdefault((layout, weights, salt), PrefixRoot())

    def match(self, root: PrefixRoot, layout: KVLayout, content: Sequence[int]) -> PrefixMatch:
        """The longest known beginning of `content`; nothing is retained yet."""
        pages: list[Page] = []
        node: Page | PrefixRoot = root
        size = layout.tokens_per_page
        for start in range(0, len(content) - size + 1, size):
            child = node.children.get(tuple(content[start : start + size]))
            if child is None:
                break
            pages.append(child)
            node = child
        rest = tuple(content[len(pages) * size : (len(pages) + 1) * size])
        best, best_tokens = None, 0
        for child_content, child in node.children.items():
            common = _common_prefix(child_content, rest)
            if common > best_tokens:
                best, best_tokens = child, common
        return PrefixMatch(pages, best, best_tokens)

    def insert(self, parent: Page | PrefixRoot, page: Page, content: tuple[int, ...]) -> Page:
        """Make an owned page findable as the continuation of `parent`.

        Where the same continuation is known already, the known page is returned, retained for the caller, who then
        has no use for its own page and releases it.
        """
        known = parent.children.get(content)
        if known is page:
            return page
        if known is not None:
            self.retain([known])
            return known
        page.content = content
        page.parent = parent
        parent.children[content] = page
        return page

    def clear_cache(self) -> None:
        """Forget every page that nobody holds."""
        for lru in self._lru.values():
            while lru:
                self._evict(next(iter(lru)))

    # Self-check.

    @property
    def owned_pages(self) -> int:
        return sum(slab.owned for slab in self.slabs if slab is not None)

    @property
    def cached_pages(self) -> int:
        return sum(len(lru) for lru in self._lru.values())

    def check_integrity(self, tables: Iterable[Sequence[Page]] = ()) -> None:
        """Raise `PoolCorrupted` unless every page is free, cached, or owned exactly as often as `tables` say."""
        held = Counter(page for table in tables for page in table)
        for page, refs in held.items():
            _expect(page.refs == refs, f"page {page.slab}:{page.index} has {page.refs} references, not {refs}")
        owned = Counter(page.slab for page in held)
        for number, slab in enumerate(self.slabs):
            if slab is None:
                _expect(not owned[number], f"slab {number} is free but has holders")
                continue
            taken = len(slab.free) - sum(slab.free)
            _expect(slab.owned == owned[number], f"slab {number} counts {slab.owned} owners, not {owned[number]}")
            _expect(taken == slab.owned + len(slab.cached), f"slab {number}: free + cached + owned is not the total")
            _expect(not slab.empty, f"slab {number} holds nothing but was not given back")
        cached = {page for slab in self.slabs if slab is not None for page in slab.cached}
        listed = {page for lru in self._lru.values() for page in lru}
        _expect(cached == listed, "cached pages and the eviction order differ")
        reachable: set[Page] = set()
        stack: list[Page | PrefixRoot] = list(self._roots.values())
        while stack:
            node = stack.pop()
            for content, child in node.children.items():
                _expect(child.parent is node and child.content == content, "a page and its parent disagree")
                if isinstance(node, Page):
                    _expect(node.refs >= child.refs, "a page is held more often than its parent")
                reachable.add(child)
                stack.append(child)
        _expect(cached <= reachable, "a cached page cannot be found")
        _expect(reachable <= cached | set(held), "the prefix index names a page that is free")

    # Below: how slabs are cut and pages are found.

    def _pages_per_slab(self, layout: KVLayout) -> int:
        return self.slab_bytes // layout.page_bytes

    def _slab(self, page: Page) -> _Slab:
        slab = self.slabs[page.slab]
        assert slab is not None
        return slab

    def _rows(self, layout: KVLayout) -> Tensor:
        """[depth * 2 * kv_heads, rows, head_dim]: row r of slab s is s * (slab bytes / row bytes) + r."""
        elements = self.arena.view(layout.dtype)
        padded = layout.row_bytes // layout.dtype.itemsize
        slab_tokens = self._pages_per_slab(layout) * layout.tokens_per_page
        rows = (len(self.slabs) - 1) * (self.slab_bytes // layout.row_bytes) + slab_tokens
        heads = layout.depth * 2 * layout.kv_heads
        return elements.as_strided((heads, rows, layout.head_dim), (slab_tokens * padded, padded, 1))

    def _clear_padding(self, layout: KVLayout, number: int) -> None:
        """Zero what pads a slab's rows to 16 bytes: kernels read it with the row, times a query's zeros, and it may
        be the NaN of another layout's numbers."""
        rows = self._all_rows[layout]
        heads, _, dim = rows.shape
        first, slab_tokens = number * (self.slab_bytes // layout.row_bytes), rows.stride(0) // rows.stride(1)
        padding = rows.stride(1) - dim
        if padding:
            start = rows.storage_offset() + first * rows.stride(1) + dim
            rows.as_strided((heads, slab_tokens, padding), rows.stride(), start).zero_()

    def _layer_views(self, layout: KVLayout) -> list[LayerKV]:
        heads = layout.kv_heads
        views = []
        for layer in self._all_rows[layout].split(2 * heads):
            views.append(LayerKV(layer, layer[:heads].unsqueeze(0), layer[heads:].unsqueeze(0)))
        return views

    def _find(self, layout: KVLayout, after: Page | None, room: int) -> tuple[int, int]:
        """Where the next page goes: beside its predecessor, where there is room, anywhere, or evict."""
        if after is not None:
            slab, index = self._slab(after), after.index + 1
            if index < len(slab.free) and slab.free[index]:
                return after.slab, index
        place = self._gap(layout, room)
        if place is not None:
            return place
        fresh = self._free_slab()
        if fresh is None:
            place = self._gap(layout, 1) or self._gap(layout, 1, hopes=False)
            if place is not None:
                return place
            fresh = self._idle_slab(layout)
        if fresh is not None:
            self.slabs[fresh] = _Slab(layout, self._pages_per_slab(layout))
            self._clear_padding(layout, fresh)
            return fresh, 0
        if self._lru[layout]:
            oldest = next(iter(self._lru[layout]))
            place = oldest.slab, oldest.index
            self._evict(oldest, keep_slab=True)
            return place
        raise PoolCorrupted("pages were promised that are not there")

    def _gap(self, layout: KVLayout, pages: int, hopes: bool = True) -> tuple[int, int] | None:
        """The first place with so many free pages in a row, that nobody hopes for unless `hopes` is False.

        First come, first placed: sequences of one size then lie at one distance, and are read in one call.
        """
        wanted = re.compile(b"\x01{%d}" % pages)
        for number, slab in enumerate(self.slabs):
            if slab is None or slab.layout != layout:
                continue
            free = bytearray(slab.free)
            if hopes:
                for start, stop in slab.hoped_for.items():
                    free[start : min(stop, len(free))] = bytes(min(stop, len(free)) - start)
            if gap := wanted.search(free):
                return number, gap.start()
        return None

    def _free_slab(self) -> int | None:
        return next((number for number, slab in enumerate(self.slabs) if slab is None), None)

    def _idle_slab(self, layout: KVLayout) -> int | None:
        """Take a slab whose pages, of another layout, nobody holds: the idlest.

        Its own cached pages go first: taking a slab from another layout is for when there are none.
        """
        idle = [
            (max(page.last_used for page in slab.cached), number)
            for number, slab in enumerate(self.slabs)
            if slab is not None and not slab.owned and slab.layout != layout
        ]
        if self._lru[layout] or not idle:
            return None
        number = min(idle)[1]
        while (slab := self.slabs[number]) is not None:
            self._evict_subtree(next(iter(slab.cached)))
        return number

    def _take(self, number: int, index: int, layout: KVLayout) -> Page:
        slab = self.slabs[number]
        assert slab is not None
        assert slab.free[index]
        slab.free[index] = 0
        slab.owned += 1
        row = number * (self.slab_bytes // layout.row_bytes) + index * layout.tokens_per_page
        if self._zero_fresh:
            self._all_rows[layout][:, row : row + layout.tokens_per_page] = 0
        return Page(layout, number, index, row)

    def _evict_subtree(self, page: Page) -> None:
        order = [page]
        for node in order:  # grows while it is read: parents before children
            order.extend(node.children.values())
        for node in reversed(order):
            self._evict(node)

    def _evict(self, page: Page, keep_slab: bool = False) -> None:
        assert page.refs == 0 and not page.children
        assert page.parent is not None
        assert page.content is not None
        del page.parent.children[page.content]
        page.parent, page.content = None, None
        self._slab(page).cached.remove(page)
        del self._lru[page.layout][page]
        self.evictions += 1
        self._free(page, keep_slab)

    def _free(self, page: Page, keep_slab: bool = False) -> None:
        slab = self._slab(page)
        slab.free[page.index] = 1
        if slab.empty and not keep_slab:
            self.slabs[page.slab] = None


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    count = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        count += 1
    return count


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise PoolCorrupted(message)
