"""Rotation and the writing of keys and values in one launch against fp64; nothing else of the pool is touched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stockade.kernels.paged_attention import LayerKV
from stockade.kernels.quantized import FP8
from stockade.kernels.rms_norm import rms_norm_reference
from stockade.kernels.rope import rope_, rope_angles
from stockade.kernels.triton.common import FLOATS, KernelArgumentError
from stockade.kernels.triton.rope_write import rope_write
from tests.kernels.triton.bounds import NAN, assert_as_exact

EPS = 1e-6
PLACES = 40


@dataclass
class Step:
    """One launch's arguments. store: what the pool's rows lie in, padding included, [2 * kv_heads, rows, padded]."""

    qkv: Tensor
    cos: Tensor
    sin: Tensor
    store: Tensor
    write_rows: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    kv_scale: Tensor | None = None

    def to(self, device: torch.device) -> Step:
        return replace(
            self, **{key: part.to(device, copy=True) for key, part in vars(self).items() if part is not None}
        )

    def run(self) -> None:
        kv = self.store[..., : self.qkv.shape[2]]
        half = len(kv) // 2
        cache = LayerKV(kv, kv[:half].unsqueeze(0), kv[half:].unsqueeze(0))
        arguments = {name: getattr(self, name) for name in ("qkv", "cos", "sin", "write_rows", "q_norm", "k_norm")}
        rope_write(**arguments, cache=cache, eps=EPS, kv_scale=self.kv_scale)


def made(
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    write_rows: list[int],
    *,
    normed: bool = False,
    pages: torch.dtype | None = None,
    tables: int = 1,
    index: torch.dtype = torch.int64,
) -> Step:
    generator = torch.Generator().manual_seed(heads + dim + len(write_rows))
    rows = len(write_rows)
    qkv = (torch.randn(rows, heads + 2 * kv_heads, dim, generator=generator) * 2).to(dtype)
    frequencies = 10000.0 ** -(torch.arange(0, dim, 2) / dim)
    positions = torch.randint(0, 4000, (rows, dim // 2), generator=generator)  # as an M-RoPE has them
    angles = rope_angles(positions, frequencies, 1.0, dtype)
    # one of several rotary tables beside each other, as Gemma 3 has them
    cos, sin = (torch.cat([part] * tables, 1)[:, tables - 1].unsqueeze(1) for part in angles)
    pages = pages or dtype
    padded = -(-dim * pages.itemsize // 16) * 16 // pages.itemsize
    store = torch.full((2 * kv_heads, PLACES, padded), NAN, dtype=torch.float32).to(pages)
    step = Step(qkv, cos, sin, store, torch.tensor(write_rows, dtype=index))
    if normed:
        step.q_norm, step.k_norm = ((torch.randn(dim, generator=generator) * 0.3 + 1).to(dtype) for _ in range(2))
    if pages is FP8:
        step.kv_scale = torch.rand(2 * kv_heads, generator=generator) * 0.1 + 0.01
    return step


def turned(step: Step, wide: bool) -> Tensor:
    """qkv normed and rotated by torch: in fp64 (wide), or in its own dtype."""
    kv_heads = len(step.store) // 2
    qkv = step.qkv.double() if wide else step.qkv.clone()
    heads = qkv.shape[1] - 2 * kv_heads
    for part, norm in ((qkv[:, :heads], step.q_norm), (qkv[:, heads : heads + kv_heads], step.k_norm)):
        if norm is not None and wide:
            part.copy_(part * (part.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * norm.double())
        elif norm is not None:
            part.copy_(rms_norm_reference(part, norm, EPS))
    rope_(qkv[:, : heads + kv_heads], step.cos.to(qkv.dtype), step.sin.to(qkv.dtype))
    return qkv


def check(step: Step, device: torch.device) -> None:
    here = step.to(device)
    here.run()
    exact, torchs = turned(step, True), turned(step, False)
    kv_heads, dim = len(step.store) // 2, step.qkv.shape[2]
    heads = step.qkv.shape[1] - 2 * kv_heads
    kept = [row for row, place in enumerate(step.write_rows.tolist()) if place >= 0]
    places = step.write_rows[kept]
    assert_as_exact(here.qkv[kept][:, :heads], exact[kept][:, :heads], torchs[kept][:, :heads])
    store = here.store.cpu()
    written = store[:, places].transpose(0, 1)
    assert (written[..., dim:].float() == 0).all(), "what pads a row is not zero"
    if step.kv_scale is None:
        assert_as_exact(written[..., :dim], exact[kept][:, heads:], torchs[kept][:, heads:])
    else:
        want = (exact[kept][:, heads:] / step.kv_scale.double()[:, None]).clamp(-448, 448)
        # a unit of e4m3's last place: the interpreter does not round to nearest
        torch.testing.assert_close(written[..., :dim].double(), want, rtol=0.126, atol=2**-9)
    untouched = [place for place in range(PLACES) if place not in places.tolist()]
    assert store[:, untouched].float().isnan().all()
    padding = [row for row in range(len(step.qkv)) if row not in kept]
    assert torch.equal(here.qkv[padding].cpu(), step.qkv[padding])


@settings(max_examples=15, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (9, 3), (4, 4), (14, 2)]),
    dim=st.sampled_from([64, 80, 96, 100, 112, 128, 256]),
    dtype=st.sampled_from(FLOATS),
    write_rows=st.lists(st.integers(0, PLACES - 1), min_size=1, max_size=3, unique=True),
    padding=st.integers(0, 2),
    normed=st.booleans(),
    tables=st.sampled_from([1, 2]),
    index=st.sampled_from([torch.int32, torch.int64]),
)
def test_queries_keys_and_values_are_those_of_fp64(
    heads: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    write_rows: list[int],
    padding: int,
    normed: bool,
    tables: int,
    index: torch.dtype,
    device: torch.device,
) -> None:
    places = [*write_rows, *[-1] * padding]
    check(made(*heads, dim, dtype, places, normed=normed, tables=tables, index=index), device)


def test_norms_of_gemma_are_fp32(device: torch.device) -> None:
    step = made(4, 2, 96, torch.float16, [3, 17], normed=True)
    assert step.q_norm is not None and step.k_norm is not None
    step.q_norm, step.k_norm = step.q_norm.float() * 1.001, step.k_norm.float()
    check(step, device)


def no_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9)


@pytest.mark.parametrize("dim", [64, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fp8_pages_hold_the_number_over_its_heads_scale(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    if no_fp8(device):
        pytest.skip("no fp8 here")
    step = made(3, 2, dim, dtype, [8, -1, 30], pages=FP8)
    if device.type == "cpu":
        # The interpreter's cast to fp8 does not round. So nothing turns, and all numbers are ones that fp8 has.
        step.kv_scale = torch.tensor([0.5, 0.25, 2.0, 0.125])
        step.cos, step.sin = torch.ones_like(step.cos), torch.zeros_like(step.sin)
        step.qkv = step.qkv.to(FP8).to(dtype)
    step.qkv[0, 3, 5] = 3e4  # saturates, and is no NaN
    check(step, device)


def test_a_nan_is_written_as_one(device: torch.device) -> None:
    """Fail closed: what is no number must not become one on its way through the pages."""
    # the interpreter's cast to fp8 makes a number of a NaN, a GPU's does not
    for pages in (torch.float32,) if device.type == "cpu" or no_fp8(device) else (torch.float32, FP8):
        step = made(2, 1, 64, torch.float32, [4], pages=pages)
        step.store.zero_()
        step.qkv[0, 3, 9] = NAN
        here = step.to(device)
        here.run()
        assert here.store.cpu().float()[1, 4].isnan().nonzero().tolist() == [[9]]
        if pages is FP8:  # an infinity does not become the largest number
            here.qkv[0, 3, 7] = -float("inf")
            here.run()
            assert here.store.cpu().float()[1, 4].isnan().nonzero().tolist() == [[7], [9]]


def test_offsets_beyond_32_bits_are_computed_in_64(device: torch.device) -> None:
    """Head 1 begins 2^31 + 32 numbers behind head 0, in a store that is mostly a hole."""
    if device.type == "cuda":
        pytest.skip("holes in memory are the CPU's")
    dim, far = 16, 2**31 + 32
    store = torch.empty(far + 64, dtype=torch.float16)  # 4 GiB of addresses, of which two pages are touched
    kv = store.as_strided((2, 4, dim), (far, dim, 1))
    step = made(1, 1, dim, torch.float16, [2])
    cache = LayerKV(kv, kv[:1].unsqueeze(0), kv[1:].unsqueeze(0))
    rope_write(step.qkv.clone(), step.cos, step.sin, cache, step.write_rows)
    assert torch.equal(kv[1, 2], step.qkv[0, 2])


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("qkv", lambda x: x[..., :15].contiguous(), "qkv: a head_dim of 15, not an even one up to 256"),
        ("qkv", lambda x: x.double(), "qkv: its dtype is float64"),
        ("qkv", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), "qkv: it is not contiguous"),
        ("cos", lambda x: x[:1], r"cos: its shape is \[1, 1, 16\], not \[2, 1, 16\]"),
        ("sin", lambda x: torch.cat((x, x), 1)[:, :1], "sin: its rows are 32 apart, those of cos 16"),
        ("store", lambda x: x.half(), "cache: its dtype is float16, not float32"),
        ("store", lambda x: torch.cat((x, x)), "cache: keys and values of 2 heads; qkv has 4"),
        ("store", lambda x: x.to(FP8), "cache: its dtype is float8_e4m3fn"),
        ("write_rows", lambda x: x.float(), "write_rows: its dtype is float32"),
        ("q_norm", lambda x: torch.ones(16), "k_norm: queries and keys have a norm each"),
        ("kv_scale", lambda x: torch.ones(2), "cache: its dtype is float32, not float8_e4m3fn"),
    ],
)
def test_the_wrong_argument_is_named(name: str, change: Any, said: str, device: torch.device) -> None:
    step = made(2, 1, 16, torch.float32, [4, 5]).to(device)
    value = change(getattr(step, name))
    with pytest.raises(KernelArgumentError, match=said):
        replace(step, **{name: value if value is None else value.to(device)}).run()
