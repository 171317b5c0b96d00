"""What the engine runs: backbones (weights) and the models that use them under a name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from ..kv_pages import KVLayout
from ..text import Codec
from .decoder import Decoder, rope_parameters
from .heads import Head
from .vision import VisionAdapter


@dataclass(frozen=True, eq=False)
class Backbone:
    """One set of weights. content_hash: of all of them, so that equal weights share pages under any name."""

    decoder: Decoder
    content_hash: str
    vision: VisionAdapter | None = None

    @cached_property
    def cache_key(self) -> str:
        """All that its keys and values depend on: the weights, and how they are run (rotary scaling, windows …)."""
        config = self.decoder.config
        return f"{self.content_hash} {replace(config, rope=None)} {sorted(rope_parameters(config.rope).items())}"


@dataclass(frozen=True, eq=False)
class Model:
    """A backbone under a name, with the tokenizer, the depth it runs to and, for a detector, its head.

    context: most tokens of one sequence. max_images: most images in one prompt. chat_only: it understands
    nothing but its own chat template, so a pass that has both forms of a prompt uses the chat.
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

    def layout(self, tokens_per_page: int) -> KVLayout:
        config = self.backbone.decoder.config
        dtype = self.backbone.decoder.dtype
        return KVLayout(self.depth, config.kv_heads, config.head_dim, dtype, tokens_per_page)
