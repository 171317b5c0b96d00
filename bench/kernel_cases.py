"""Every operation of `kernels/` in the shapes of a model, and the bytes and operations that it cannot do without.

An operation has several ways to be done: its plain reference, and whatever is fast on this device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import cycle
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig

from ..engine.models.bundles import default_cache
from ..engine.models.decoder import Decoder, DecoderConfig
from ..kernels import native
from ..kernels.backend import chosen
from ..kernels.linear import Linear, can_pack
from ..kernels.lora import LowRank, add_low_rank_, low_rank_reference, stacked
from ..kernels.native import Native, RaggedGroup, RaggedSequence
from ..kernels.paged_attention import (
    LayerKV,
    SequenceSpan,
    attention_reference,
    causal_mask,
    paged_attention,
    write_kv,
)
from ..kernels.pooled_logit import pool_add, pooled_head_reference, pooled_logit
from ..kernels.ragged import RaggedTables
from ..kernels.rms_norm import rms_norm, rms_norm_reference
from ..kernels.rope import rope_, rope_angles, rope_reference
from ..kernels.swiglu import swiglu
from .roofline import Shape, Work

OPERATIONS = (
    *("rms_norm", "rope", "rope_write", "swiglu", "linear", "lora", "pool_add", "pooled_logit", "pooled_head"),
    *("attention_decode", "attention_prefill", "layer"),
)
REFERENCE = "reference"
RANK = 16  # of adapters
PAGE = 64  # tokens, where Triton reads pages
EPS = 1e-5


class Way(NamedTuple):
    """run: does the operation once, where it is timed. result: what it gives for the case's first inputs."""

    run: Callable[[], object]
    result: Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """what: the sizes, for people. exact: the result in fp64."""

    operation: str
    what: str
    work: Work
    exact: Callable[[], Tensor]
    ways: dict[str, Way]

    @property
    def name(self) -> str:
        return f"{self.operation}, {self.what}"


@dataclass(frozen=True)
class KernelSizes:
    """rows: of a step. contexts: tokens before it. chunk: rows of a prefill. cold_bytes: weights, keys and values are
    read again only after so much else, so that they come from memory and not from a cache."""

    rows: tuple[int, ...] = (1, 16)
    contexts: tuple[int, ...] = (1024,)
    chunk: int = 512
    cold_bytes: int = 256 << 20


class Cases:
    """Makes the cases of one shape on one device, in one dtype; `all` in turn, so that few are in memory at once."""

    def __init__(
        self, shape: Shape, sizes: KernelSizes, device: torch.device, dtype: torch.dtype, seed: int = 0
    ) -> None:
        self.shape, self.sizes, self.device, self.dtype = shape, sizes, device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)
        loaded = (
            native.load(default_cache()) if device.type == "cpu" and dtype is torch.bfloat16 else "no bf16 on a CPU"
        )
        self.native = loaded if isinstance(loaded, Native) else None
        self.triton = chosen(device) == "triton"

    def all(self, operations: Sequence[str] = OPERATIONS) -> Iterator[Case]:
        """Those of some operations."""
        sizes = self.sizes
        rows = (*sizes.rows, sizes.chunk)
        for operation in operations:
            match operation:
                case "attention_decode":
                    yield from (
                        self.decode_attention(count, known) for count in sizes.rows for known in sizes.contexts
                    )
                case "attention_prefill":
                    yield from (self.prefill_attention(sizes.chunk, known) for known in (0, *sizes.contexts))
                case "layer":
                    yield from (self.layer(count, sizes.contexts[0]) for count in rows)
                case "pooled_logit" | "pooled_head":
                    yield from (getattr(self, operation)(count) for count in sizes.rows)
                case _:
                    yield from (getattr(self, operation)(count) for count in rows)

    def rms_norm(self, rows: int) -> Case:
        width = self.shape.hidden
        x, weight = self._random(rows, width), self._random(width)
        return self._case(
            *("rms_norm", f"{rows} x {width}", self._bytes(2 * x.numel() + width), 4.0 * x.numel()),
            lambda: rms_norm_reference(x.double().float(), weight.float(), EPS),
            {
                REFERENCE: lambda: rms_norm_reference(x, weight, EPS),
                "torch": lambda: rms_norm(x, weight, EPS),
            }
            | self._triton("add_rms_norm", x, None, weight, EPS),
        )

    def rope(self, rows: int) -> Case:
        shape = self.shape
        x = self._random(rows, shape.heads + shape.kv_heads, shape.head_dim)
        frequencies = 10000.0 ** -(torch.arange(0, shape.head_dim, 2, device=self.device) / shape.head_dim)
        cos, sin = rope_angles(torch.arange(rows, device=self.device) + 40, frequencies, 1.0, self.dtype)
        turned = x.clone()
        return Case(
            *("rope", f"{rows} x {x.shape[1]} x {x.shape[2]}"),
            Work(self._bytes(2 * x.numel() + cos.numel() + sin.numel()), 3.0 * x.numel(), 1),
            lambda: rope_reference(x.double(), cos.double(), sin.double()),
            {
                REFERENCE: _way(lambda: rope_reference(x, cos, sin)),
                "torch": Way(lambda: rope_(turned, cos, sin), lambda: rope_(x.clone(), cos, sin)),
            },
        )

    def rope_write(self, rows: int) -> Case:
        """Queries and keys rotated, keys and values written to the pool; in place: every run turns them on."""
        shape = self.shape
        half, dim = shape.kv_heads, shape.head_dim
        qkv, cache = self._random(rows, shape.heads + 2 * half, dim), self._cache(2 * rows)
        places = torch.arange(rows, device=self.device) + rows // 2
        frequencies = 10000.0 ** -(torch.arange(0, dim, 2, device=self.device) / dim)
        cos, sin = rope_angles(torch.arange(rows, device=self.device) + 40, frequencies, 1.0, self.dtype)

        def plain(x: Tensor, rotate: Callable[[Tensor], Tensor]) -> None:
            turned = rotate(x[:, : shape.heads + half])
            kept = torch.cat((turned[:, shape.heads :], x[:, shape.heads + half :]), 1)
            write_kv(cache, places, kept)
            x[:, : shape.heads] = turned[:, : shape.heads]

        def way(run: Callable[[Tensor], object]) -> Way:
            changed = qkv.clone()

            def result() -> Tensor:
                run(fresh := qkv.clone())
                return torch.cat((fresh[:, : shape.heads], cache.kv[:, places].transpose(0, 1)), 1)

            return Way(lambda: run(changed), result)

        ways = {
            REFERENCE: way(lambda x: plain(x, lambda part: rope_reference(part, cos, sin))),
            "torch": way(lambda x: plain(x, lambda part: rope_(part, cos, sin))),
        }
        if self.triton:
            from ..kernels.triton.rope_write import rope_write  # there is no Triton everywhere

            ways["triton"] = way(lambda x: rope_write(x, cos, sin, cache, places))
        exact = torch.cat(
            (rope_reference(qkv[:, : shape.heads + half].double(), cos.double(), sin.double()), qkv[:, -half:]), 1
        )
        moved = (2 * shape.heads + 4 * half) * rows * dim + cos.numel()
        return Case(
            *("rope_write", f"{rows} x {shape.heads + 2 * half} x {dim}"),
            Work(self._bytes(moved), 3.0 * rows * (shape.heads + half) * dim, 1),
            lambda: exact,
            ways,
        )

    def swiglu(self, rows: int) -> Case:
        gate, up = self._random(rows, self.shape.ffn), self._random(rows, self.shape.ffn)
        return self._case(
            *("swiglu", f"{rows} x {self.shape.ffn}", self._bytes(3 * gate.numel()), 5.0 * gate.numel()),
            lambda: F.silu(gate.double()) * up.double(),
            {
                REFERENCE: lambda: gate * torch.sigmoid(gate) * up,
                "torch": lambda: swiglu(gate, up),
            }
            | self._triton("gated", gate, up),
        )

    def linear(self, rows: int) -> Case:
        """The map of a layer with the most weights in one piece: hidden to gate and up."""
        inputs, outputs = self.shape.hidden, 2 * self.shape.ffn
        x = self._random(rows, inputs)
        weights = [self._random(outputs, inputs) for _ in range(self._copies(inputs * outputs))]
        ways = {REFERENCE: [Linear(weight) for weight in weights]}
        if can_pack(weights[0]):
            ways["packed"] = [Linear(weight.clone()) for weight in weights]
        if self.native is not None and native.can_pack(weights[0]):
            ways["native"] = [Linear(weight.clone()) for weight in weights]
        for name, linears in ways.items():
            for linear in linears if name != REFERENCE else ():
                linear.pack(self.native if name == "native" else None)
        size = inputs * outputs
        return Case(
            *("linear", f"{rows} x {inputs} to {outputs}"),
            Work(self._bytes(size + rows * (inputs + outputs)), 2.0 * rows * size, 1),
            lambda: x.double() @ weights[0].double().T,
            {name: _cycled([_bound(linear, x) for linear in linears]) for name, linears in ways.items()},
        )

    def lora(self, rows: int) -> Case:
        width = self.shape.hidden
        x, y = self._random(rows, width), self._random(rows, width)
        kept = torch.float32 if self.device.type == "cpu" else self.dtype
        update = LowRank(
            self._random(width, RANK, dtype=kept) * width**-0.5, self._random(RANK, width, dtype=kept) * 0.01
        )
        changed = y.clone()
        adapted = [0] * rows

        def result(add: Callable[[Tensor], object]) -> Tensor:
            add(fresh := y.clone())
            return fresh

        def torchs(into: Tensor) -> None:
            add_low_rank_(into, x, slice(0, rows), update)

        ways = {
            REFERENCE: _way(lambda: y + (x.to(kept) @ update.a @ update.b).to(self.dtype)),
            "torch": Way(lambda: torchs(changed), lambda: result(torchs)),
        }
        if self.triton and (stack := stacked([update])) is not None:
            from ..kernels.triton.lora import add_low_rank  # there is no Triton everywhere

            who = torch.zeros(rows, dtype=torch.int32, device=self.device)
            turned = partial(add_low_rank, x=x, adapter=who, stack=stack)
            ways["triton"] = Way(lambda: turned(changed), lambda: result(turned))
        return Case(
            *("lora", f"{rows} x {width}, rank {RANK}"),
            Work(2 * width * RANK * kept.itemsize + self._bytes(3 * rows * width), 4.0 * rows * width * RANK, 1),
            lambda: low_rank_reference(y, x, adapted, [update]),
            ways,
        )

    def pool_add(self, rows: int) -> Case:
        width = self.shape.hidden
        hidden = self._random(rows, width)
        slots = torch.arange(rows, device=self.device) % 4
        sums = torch.zeros(5, width, device=self.device)

        def result(add: Callable[[Tensor], object]) -> Tensor:
            add(fresh := torch.zeros_like(sums))
            return fresh

        def reference(into: Tensor) -> None:
            for row, slot in enumerate(slots.tolist()):
                into[slot] += hidden[row]

        def fast(into: Tensor) -> None:
            pool_add(hidden, slots, into)

        return Case(
            *("pool_add", f"{rows} x {width}"),
            Work(self._bytes(rows * width) + 2.0 * 4 * min(rows, 4) * width, 1.0 * rows * width, 1),
            lambda: torch.zeros(5, width, device=self.device, dtype=torch.double).index_add_(
                0, slots, hidden.double()
            ),
            {
                REFERENCE: Way(lambda: reference(sums), lambda: result(reference)),
                "torch": Way(lambda: fast(sums), lambda: result(fast)),
            },
        )

    def pooled_logit(self, rows: int) -> Case:
        width = self.shape.hidden
        pooled, weight, bias = (self._random(*size, dtype=torch.float32) for size in ((rows, width), (width,), (1,)))
        return self._case(
            *("pooled_logit", f"{rows} x {width}", 4.0 * (pooled.numel() + width), 2.0 * pooled.numel()),
            lambda: pooled.double() @ weight.double() + bias.double(),
            {
                REFERENCE: lambda: pooled @ weight + bias,
                "torch": lambda: pooled_logit(pooled, weight, bias, None, EPS)[0],
            },
        )

    def pooled_head(self, rows: int) -> Case:
        """The detector's head after a step of one token each: sum, mean, norm, dot product, score, threshold."""
        width = self.shape.hidden
        hidden, weight, norm, bias = (self._random(*size) for size in ((rows, width), (width,), (width,), (1,)))
        weight *= width**-0.5
        first_row = torch.arange(rows + 1, dtype=torch.int32, device=self.device)
        tables = (first_row, torch.ones_like(first_row[1:]), first_row[:-1], first_row[:-1])
        slots = first_row[:-1].long()
        sums = torch.zeros(rows + 1, width, device=self.device)
        threshold = 0.5

        def reference(into: Tensor) -> Tensor:
            return pooled_head_reference(hidden, *tables, into, weight, bias, norm, EPS, threshold)[0]

        def plain(into: Tensor) -> tuple[Tensor, Tensor]:
            pool_add(hidden, slots, into)
            score = pooled_logit(into[slots] / tables[1][:, None], weight, bias, norm, EPS)[1]
            return score, score.isfinite() & (score >= threshold)

        ways = {
            REFERENCE: _way(lambda: reference(sums)),
            "torch": Way(lambda: plain(sums), lambda: plain(torch.zeros_like(sums))[0]),
        }
        if self.triton:
            from ..kernels.triton.pooled_head import pooled_head  # there is no Triton everywhere

            ways["triton"] = _way(lambda: pooled_head(hidden, *tables, sums, weight, bias, norm, EPS, threshold)[0])
        return Case(
            *("pooled_head", f"{rows} x {width}"),
            Work(self._bytes(hidden.numel() + 2 * width) + 4.0 * hidden.numel(), 6.0 * hidden.numel(), 1),
            lambda: reference(sums.double()),
            ways,
        )

    def decode_attention(self, rows: int, context: int) -> Case:
        """One query a sequence, over keys and values in one piece, and over such in four."""
        shape = self.shape
        q = self._random(rows, shape.heads, shape.head_dim)
        caches = [self._cache(2 * rows * context) for _ in range(self._copies(rows * context * self._row))]
        spans = {
            runs: [
                SequenceSpan(
                    row,
                    1,
                    tuple((2 * (row * runs + run) * (context // runs), context // runs) for run in range(runs)),
                )
                for row in range(rows)
            ]
            for runs in (1, 4)
        }
        scale = shape.head_dim**-0.5
        ways = {
            # the exact one in fp64, which copies what it reads
            REFERENCE: _way(lambda: self._exact_attention(q, caches[0], spans[1])),
            "torch": _cycled([_bound(paged_attention, q, cache, spans[1], scale) for cache in caches]),
            "torch, in four pieces": Way(
                _cycled([_bound(paged_attention, q, cache, spans[4], scale) for cache in caches]).run,
                lambda: paged_attention(q, self._gathered(caches[0], spans[1], spans[4]), spans[4], scale),
            ),
        }
        return Case(
            *("attention_decode", f"{rows} x {context} tokens"),
            Work(
                self._bytes(rows * context * self._row + 2 * q.numel()),
                4.0 * rows * shape.heads * shape.head_dim * context,
                1,
            ),
            lambda: self._exact_attention(q, caches[0], spans[1]),
            ways | self._triton_attention(q, caches, spans[1]),
        )

    def prefill_attention(self, rows: int, context: int) -> Case:
        """A chunk behind `context` known tokens."""
        shape = self.shape
        q, cache = self._random(rows, shape.heads, shape.head_dim), self._cache(rows + context)
        mask = causal_mask(rows, context + rows, None, self.device)
        spans = [SequenceSpan(0, rows, ((0, context + rows),), mask)]
        pairs = rows * context + rows * (rows + 1) / 2
        ways = {
            REFERENCE: _way(lambda: self._exact_attention(q, cache, spans)),
            "torch": _way(lambda: paged_attention(q, cache, spans, shape.head_dim**-0.5)),
        }
        return Case(
            *("attention_prefill", f"{rows} after {context} tokens"),
            Work(
                self._bytes((rows + context) * self._row + 2 * q.numel()),
                4.0 * shape.heads * shape.head_dim * pairs,
                1,
            ),
            lambda: self._exact_attention(q, cache, spans),
            ways | self._triton_attention(q, [cache], spans),
        )

    def _triton_attention(
        self, q: Tensor, caches: Sequence[LayerKV], spans: Sequence[SequenceSpan]
    ) -> dict[str, Way]:
        """Over the pages of `spans` as they lie, side by side, and over the same in any order."""
        if not self.triton:
            return {}
        from ..kernels.triton.paged_attention import paged_attention as triton_attention  # not everywhere

        contexts = [sum(count for _, count in span.runs) for span in spans]
        page_counts = [-(-context // PAGE) for context in contexts]
        order = torch.randperm(sum(page_counts), generator=torch.Generator().manual_seed(0)).tolist()
        beside = torch.zeros(len(spans), max(page_counts), dtype=torch.int32)
        apart = torch.zeros_like(beside)
        for index, (span, count) in enumerate(zip(spans, page_counts, strict=True)):
            beside[index, :count] = torch.arange(count) * PAGE + span.runs[0][0]
            apart[index, :count] = torch.tensor([order.pop() for _ in range(count)]) * PAGE
        starts = torch.tensor([span.start for span in spans] + [len(q)], dtype=torch.int32, device=self.device)
        lengths = torch.tensor(contexts, dtype=torch.int32, device=self.device)
        limits = PAGE, max(span.length for span in spans), max(contexts)
        tables = [RaggedTables(starts, lengths, pages.to(self.device), *limits) for pages in (beside, apart)]
        scale = self.shape.head_dim**-0.5

        def attend(cache: LayerKV, which: int) -> Callable[[], Tensor]:
            return _bound(triton_attention, q, cache, tables[which], scale)

        shuffled = self._cache(caches[0].kv.shape[1])
        for index, context in enumerate(contexts):
            places = torch.arange(context)
            here, there = (side[index].long()[places // PAGE] + places % PAGE for side in (beside, apart))
            shuffled.kv[:, there] = caches[0].kv[:, here]
        return {
            "triton": _cycled([attend(cache, 0) for cache in caches]),
            "triton, pages apart": Way(_cycled([attend(cache, 1) for cache in caches]).run, attend(shuffled, 1)),
        }

    def layer(self, rows: int, context: int) -> Case:
        """A whole decoder layer over `rows` tokens of one text: single operations, and the native kernels."""
        shape = self.shape
        config = DecoderConfig.from_pretrained(
            LlamaConfig(
                vocab_size=shape.vocab,
                hidden_size=shape.hidden,
                intermediate_size=shape.ffn,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                num_hidden_layers=1,
            )
        )
        copies = self._copies(shape.layer_weights)
        decoders = [self._decoder(config) for _ in range(copies)]
        cache, x = self._cache(context + rows), self._random(rows, shape.hidden)
        places, runs = torch.arange(context, context + rows, device=self.device), ((0, context + rows),)
        angles = decoders[0].angles(places)
        span = SequenceSpan(0, rows, runs, causal_mask(rows, context + rows, None, self.device) if rows > 1 else None)
        group = RaggedGroup([cache], [RaggedSequence(0, rows, context, runs)])

        def attend(index: int, qkv: Tensor) -> Tensor:
            write_kv(cache, places, qkv[:, shape.heads :])
            return paged_attention(qkv[:, : shape.heads], cache, [span], shape.head_dim**-0.5)

        def plain(decoder: Decoder) -> Tensor:
            return decoder.block(0, x.clone(), angles, attend, None)

        def fast(decoder: Decoder) -> Tensor:
            assert decoder.native is not None
            out = x.clone()
            decoder.native.run(0, 1, out, angles, places, [group], None)
            return out

        ways = {REFERENCE: _cycled([_bound(plain, decoder) for decoder in decoders])}
        if decoders[0].native is not None:
            ways["native"] = _cycled([_bound(fast, decoder) for decoder in decoders])
        return Case(
            *("layer", f"{rows} x {shape.hidden}, after {context} tokens"),
            replace(shape, layers=1).forward(rows, context),
            lambda: plain(decoders[0]).double(),  # of single operations, each of which has its own exact result
            ways,
        )

    def _decoder(self, config: DecoderConfig) -> Decoder:
        decoder = Decoder(config, self.device, self.dtype, with_head=False)
        for _, slot in decoder.slots():
            slot.copy_(self._random(*slot.shape) * self.shape.hidden**-0.5)
        decoder.freeze()
        return decoder

    def _triton(self, operation: str, *args: object) -> dict[str, Callable[[], Tensor]]:
        """The operation of that name in `kernels.triton`, where it runs."""
        if not self.triton:
            return {}
        module = import_module(f"..kernels.triton.{operation}", __package__)
        return {"triton": _bound(getattr(module, operation), *args)}

    @property
    def _row(self) -> int:
        """Numbers of one token's keys and values."""
        return 2 * self.shape.kv_heads * self.shape.head_dim

    def _random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        made = torch.randn(*shape, generator=self._generator, device=self.device)
        return made.to(dtype or self.dtype)

    def _cache(self, rows: int) -> LayerKV:
        unit = 16 // self.dtype.itemsize  # rows of the pool begin at multiples of 16 bytes, pages are whole
        padded, rows = -(-self.shape.head_dim // unit) * unit, -(-rows // PAGE) * PAGE
        kv = self._random(2 * self.shape.kv_heads, rows, padded)[..., : self.shape.head_dim]
        half = self.shape.kv_heads
        return LayerKV(kv, kv[:half].unsqueeze(0), kv[half:].unsqueeze(0))

    def _gathered(self, cache: LayerKV, wanted: Sequence[SequenceSpan], spans: Sequence[SequenceSpan]) -> LayerKV:
        """The keys and values that lie where `wanted` says, where `spans` says."""
        kv = torch.zeros_like(cache.kv)
        for here, there in zip(wanted, spans, strict=True):
            kv[:, _places(there)] = cache.kv[:, _places(here)]
        half = self.shape.kv_heads
        return LayerKV(kv, kv[:half].unsqueeze(0), kv[half:].unsqueeze(0))

    def _exact_attention(self, q: Tensor, cache: LayerKV, spans: Sequence[SequenceSpan]) -> Tensor:
        outs = []
        for span in spans:
            keys, values = (side[0][:, _places(span)] for side in (cache.keys, cache.values))
            queries = q[span.start : span.start + span.length]
            outs.append(attention_reference(queries, keys, values, self.shape.head_dim**-0.5))
        return torch.cat(outs)

    def _bytes(self, numbers: float) -> float:
        return numbers * self.dtype.itemsize

    def _copies(self, numbers: int) -> int:
        return max(1, -(-self.sizes.cold_bytes // int(self._bytes(numbers))))

    def _case(
        self,
        operation: str,
        what: str,
        moved: float,
        flops: float,
        exact: Callable[[], Tensor],
        ways: dict[str, Callable[[], Tensor]],
    ) -> Case:
        return Case(operation, what, Work(moved, flops, 1), exact, {name: _way(run) for name, run in ways.items()})


def _way(run: Callable[[], Tensor]) -> Way:
    return Way(run, run)


def _cycled(runs: Sequence[Callable[[], Tensor]]) -> Way:
    """The same on other inputs every time."""
    turn = cycle(runs)
    return Way(lambda: next(turn)(), runs[0])


def _bound(function: Callable[..., Tensor], *args: object) -> Callable[[], Tensor]:
    return lambda: function(*args)


def _places(span: SequenceSpan) -> Tensor:
    """The rows of a span's keys and values."""
    return torch.cat([torch.arange(row, row + count) for row, count in span.runs])  # any device indexes by these
