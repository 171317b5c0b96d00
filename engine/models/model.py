"""What the engine runs: backbones (weights) and the models that use them under a name."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from ...kernels.quantized import FP8
from ..kv_pages import KVLayout
from ..text import Codec
from .attached import AttachedAdapter
from .heads import Head, HeadSpec
from .language_model import LanguageModel
from .vision.adapter import VisionAdapter


@dataclass(frozen=True, eq=False)
class Backbone:
    """One set of weights. content_hash: of all of them, so that equal weights share pages under any name.

    adapters: what is attached beside the weights; a token's adapter is an index into it, -1 for none.
    """

    decoder: LanguageModel
    content_hash: str
    vision: VisionAdapter | None = None
    adapters: list[AttachedAdapter] = field(default_factory=list)

    def attach(self, adapter: AttachedAdapter) -> int:
        """Add an adapter, made for this decoder; returns its index. One that is there already is not added again."""
        for index, known in enumerate(self.adapters):
            if (known.content_hash, known.invocation) == (adapter.content_hash, adapter.invocation):
                return index
        self.adapters.append(adapter)
        return len(self.adapters) - 1

    @cached_property
    def cache_key(self) -> str:
        """All that its keys and values depend on: the weights, and how they are run (rotary scaling, windows …)."""
        return f"{self.content_hash} {self.decoder.way_of_running}"


@dataclass(frozen=True, eq=False)
class Model:
    """A backbone under a name, with the tokenizer, the depth it runs to and, for a detector, its head.

    context: most tokens of one sequence. max_images: most images in one prompt. chat_only: it understands
    nothing but its own chat template, so a pass that has both forms of a prompt uses the chat. adapter: index
    into the backbone's adapters, None for the weights alone. pad_id: what a classifier takes for padding at the end
    of a text, None where there is none.
    """

    name: str
    backbone: Backbone
    codec: Codec
    context: int
    depth: int
    head: Head | None = None
    image_token_id: int | None = None
    max_images: int = 0
    chat_only: bool = False
    adapter: int | None = None
    pad_id: int | None = None

    @property
    def spec(self) -> HeadSpec | None:
        return None if self.head is None else self.head.spec

    @property
    def vocab_size(self) -> int:
        """How many tokens it has weights for; its tokenizer may know more."""
        return self.backbone.decoder.config.vocab_size

    @property
    def invocation(self) -> tuple[int, ...]:
        """The ids that switch on its adapter: the engine appends them. Empty where it applies to every token."""
        return () if self.adapter is None else self.backbone.adapters[self.adapter].invocation

    def layout(self, tokens_per_page: int) -> KVLayout:
        config = self.backbone.decoder.config
        dtype = self.backbone.decoder.dtype if self.backbone.decoder.kv_scales is None else FP8
        return KVLayout(self.depth, config.kv_heads, config.head_dim, dtype, tokens_per_page)
