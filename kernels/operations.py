"""The operations of a fused decoder layer as one set, in Triton or in plain torch. It adds nothing to either."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from . import reference
from .backend import Backend
from .lora import LoraStack
from .pooled_logit import pooled_head_reference
from .sampling import SamplingRows


class Operations(NamedTuple):
    """What each does, and its arguments, `reference` says."""

    backend: Backend
    add_rms_norm: Callable[..., Tensor]
    rope_write: Callable[..., None]
    paged_attention: Callable[..., Tensor]
    gated: Callable[..., Tensor]
    pooled_head: Callable[..., tuple[Tensor, Tensor]]
    scatter_features: Callable[..., None]
    add_low_rank: Callable[[Tensor, Tensor, Tensor, LoraStack], None]
    sample_ids: Callable[[Tensor, SamplingRows], Tensor] | None  # None: none here; the engine has its own

    @classmethod
    def of(cls, backend: Backend) -> Operations:
        if backend == "reference":
            return cls(
                backend,
                reference.add_rms_norm,
                reference.rope_write,
                reference.paged_attention,
                reference.gated,
                pooled_head_reference,
                reference.scatter_features,
                reference.add_low_rank,
                None,
            )
        # imported where they run only: the CPU needs no Triton
        from .triton.add_rms_norm import add_rms_norm
        from .triton.gated import gated
        from .triton.lora import add_low_rank
        from .triton.paged_attention import paged_attention
        from .triton.pooled_head import pooled_head
        from .triton.rope_write import rope_write
        from .triton.sample import sample
        from .triton.scatter_features import scatter_features

        def sample_ids(logits: Tensor, rows: SamplingRows) -> Tensor:
            return sample(logits, rows).ids

        return cls(
            backend,
            add_rms_norm,
            rope_write,
            paged_attention,
            gated,
            pooled_head,
            scatter_features,
            add_low_rank,
            sample_ids,
        )
