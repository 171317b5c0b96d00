"""The token stream of one pass on one model: what is known, what is computed, and where it lies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from .drafts import PromptLookup
from .kv_pages import KVLayout, Page, PrefixRoot
from .models.model import Model
from .models.vision.adapter import PreparedImage
from .request import PassRecord
from .sampling import Sampled, SamplingParams


class PlacedImage(NamedTuple):
    """An image, the index of its first token in the sequence and that token's rotary position."""

    start: int
    image: PreparedImage
    position: int

    @property
    def stop(self) -> int:
        return self.start + self.image.tokens

    @property
    def shift(self) -> int:
        """What a token behind it adds to its index for its rotary position."""
        return self.position + self.image.place.advance - self.stop


class BlockTable:
    """A sequence's pages in order, and the runs of adjacent ones, which are read as one piece."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout
        self.pages: list[Page] = []
        self.version = 0  # counts changes
        self._runs: list[tuple[int, int]] = []  # (first row, rows)

    def extend(self, pages: list[Page]) -> None:
        size = self.layout.tokens_per_page
        self.version += 1
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

    def cut(self, count: int) -> None:
        """Keep the first `count` pages."""
        pages = self.pages[:count]
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
    """One token stream as the scheduler sees it: `num_tokens` are known, `num_computed` have keys and values.

    order: (request id, pass number, part of the pass): who goes first, and the youngest is preempted first.
    content: what a token stands for in the prefix index: the token itself, or a number made from more where more
    decides its keys and values (the row of an image, an adapter); the same list as `tokens` where nothing does.
    limit: most tokens it may come to have. optional: it runs only where that costs nothing. open: more tokens may
    come whose text is not written yet. drafts: guesses of the next tokens, to be verified in the next step.

    tap: the model whose head reads this sequence's own hidden states. pool_from: first token that a mean head pools.
    sums: the running sum at some of its lengths, for a sequence that may be rolled back.
    """

    order: tuple[int, int, int]
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
    draw: int = 0  # which generation of the request it is, for its random numbers
    words: tuple[tuple[int, ...], ...] = ()
    scored: bool = False
    optional: bool = False
    open: bool = False
    tap: Model | None = None
    pool_from: int | None = None
    adapted_from: int | None = None  # first token under the model's adapter
    deadline: float | None = None
    drafter: PromptLookup | None = None
    drafts: list[int] = field(default_factory=list)
    num_computed: int = 0
    pool_slot: int | None = None
    running: bool = False
    closing: bool = False  # its last token is computed for the tap alone
    rolled_back: bool = False
    sums: dict[int, Tensor] = field(default_factory=dict)
    features: dict[bytes, Tensor] = field(default_factory=dict)
    sampled: list[Sampled] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def remaining(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def decoding(self) -> bool:
        return self.sampling is not None and self.num_tokens > self.prompt_tokens and self.remaining == 1

    @property
    def closes(self) -> bool:
        """Whether its next token is the last, computed for the tap alone; preempted, it has others before that."""
        return self.closing and self.remaining == 1

    @property
    def depth(self) -> int:
        """How many layers its next tokens go through."""
        return self.tap.depth if self.tap is not None and self.closes else self.model.depth

    @property
    def wants_logits(self) -> bool:
        return (self.sampling is not None or bool(self.words)) and not self.closing

    @property
    def device_can_choose(self) -> bool:
        """Whether the device can choose its next token: not where that depends on what was said before, or where more
        than the token is asked for, or where guesses are checked."""
        params = self.sampling
        return (
            params is not None
            and not self.closing
            and self.drafter is None
            and params.repetition_penalty == 1.0
            and params.logprobs is None
        )

    @property
    def reusable(self) -> int:
        """How many tokens may come from the prefix index: never the last, never one that is pooled."""
        return self.num_tokens - 1 if self.pool_from is None else min(self.num_tokens - 1, self.pool_from)

    @property
    def plain_content(self) -> list[int]:
        """What its tokens stand for without its adapter."""
        # a second time under the same adapter gives the number back
        return [self.content_of(item, at) for at, item in enumerate(self.content)]

    def append(self, token: int) -> None:
        self.tokens.append(token)
        if self.content is not self.tokens:
            self.content.append(self.content_of(token, len(self.tokens) - 1))

    def cut(self, count: int) -> None:
        """Forget all tokens but the first `count`; see `Scheduler.roll_back` for what is computed of them."""
        del self.tokens[count:]
        if self.content is not self.tokens:
            del self.content[count:]

    def content_of(self, content: int, position: int) -> int:
        """What stands in the prefix index for a token (or an image's row): under an adapter, a number of its own.

        What an adapter does to a token depends on where it became active; positions before that have the base's
        numbers, so the path to a page tells.
        """
        if self.adapted_from is None or position < self.adapted_from:
            return content
        assert self.model.adapter is not None
        adapter = self.model.backbone.adapters[self.model.adapter]
        return -(int(adapter.content_hash, 16) << 300) - content

    @property
    def whole_images(self) -> bool:
        """Whether a step computes an image's tokens all or none, as they attend to each other in both directions."""
        vision = self.model.backbone.vision
        return bool(self.images) and vision is not None and vision.whole

    def chunk(self, most: int) -> int:
        """How many of the remaining tokens the next step computes: `most`, or what comes before an image that would
        not end with them; if nothing does, all of that image."""
        start, stop = self.num_computed, self.num_computed + min(self.remaining, most)
        if not self.whole_images or start == stop:
            return stop - start
        for placed in self.images_between(start, stop):
            if placed.stop > stop:
                stop = placed.start if placed.start > start else placed.stop
        return stop - start

    def positions(self, start: int, stop: int) -> Iterable[int]:
        """Rotary positions of the tokens [start, stop) as text; those of an image with a grid are in the grid."""
        if not self.images or self.images[-1].stop <= start:
            shift = self.images[-1].shift if self.images else 0
            return range(start + shift, stop + shift)
        found: list[int] = []
        shift, at = 0, start
        for placed in self.images:
            found += range(at + shift, min(placed.stop, stop) + shift)
            at = max(at, min(placed.stop, stop))
            shift = placed.shift
        found += range(at + shift, stop + shift)
        return found

    def grids(self, start: int, stop: int, row: int) -> Iterator[tuple[int, Tensor]]:
        """(row, rotary positions [3, n]) of images with a grid in [start, stop), where token `start` has `row`."""
        for placed in self.images_between(start, stop):
            if placed.image.place.grid is not None:
                first, last = max(start, placed.start), min(stop, placed.stop)
                part = placed.image.place.grid[:, first - placed.start : last - placed.start]
                yield row + first - start, part + placed.position

    def images_between(self, start: int, stop: int) -> Iterator[PlacedImage]:
        return (placed for placed in self.images if placed.start < stop and placed.stop > start)
