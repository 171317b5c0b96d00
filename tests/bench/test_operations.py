"""Hot operations, each held against its reference; `--benchmark-enable` measures them in the shapes of smol."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from stockade.engine.engine import Engine
from stockade.engine.kv_pages import KVLayout, PagePool
from stockade.engine.models.bundles import default_cache
from stockade.engine.models.decoder import Decoder, DecoderConfig
from stockade.engine.sampling import SamplingParams, greedy
from stockade.kernels import native
from stockade.kernels.linear import Linear
from stockade.kernels.lora import ActiveAdapters, LowRank
from stockade.kernels.native import RaggedGroup, RaggedSequence
from stockade.kernels.paged_attention import (
    LayerKV,
    SequenceSpan,
    attention_reference,
    causal_mask,
    paged_attention,
    write_kv,
)
from stockade.kernels.pooled_logit import pooled_logit
from stockade.kernels.rms_norm import rms_norm, rms_norm_reference
from stockade.kernels.rope import rope_, rope_angles, rope_reference
from stockade.kernels.swiglu import swiglu

HIDDEN, FFN, HEADS, KV_HEADS, DIM, VOCAB = 576, 1536, 9, 3, 64, 49152
DTYPE = torch.bfloat16
ROWS = pytest.mark.parametrize("rows", [1, 16])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(DTYPE)


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 2e-2) -> None:
    scale = want.double().abs().max()
    assert (got.double() - want.double()).abs().max() <= tolerance * scale


@ROWS
def test_packed_linear(benchmark: Any, rows: int) -> None:
    x, weight = random(rows, HIDDEN), random(2 * FFN, HIDDEN)
    linear = Linear(weight.clone())
    linear.pack()
    with torch.inference_mode():
        close(benchmark(linear, x), F.linear(x.double(), weight.double()))


@ROWS
def test_rms_norm(benchmark: Any, rows: int) -> None:
    x, weight = random(rows, HIDDEN), random(HIDDEN)
    with torch.inference_mode():
        close(benchmark(rms_norm, x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))


@ROWS
def test_rope(benchmark: Any, rows: int) -> None:
    x = random(rows, HEADS + KV_HEADS, DIM)
    cos, sin = rope_angles(torch.arange(rows) + 40, 10000.0 ** -(torch.arange(0, DIM, 2) / DIM), 1.0, DTYPE)
    want = rope_reference(x, cos, sin)
    with torch.inference_mode():
        once = rope_(x.clone(), cos, sin)
        benchmark(rope_, x, cos, sin)
    close(once, want)


@ROWS
def test_swiglu(benchmark: Any, rows: int) -> None:
    gate, up = random(rows, FFN), random(rows, FFN)
    with torch.inference_mode():
        close(benchmark(swiglu, gate, up), F.silu(gate.double()) * up.double())


def cache(rows: int) -> LayerKV:
    kv = random(2 * KV_HEADS, rows, DIM)
    return LayerKV(kv, kv[:KV_HEADS].unsqueeze(0), kv[KV_HEADS:].unsqueeze(0))


def reference(q: torch.Tensor, layer: LayerKV, spans: list[SequenceSpan]) -> torch.Tensor:
    outs = []
    for span in spans:
        places = torch.cat([torch.arange(row, row + count) for row, count in span.runs])
        keys, values = (side[0][:, places] for side in (layer.keys, layer.values))
        outs.append(attention_reference(q[span.start : span.start + span.length], keys, values, DIM**-0.5))
    return torch.cat(outs)


@ROWS
@pytest.mark.parametrize("runs", [1, 4])
def test_decode_attention(benchmark: Any, rows: int, runs: int) -> None:
    """One query a sequence over 1,024 tokens, in one piece or scattered."""
    length = 1024 // runs
    layer = cache(2 * 1024 * rows)
    spans = [
        SequenceSpan(row, 1, tuple(((2 * (row * runs + run)) * length, length) for run in range(runs)))
        for row in range(rows)
    ]
    q = random(rows, HEADS, DIM)
    with torch.inference_mode():
        close(benchmark(paged_attention, q, layer, spans, DIM**-0.5), reference(q, layer, spans))


@pytest.mark.parametrize("before", [0, 512])
def test_prefill_attention(benchmark: Any, before: int) -> None:
    """A chunk of 512 tokens, alone and behind 512 known ones."""
    layer = cache(2048)
    mask = causal_mask(512, before + 512, None, torch.device("cpu"))
    spans = [SequenceSpan(0, 512, ((64, before + 512),), mask)]
    q = random(512, HEADS, DIM)
    with torch.inference_mode():
        close(benchmark(paged_attention, q, layer, spans, DIM**-0.5), reference(q, layer, spans))


@pytest.mark.parametrize("adapted", [0, 10, 640])
@pytest.mark.parametrize("rows", [1, 16, 512])
def test_native_layer(benchmark: Any, rows: int, adapted: int) -> None:
    """A whole layer over a chunk behind 256 known tokens, against the same from single operations; at most `adapted`
    of its rows have an adapter of rank 16 for all maps."""
    if isinstance(library := native.load(default_cache()), str):
        pytest.skip(f"native kernels: {library}")
    shape = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": HEADS, "num_hidden_layers": 1}
    config = DecoderConfig.from_pretrained(LlamaConfig(vocab_size=VOCAB, num_key_value_heads=KV_HEADS, **shape))
    decoder = Decoder(config, torch.device("cpu"), DTYPE, with_head=False)
    for _, slot in decoder.slots():
        slot.copy_(random(*slot.shape) * HIDDEN**-0.5)
    decoder.freeze()
    assert decoder.native is not None
    layer, x = cache(1024), random(rows, HIDDEN)
    angles, places = decoder.angles(torch.arange(256, 256 + rows)), torch.arange(64 + 256, 64 + 256 + rows)
    runs = ((64, 256 + rows),)
    span = SequenceSpan(0, rows, runs, causal_mask(rows, 256 + rows, None, torch.device("cpu")) if rows > 1 else None)
    group = RaggedGroup([layer], [RaggedSequence(0, rows, 256, runs)])

    maps = (
        *(("qkv", HIDDEN, 48, 960), ("o", HIDDEN, 16, HIDDEN)),
        *(("gate", HIDDEN, 16, FFN), ("up", HIDDEN, 16, FFN), ("down", FFN, 16, HIDDEN)),
    )
    updates = {
        (0, part): LowRank(torch.randn(inputs, rank) * inputs**-0.5, torch.randn(rank, outputs) * 0.1)
        for part, inputs, rank, outputs in maps
    }
    active = ActiveAdapters.of((torch.arange(rows) < adapted).long() - 1, [updates], torch.device("cpu"))

    def attend(index: int, qkv: torch.Tensor) -> torch.Tensor:
        write_kv(layer, places, qkv[:, HEADS:])
        return paged_attention(qkv[:, :HEADS], layer, [span], DIM**-0.5)

    with torch.inference_mode():
        want, got = decoder.block(0, x.clone(), angles, attend, active), x.clone()
        decoder.native.run(0, 1, got, angles, places, [group], active)
        close(got, want)
        benchmark(decoder.native.run, 0, 1, x.clone(), angles, places, [group], active)


def test_pooled_logit(benchmark: Any) -> None:
    pooled, weight, bias = torch.randn(16, HIDDEN), torch.randn(HIDDEN), torch.randn(1)
    logit, score = benchmark(pooled_logit, pooled, weight, bias, None, 1e-5)
    close(logit, pooled.double() @ weight.double() + bias.double(), 1e-5)
    close(score, torch.sigmoid(logit.double()), 1e-5)


@ROWS
def test_greedy_sampler(benchmark: Any, rows: int) -> None:
    logits = random(rows, VOCAB)
    assert torch.equal(benchmark(greedy, logits), logits.argmax(-1))


def test_engine_step(benchmark: Any, checkpoint: Callable[[str], Path]) -> None:
    """One step of a tiny model that decodes for eight requests: everything but large matrices."""
    engine = Engine(checkpoint("llama-gqa"), device="cpu", dtype=torch.float32, kv_bytes=16 << 20, tokens_per_page=16)
    sampling = SamplingParams(max_tokens=400, ignore_eos=True)
    requests = [engine.submit_prompt([5 + number, 6, 7, 8], sampling) for number in range(8)]
    engine.step()
    steps = engine.steps
    benchmark.pedantic(engine.step, rounds=200, warmup_rounds=10)
    for request in requests:
        (run,) = request.runs.values()
        assert run.sequence.num_tokens == 4 + 1 + engine.steps - steps


@pytest.fixture
def pool() -> tuple[PagePool, KVLayout]:
    layout = KVLayout(depth=2, kv_heads=KV_HEADS, head_dim=DIM, dtype=DTYPE, tokens_per_page=64)
    return PagePool(64 << 20, [layout], torch.device("cpu")), layout


def test_page_allocation(benchmark: Any, pool: tuple[PagePool, KVLayout]) -> None:
    """Sixteen pages taken and given back."""
    pages, layout = pool

    def take_and_give() -> int:
        taken = pages.allocate(layout, 16)
        assert taken is not None
        pages.release(taken)
        return len({page.row for page in taken})

    assert benchmark(take_and_give) == 16
    pages.check_integrity()
    assert pages.owned_pages == 0


def test_prefix_match(benchmark: Any, pool: tuple[PagePool, KVLayout]) -> None:
    """A text of sixteen pages found again, and half a page of another that continues it."""
    pages, layout = pool
    text = list(range(1000, 1000 + 16 * 64))
    taken = pages.allocate(layout, 16)
    assert taken is not None
    parent: Any = pages.root(layout, "weights", None)
    for index, page in enumerate(taken):
        parent = pages.insert(parent, page, tuple(text[64 * index : 64 * (index + 1)]))
    pages.release(taken)
    match = benchmark(pages.match, pages.root(layout, "weights", None), layout, [*text[: 15 * 64 + 32], 7])
    assert match.pages == taken[:15]
    assert (match.partial, match.tokens) == (taken[15], 15 * 64 + 32)
    pages.check_integrity()
