"""Rotary embedding (Su et al. 2021) of queries and keys, and keys and values written into pages, in one launch.

Norms of queries and keys, where a model has them, come before; fp8 pages are quantized on the way. The contract in
plain torch is `kernels.rms_norm`, `kernels.rope` and `kernels.paged_attention.write_kv`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..paged_attention import LayerKV
from ..quantized import FP8
from .common import FLOATS, Launch, check, check_device, check_tensor

MAX_HEAD_DIM = 256
TILE = 2048  # numbers of each half of a head that a program of 4 warps turns: 4 loads of 16 bytes a thread


def rope_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: LayerKV,
    write_rows: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    kv_scale: Tensor | None = None,
) -> None:
    """Rotate the queries in place; write the rotated keys, and the values, to `write_rows` of the pool.

    qkv: [rows, heads + 2 * kv_heads, head_dim], contiguous; its keys and values stay. cos, sin:
    [rows, 1, head_dim] as of `rope_angles`, the second half of each like the first but for sin's sign. cache: its
    dtype is qkv's, or fp8 (e4m3) with kv_scale [2 * kv_heads] fp32, keys first: what is stored times the scale is the
    number; beyond the largest, 448, it is that, but an infinity becomes NaN, so that nothing finite is computed from
    it. A row's padding up to 16 bytes is zeroed. write_rows: [rows] int32 or
    int64; a row with -1 is padding, of which nothing is read or written. q_norm, k_norm: [head_dim], weights of
    RMSNorms of each head with `eps`, rounded as by `add_rms_norm`. Raises `KernelArgumentError`.
    """
    launch = plan(qkv, cos, sin, cache.kv, write_rows, q_norm, k_norm, eps, kv_scale)
    if qkv.shape[0]:
        launch.run()


def plan(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv: Tensor,
    write_rows: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    kv_scale: Tensor | None,
) -> Launch:
    """The launch of these arguments, which it checks."""
    check_device("qkv", qkv)
    check_tensor("qkv", qkv, ("rows", "heads", "head_dim"), FLOATS, qkv.device)
    rows, every, dim = qkv.shape
    check(dim % 2 == 0 and 0 < dim <= MAX_HEAD_DIM, f"qkv: a head_dim of {dim}, not an even one up to {MAX_HEAD_DIM}")
    check_tensor("cos", cos, (rows, 1, dim), FLOATS, qkv.device, contiguous=False)
    check_tensor("sin", sin, (rows, 1, dim), (cos.dtype,), qkv.device, contiguous=False)
    check(sin.stride(0) == cos.stride(0), f"sin: its rows are {sin.stride(0)} apart, those of cos {cos.stride(0)}")
    dtypes = (qkv.dtype,) if kv_scale is None else (FP8,)
    check_tensor("cache", kv, ("2 * kv_heads", "places", dim), dtypes, qkv.device, contiguous=False)
    written = kv.shape[0]
    check(
        written % 2 == 0 and written < every,
        f"cache: keys and values of {written // 2} heads; qkv has {every}",
    )
    check_tensor("write_rows", write_rows, (rows,), (torch.int32, torch.int64), qkv.device)
    check((q_norm is None) == (k_norm is None), "k_norm: queries and keys have a norm each, or neither has")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check_tensor(name, norm, (dim,), (qkv.dtype, torch.float32), qkv.device)
    if q_norm is not None and k_norm is not None:
        check(q_norm.dtype == k_norm.dtype, f"k_norm: its dtype is {k_norm.dtype}, that of q_norm {q_norm.dtype}")
    if kv_scale is not None:
        check_tensor("kv_scale", kv_scale, (written,), (torch.float32,), qkv.device)
    half_block = triton.next_power_of_2(dim // 2)
    head_block = min(max(1, TILE // half_block), triton.next_power_of_2(every))
    warps = min(4, max(1, head_block * half_block // 512))
    row_stride = kv.stride(1)
    padding = min(row_stride - dim, -dim % (16 // kv.element_size()))
    arguments = {
        **{"qkv": qkv, "cos": cos, "sin": sin, "kv": kv, "places": write_rows},
        **{"q_norm": qkv if q_norm is None else q_norm, "k_norm": qkv if k_norm is None else k_norm},
        **{"kv_scale": qkv if kv_scale is None else kv_scale},
        **{"eps": eps, "head_stride": kv.stride(0), "ANGLE_STRIDE": cos.stride(0)},
        **{"HEADS": every - written, "EVERY": every, "WRITTEN": written, "DIM": dim, "ROW_STRIDE": row_stride},
        **{"HALF_BLOCK": half_block, "HEAD_BLOCK": head_block, "PADDING": max(0, padding)},
        **{"NORMED": q_norm is not None, "SCALED": kv_scale is not None},
    }
    return Launch(_rope_write, (rows, triton.cdiv(every, head_block)), arguments, warps)


@triton.jit
def _rope_write(
    qkv,
    cos,
    sin,
    kv,
    places,
    q_norm,
    k_norm,
    kv_scale,
    eps,
    head_stride,
    ANGLE_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    EVERY: tl.constexpr,
    WRITTEN: tl.constexpr,
    DIM: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    PADDING: tl.constexpr,
    NORMED: tl.constexpr,
    SCALED: tl.constexpr,
):
    HALF: tl.constexpr = DIM // 2
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(places + row).to(tl.int64)
    if place < 0:
        return
    heads = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)[:, None]
    at = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (heads < EVERY) & (at < HALF)
    here = qkv + (row * EVERY + heads) * DIM + at
    first = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(here + HALF, mask=inside, other=0.0).to(tl.float32)
    turning = heads < EVERY - WRITTEN // 2  # values do not
    if NORMED:
        mean = tl.sum(first * first + second * second, 1) / DIM
        inverse = tl.rsqrt(mean + eps)[:, None]
        weighs = at < HALF
        query = heads < HEADS
        w_first = tl.where(query, tl.load(q_norm + at, mask=weighs), tl.load(k_norm + at, mask=weighs))
        w_second = tl.where(query, tl.load(q_norm + HALF + at, mask=weighs), tl.load(k_norm + HALF + at, mask=weighs))
        n_first = (first * inverse).to(w_first.dtype).to(tl.float32) * w_first.to(tl.float32)
        n_second = (second * inverse).to(w_second.dtype).to(tl.float32) * w_second.to(tl.float32)
        kind = qkv.dtype.element_ty
        first = tl.where(turning, n_first.to(kind).to(tl.float32), first)
        second = tl.where(turning, n_second.to(kind).to(tl.float32), second)
    c = tl.load(cos + row * ANGLE_STRIDE + at, mask=at < HALF, other=0.0).to(tl.float32)
    s = tl.load(sin + row * ANGLE_STRIDE + HALF + at, mask=at < HALF, other=0.0).to(tl.float32)
    t_first = tl.where(turning, first * c - second * s, first)
    t_second = tl.where(turning, second * c + first * s, second)
    tl.store(here, t_first.to(qkv.dtype.element_ty), mask=inside & (heads < HEADS))
    tl.store(here + HALF, t_second.to(qkv.dtype.element_ty), mask=inside & (heads < HEADS))
    kept = inside & (heads >= HEADS)
    head = (heads - HEADS).to(tl.int64)
    if SCALED:
        t_first = tl.where(tl.abs(t_first) == float("inf"), float("nan"), t_first)
        t_second = tl.where(tl.abs(t_second) == float("inf"), float("nan"), t_second)
        inverse_scale = 1.0 / tl.load(kv_scale + head, mask=(heads >= HEADS) & (heads < EVERY), other=1.0)
        t_first *= inverse_scale
        t_second *= inverse_scale
        # not `clamp`, which makes a number of a NaN
        t_first = tl.where(t_first > 448.0, 448.0, tl.where(t_first < -448.0, -448.0, t_first))
        t_second = tl.where(t_second > 448.0, 448.0, tl.where(t_second < -448.0, -448.0, t_second))
    there = kv + head * head_stride + place * ROW_STRIDE
    tl.store(there + at, t_first.to(kv.dtype.element_ty), mask=kept)
    tl.store(there + HALF + at, t_second.to(kv.dtype.element_ty), mask=kept)
    if PADDING > 0:
        beyond = tl.arange(0, 16)[None, :]
        nothing = tl.zeros([HEAD_BLOCK, 16], tl.float32)
        padded = (heads >= HEADS) & (heads < EVERY) & (beyond < PADDING)
        tl.store(there + DIM + beyond, nothing.to(kv.dtype.element_ty), mask=padded)
