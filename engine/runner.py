"""Runs a batch: images to features, tokens through the layers, hidden states to logits and scores.

On a GPU what it gives is on its way when it returns: every lane has a stream of its own, and `collect` waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate
from math import nan
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.lora import ActiveAdapters
from ..kernels.operations import Operations
from ..kernels.paged_attention import paged_attention, widened, write_kv
from ..kernels.pooled_logit import pool_add
from .batch import Batch, Group, build_batch, in_batch_order, sent
from .decoding import Decoding, Row, Shapes
from .errors import DeviceLost
from .kv_pages import PagePool
from .models.fused import FusedLayers, RowAdapters
from .models.heads import IN_CONTEXT, Head
from .models.model import Backbone, Model
from .models.vision.features import FeatureCache
from .sampling import sample_ids
from .scheduler import Lane, Work
from .sequence import Sequence
from .warm_up import warm_up

IMAGES_AT_ONCE = 8


class Arrival(NamedTuple):
    """Scores on their way to the host, and when they, and the ids of a result, are there."""

    event: torch.cuda.Event
    scores: Tensor | None
    scored: list[Sequence]


@dataclass(frozen=True)
class StepResult:
    """works: those whose next tokens are to be chosen. logits: [n, vocab], for each of them the row of its last token
    and one for each draft. ids: their tokens, [n] int32 on the host, where they were chosen on the device; -1 where
    the logits are no numbers. scores: P(harmless) of scored sequences whose known tokens are all computed. closed:
    sequences whose last token was computed for their tap alone.

    arrival: what has not come yet; ids and scores are undefined until `collect` gives the result without it.
    """

    works: list[Work]
    logits: Tensor | None
    scores: list[tuple[Sequence, float]]
    closed: list[Sequence]
    ids: Tensor | None = None
    arrival: Arrival | None = None

    def collect(self) -> StepResult:
        """The result that can be read; waits for it."""
        if self.arrival is None:
            return self
        event, scores, scored = self.arrival
        event.synchronize()
        found = [] if scores is None else list(zip(scored, scores.tolist(), strict=True))
        return replace(self, scores=found, arrival=None)


class ModelRunner:
    """Executes one lane's work. It decides nothing: who runs, and what the result means, is said elsewhere.

    models: what runs on the lanes. feature_bytes bounds the features of images kept for later requests. ahead: how
    many batches of a lane may be under way: with two, the second is launched before the host has read the first one's
    tokens.
    """

    def __init__(self, pool: PagePool, lanes: list[Lane], models: Mapping[str, Model], feature_bytes: int) -> None:
        self.pool = pool
        self.features = FeatureCache(feature_bytes)
        self.images_encoded = 0
        self.seconds = 0.0  # of the host in forward passes, vision included
        self.vision_seconds = 0.0
        self._sums = {
            id(lane): torch.zeros(
                lane.max_sequences + 1,
                lane.backbone.decoder.config.hidden_size,
                device=lane.backbone.decoder.device,
            )
            for lane in lanes
        }
        device = lanes[0].backbone.decoder.device
        self._device, self._cuda = device, device.type == "cuda"
        self.ahead = 2 if self._cuda else 1
        self._streams: dict[int, torch.cuda.Stream] = {}
        if self._cuda:
            for lane in lanes:  # where both want the device, the answers' lane goes before those of their guards
                self._streams[id(lane)] = torch.cuda.Stream(device, priority=-1 if lane is lanes[0] else 0)
            torch.cuda.synchronize(device)  # weights and sums are there before other streams read them
        self._decoding: dict[int, Decoding] = {}
        for lane in lanes:
            with self.on(lane):
                self._warm_up(lane, models)
                decoding = self._decoding_of(lane, models)
            if decoding is not None:
                self._decoding[id(lane)] = decoding

    @torch.inference_mode()
    def _warm_up(self, lane: Lane, models: Mapping[str, Model]) -> None:
        fused = lane.backbone.decoder.fused
        if not self._cuda or fused is None or fused.operations.backend != "triton":
            return
        mine = [model for model in models.values() if model.backbone is lane.backbone]
        layout = max(mine, key=lambda model: model.depth).layout(self.pool.layouts[0].tokens_per_page)
        heads = [model.head for model in mine if model.head is not None]
        context = max(model.context for model in mine)
        warm_up(lane.backbone, layout, self.pool.layers(layout), context, heads)

    @torch.inference_mode()
    def _decoding_of(self, lane: Lane, models: Mapping[str, Model]) -> Decoding | None:
        """What runs a lane's decoding steps, where layers are fused; on a GPU with its graphs, made on the current
        stream."""
        decoder = lane.backbone.decoder
        mine = [model for model in models.values() if model.backbone is lane.backbone]
        whole = [model for model in mine if model.depth == decoder.depth]
        if decoder.fused is None or decoder.head is None or not whole:
            return None
        operations, layout = decoder.fused.operations, whole[0].layout(self.pool.layouts[0].tokens_per_page)
        taps = [model.depth for model in mine if model.spec is not None and model.spec.template == IN_CONTEXT]
        adapters = [item.updates for item in lane.backbone.adapters]
        decoding = Decoding(
            decoder,
            layout,
            self.pool.layers(layout),
            self._sums[id(lane)],
            Shapes(lane.max_sequences, max(model.context for model in whole), taps, bool(adapters)),
            operations.sample_ids or sample_ids,
            len(adapters),
            decoder.fused.stacks(adapters),
        )
        if self._cuda and operations.backend == "triton":
            decoding.capture()
        return decoding

    def on(self, lane: Lane) -> AbstractContextManager[object]:
        """Within it, all that is computed is computed in the order of a lane's batches."""
        stream = self._streams.get(id(lane))
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    @torch.inference_mode()
    def run(self, lane: Lane, works: list[Work]) -> StepResult:
        """Compute the works' tokens: writes keys and values, updates running sums, returns what is finished."""
        began = perf_counter()
        decoding = self._decoding.get(id(lane))
        shape = None if decoding is None else decoding.shape_of(works)
        try:
            if decoding is not None and shape is not None:
                for work in works:
                    _begin_sum(work, self._sums[id(lane)])
                ids = decoding.run(shape, _rows(lane, works))
                result = StepResult(works, None, [], [], ids, self._arrival([]) if self._cuda else None)
            else:
                result = self._run(lane, works, decoding)
        except BaseException:
            if self._cuda:  # what was launched of it is over before its pages are given away
                torch.cuda.current_stream().synchronize()
            raise
        self.seconds += perf_counter() - began
        return result

    def check_device(self) -> None:
        """Raises `DeviceLost` where the GPU fails, whatever it is asked: after some errors none of its memory can be
        read, and no kernel launched, until the process has ended."""
        if self._cuda:
            try:
                torch.cuda.synchronize(self._device)
            except RuntimeError as error:
                raise DeviceLost(f"the GPU has failed, and the engine with it: {error}") from error

    def decodes(self, lane: Lane, works: list[Work]) -> bool:
        """Whether `run` can take these works before it is known which tokens they compute."""
        decoding = self._decoding.get(id(lane))
        return decoding is not None and decoding.shape_of(works) is not None

    def _arrival(self, scores: list[tuple[Sequence, Tensor]]) -> Arrival:
        found = None
        if scores:
            found = torch.empty(len(scores), pin_memory=True)
            found.copy_(torch.stack([score for _, score in scores]), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return Arrival(event, found, [sequence for sequence, _ in scores])

    def _run(self, lane: Lane, works: list[Work], decoding: Decoding | None) -> StepResult:
        """Any batch."""
        backbone = lane.backbone
        decoder = backbone.decoder
        self._encode_images(backbone, works)
        works = in_batch_order(works)
        batch = build_batch(works, self.pool, decoder.device)
        sums = self._sums[id(lane)]
        for work in works:
            _begin_sum(work, sums)
        x = decoder.embed(batch.tokens)
        deep = _place_features(x, works, decoder.fused)
        angles = decoder.angles(batch.positions)
        active, adapters = list(batch.groups), batch.adapters
        scores: list[tuple[Sequence, Tensor]] = []
        logits = None

        first = 0
        while active:
            last = active[-1].depth if first >= deep.layers else first + 1
            x = _layers(backbone, batch, active, first, last, x, angles, adapters, sums)
            deep.add_(first, x)
            first = last
            while active and active[-1].depth == last:
                group = active.pop()
                scores += _score(group, x, sums, decoder.fused)
                if len(batch.logit_rows) and not active:
                    logits = decoder.logits(x[batch.logit_rows])
                x = x[: group.start]
                angles = decoder.angles(batch.positions[..., : group.start]) if active else None
                adapters = adapters.first(group.start) if adapters is not None and group.start else None
        choosing = [work for work in works if work.finishes and work.sequence.wants_logits]
        closed = [work.sequence for work in works if work.finishes and work.sequence.closing]
        ids = None
        if decoding is not None and logits is not None:
            ids = decoding.choose(choosing, logits)
        if self._cuda:
            return StepResult(choosing, logits, [], closed, ids, self._arrival(scores))
        return StepResult(choosing, logits, [(sequence, float(score)) for sequence, score in scores], closed, ids)

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
                    continue
                sequence.features[key] = known
                if self._cuda:  # another lane's stream may have made them: their memory is not reused before this one
                    known.record_stream(torch.cuda.current_stream())
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
        if self._cuda:  # another lane may find them from now on
            torch.cuda.current_stream().synchronize()
        self.images_encoded += len(keys)
        self.vision_seconds += perf_counter() - began


def _rows(lane: Lane, works: list[Work]) -> list[Row]:
    """Rows of a decoding step; where a token is not known yet, the batch in flight is what chooses it."""
    chosen = {work.sequence: row for row, work in enumerate(lane.flights[-1].result.works)} if lane.flights else {}
    rows = []
    for work in works:
        sequence, start = work.sequence, work.start
        known = start < sequence.num_tokens
        rows.append(Row(sequence, start, sequence.tokens[start] if known else 0, -1 if known else chosen[sequence]))
    return rows


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
    """What images add to the output of the first layers (DeepStack, Meng et al. 2024): parts of (rows of the batch in
    their order, on the host; [layers, rows, hidden])."""

    parts: list[tuple[Tensor, Tensor]]

    @property
    def layers(self) -> int:
        return len(self.parts[0][1]) if self.parts else 0

    def add_(self, layer: int, x: Tensor) -> None:
        """Add to x, the output of `layer`, in place."""
        if layer < self.layers:
            for rows, features in self.parts:
                here = rows[rows < len(x)]  # sequences that end at a lower layer have left
                x[sent(here, torch.long, x.device)] += features[layer, : len(here)]


def _place_features(x: Tensor, works: list[Work], fused: FusedLayers | None) -> _DeepFeatures:
    """Overwrite the embeddings of image tokens by the images' features; returns what later layers get."""
    row = 0
    deep: list[tuple[Tensor, Tensor]] = []
    for work in works:
        for placed in work.sequence.images_between(work.start, work.stop):
            first, stop = max(work.start, placed.start), min(work.stop, placed.stop)
            wanted = placed.image.place.rows[first - placed.start : stop - placed.start]
            rows = (wanted >= 0).nonzero().squeeze(1)
            features = work.sequence.features[placed.image.key][:, sent(wanted[rows], torch.long, x.device)]
            rows += row + first - work.start
            there = sent(rows, torch.long, x.device)
            if fused is not None:
                fused.operations.scatter_features(x, there, features[0])
            else:
                x[there] = features[0]
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
    if decoder.fused is not None:
        adapted = None
        if adapters is not None:
            stacks = decoder.fused.stacks([item.updates for item in backbone.adapters])
            adapted = RowAdapters(sent(adapters.adapter, torch.long, x.device), stacks)
        decoder.fused.run(first, last, x, angles, [group.fused for group in groups], adapted, pooled, sums)
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
    config, scales = backbone.decoder.config, backbone.decoder.kv_scales
    kv_scale = None if scales is None else scales[layer]
    outs = []
    for group in groups:
        rows = qkv if len(groups) == 1 else qkv[group.start : group.stop]
        cache = group.layers[layer]
        write_kv(cache, group.write_rows, rows[:, config.heads :], kv_scale)
        spans = group.spans(config.windows[layer])
        if kv_scale is not None:
            cache, spans = widened(cache, spans, kv_scale, qkv.dtype)
        scale, cap = config.attention_scale, config.attention_cap
        outs.append(paged_attention(rows[:, : config.heads], cache, spans, scale, cap))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _last_rows(group: Group) -> list[int]:
    """The row of the last token of each of the group's works."""
    return list(accumulate((work.rows for work in group.works), initial=group.start - 1))[1:]


def _score(group: Group, x: Tensor, sums: Tensor, fused: FusedLayers | None) -> list[tuple[Sequence, Tensor]]:
    """Scores, without a dimension, of the group's scored sequences; x [rows, hidden] is the output of its last
    layer."""
    scores = []
    at_once = {} if fused is None else _heads_at_once(group, x, sums, fused.operations)
    for index, (work, last) in enumerate(zip(group.works, _last_rows(group), strict=True)):
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
            found = at_once.get(head)
            scores.append((sequence, head.score(pooled.unsqueeze(0))[0] if found is None else found[index]))
    return scores


def _heads_at_once(group: Group, x: Tensor, sums: Tensor, operations: Operations) -> dict[Head, Tensor]:
    """What the heads of scored sequences, those of one logit, say of every sequence of the group, [works] each."""
    scored = [work.sequence for work in group.works if work.sequence.scored and work.finishes]
    heads = {head for sequence in scored if (head := sequence.model.head) is not None and head.labels is None}
    if not heads:
        return {}
    counts, starts, slots = [], [], []
    for work, last in zip(group.works, _last_rows(group), strict=True):
        sequence = work.sequence
        summed = sequence.scored and sequence.pool_slot is not None
        counts.append(work.stop - (sequence.pool_from or 0) if summed else 0)
        # the layers have added its rows already: none are left to be added from here on
        starts.append(last + 1 - group.start if summed else -1)
        slots.append(sequence.pool_slot or 0)
    firsts = list(accumulate((work.rows for work in group.works), initial=0))
    first_row, count, start, slot = (
        sent(column, torch.int32, x.device) for column in (firsts, counts, starts, slots)
    )
    rows = x[group.start : group.stop]
    return {
        head: operations.pooled_head(
            *(rows, first_row, count, start, slot, sums, head.weight, head.bias, head.norm_weight, head.norm_eps),
            head.spec.threshold,
        )[0]
        for head in heads
    }
