"""A decoder's layers through few, fused operations over tables on the device: how they run on CUDA.

The same operations in plain torch make it run anywhere; `Decoder.block` says what a layer computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ...kernels.lora import LoraStack, LowRank, Updates, stacked
from ...kernels.operations import Operations
from ...kernels.paged_attention import LayerKV
from ...kernels.pooled_logit import pool_add
from ...kernels.ragged import RaggedTables

if TYPE_CHECKING:
    from .decoder import DecoderConfig, DecoderLayer


Stacks: TypeAlias = Mapping[tuple[int, str], LoraStack]
"""(layer, "qkv" | "o" | "wide" | "down") -> the updates of that map by all adapters."""


class RowAdapters(NamedTuple):
    """Which rows have which adapter: an index into the stacks' adapters on the device, -1 for none, [rows]."""

    adapter: Tensor
    stacks: Stacks


def _stacks_of(adapters: Sequence[Updates], layers: int) -> Stacks:
    """Adapters side by side, in the form of fused layers: gate and up are one map."""
    stacks = {}
    for layer in range(layers):
        for part in ("qkv", "o", "wide", "down"):
            found = [_wide(updates, layer) if part == "wide" else updates.get((layer, part)) for updates in adapters]
            if (stack := stacked(found)) is not None:
                stacks[layer, part] = stack
    return stacks


def _wide(updates: Updates, layer: int) -> LowRank | None:
    """The updates of gate and up as one of both."""
    gate, up = (updates.get((layer, part)) for part in ("gate", "up"))
    some = gate or up
    if some is None:
        return None
    gate = gate or some._replace(b=torch.zeros_like(some.b))
    up = up or some._replace(b=torch.zeros_like(some.b))
    return LowRank(torch.cat((gate.a, up.a), 1), torch.block_diag(gate.b, up.b))


class FusedPart(NamedTuple):
    """The rows [start, stop) of a group that attend in one launch: decoding ones, which share out their contexts to
    many programs, or those of chunks, which share what they read.

    tables: who attends to what; their rows count from `start`. sees: [stop - start] int32, how many tokens of its
    context, from the first on, a row sees, where images see their own tokens in both directions; None: those up to
    itself.
    """

    start: int
    stop: int
    tables: RaggedTables
    sees: Tensor | None = None


class FusedGroup(NamedTuple):
    """The rows [start, stop) of a batch, whose keys and values lie in one layout.

    caches: a view for every layer that runs. write_rows: [stop - start], where keys and values go, -1 for nowhere.
    parts: they cover all rows in order; their rows count from the group's first.
    """

    start: int
    stop: int
    caches: Sequence[LayerKV]
    write_rows: Tensor
    parts: Sequence[FusedPart]


class FusedLayers:
    """The layers of one decoder, whose maps of gate and up are one."""

    def __init__(self, config: DecoderConfig, layers: Sequence[DecoderLayer], operations: Operations) -> None:
        self._config = config
        self._layers = layers
        self.operations = operations
        self.kv_scales: Tensor | None = None  # [layers, 2 * kv_heads] fp32 of pages of fp8
        self._stacked: tuple[list[Updates], Stacks] = [], {}

    def stacks(self, adapters: list[Updates]) -> Stacks:
        """All adapters of these weights side by side; made anew when there are others than the last time."""
        known, stacks = self._stacked
        if len(known) != len(adapters):  # one that is there stays
            stacks = _stacks_of(adapters, len(self._layers))
            self._stacked = adapters, stacks
        return stacks

    def run(
        self,
        first: int,
        last: int,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        groups: Sequence[FusedGroup],
        adapters: RowAdapters | None = None,
        pooled: Mapping[int, Tensor] | None = None,
        sums: Tensor | None = None,
    ) -> None:
        """Run layers [first, last) over x [rows, hidden] in place; stores the new keys and values.

        angles: as of `Decoder.angles`. groups: they cover all rows in order. pooled: by layer, counted from 1, the
        slots [rows] int64 of `sums` [slots + 1, hidden] fp32 that its output is added to, -1 for none.
        """
        config, operations = self._config, self.operations
        tables = [
            (cos.contiguous(), sin.contiguous()) for cos, sin in zip(*(a.split(1, 1) for a in angles), strict=True)
        ]
        pooled = pooled or {}
        scale = config.residual_scale
        added: Tensor | None = None  # what the last layer adds to x, which it does with the norm that follows
        for index in range(first, last):
            layer = self._layers[index]
            h = _add_norm(operations, added, x, layer.input_norm, config.norm_eps, scale)
            o = self._attention(index, h, tables[config.rotary[index]], groups, adapters)
            h = _add_norm(operations, o, x, layer.post_norm, config.norm_eps, scale)
            added = self._mlp(index, h, adapters)
            if index + 1 in pooled or index + 1 == last:
                x.add_(added, alpha=scale)
                added = None
            if index + 1 in pooled:
                assert sums is not None
                pool_add(x, pooled[index + 1], sums)

    def _attention(
        self,
        index: int,
        h: Tensor,
        angles: tuple[Tensor, Tensor],
        groups: Sequence[FusedGroup],
        adapters: RowAdapters | None,
    ) -> Tensor:
        """What attention adds, [rows, hidden], to rows whose normed input is h."""
        layer, config = self._layers[index], self._config
        qkv = layer.qkv(h)
        self._adapt(index, "qkv", qkv, h, adapters)
        qkv = qkv.view(-1, config.heads + 2 * config.kv_heads, config.head_dim)
        outs = [self._attend(index, qkv, angles, group) for group in groups]
        attended = outs[0] if len(outs) == 1 else torch.cat(outs)
        o = layer.o(attended)
        self._adapt(index, "o", o, attended, adapters)
        return o if layer.attention_norm is None else self._normed(o, layer.attention_norm)

    def _attend(self, index: int, qkv: Tensor, angles: tuple[Tensor, Tensor], group: FusedGroup) -> Tensor:
        layer, config, operations = self._layers[index], self._config, self.operations
        cache, window = group.caches[index], config.windows[index]
        scale, cap = config.attention_scale, config.attention_cap
        rows = slice(group.start, group.stop)
        qkv, (cos, sin) = qkv[rows], (side[rows] for side in angles)
        kv_scale = None if self.kv_scales is None else self.kv_scales[index]
        operations.rope_write(
            *(qkv, cos, sin, cache, group.write_rows, layer.q_norm, layer.k_norm, config.norm_eps), kv_scale=kv_scale
        )
        queries = qkv[:, : config.heads]
        out = queries.new_empty(len(queries), config.heads * config.head_dim)
        for start, stop, tables, sees in group.parts:
            operations.paged_attention(
                *(queries[start:stop], cache, tables, scale, window, cap, kv_scale), sees=sees, out=out[start:stop]
            )
        return out

    def _mlp(self, index: int, h: Tensor, adapters: RowAdapters | None) -> Tensor:
        """What the MLP adds, [rows, hidden], to rows whose normed input is h."""
        layer, config = self._layers[index], self._config
        assert layer.wide is not None
        both = layer.wide(h)
        self._adapt(index, "wide", both, h, adapters)
        wide = self.operations.gated(both, kind="gelu" if config.gelu else "silu")
        down = layer.down(wide)
        self._adapt(index, "down", down, wide, adapters)
        return down if layer.ffn_norm is None else self._normed(down, layer.ffn_norm)

    def _adapt(self, index: int, part: str, y: Tensor, x: Tensor, adapters: RowAdapters | None) -> None:
        """Add to y, the output of a part for x, what its rows' adapters change."""
        if adapters is not None and (stack := adapters.stacks.get((index, part))) is not None:
            self.operations.add_low_rank(y, x, adapters.adapter, stack)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.operations.add_rms_norm(x, None, weight, self._config.norm_eps)


def _add_norm(
    operations: Operations, added: Tensor | None, x: Tensor, weight: Tensor, eps: float, scale: float
) -> Tensor:
    """The norm of x, after what is added to it."""
    if added is None:
        return operations.add_rms_norm(x, None, weight, eps)
    return operations.add_rms_norm(added, x, weight, eps, scale=scale)
