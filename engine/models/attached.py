"""An adapter beside the weights of a loaded decoder: its updates in the form a batch adds them, token by token.

What an adapter folder may hold is decided in `adapters`; which tokens it applies to is the engine's business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels.lora import LowRank as Update
from ...kernels.lora import Updates
from ..errors import CheckpointMismatch
from .adapters import Adapter, LowRank
from .checkpoint import ContentHash

if TYPE_CHECKING:
    from .decoder import Decoder, DecoderConfig

_PLACE = re.compile(
    r"model\.layers\.(?P<layer>0|[1-9]\d{0,5})\."
    r"(?:self_attn\.(?=[qkvo]_)|mlp\.(?=gate|up|down))(?P<map>q|k|v|o|gate|up|down)_proj\.weight"
)
# A part is one linear map of the decoder, fused from these of a checkpoint.
_PARTS = {"qkv": ("q", "k", "v"), "o": ("o",), "gate": ("gate",), "up": ("up",), "down": ("down",)}


@dataclass(frozen=True, eq=False)
class AttachedAdapter:
    """updates: (layer, "qkv" | "o" | "gate" | "up" | "down") -> low-rank update, on the decoder's device, in fp32 on
    the CPU (see `kernels.lora`) and in the decoder's dtype elsewhere.

    content_hash: of what is added, scales included; not of names, nor of the invocation. invocation: the ids an
    activated LoRA (aLoRA, arXiv 2504.12397) follows: it applies from the first of them on, and the keys and values
    of all tokens before are the base's. Empty for a LoRA that applies to every token.
    """

    content_hash: str
    updates: Updates
    invocation: tuple[int, ...]

    @classmethod
    def of(cls, adapter: Adapter, decoder: Decoder) -> AttachedAdapter:
        """Fit an adapter to a decoder whose weights stay as they are.

        Raises `CheckpointMismatch` for updates that are none of the decoder's layers or of other shapes, for whole
        parameters beside a classifier's head, and for invocation ids outside the vocabulary.
        """
        config = decoder.config
        if others := sorted(adapter.saved.keys() - {"score.weight"}):
            raise CheckpointMismatch(
                f"{adapter.path} replaces {others[0]!r} as a whole, which its base would lose; attached, an adapter "
                "may save score.weight only (merge this one: give it with its base)"
            )
        if unknown := [token for token in adapter.invocation if token >= config.vocab_size]:
            raise CheckpointMismatch(
                f"{adapter.path} is invoked by token {unknown[0]}; the base has {config.vocab_size} tokens"
            )
        shapes = _shapes(config)
        placed = _placed(adapter, shapes, config.layers)
        dtype = torch.float32 if decoder.device.type == "cpu" else decoder.dtype
        hasher = ContentHash()
        updates: dict[tuple[int, str], Update] = {}
        for layer in range(config.layers):
            for part, names in _PARTS.items():
                if not any((layer, name) in placed for name in names):
                    continue
                a, b = _fused([placed.get((layer, name)) for name in names], [shapes[name][0] for name in names])
                a, b = a.to(dtype), b.to(dtype)
                hasher.add(f"{layer}.{part}.a", a)
                hasher.add(f"{layer}.{part}.b", b)
                updates[layer, part] = Update(a.to(decoder.device), b.to(decoder.device))
        return cls(hasher.hexdigest(), updates, adapter.invocation)


def _placed(adapter: Adapter, shapes: Mapping[str, tuple[int, int]], layers: int) -> dict[tuple[int, str], LowRank]:
    """Each update by its layer and linear map."""
    placed = {}
    for name, update in adapter.updates.items():
        match = _PLACE.fullmatch(name)
        if match is None or int(match["layer"]) >= layers:
            raise CheckpointMismatch(
                f"{adapter.path} has a LoRA for {name!r}; attached, it may change the linear maps of the base's "
                f"{layers} decoder layers only"
            )
        found, shape = (update.b.shape[0], update.a.shape[1]), shapes[match["map"]]
        if found != shape:
            raise CheckpointMismatch(f"{adapter.path}: the LoRA for {name!r} is {found}, the base has {shape}")
        placed[int(match["layer"]), match["map"]] = update
    return placed


def _shapes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of a layer's linear maps as checkpoints have them."""
    hidden, ffn = config.hidden_size, config.ffn_size
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        **{"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)},
        **{"gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)},
    }


def _fused(updates: Sequence[LowRank | None], outs: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One update [in, ranks], [ranks, outs] for maps that are multiplied as one; in fp32, scales included.

    The second has each map's own block on its diagonal. The zeros beside them cost less than a call a map: 13
    against 34 us for queries, keys and values of 576 -> 960 by rank 16, one row.
    """
    a = [update.a.float() for update in updates if update is not None]
    b = [
        torch.zeros(rows, 0) if update is None else update.b.float() * update.scale
        for update, rows in zip(updates, outs, strict=True)
    ]
    return torch.cat(a).t().contiguous(), torch.block_diag(*b).t().contiguous()
