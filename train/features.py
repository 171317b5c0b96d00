"""Pooled hidden states of a frozen decoder over many answers: what a head is fitted on. Not the serving path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..engine.chat import Chat
from ..engine.models.heads import IN_CONTEXT
from ..engine.models.language_model import LanguageModel, LanguageModelConfig
from ..engine.models.model import Model
from ..engine.text import Untrusted
from ..kernels.native import RaggedGroup, RaggedSequence
from ..kernels.paged_attention import LayerKV, SequenceSpan, causal_mask, paged_attention

BATCH_TOKENS = 2048
FIRST_BEGINNING = 16  # tokens of an answer's shortest beginning ...
NEXT_BEGINNING = 32  # ... and how many more each further one has

RunLayers: TypeAlias = Callable[[int, int, Tensor, Any], Tensor]
"""(first, last, x [tokens, hidden], angles) -> x after layers [first, last), in place."""


class Passage(NamedTuple):
    """The tokens that a head is to read, and the index of the first one that is pooled."""

    tokens: list[int]
    answer_from: int = 0


@dataclass(frozen=True, eq=False)
class Features:
    """Of some passages, by layer (its output, un-normed), in fp32.

    mean, last: [passages, hidden], of all pooled tokens. beginnings: [beginnings, hidden], the mean of the first
    `lengths` [beginnings] pooled tokens of the passages `owners` [beginnings]; whole passages are not among them.
    sizes: [passages], all pooled tokens of each.
    """

    mean: dict[int, Tensor]
    last: dict[int, Tensor]
    beginnings: dict[int, Tensor]
    owners: Tensor
    lengths: Tensor
    sizes: Tensor

    def of(self, layer: int, pooling: str) -> Tensor:
        return (self.mean if pooling == "mean" else self.last)[layer]


def passage(model: Model, template: str, question: str, answer: str, max_tokens: int | None = None) -> Passage:
    """The tokens as serving has them: of the answer alone, as the detector's pass encodes it, or in the model's own
    context, behind its chat prompt for the question and without the token that ends an answer.

    The answer is cut to `max_tokens`, and to what the model's context has room for.
    """
    prompt = model.codec.encode_chat(Chat.single(question)) if template == IN_CONTEXT else []
    tokens = model.codec.encode((Untrusted(answer),), add_special_tokens=template != IN_CONTEXT)
    room = model.context - len(prompt)
    return Passage(prompt + tokens[: room if max_tokens is None else min(max_tokens, room)], len(prompt))


@torch.inference_mode()
def pooled_states(
    model: Model,
    passages: Sequence[Passage],
    layers: Sequence[int],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Run every passage alone, from its first token, through the blocks below the deepest of `layers`.

    `progress` is called with (passages done, passages).
    """
    decoder = model.backbone.decoder
    config = decoder.config
    marks = [_marks(len(tokens) - first) for tokens, first in passages]
    owners = torch.tensor([index for index, ends in enumerate(marks) for _ in ends[:-1]], dtype=torch.long)
    lengths = torch.tensor([end for ends in marks for end in ends[:-1]], dtype=torch.long)
    mean, last = ({layer: torch.empty(len(passages), config.hidden_size) for layer in layers} for _ in range(2))
    beginnings: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    done = 0
    for batch in _batches(passages):
        some = [passages[index] for index in batch]
        sizes = [len(tokens) for tokens, _ in some]
        tokens = torch.tensor([token for item in some for token in item.tokens], device=decoder.device)
        positions = torch.cat([torch.arange(size) for size in sizes]).to(decoder.device)
        ends = torch.tensor(sizes).cumsum(0).to(decoder.device)
        owner = _stretches(some, [marks[index] for index in batch]).to(decoder.device)
        x, angles = decoder.embed(tokens), decoder.angles(positions)
        run = _native_layers(decoder, sizes, max(layers)) if decoder.native is not None else _layers(decoder, sizes)
        for start, layer in pairwise([0, *sorted(layers)]):
            x = run(start, layer, x, angles)
            sums = torch.zeros(int(owner.max()) + 1, config.hidden_size, device=decoder.device)
            sums.index_add_(0, owner, x.float())
            means = _running_means(sums[1:].cpu(), [marks[index] for index in batch])
            mean[layer][batch] = torch.stack([item[-1] for item in means])
            last[layer][batch] = x[ends - 1].float().cpu()
            beginnings[layer] += [item[:-1] for item in means]
        done += len(batch)
        if progress is not None:
            progress(done, len(passages))
    early = {layer: torch.cat(some) for layer, some in beginnings.items()}
    return Features(mean, last, early, owners, lengths, torch.tensor([ends[-1] for ends in marks]))


def _marks(tokens: int) -> list[int]:
    """Where an answer's beginnings end, and last the answer itself."""
    return [*range(FIRST_BEGINNING, tokens, NEXT_BEGINNING), tokens]


def _stretches(passages: Sequence[Passage], marks: Sequence[list[int]]) -> Tensor:
    """For each token the stretch between two marks in which it is pooled, from 1 on; 0 for tokens of the prompt."""
    found: list[int] = []
    number = 0
    for item, ends in zip(passages, marks, strict=True):
        found += [0] * item.answer_from
        for start, end in zip([0, *ends], ends, strict=False):
            number += 1
            found += [number] * (end - start)
    return torch.tensor(found)


def _running_means(sums: Tensor, marks: Sequence[list[int]]) -> list[Tensor]:
    """sums [stretches, hidden] -> for each passage the mean up to each of its marks [marks, hidden]."""
    some = sums.split([len(ends) for ends in marks])
    return [part.cumsum(0) / torch.tensor(ends).unsqueeze(1) for part, ends in zip(some, marks, strict=True)]


def _batches(passages: Sequence[Passage]) -> Iterator[list[int]]:
    """Indices of passages, in order, that together have about BATCH_TOKENS tokens; one passage at least."""
    batch: list[int] = []
    size = 0
    for index, (tokens, _) in enumerate(passages):
        if batch and size + len(tokens) > BATCH_TOKENS:
            yield batch
            batch, size = [], 0
        batch.append(index)
        size += len(tokens)
    if batch:
        yield batch


def _layers(decoder: LanguageModel, lengths: list[int]) -> RunLayers:
    """For passages of these lengths, in torch."""
    config = decoder.config

    def attend(layer: int, qkv: Tensor) -> Tensor:
        return _causal(qkv, lengths, config, config.windows[layer])

    def run(first: int, last: int, x: Tensor, angles: Any) -> Tensor:
        for layer in range(first, last):
            x = decoder.block(layer, x, angles, attend)
        return x

    return run


def _native_layers(decoder: LanguageModel, lengths: list[int], depth: int) -> RunLayers:
    """The same with the native kernels, which serve too; keys and values lie one passage behind the other."""
    config, rows = decoder.config, torch.arange(sum(lengths))
    kv = torch.empty(depth, 2 * config.kv_heads, len(rows), config.head_dim, dtype=decoder.dtype)
    caches = [LayerKV(both, *both.unsqueeze(0).split(config.kv_heads, 1)) for both in kv]
    starts = (end - length for end, length in zip(accumulate(lengths), lengths, strict=True))
    spans = [RaggedSequence(at, n, 0, ((at, n),)) for at, n in zip(starts, lengths, strict=True)]
    group = RaggedGroup(caches, spans)

    def run(first: int, last: int, x: Tensor, angles: Any) -> Tensor:
        assert decoder.native is not None
        decoder.native.run(first, last, x, angles, rows, [group])
        return x

    return run


def _causal(qkv: Tensor, lengths: list[int], config: LanguageModelConfig, window: int | None) -> Tensor:
    """qkv [tokens, heads + 2 kv_heads, head_dim] of texts of these lengths -> [tokens, heads * head_dim]."""
    outs = []
    for rows in qkv.split(lengths):
        both = rows[:, config.heads :].transpose(0, 1)
        cache = LayerKV(both, *both.unsqueeze(0).split(config.kv_heads, 1))
        mask = causal_mask(len(rows), len(rows), window, qkv.device)
        spans = [SequenceSpan(0, len(rows), ((0, len(rows)),), mask)]
        scale, cap = config.attention_scale, config.attention_cap
        outs.append(paged_attention(rows[:, : config.heads], cache, spans, scale, cap))
    return torch.cat(outs)
