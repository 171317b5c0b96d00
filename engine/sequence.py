"""The token stream of one pass on one model: what is known, what is computed, and where it lies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from .kv_pages import KVLayout, Page, PrefixRoot
from .models.model import Model
from .models.vision import PreparedImage
from .request import PassRecord
from .sampling import Sampled, SamplingParams


class PlacedImage(NamedTuple):
    """An image and the position of its first token."""

    start: int
    image: PreparedImage

    @property
    def stop(self) -> int:
        return self.start + self.image.tokens


class BlockTable:
    """A sequence's pages in order, and the runs of adjacent ones, which are read as one piece."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.pages: list[Page] = []
        self._runs: list[tuple[int, int]] = []  # (first row, rows)

    def extend(self, pages: list[Page]) -> None:
        size = self.layout.tokens_per_page
        for page in pages:
            if self._runs and sum(self._runs[-1]) == page.row:
                row, count = self._runs.pop()
                self._runs.append((row, count + size))
            else:
                self._runs.append((page.row, size))
        self.pages.extend(pages)

    def replace(self, index: int, page: Page) -> None:
        pages = self.pages
        pages[index] = page
        self.pages, self._runs = [], []
        self.extend(pages)

    def runs(self, start: int, stop: int) -> tuple[tuple[int, int], ...]:
        """(first row, tokens) of the tokens from position `start` up to `stop`."""
        if start == 0 and len(self._runs) == 1:
            return ((self._runs[0][0], stop),)
        out = []
        position = 0
        for row, count in self._runs:
            first, last = max(start, position), min(stop, position + count)
            if first < last:
                out.append((row + first - position, last - first))
            position += count
        return tuple(out)


@dataclass(eq=False)
class Sequence:
    """One pass as the scheduler sees it: `num_tokens` are known, `num_computed` of them have keys and values.

    order: (request id, pass number): who goes first, and the youngest is preempted first.
    content: what a token stands for in the prefix index: the token itself, or for a row of an image a number
    made from the image's key and the row. Without images it is the same list as `tokens`.
    limit: most tokens it may come to have. pool_from: first token that a mean head pools.
    """

    order: tuple[int, int]
    model: Model
    record: PassRecord
    root: PrefixRoot
    table: BlockTable
    tokens: list[int]
    content: list[int]
    prompt_tokens: int
    limit: int
    images: tuple[PlacedImage, ...] = ()
    sampling: SamplingParams | None = None  # None: nothing is generated
    seed: int = 0
    words: tuple[tuple[int, ...], ...] = ()
    pool_from: int | None = None
    deadline: float | None = None
    num_computed: int = 0
    pool_slot: int | None = None
    running: bool = False
    features: dict[bytes, Tensor] = field(default_factory=dict)
    sampled: list[Sampled] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def remaining(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def reusable(self) -> int:
        """How many tokens may come from the prefix index: never the last, never one that is pooled."""
        return self.num_tokens - 1 if self.pool_from is None else min(self.num_tokens - 1, self.pool_from)

    def append(self, token: int) -> None:
        self.tokens.append(token)
        if self.content is not self.tokens:
            self.content.append(token)

    def images_between(self, start: int, stop: int) -> Iterator[PlacedImage]:
        return (placed for placed in self.images if placed.start < stop and placed.stop > start)
