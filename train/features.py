"""Pooled hidden states of a frozen decoder over many texts: what a probe is fitted on. Not the serving path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.models.model import Model
from ..engine.text import Untrusted
from ..kernels.paged_attention import causal_mask

BATCH_TOKENS = 2048


@dataclass(frozen=True, eq=False)
class Features:
    """mean, last: by layer (its output, un-normed), fp32 [texts, hidden]."""

    mean: dict[int, Tensor]
    last: dict[int, Tensor]

    def of(self, layer: int, pooling: str) -> Tensor:
        return (self.mean if pooling == "mean" else self.last)[layer]


@torch.inference_mode()
def pooled_states(
    model: Model,
    texts: Sequence[str],
    layers: Sequence[int],
    *,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Run every text alone, from its first token, through the blocks below the deepest of `layers`.

    Texts are encoded as the detector's pass encodes them and cut to `max_tokens`, or to the model's context.
    `progress` is called with (texts done, texts).
    """
    decoder = model.backbone.decoder
    config = decoder.config
    limit = min(max_tokens or model.context, model.context)
    encoded = [model.codec.encode((Untrusted(text),), add_special_tokens=True)[:limit] for text in texts]
    mean, last = ({layer: torch.empty(len(texts), config.hidden_size) for layer in layers} for _ in range(2))
    done = 0
    for batch in _batches(encoded):
        lengths = [len(encoded[index]) for index in batch]
        tokens = torch.tensor([token for index in batch for token in encoded[index]], device=decoder.device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(decoder.device)
        ends = torch.tensor(lengths).cumsum(0)
        owner = torch.arange(len(batch)).repeat_interleave(torch.tensor(lengths)).to(decoder.device)

        def attend(layer: int, qkv: Tensor, lengths: list[int] = lengths) -> Tensor:
            return _causal(qkv, lengths, config.heads, config.kv_heads, config.windows[layer])

        x, angles = decoder.embed(tokens), decoder.angles(positions)
        for layer in range(1, max(layers) + 1):
            x = decoder.block(layer - 1, x, angles, attend)
            if layer in mean:
                sums = torch.zeros(len(batch), config.hidden_size, device=decoder.device)
                sums.index_add_(0, owner, x.float())
                mean[layer][batch] = sums.cpu() / torch.tensor(lengths).unsqueeze(1)
                last[layer][batch] = x[(ends - 1).to(decoder.device)].float().cpu()
        done += len(batch)
        if progress is not None:
            progress(done, len(texts))
    return Features(mean, last)


def _batches(encoded: Sequence[list[int]]) -> Iterator[list[int]]:
    """Indices of texts, in order, that together have about BATCH_TOKENS tokens; one text at least."""
    batch: list[int] = []
    size = 0
    for index, tokens in enumerate(encoded):
        if batch and size + len(tokens) > BATCH_TOKENS:
            yield batch
            batch, size = [], 0
        batch.append(index)
        size += len(tokens)
    if batch:
        yield batch


def _causal(qkv: Tensor, lengths: list[int], heads: int, kv_heads: int, window: int | None) -> Tensor:
    """qkv [tokens, heads + 2 kv_heads, head_dim] of texts of these lengths -> [tokens, heads * head_dim]."""
    outs = []
    for rows in qkv.split(lengths):
        q, k, v = rows.transpose(0, 1).unsqueeze(0).split((heads, kv_heads, kv_heads), 1)
        mask = causal_mask(len(rows), len(rows), window, qkv.device)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=heads != kv_heads
        )
        outs.append(out.squeeze(0).transpose(0, 1).reshape(len(rows), -1))
    return torch.cat(outs)
