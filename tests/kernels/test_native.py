"""The native kernels against plain PyTorch: no less exact, and no row depends on what runs beside it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from stockade.engine.models.bundles import default_cache
from stockade.engine.models.decoder import Decoder, DecoderConfig
from stockade.kernels import native
from stockade.kernels.linear import Linear
from stockade.kernels.native import Native, RaggedGroup, RaggedSequence
from stockade.kernels.paged_attention import LayerKV, SequenceSpan, causal_mask, paged_attention, write_kv
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


class Texts:
    """Texts on their way through a decoder, in a pool full of NaN: what is read without having been written shows."""

    def __init__(self, decoder: Decoder) -> None:
        config = decoder.config
        self.decoder = decoder
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
        if self.decoder.native is not None:
            self._native(x, angles, rows, works)
        else:
            self._plain(x, angles, rows, works)
        for (text, _, count), part in zip(works, x.split([count for _, _, count in works]), strict=True):
            self.outs[text].append(self.decoder.logits(part))
            self.done[text] += count

    def _native(
        self, x: Tensor, angles: tuple[Tensor, Tensor], rows: Tensor, works: list[tuple[int, int, int]]
    ) -> None:
        assert self.decoder.native is not None
        sequences, at = [], 0
        for text, start, count in works:
            sequences.append(RaggedSequence(at, count, start, runs_of(self.rows[text][: start + count])))
            at += count
        # as two groups, and in two goes
        groups = [RaggedGroup(self.caches, part) for part in (sequences[:2], sequences[2:])]
        self.decoder.native.run(0, 1, x, angles, rows, groups)
        self.decoder.native.run(1, 3, x, angles, rows, groups)

    def _plain(
        self, x: Tensor, angles: tuple[Tensor, Tensor], rows: Tensor, works: list[tuple[int, int, int]]
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
            self.decoder.block(layer, x, angles, attend)


def logits_of(decoder: Decoder, steps: list[list[int]]) -> list[Tensor]:
    texts = Texts(decoder)
    for counts in steps:
        texts.step(counts)
    assert texts.done == [count for count, _ in TEXTS]
    return [torch.cat(out) for out in texts.outs]


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Decoder]:
    def make(name: str, dtype: torch.dtype = BF16, use_native: bool = True) -> Decoder:
        monkeypatch.setenv("STOCKADE_NATIVE", "1" if use_native else "0")
        made = Decoder(DecoderConfig.from_pretrained(CONFIGS[name]()), CPU, dtype)
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
def test_no_bit_depends_on_the_number_of_threads(
    decoder: Callable[..., Decoder], threads: Callable[[int], None]
) -> None:
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(torch.cat(logits_of(decoder("groups of two"), STEPS["in chunks"])))
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
