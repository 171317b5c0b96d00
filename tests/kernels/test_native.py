"""The native kernels against plain PyTorch: no less exact, and no row depends on what runs beside it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from stockade.engine.models.bundles import default_cache
from stockade.engine.models.decoder import Decoder, DecoderConfig
from stockade.kernels import native
from stockade.kernels.linear import Linear
from stockade.kernels.lora import ActiveAdapters, LowRank, Updates
from stockade.kernels.native import Native, RaggedGroup, RaggedSequence
from stockade.kernels.paged_attention import LayerKV, SequenceSpan, causal_mask, paged_attention, write_kv
from stockade.kernels.pooled_logit import pool_add
from stockade.kernels.rms_norm import rms_norm

LOADED = native.load(default_cache())
needs_native = pytest.mark.skipif(not isinstance(LOADED, Native), reason=f"native kernels: {LOADED}")
CPU, BF16 = torch.device("cpu"), torch.bfloat16
ROWS = 2000  # of a pool
BASE = {
    "vocab_size": 390,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
CONFIGS = {
    "groups of two": lambda: LlamaConfig(**BASE, head_dim=32),
    "no groups": lambda: LlamaConfig(**{**BASE, "num_key_value_heads": 4}, head_dim=64),
    "groups of three, biases": lambda: LlamaConfig(
        **{**BASE, "hidden_size": 288, "num_attention_heads": 9, "num_key_value_heads": 3},
        head_dim=96,
        attention_bias=True,
        mlp_bias=True,
    ),
    "norms of heads": lambda: Qwen3Config(**BASE, head_dim=128),
    "biases of qkv": lambda: Qwen2Config(**{**BASE, "hidden_size": 128}),
    "window in a block": lambda: MistralConfig(**BASE, head_dim=32, sliding_window=24),
    "window over blocks": lambda: MistralConfig(**BASE, head_dim=256, sliding_window=200),
}
# (tokens, lengths of the runs they lie in, again and again)
TEXTS = ((300, (300,)), (5, (2,)), (130, (16, 33, 1)), (1, (1,)), (47, (64,)))
ADAPTED = ((0, 40), (-1, 0), (1, 0), (2, 0), (0, 20))  # (adapter, first position that has it) of each text
STEPS = {
    "whole": [[300, 5, 130, 1, 47]],
    "in chunks": [[100, 2, 30, 1, 0], [1, 1, 1, 0, 40], *[[37, 1, 50, 0, 7]] * 6],
    "decoding": [[290, 1, 120, 1, 40], *[[1] * 5] * 10],
}


def place(first: int, count: int, pieces: tuple[int, ...]) -> list[int]:
    """Rows of a pool for `count` tokens, in runs with gaps between them."""
    rows: list[int] = []
    while len(rows) < count:
        for piece in pieces:
            rows += range(first, first + piece)
            first += piece + 5
    return rows[:count]


def runs_of(rows: list[int]) -> tuple[tuple[int, int], ...]:
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and sum(runs[-1]) == row:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((row, 1))
    return tuple(runs)


def low_ranks(config: DecoderConfig) -> list[Updates]:
    """Adapters of rank 8 and 64 for every map, and one of rank 16 for some."""
    heads, keys, hidden = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.hidden_size
    shapes = {
        "qkv": (hidden, (heads, keys, keys)),
        "o": (heads, (hidden,)),
        "gate": (hidden, (config.ffn_size,)),
        "up": (hidden, (config.ffn_size,)),
        "down": (config.ffn_size, (hidden,)),
    }
    generator = torch.Generator().manual_seed(5)
    made: list[Updates] = []
    for rank, parts in ((8, tuple(shapes)), (16, ("qkv", "up")), (64, tuple(shapes))):
        updates = {}
        for layer in (0, 1, 2) if len(parts) == 5 else (0, 2):
            for part in parts:
                inputs, outputs = shapes[part]
                a = torch.randn(inputs, rank * len(outputs), generator=generator) * inputs**-0.5
                b = torch.block_diag(*(torch.randn(rank, out, generator=generator) * rank**-0.5 for out in outputs))
                updates[layer, part] = LowRank(a, b * 0.5)
        made.append(updates)
    return made


class Texts:
    """Texts on their way through a decoder, in a pool full of NaN: what is read without having been written shows.

    adapters: what the texts' tokens are adapted by, as in ADAPTED.
    """

    def __init__(self, decoder: Decoder, adapters: list[Updates] | None = None) -> None:
        config = decoder.config
        self.decoder, self.adapters = decoder, adapters
        kv = [torch.full((2 * config.kv_heads, ROWS, config.head_dim), torch.nan).to(decoder.dtype) for _ in range(3)]
        self.caches = [
            LayerKV(layer, layer[: config.kv_heads].unsqueeze(0), layer[config.kv_heads :].unsqueeze(0))
            for layer in kv
        ]
        generator = torch.Generator().manual_seed(3)
        self.tokens = [torch.randint(0, 390, (count,), generator=generator) for count, _ in TEXTS]
        self.rows = [place(350 * index, *text) for index, text in enumerate(TEXTS)]
        self.done = [0] * len(TEXTS)
        self.outs: list[list[Tensor]] = [[] for _ in TEXTS]

    def step(self, counts: list[int]) -> None:
        works = [
            (text, start, min(count, TEXTS[text][0] - start))
            for text, (start, count) in enumerate(zip(self.done, counts, strict=True))
            if min(count, TEXTS[text][0] - start) > 0
        ]
        if not works:
            return
        x = self.decoder.embed(torch.cat([self.tokens[text][start : start + count] for text, start, count in works]))
        angles = self.decoder.angles(torch.cat([torch.arange(start, start + count) for _, start, count in works]))
        rows = torch.tensor([row for text, start, count in works for row in self.rows[text][start : start + count]])
        active = None
        if self.adapters is not None:
            places = [
                (*ADAPTED[text], place) for text, start, count in works for place in range(start, start + count)
            ]
            adapter = torch.tensor([index if place >= first else -1 for index, first, place in places])
            active = ActiveAdapters.of(adapter, self.adapters, CPU)
        if self.decoder.native is not None:
            self._native(x, angles, rows, works, active)
        else:
            self._plain(x, angles, rows, works, active)
        for (text, _, count), part in zip(works, x.split([count for _, _, count in works]), strict=True):
            self.outs[text].append(self.decoder.logits(part))
            self.done[text] += count

    def _native(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        rows: Tensor,
        works: list[tuple[int, int, int]],
        active: ActiveAdapters | None,
    ) -> None:
        assert self.decoder.native is not None
        sequences, at = [], 0
        for text, start, count in works:
            sequences.append(RaggedSequence(at, count, start, runs_of(self.rows[text][: start + count])))
            at += count
        # as two groups, and in two goes
        groups = [RaggedGroup(self.caches, part) for part in (sequences[:2], sequences[2:])]
        self.decoder.native.run(0, 1, x, angles, rows, groups, active)
        self.decoder.native.run(1, 3, x, angles, rows, groups, active)

    def _plain(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        rows: Tensor,
        works: list[tuple[int, int, int]],
        active: ActiveAdapters | None,
    ) -> None:
        config = self.decoder.config
        (window,) = set(config.windows)
        spans, at = [], 0
        for text, start, count in works:
            first = 0 if window is None else max(0, start - window + 1)
            mask = causal_mask(count, start + count - first, window, CPU) if count > 1 else None
            spans.append(SequenceSpan(at, count, runs_of(self.rows[text][first : start + count]), mask))
            at += count

        def attend(layer: int, qkv: Tensor) -> Tensor:
            write_kv(self.caches[layer], rows, qkv[:, config.heads :])
            return paged_attention(qkv[:, : config.heads], self.caches[layer], spans, config.head_dim**-0.5)

        for layer in range(config.layers):
            self.decoder.block(layer, x, angles, attend, active)


def logits_of(decoder: Decoder, steps: list[list[int]], adapters: list[Updates] | None = None) -> list[Tensor]:
    texts = Texts(decoder, adapters)
    for counts in steps:
        texts.step(counts)
    assert texts.done == [count for count, _ in TEXTS]
    return [torch.cat(out) for out in texts.outs]


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Decoder]:
    def make(
        name: str, dtype: torch.dtype = BF16, use_native: bool = True, weights: Literal["int8"] | None = None
    ) -> Decoder:
        monkeypatch.setenv("STOCKADE_NATIVE", "1" if use_native else "0")
        made = Decoder(DecoderConfig.from_pretrained(CONFIGS[name]()), CPU, dtype, weights=weights)
        generator = torch.Generator().manual_seed(1)
        for slot, tensor in made.slots():
            noise = torch.randn(tensor.shape, generator=generator) * (
                0.2 if tensor.ndim == 1 else tensor.shape[1] ** -0.5
            )
            tensor.copy_((noise + ("norm" in slot)).bfloat16())
        made.freeze()
        assert (made.native is not None) == (use_native and dtype is BF16)
        return made

    return make


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_are_no_less_exact_than_the_plain_path(name: str, decoder: Callable[..., Decoder]) -> None:
    exact = torch.cat(logits_of(decoder(name, torch.float32), STEPS["whole"])).double()
    plain = torch.cat(logits_of(decoder(name, use_native=False), STEPS["whole"])).double()
    ours = torch.cat(logits_of(decoder(name), STEPS["whole"])).double()
    assert (ours - exact).norm() <= (plain - exact).norm()
    assert (ours - exact).abs().max() <= (plain - exact).abs().max() * 1.5


@needs_native
@pytest.mark.parametrize("name", CONFIGS)
def test_no_bit_depends_on_how_the_tokens_are_cut_into_steps(name: str, decoder: Callable[..., Decoder]) -> None:
    whole, *others = (logits_of(decoder(name), steps) for steps in STEPS.values())
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(whole, other, strict=True))


@needs_native
@pytest.mark.parametrize("name", ["groups of three, biases", "norms of heads", "window over blocks"])
def test_weights_of_8_bits_are_no_less_exact_and_no_row_depends_on_others(
    name: str, decoder: Callable[..., Decoder]
) -> None:
    def ours(steps: str) -> list[Tensor]:
        made = decoder(name, weights="int8")
        assert made.layers[0].qkv.weight.dtype is torch.int8
        return logits_of(made, STEPS[steps], low_ranks(made.config))

    exact, plain = (
        torch.cat(logits_of(made, STEPS["whole"], low_ranks(made.config))).double()
        for made in (decoder(name, torch.float32, weights="int8"), decoder(name, BF16, False, "int8"))
    )
    whole = ours("whole")
    assert (torch.cat(whole) - exact).norm() <= (plain - exact).norm()
    for steps in ("in chunks", "decoding"):
        assert all(torch.equal(a, b) for a, b in zip(whole, ours(steps), strict=True))


@needs_native
def test_no_bit_depends_on_the_number_of_threads(
    decoder: Callable[..., Decoder], threads: Callable[[int], None]
) -> None:
    found = []
    for count in (1, 2, 3):
        threads(count)
        made = decoder("groups of two")
        found.append(torch.cat(logits_of(made, STEPS["in chunks"], low_ranks(made.config))))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_native
def test_nan_stays_in_its_sequence_and_is_not_lost(decoder: Callable[..., Decoder]) -> None:
    made = decoder("groups of two")
    clean = logits_of(made, STEPS["whole"])
    texts = Texts(made)
    texts.tokens[2] = texts.tokens[2].clone()
    texts.tokens[2][7] = 0
    made.embedding[0] = torch.nan
    for index in (0, 1, 3, 4):
        texts.tokens[index] = texts.tokens[index].clone()
        texts.tokens[index][texts.tokens[index] == 0] = 1
    texts.step(STEPS["whole"][0])
    hurt = [torch.cat(out) for out in texts.outs]
    assert hurt[2][7:].isnan().all()
    assert torch.equal(hurt[3], clean[3]) and not torch.cat([hurt[0], hurt[1], hurt[4]]).isnan().any()


@needs_native
@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_are_no_less_exact_than_on_the_plain_path(name: str, decoder: Callable[..., Decoder]) -> None:
    """Three in one batch: ranks 8, 16 and 64, of every map or of some, from the first token on or a later one."""
    made = decoder(name)
    adapters = low_ranks(made.config)
    exact = torch.cat(logits_of(decoder(name, torch.float32), STEPS["whole"], adapters)).double()
    plain = torch.cat(logits_of(decoder(name, use_native=False), STEPS["whole"], adapters)).double()
    ours = torch.cat(logits_of(made, STEPS["whole"], adapters)).double()
    assert (ours - exact).norm() <= (plain - exact).norm()
    assert (ours - exact).abs().max() <= (plain - exact).abs().max() * 1.5


@needs_native
@pytest.mark.parametrize("rank", [1, 8, 16, 64])
def test_an_update_is_rounded_to_bf16_once(rank: int, decoder: Callable[..., Decoder]) -> None:
    """Where the weights are zero only the update is left: of values its sum in fp64, rounded."""
    made = decoder("groups of two")
    assert made.native is not None
    qkv = made.layers[0].qkv.matrix
    assert qkv is not None
    qkv.tiles.zero_()
    generator = torch.Generator().manual_seed(rank)
    update = LowRank(torch.randn(64, rank, generator=generator), torch.randn(rank, 256, generator=generator))
    texts, x, angles = Texts(made), made.embed(torch.arange(40)), made.angles(torch.arange(40))
    wide = x.double()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + made.config.norm_eps) * made.layers[0].input_norm
    group = RaggedGroup(texts.caches, [RaggedSequence(0, 40, 0, ((0, 40),))])
    active = ActiveAdapters.of(torch.zeros(40, dtype=torch.long), [{(0, "qkv"): update}], CPU)
    made.native.run(0, 1, x, angles, torch.arange(40), [group], active)
    values = texts.caches[0].kv[2:, :40].transpose(0, 1).flatten(1).double()
    exact = (normed.bfloat16().double() @ update.a.double() @ update.b.double())[:, 192:]
    assert (values - exact).norm() <= (exact.bfloat16().double() - exact).norm() * 1.02


@needs_native
@pytest.mark.parametrize("name", CONFIGS)
def test_no_bit_of_an_adapted_row_depends_on_the_rows_beside_it(name: str, decoder: Callable[..., Decoder]) -> None:
    made = decoder(name)
    base = logits_of(made, STEPS["whole"])
    whole, *others = (logits_of(made, steps, low_ranks(made.config)) for steps in STEPS.values())
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(whole, other, strict=True))
    for (index, first), adapted, plain in zip(ADAPTED, whole, base, strict=True):
        first = len(plain) if index < 0 else first
        assert torch.equal(adapted[:first], plain[:first])
        assert not torch.isclose(adapted[first:], plain[first:]).all(1).any()


@needs_native
def test_an_adapter_that_overflows_stays_in_its_rows(decoder: Callable[..., Decoder]) -> None:
    made = decoder("groups of two")
    adapters = low_ranks(made.config)
    whole = logits_of(made, STEPS["whole"], adapters)
    adapters[1] = {(0, "qkv"): LowRank(*(part * torch.inf for part in adapters[1][0, "qkv"]))}
    hurt = logits_of(made, STEPS["whole"], adapters)
    assert hurt[2].isnan().all()
    assert all(torch.equal(hurt[text], whole[text]) for text in (0, 1, 3, 4))


@needs_native
def test_rows_that_nobody_wants_leave_the_others_as_they_are(decoder: Callable[..., Decoder]) -> None:
    made = decoder("window in a block")
    assert made.native is not None
    tokens, angles = torch.arange(300), made.angles(torch.arange(300))
    found, pools = [], []
    for wanted in (None, torch.arange(300).remainder(130) == 70):
        texts, x = Texts(made), made.embed(tokens)
        active = ActiveAdapters.of((tokens > 90).long() - 1, low_ranks(made.config), CPU)
        group = RaggedGroup(texts.caches, [RaggedSequence(0, 300, 0, ((0, 300),))])
        made.native.run(0, 3, x, angles, torch.arange(300), [group], active, wanted)
        found.append(x)
        pools.append(torch.stack([cache.kv[:, :300] for cache in texts.caches]))
    whole, some = found
    assert torch.equal(some[70::130], whole[70::130]) and not torch.equal(some, whole)
    assert torch.equal(*pools)


@needs_native
@pytest.mark.parametrize("rows", [1, 16, 300])
def test_pooled_rows_are_added_to_their_sums(rows: int, decoder: Callable[..., Decoder]) -> None:
    made = decoder("groups of two")
    assert made.native is not None
    tokens, angles, places = torch.arange(rows) % 390, made.angles(torch.arange(rows)), torch.arange(rows)
    pooled = {layer: torch.arange(rows).remainder(layer + 2) - 1 for layer in (1, 2, 3)}
    if rows == 1:
        pooled[2] = torch.tensor([3])
    found = []
    for steps in (((0, 3),), ((0, 1), (1, 2), (2, 3))):
        texts, x = Texts(made), made.embed(tokens)
        group = RaggedGroup(texts.caches, [RaggedSequence(0, rows, 0, ((0, rows),))])
        sums = torch.ones(5, 64)
        for first, last in steps:
            whole = len(steps) == 1
            made.native.run(first, last, x, angles, places, [group], pooled=pooled if whole else None, sums=sums)
            if not whole:
                pool_add(x, pooled[last], sums)
        found.append((x, sums))
    (x, sums), (reference_x, reference) = found
    assert torch.equal(x, reference_x)
    assert torch.equal(sums[:4], reference[:4])  # the reference's last one is for what is discarded
    assert not torch.equal(sums[0 if rows > 1 else 3], torch.ones(64))


@needs_native
def test_sums_that_do_not_fit_are_refused(decoder: Callable[..., Decoder]) -> None:
    made = decoder("groups of two")
    assert made.native is not None
    texts, x, angles = Texts(made), made.embed(torch.tensor([7])), made.angles(torch.tensor([0]))
    group, before = RaggedGroup(texts.caches, [RaggedSequence(0, 1, 0, ((5, 1),))]), x.clone()
    for slots, sums, error in (
        (torch.tensor([4]), torch.zeros(4, 64), IndexError),
        (torch.tensor([-2]), torch.zeros(4, 64), IndexError),
        (torch.tensor([0, 0]), torch.zeros(4, 64), ValueError),
        (torch.tensor([0]).int(), torch.zeros(4, 64), ValueError),
        (torch.tensor([0]), torch.zeros(4, 63), ValueError),
        (torch.tensor([0]), torch.zeros(4, 64).bfloat16(), ValueError),
        (torch.tensor([0]), None, ValueError),
    ):
        with pytest.raises(error):
            made.native.run(0, 3, x, angles, torch.tensor([5]), [group], pooled={2: slots}, sums=sums)
    assert torch.equal(x, before)


@needs_native
def test_adapters_that_do_not_fit_are_refused(decoder: Callable[..., Decoder]) -> None:
    made = decoder("groups of two")
    assert made.native is not None
    texts, x, angles = Texts(made), made.embed(torch.tensor([7])), made.angles(torch.tensor([0]))
    group = RaggedGroup(texts.caches, [RaggedSequence(0, 1, 0, ((5, 1),))])

    def run(rows: list[int], a: tuple[int, int], b: tuple[int, int], wanted: Tensor | None = None) -> None:
        active = ActiveAdapters(torch.tensor(rows), [{(1, "o"): LowRank(torch.zeros(a), torch.zeros(b))}], CPU)
        assert made.native is not None
        made.native.run(0, 3, x, angles, torch.tensor([5]), [group], active, wanted)

    run([0], (128, 4), (4, 64))
    for a, b in (((64, 4), (4, 64)), ((128, 4), (4, 128)), ((128, 4), (5, 64))):
        with pytest.raises(ValueError, match="its map takes"):
            run([0], a, b)
    with pytest.raises(ValueError, match="adapters for 2"):
        run([0, 0], (128, 4), (4, 64))
    with pytest.raises(ValueError, match="must be bool"):
        run([0], (128, 4), (4, 64), torch.ones(2, dtype=torch.bool))


@needs_native
@pytest.mark.parametrize(
    ("rows", "runs", "length"),
    [
        ([5], ((5, 1), (ROWS, 1)), 2),
        ([5], ((ROWS - 1, 2),), 2),
        ([ROWS], ((5, 1),), 1),
        ([-1], ((5, 1),), 1),
        ([5], ((5, 3),), 2),
    ],
    ids=["run beyond", "run over the end", "write beyond", "write before", "more runs than tokens"],
)
def test_rows_outside_the_pool_are_refused(
    rows: list[int], runs: tuple[tuple[int, int], ...], length: int, decoder: Callable[..., Decoder]
) -> None:
    made = decoder("groups of two")
    assert made.native is not None
    texts = Texts(made)
    x = made.embed(torch.tensor([7]))
    before = x.clone()
    group = RaggedGroup(texts.caches, [RaggedSequence(0, 1, length - 1, runs)])
    with pytest.raises(IndexError, match="outside the pool"):
        made.native.run(0, 3, x, made.angles(torch.tensor([length - 1])), torch.tensor(rows), [group])
    assert torch.equal(x, before)


@needs_native
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 32), (16, 64), (49, 96), (33, 576), (100, 1536)])
def test_a_packed_map_is_no_less_exact_than_pytorch(shape: tuple[int, int], bias: bool) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator).bfloat16()
    offset = torch.randn(shape[0], generator=generator).bfloat16() if bias else None
    norm = torch.rand(shape[1], generator=generator).bfloat16()
    x = torch.randn(300, shape[1], generator=generator).bfloat16()
    linear = Linear(weight.clone(), offset)
    assert isinstance(LOADED, Native)
    linear.pack(LOADED)
    assert linear.packed and linear(x[:0]).shape == (0, shape[0])
    exact = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    for rows in (1, 2, 15, 16, 17, 32, 33, 300):
        got = linear(x[:rows])
        assert torch.equal(got, linear(x)[:rows])
        assert (got - exact[:rows]).norm() <= (F.linear(x[:rows], weight, offset) - exact[:rows]).norm() * 1.02
    wide = x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5) * norm.double()
    exact = F.linear(wide, weight.double(), None if offset is None else offset.double())
    theirs = F.linear(rms_norm(x, norm, 1e-5), weight, offset)
    assert (linear.after_norm(x, norm, 1e-5) - exact).norm() <= (theirs - exact).norm()


@needs_native
@pytest.mark.parametrize("shape", [(16, 64), (48, 96), (64, 1536)])
def test_a_packed_map_of_8_bits_multiplies_what_is_stored(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    linear = Linear(torch.randn(shape, generator=generator).bfloat16(), torch.randn(shape[0]).bfloat16())
    linear.quantize("int8")
    assert linear.quantized is not None and linear.bias is not None and isinstance(LOADED, Native)
    stored = linear.quantized.weight.double() * linear.quantized.scale.double()[:, None]
    linear.pack(LOADED)
    x = torch.randn(70, shape[1], generator=generator).bfloat16()
    whole, exact = linear(x), F.linear(x.double(), stored, linear.bias.double())
    assert (whole - exact).abs().max() <= exact.abs().max() * 2**-8
    for rows in (1, 2, 3, 16, 17, 33):  # one by one, in tiles as they come, and in panels that are kept
        assert torch.equal(linear(x[:rows]), whole[:rows])


def test_odd_shapes_and_other_dtypes_are_not_packed() -> None:
    assert not native.can_pack(torch.zeros(32, 40, dtype=BF16))
    assert not native.can_pack(torch.zeros(32, 64))


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STOCKADE_NATIVE", "0")
    assert native.load(tmp_path) == "turned off by STOCKADE_NATIVE=0"
    assert not list(tmp_path.iterdir())


@needs_native
def test_without_a_compiler_it_says_so_quietly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.load(tmp_path / "none") == "there is no compiler (g++)"


@needs_native
def test_a_compiler_that_fails_is_told_once_and_nothing_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "g++").write_text("#!/bin/sh\n[ $# = 1 ] && echo 12 && exit 0\necho no such flag >&2\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.warns(UserWarning, match="no such flag"):
        assert native.load(tmp_path / "broken") == "building it failed: CalledProcessError"
    assert not list((tmp_path / "broken").iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(native.load(tmp_path / "broken"), str)


@needs_native
def test_it_may_be_built_twice_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as both:
        assert all(isinstance(found, Native) for found in both.map(native.load, [tmp_path, tmp_path]))
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"]
