"""Runs a batch: images to features, tokens through the layers, hidden states to logits and scores."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from ..kernels.paged_attention import paged_attention, write_kv
from ..kernels.pooled_logit import pool_add
from .batch import Batch, Group, build_batch, in_batch_order
from .kv_pages import PagePool
from .models.model import Backbone
from .models.vision import FeatureCache
from .scheduler import Lane, Work
from .sequence import Sequence

IMAGES_AT_ONCE = 8


@dataclass(frozen=True)
class StepResult:
    """logits: [n, vocab], one row for each of `sequences`. scores: P(harmless) of finished scoring sequences."""

    sequences: list[Sequence]
    logits: Tensor | None
    scores: list[tuple[Sequence, float]]


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
        batch = build_batch(works, self.pool, decoder.config.windows, decoder.device)
        sums = self._sums[id(lane)]
        for work in works:
            if work.sequence.pool_slot is not None and work.start <= (work.sequence.pool_from or 0):
                sums[work.sequence.pool_slot] = 0
        x = decoder.embed(batch.tokens)
        _place_features(x, works)
        angles = decoder.angles(batch.positions)
        active = list(batch.groups)
        scores: list[tuple[Sequence, float]] = []
        logits = None

        def attend(layer: int, qkv: Tensor) -> Tensor:
            return _attend(backbone, active, layer, qkv)

        for layer in range(active[0].depth):
            x = decoder.block(layer, x, angles, attend)
            if active[-1].depth == layer + 1:
                group = active.pop()
                scores += _score(group, batch, x, sums)
                if len(batch.logit_rows) and not active:
                    logits = decoder.logits(x[batch.logit_rows])
                x = x[: group.start]
                angles = (angles[0][: group.start], angles[1][: group.start])
        sequences = [work.sequence for work in works if work.finishes and _wants_logits(work.sequence)]
        self.seconds += perf_counter() - began
        return StepResult(sequences, logits, scores)

    def _encode_images(self, backbone: Backbone, works: list[Work]) -> None:
        """Features of every image that a work's tokens touch: from the cache, or through the tower, in batches."""
        missing = {}
        for sequence, start, count in works:
            for placed in sequence.images_between(start, start + count):
                key = placed.image.key
                if key in sequence.features:
                    continue
                known = self.features.get(key)
                if known is None:
                    missing[key] = placed.image.pixels
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
            encoded.update(
                zip(some, backbone.vision.encode(torch.stack([missing[key] for key in some])), strict=True)
            )
        for key, features in encoded.items():
            # a row of the batch of its own, so that the cache's bound holds
            self.features.put(key, features.clone())
        for sequence, start, count in works:
            for placed in sequence.images_between(start, start + count):
                if placed.image.key in encoded:
                    sequence.features[placed.image.key] = encoded[placed.image.key]
        self.images_encoded += len(keys)
        self.vision_seconds += perf_counter() - began


def _wants_logits(sequence: Sequence) -> bool:
    return sequence.sampling is not None or bool(sequence.words)


def _place_features(x: Tensor, works: list[Work]) -> None:
    """Overwrite the embeddings of image tokens by the images' features."""
    row = 0
    for sequence, start, count in works:
        for placed in sequence.images_between(start, start + count):
            first, stop = max(start, placed.start), min(start + count, placed.stop)
            features = sequence.features[placed.image.key][first - placed.start : stop - placed.start]
            x[row + first - start : row + stop - start] = features
        row += count


def _attend(backbone: Backbone, groups: list[Group], layer: int, qkv: Tensor) -> Tensor:
    config = backbone.decoder.config
    outs = []
    for group in groups:
        rows = qkv if len(groups) == 1 else qkv[group.start : group.stop]
        cache = group.layers[layer]
        write_kv(cache, group.write_rows, rows[:, config.heads :])
        spans = group.spans[config.windows[layer]]
        outs.append(paged_attention(rows[:, : config.heads], cache, spans, config.head_dim**-0.5))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _score(group: Group, batch: Batch, x: Tensor, sums: Tensor) -> list[tuple[Sequence, float]]:
    """Scores of the group's finished scoring sequences; x [rows, hidden] is the output of its last layer."""
    if batch.pool_slots is not None:
        pool_add(x[group.start : group.stop], batch.pool_slots[group.start : group.stop], sums)
    scores = []
    last = group.start - 1
    for work in group.works:
        last += work.length
        sequence, head = work.sequence, work.sequence.model.head
        if head is None or not work.finishes or _wants_logits(sequence):
            continue
        if sequence.pool_slot is None:
            pooled = x[last]
        else:
            pooled = sums[sequence.pool_slot] / (sequence.num_tokens - (sequence.pool_from or 0))
        scores.append((sequence, float(head.score(pooled.unsqueeze(0)))))
    return scores
