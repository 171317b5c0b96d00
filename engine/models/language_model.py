"""What the engine needs of a decoder, whether its own or one of `transformers`."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ...kernels.lora import ActiveAdapters
from ...kernels.native import NativeLayers
from .decoder import ATTEND
from .fused import FusedLayers


class LanguageModelConfig(Protocol):
    """`DecoderConfig` says what these are."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def windows(self) -> tuple[int | None, ...]: ...
    @property
    def attention_scale(self) -> float: ...
    @property
    def attention_cap(self) -> float | None: ...


class LanguageModel(Protocol):
    """A ragged batch goes through `embed`, `block` for each layer below its depth, and `logits`.

    depth: how many layers there are. head: the output matrix over the vocabulary, None without one. native, fused:
    what runs several layers at once, where there is such. kv_scales: [layers, 2 * kv_heads] fp32 where pages hold
    keys and values in fp8: what is stored times it is the number. way_of_running: all that these depend on
    beside the weights.
    """

    device: torch.device
    dtype: torch.dtype
    depth: int
    head: Any
    native: NativeLayers | None
    fused: FusedLayers | None
    kv_scales: Tensor | None

    @property
    def config(self) -> LanguageModelConfig: ...

    @property
    def way_of_running(self) -> str: ...

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [n] -> [n, hidden]."""

    def angles(self, positions: Tensor) -> Any:
        """positions [n] -> what blocks need to know of them, in a form of the model's own."""

    def block(
        self, index: int, x: Tensor, angles: Any, attend: ATTEND, adapters: ActiveAdapters | None = None
    ) -> Tensor:
        """Layer `index` over x [n, hidden], which it may overwrite -> [n, hidden]. `attend` stores the new keys and
        values, and attends."""

    def logits(self, x: Tensor) -> Tensor:
        """x [n, hidden], the output of the last layer -> [n, vocab] in the model's dtype."""
