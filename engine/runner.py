"""Runs a batch: images to features, tokens through the layers, hidden states to logits and scores."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import nan
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..kernels.lora import ActiveAdapters
from ..kernels.paged_attention import paged_attention, write_kv
from ..kernels.pooled_logit import pool_add
from .batch import Batch, Group, build_batch, in_batch_order
from .kv_pages import PagePool
from .models.model import Backbone
from .models.vision.features import FeatureCache
from .scheduler import Lane, Work
from .sequence import Sequence

IMAGES_AT_ONCE = 8


@dataclass(frozen=True)
class StepResult:
    """works: those whose next tokens are to be chosen. logits: [n, vocab], for each of them the row of its last token
    and one for each draft. scores: P(harmless) of scored sequences whose known tokens are all computed. closed:
    sequences whose last token was computed for their tap alone."""

    works: list[Work]
    logits: Tensor | None
    scores: list[tuple[Sequence, float]]
    closed: list[Sequence]


class ModelRunner:
    """Executes one lane's work. It decides nothing: who runs, and what the result means, is said elsewhere.

    feature_bytes bounds the features of images kept for later requests.
    """

    def __init__(self, pool: PagePool, lanes: list[Lane], feature_bytes: int) -> None:
        self.pool = pool
        self.features = FeatureCache(feature_bytes)
        self.images_encoded = 0
        self.seconds = 0.0  # in forward passes, vision included
        self.vision_seconds = 0.0
        self._sums = {
            id(lane): torch.zeros(
                lane.max_sequences + 1,
                lane.backbone.decoder.config.hidden_size,
                device=lane.backbone.decoder.device,
            )
            for lane in lanes
        }

    @torch.inference_mode()
    def run(self, lane: Lane, works: list[Work]) -> StepResult:
        """Compute the works' tokens: writes keys and values, updates running sums, returns what is finished."""
        began = perf_counter()
        backbone = lane.backbone
        decoder = backbone.decoder
        self._encode_images(backbone, works)
        works = in_batch_order(works)
        batch = build_batch(works, self.pool, decoder.device)
        sums = self._sums[id(lane)]
        for work in works:
            _begin_sum(work, sums)
        x = decoder.embed(batch.tokens)
        deep = _place_features(x, works)
        angles = decoder.angles(batch.positions)
        active, adapters = list(batch.groups), batch.adapters
        scores: list[tuple[Sequence, float]] = []
        logits = None

        first = 0
        while active:
            last = active[-1].depth if first >= deep.layers else first + 1
            x = _layers(backbone, batch, active, first, last, x, angles, adapters, sums)
            deep.add_(first, x)
            first = last
            while active and active[-1].depth == last:
                group = active.pop()
                scores += _score(group, x, sums)
                if len(batch.logit_rows) and not active:
                    logits = decoder.logits(x[batch.logit_rows])
                x = x[: group.start]
                angles = decoder.angles(batch.positions[..., : group.start]) if active else None
                adapters = adapters.first(group.start) if adapters is not None and group.start else None
        self.seconds += perf_counter() - began
        choosing = [work for work in works if work.finishes and work.sequence.wants_logits]
        closed = [work.sequence for work in works if work.finishes and work.sequence.closing]
        return StepResult(choosing, logits, scores, closed)

    @torch.inference_mode()
    def tapped_score(self, lane: Lane, sequence: Sequence) -> float:
        """P(harmless) from the states of a tapped sequence's own tokens that were pooled so far; NaN for none."""
        assert sequence.tap is not None and sequence.tap.head is not None and sequence.pool_from is not None
        count = (sequence.num_tokens if sequence.closing else sequence.num_computed) - sequence.pool_from
        if sequence.pool_slot is None or count < 1:
            return nan
        pooled = self._sums[id(lane)][sequence.pool_slot] / count
        return float(sequence.tap.head.score(pooled.unsqueeze(0)))

    def _encode_images(self, backbone: Backbone, works: list[Work]) -> None:
        """Features of every image that a work's tokens touch: from the cache, or through the tower, in batches."""
        missing = {}
        for work in works:
            sequence = work.sequence
            for placed in sequence.images_between(work.start, work.stop):
                key = placed.image.key
                if key in sequence.features:
                    continue
                known = self.features.get(key)
                if known is None:
                    missing[key] = placed.image
                else:
                    sequence.features[key] = known
        if not missing:
            return
        began = perf_counter()
        assert backbone.vision is not None
        keys = list(missing)
        encoded: dict[bytes, Tensor] = {}
        for first in range(0, len(keys), IMAGES_AT_ONCE):
            some = keys[first : first + IMAGES_AT_ONCE]
            encoded.update(zip(some, backbone.vision.encode([missing[key] for key in some]), strict=True))
        for key, features in encoded.items():
            # not a view of what was computed together, so that the cache's bound holds
            self.features.put(key, features.clone())
        for work in works:
            for placed in work.sequence.images_between(work.start, work.stop):
                if placed.image.key in encoded:
                    work.sequence.features[placed.image.key] = encoded[placed.image.key]
        self.images_encoded += len(keys)
        self.vision_seconds += perf_counter() - began


def _begin_sum(work: Work, sums: Tensor) -> None:
    """Set a pooled sequence's running sum to what it was before the work's first token."""
    sequence = work.sequence
    if sequence.pool_slot is None or sequence.pool_from is None:
        return
    if work.start <= sequence.pool_from:
        sums[sequence.pool_slot] = 0
    elif sequence.rolled_back:
        sums[sequence.pool_slot] = sequence.sums[work.start]
    sequence.rolled_back = False


@dataclass(frozen=True)
class _DeepFeatures:
    """What images add to the output of the first layers (DeepStack, Meng et al. 2024): parts of (rows of the batch,
    [layers, rows, hidden])."""

    parts: list[tuple[Tensor, Tensor]]

    @property
    def layers(self) -> int:
        return len(self.parts[0][1]) if self.parts else 0

    def add_(self, layer: int, x: Tensor) -> None:
        """Add to x, the output of `layer`, in place."""
        if layer < self.layers:
            for rows, features in self.parts:
                here = rows < len(x)  # sequences that end at a lower layer have left
                x[rows[here]] += features[layer, here]


def _place_features(x: Tensor, works: list[Work]) -> _DeepFeatures:
    """Overwrite the embeddings of image tokens by the images' features; returns what later layers get."""
    row = 0
    deep: list[tuple[Tensor, Tensor]] = []
    for work in works:
        for placed in work.sequence.images_between(work.start, work.stop):
            first, stop = max(work.start, placed.start), min(work.stop, placed.stop)
            wanted = placed.image.place.rows[first - placed.start : stop - placed.start]
            rows = (wanted >= 0).nonzero().squeeze(1)
            features = work.sequence.features[placed.image.key][:, wanted[rows]]
            rows += row + first - work.start
            x[rows] = features[0]
            if len(features) > 1 and len(rows):
                deep.append((rows, features[1:]))
        row += work.rows
    return _DeepFeatures(deep)


def _layers(
    backbone: Backbone,
    batch: Batch,
    groups: list[Group],
    first: int,
    last: int,
    x: Tensor,
    angles: Any,
    adapters: ActiveAdapters | None,
    sums: Tensor,
) -> Tensor:
    """Run layers [first, last) over x [rows, hidden], the rows of `groups`, in place, and add what is pooled to its
    sums. Rows of the output that nobody reads may stay undefined."""
    decoder = backbone.decoder
    pooled = {layer: slots[: len(x)] for layer, slots in batch.pooled.items()}
    if decoder.native is not None:
        rows = torch.cat([group.write_rows for group in groups])
        ragged = [group.ragged() for group in groups]
        wanted = _wanted(batch, groups, last, len(x))
        decoder.native.run(first, last, x, angles, rows, ragged, adapters, wanted, pooled, sums)
        return x
    for layer in range(first, last):
        x = decoder.block(layer, x, angles, lambda index, qkv: _attend(backbone, groups, index, qkv), adapters)
        if layer + 1 in pooled:
            pool_add(x, pooled[layer + 1], sums)
    return x


def _wanted(batch: Batch, groups: list[Group], last: int, rows: int) -> Tensor | None:
    """Which of the batch's `rows` after layer `last` are read: by deeper layers, sums, logits or heads. None: all, or
    nearly so."""
    ending = [group for group in groups if group.depth == last]
    if not ending or rows - ending[0].start <= 32:
        return None
    wanted = torch.zeros(rows, dtype=torch.bool)
    wanted[: ending[0].start] = True
    if last in batch.pooled:
        wanted |= batch.pooled[last][:rows] >= 0
    wanted[batch.logit_rows] = True
    for group in ending:
        scored = zip(group.works, _last_rows(group), strict=True)
        wanted[[row for work, row in scored if work.sequence.scored]] = True
    return wanted


def _attend(backbone: Backbone, groups: list[Group], layer: int, qkv: Tensor) -> Tensor:
    config = backbone.decoder.config
    outs = []
    for group in groups:
        rows = qkv if len(groups) == 1 else qkv[group.start : group.stop]
        cache = group.layers[layer]
        write_kv(cache, group.write_rows, rows[:, config.heads :])
        spans = group.spans(config.windows[layer])
        scale, cap = config.attention_scale, config.attention_cap
        outs.append(paged_attention(rows[:, : config.heads], cache, spans, scale, cap))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _last_rows(group: Group) -> list[int]:
    """The row of the last token of each of the group's works."""
    return list(accumulate((work.rows for work in group.works), initial=group.start - 1))[1:]


def _score(group: Group, x: Tensor, sums: Tensor) -> list[tuple[Sequence, float]]:
    """Scores of the group's scored sequences; x [rows, hidden] is the output of its last layer."""
    scores = []
    for work, last in zip(group.works, _last_rows(group), strict=True):
        sequence, head = work.sequence, work.sequence.model.head
        if not sequence.scored:
            continue
        assert head is not None
        if sequence.pool_slot is None:
            pooled = x[last]
        else:
            total = sums[sequence.pool_slot]
            pooled = total / (work.stop - (sequence.pool_from or 0))
            if sequence.open:
                sequence.sums[work.stop] = total.clone()
        if work.finishes:
            scores.append((sequence, float(head.score(pooled.unsqueeze(0)))))
    return scores
