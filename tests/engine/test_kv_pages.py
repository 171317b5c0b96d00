"""The page pool against a plain model of it: who holds what, what is found again, and every byte in its place."""

from __future__ import annotations

from dataclasses import dataclass, field
from zlib import crc32

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stockade.engine.errors import DoesNotFit
from stockade.engine.kv_pages import KVLayout, Page, PagePool, PoolCorrupted

CPU = torch.device("cpu")
WIDE = KVLayout(2, 1, 8, torch.float32, 4)
ODD = KVLayout(1, 2, 100, torch.bfloat16, 4)  # rows of 200 bytes, padded to 208
SMALL = KVLayout(3, 1, 4, torch.bfloat16, 8)  # rows of 8 bytes, padded to 16
LAYOUTS = (WIDE, ODD, SMALL)
SLAB = 3328  # one page of ODD


def pool_of(slabs: int, layouts: tuple[KVLayout, ...] = LAYOUTS) -> PagePool:
    return PagePool(slabs * SLAB, layouts, CPU)


def stamps(layout: KVLayout, salt: str | None, tokens: list[int]) -> list[float]:
    """For each token a number that depends on everything before it; exact in bf16."""
    head = f"{LAYOUTS.index(layout)} {salt} ".encode()
    return [float(crc32(head + bytes(tokens[: n + 1])) % 251) for n in range(len(tokens))]


def write(pool: PagePool, layout: KVLayout, row: int, value: float) -> None:
    for number, layer in enumerate(pool.layers(layout)):
        for head in range(2 * layout.kv_heads):
            layer.kv[head, row] = value + number + head


def read(pool: PagePool, layout: KVLayout, row: int) -> float:
    """The value written at a row; fails where layers or heads disagree."""
    value = float(pool.layers(layout)[0].kv[0, row, 0])
    for number, layer in enumerate(pool.layers(layout)):
        for head in range(2 * layout.kv_heads):
            assert (layer.kv[head, row] == value + number + head).all()
        assert layer.keys.data_ptr() == layer.kv.data_ptr()
        assert torch.equal(layer.values[0, :, row], layer.kv[layout.kv_heads :, row])
    return value


@dataclass
class Text:
    """A sequence as the test knows it: tokens, pages, and how many tokens are computed."""

    layout: KVLayout
    salt: str | None
    tokens: list[int]
    pages: list[Page] = field(default_factory=list)
    computed: int = 0

    def row(self, position: int) -> int:
        page, offset = divmod(position, self.layout.tokens_per_page)
        return self.pages[page].row + offset


class Pages(RuleBasedStateMachine):
    """Does with the pool what the scheduler does, writes real numbers, and reads all of them after every step."""

    @initialize(slabs=st.integers(3, 6))
    def start(self, slabs: int) -> None:
        self.pool = pool_of(slabs)
        self.slabs = slabs
        assert self.pool.slab_bytes == SLAB
        self.texts: list[Text] = []
        self.published: dict[tuple[KVLayout, str | None], list[list[int]]] = {}
        self.forgot = False

    def room(self, layout: KVLayout) -> int:
        """Pages that can be had, counted from what the test itself holds."""
        per_slab = SLAB // layout.page_bytes
        held: dict[int, set[int]] = {}
        owner: dict[int, KVLayout] = {}
        for text in self.texts:
            for page in text.pages:
                held.setdefault(page.slab, set()).add(page.index)
                assert owner.setdefault(page.slab, text.layout) == text.layout
        free = (self.slabs - len(held)) * per_slab
        return free + sum(per_slab - len(pages) for slab, pages in held.items() if owner[slab] == layout)

    @rule(
        layout=st.sampled_from(LAYOUTS),
        salt=st.sampled_from([None, "tenant"]),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        room=st.integers(0, 6),
    )
    def admit(self, layout: KVLayout, salt: str | None, tokens: list[int], room: int) -> None:
        pool = self.pool
        root = pool.root(layout, "weights", salt)
        match = pool.match(root, layout, tokens[:-1])
        known = [common(text, tokens[:-1]) for text in self.published.get((layout, salt), [])]
        assert match.tokens <= max(known, default=0)
        if not pool.evictions:
            assert match.tokens == max(known, default=0)
        borrowed = [*match.pages, match.partial] if match.partial else match.pages
        pool.retain(borrowed)
        text = Text(layout, salt, list(tokens), list(match.pages))
        holding = Text(layout, salt, [], list(borrowed))
        count = layout.pages(len(tokens)) - len(match.pages)
        self.texts.append(holding)
        expected = self.room(layout)
        self.texts.remove(holding)
        assert pool.available(layout) == expected
        fresh = pool.allocate(layout, count, match.pages[-1] if match.pages else None, room)
        if fresh is None:
            assert count > expected
            pool.release(borrowed)
            return
        assert count <= expected and len(fresh) == count
        if match.partial:
            pool.copy_tokens(match.partial, fresh[0], match.partial_tokens)
            pool.release([match.partial])
        text.pages += fresh
        text.computed = match.tokens
        self.texts.append(text)

    @precondition(lambda self: self.texts)
    @rule(which=st.integers(0, 99), more=st.lists(st.integers(0, 1), max_size=6))
    def compute_and_grow(self, which: int, more: list[int]) -> None:
        text, pool = self.texts[which % len(self.texts)], self.pool
        size = text.layout.tokens_per_page
        for position, value in enumerate(stamps(text.layout, text.salt, text.tokens)):
            if position >= text.computed:
                write(pool, text.layout, text.row(position), value)
        first, text.computed = text.computed // size, len(text.tokens)
        for index in range(first, text.computed // size):
            self.publish(text, index, (index + 1) * size)
        missing = text.layout.pages(len(text.tokens) + len(more)) - len(text.pages)
        if missing > 0:
            expected = self.room(text.layout)
            fresh = pool.allocate(text.layout, missing, text.pages[-1])
            assert (fresh is None) == (missing > expected)
            if fresh is None:
                return
            text.pages += fresh
        text.tokens += more

    @precondition(lambda self: self.texts)
    @rule(which=st.integers(0, 99))
    def close(self, which: int) -> None:
        text = self.texts.pop(which % len(self.texts))
        index, rest = divmod(text.computed, text.layout.tokens_per_page)
        if rest:
            self.publish(text, index, text.computed)
        self.pool.release(text.pages)

    @rule()
    def forget(self) -> None:
        self.pool.clear_cache()
        assert self.pool.cached_pages == 0
        self.published.clear()
        for text in self.texts:  # what is held stays findable
            size = text.layout.tokens_per_page
            for stop in range(size, text.computed + 1, size):
                self.published.setdefault((text.layout, text.salt), []).append(text.tokens[:stop])

    def publish(self, text: Text, index: int, stop: int) -> None:
        start = index * text.layout.tokens_per_page
        parent = text.pages[index - 1] if index else self.pool.root(text.layout, "weights", text.salt)
        own = text.pages[index]
        text.pages[index] = self.pool.insert(parent, own, tuple(text.tokens[start:stop]))
        if text.pages[index] is not own:
            self.pool.release([own])
        self.published.setdefault((text.layout, text.salt), []).append(text.tokens[:stop])

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity(text.pages for text in self.texts)
            assert self.pool.owned_pages == len({page for text in self.texts for page in text.pages})

    @invariant()
    def every_number_is_where_it_was_written(self) -> None:
        for text in getattr(self, "texts", []):
            for position, value in enumerate(stamps(text.layout, text.salt, text.tokens[: text.computed])):
                assert read(self.pool, text.layout, text.row(position)) == value

    def teardown(self) -> None:
        while getattr(self, "texts", []):
            self.close(0)
        if hasattr(self, "pool"):
            self.pool.check_integrity()
            assert self.pool.owned_pages == 0


def common(a: list[int], b: list[int]) -> int:
    same = (left == right for left, right in zip(a, b, strict=False))
    return next((n for n, equal in enumerate(same) if not equal), min(len(a), len(b)))


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_writing_one_page_touches_no_byte_of_another(layout: KVLayout) -> None:
    pool = pool_of(6)
    sentinel = 0xA5
    others = [other for other in LAYOUTS if other != layout]
    for other in others:
        assert pool.allocate(other, 1) is not None
    pages = pool.allocate(layout, 3)
    assert pages is not None
    pool.arena.fill_(sentinel)
    for offset in range(layout.tokens_per_page):
        for layer in pool.layers(layout):
            layer.kv[:, pages[1].row + offset] = 0
    changed = (pool.arena != sentinel).nonzero().flatten()
    used = layout.head_dim * layout.dtype.itemsize * 2 * layout.depth * layout.kv_heads * layout.tokens_per_page
    assert len(changed) == used  # the padding behind a row stays untouched
    assert int(changed[0]) // SLAB == int(changed[-1]) // SLAB == pages[1].slab
    for page in (pages[0], pages[2]):
        for layer in pool.layers(layout):
            rows = layer.kv[:, page.row : page.row + layout.tokens_per_page]
            assert (rows.contiguous().view(torch.uint8) == sentinel).all()


def test_rows_are_padded_to_16_bytes() -> None:
    assert (ODD.row_bytes, WIDE.row_bytes, SMALL.row_bytes) == (208, 32, 16)
    layer = pool_of(3).layers(ODD)[0]
    assert layer.kv.shape[-1] == 100 and layer.kv.stride(1) == 104
    assert all(view.stride(-1) == 1 and view.data_ptr() % 16 == 0 for view in layer)


def test_a_slab_goes_to_another_layout_when_its_pages_are_only_cached() -> None:
    pool = pool_of(3)
    root = pool.root(SMALL, "w", None)
    pages = pool.allocate(SMALL, pool.capacity(SMALL))
    assert pages is not None
    for number, page in enumerate(pages):
        pool.insert(root, page, (number,))
    assert pool.allocate(WIDE, 1) is None
    pool.release(pages)
    assert pool.cached_pages == len(pages)
    wide = pool.allocate(WIDE, pool.capacity(WIDE))
    assert wide is not None and pool.cached_pages == 0 and pool.evictions == len(pages)
    pool.check_integrity([wide])


def test_eviction_takes_the_least_recently_used_leaf_first() -> None:
    pool = pool_of(3, (ODD,))
    root = pool.root(ODD, "w", None)
    parent, child, other = pool.allocate(ODD, 3) or []
    pool.insert(root, parent, (1, 1, 1, 1))
    pool.insert(parent, child, (2, 2, 2, 2))
    pool.insert(root, other, (3, 3, 3, 3))
    pool.release([parent, child])
    pool.release([other])
    texts = {"child": [1, 1, 1, 1, 2, 2, 2, 2], "parent": [1, 1, 1, 1], "other": [3, 3, 3, 3]}
    known = []
    for _ in range(3):
        assert pool.allocate(ODD, 1) is not None
        known.append({name for name, text in texts.items() if pool.match(root, ODD, text).tokens == len(text)})
    assert known == [{"parent", "other"}, {"other"}, set()]


def test_equal_texts_end_up_on_one_page() -> None:
    pool = pool_of(3)
    root = pool.root(WIDE, "w", None)
    first, second = pool.allocate(WIDE, 2) or []
    assert pool.insert(root, first, (1, 2, 3, 4)) is first
    assert pool.insert(root, second, (1, 2, 3, 4)) is first
    pool.release([second])
    assert first.refs == 2 and pool.owned_pages == 1
    pool.check_integrity([[first], [first]])


@pytest.mark.parametrize(("weights", "salt"), [("other weights", None), ("w", "tenant")])
def test_texts_of_other_weights_or_another_salt_are_not_found(weights: str, salt: str | None) -> None:
    pool = pool_of(3)
    pages = pool.allocate(WIDE, 1) or []
    pool.insert(pool.root(WIDE, "w", None), pages[0], (1, 2, 3, 4))
    assert pool.match(pool.root(WIDE, "w", None), WIDE, [1, 2, 3, 4]).tokens == 4
    assert pool.match(pool.root(WIDE, weights, salt), WIDE, [1, 2, 3, 4]).tokens == 0


def test_roots_without_pages_are_forgotten() -> None:
    pool = pool_of(3)
    for number in range(100):
        pool.root(WIDE, "w", f"tenant {number}")
    assert len(pool._roots) <= 1


def test_an_arena_without_a_slab_for_each_layout_is_refused() -> None:
    with pytest.raises(DoesNotFit, match=r"kv_bytes=6,656 .* at least 9,984 bytes"):
        pool_of(2)


def test_a_page_is_released_once_only() -> None:
    pool = pool_of(3)
    pages = pool.allocate(WIDE, 1) or []
    pool.release(pages)
    with pytest.raises(PoolCorrupted, match="released more often"):
        pool.release(pages)


def test_the_check_finds_what_is_wrong() -> None:
    pool = pool_of(3)
    pages = pool.allocate(WIDE, 2) or []
    pool.check_integrity([pages])
    with pytest.raises(PoolCorrupted, match="counts 2 owners, not 0"):
        pool.check_integrity()  # leaked pages
    with pytest.raises(PoolCorrupted, match="has 1 references, not 2"):
        pool.check_integrity([pages, pages])
    pool.insert(pool.root(WIDE, "w", None), pages[0], (1, 2, 3, 4))
    pool.release(pages)
    pool._lru[WIDE].clear()
    with pytest.raises(PoolCorrupted, match="eviction order"):
        pool.check_integrity()


def test_what_pads_rows_is_zero_whatever_was_there() -> None:
    """A kernel multiplies it by zeros, which no NaN of another layout's numbers survives."""
    pool = pool_of(2, (ODD,))
    pool.arena.fill_(255)  # NaN in every dtype
    pages = pool.allocate(ODD, pool.capacity(ODD))
    assert pages
    for layer in pool.layers(ODD):
        heads, rows, _ = layer.kv.shape
        padded = layer.kv.as_strided((heads, rows, 104), layer.kv.stride(), layer.kv.storage_offset())
        for page in pages:
            assert not padded[:, page.row : page.row + ODD.tokens_per_page, 100:].any()
