"""States, or keys and values, of texts from the engine's native layers: two to three times as fast as `transformers`
on one core, and the same numbers that serving has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from ..engine.models.decoder import Decoder
from ..engine.models.loader import load_models
from ..kernels.native import RaggedGroup, RaggedSequence
from ..kernels.paged_attention import LayerKV


def native_decoder(source: str | Path, dtype: torch.dtype, device: torch.device) -> Decoder | None:
    """The engine's decoder of a checkpoint, where it has native layers for this device and dtype."""
    if device.type != "cpu" or dtype is not torch.bfloat16:
        return None
    decoder = load_models(source, dtype=dtype, device=device).models["mllm"].backbone.decoder
    return decoder if isinstance(decoder, Decoder) and decoder.native is not None else None


@torch.inference_mode()
def keys_and_values(decoder: Decoder, rows: Sequence[Sequence[int]], depth: int) -> list[Tensor]:
    """Of the first `depth` layers, each [depth, 2, kv_heads, tokens, head_dim]; rotated, as caches hold them."""
    return [kv for _, kv in _run(decoder, rows, depth)]


@torch.inference_mode()
def states_below(decoder: Decoder, rows: Sequence[Sequence[int]], depth: int) -> list[Tensor]:
    """After the first `depth` layers, each [tokens, hidden], un-normed."""
    return [states for states, _ in _run(decoder, rows, depth)]


def _run(decoder: Decoder, rows: Sequence[Sequence[int]], depth: int) -> list[tuple[Tensor, Tensor]]:
    assert decoder.native is not None
    config, lengths = decoder.config, [len(row) for row in rows]
    kv = torch.empty(depth, 2 * config.kv_heads, sum(lengths), config.head_dim, dtype=decoder.dtype)
    caches = [LayerKV(both, *both.unsqueeze(0).split(config.kv_heads, 1)) for both in kv]
    starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
    spans = [RaggedSequence(at, n, 0, ((at, n),)) for at, n in zip(starts, lengths, strict=True)]
    x = decoder.embed(torch.tensor([token for row in rows for token in row]))
    angles = decoder.angles(torch.cat([torch.arange(length) for length in lengths]))
    decoder.native.run(0, depth, x, angles, torch.arange(len(x)), [RaggedGroup(caches, spans)])
    pairs = kv.unflatten(1, (2, config.kv_heads))
    return [(x[at : at + n], pairs[:, :, :, at : at + n]) for at, n in zip(starts, lengths, strict=True)]
