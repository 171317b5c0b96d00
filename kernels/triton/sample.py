"""Chooses one token a row on the device: greedy, or temperature, top-k, top-p and min-p with counter-based draws.

The contract in plain torch is `engine.sampling.sample`, whose order and tokens these are; penalties of what was said
and log-probabilities of other tokens than the chosen one are left to it.

Where the two could differ. Sums are fp64 here and probabilities differ from torch's in their last bits, as those of
two of torch's own devices do. So a draw within about 1e-7 of the edge between two tokens may fall either way, and so
may a token that lies as near to a nucleus' edge. Ties are no such case: of equal logits `greedy` takes the first,
top-k keeps all that equal the k-th, and of those at the edge of a nucleus the first are dropped first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sampling import SampledRows, SamplingRows
from .common import FLOATS, Launch, check, check_device, check_tensor, interpreted

# On a GPU one program a row. It reads its row up to two dozen times, from the L2 cache. A block of 4096 of 8 warps is
# 16 numbers a thread, two 16-byte loads under way, and leaves registers for three fp64 sums of as many (16 warps
# leave 128, two too few). In the interpreter a program takes as long whatever its tile, so many rows share one.
BLOCK = 4096
WARPS = 8
INTERPRETED_ROWS = 128

_DTYPES = {"top_k": torch.int32, "seed": torch.int64, "pass_index": torch.int32, "position": torch.int32}


def sample(logits: Tensor, rows: SamplingRows, out: SampledRows | None = None) -> SampledRows:
    """Choose a token of each row of logits [n, vocab], rows any distance apart. Raises `KernelArgumentError`."""
    if out is None:
        n = len(logits)
        out = SampledRows(
            torch.empty(n, dtype=torch.int32, device=logits.device),
            torch.empty(n, dtype=torch.float32, device=logits.device),
        )
    launch = plan(logits, rows, out)
    if len(logits):
        launch.run()
    return out


def plan(logits: Tensor, rows: SamplingRows, out: SampledRows) -> Launch:
    """The launch of these arguments, which it checks."""
    check_device("logits", logits)
    check_tensor("logits", logits, ("n", "vocab"), FLOATS, logits.device, contiguous=False)
    n, vocab = logits.shape
    check(0 < vocab < 1 << 30, f"logits: a vocabulary of {vocab}")
    for name, column in rows._asdict().items():
        check_tensor(f"rows.{name}", column, (n,), (_DTYPES.get(name, torch.float64),), logits.device)
    check_tensor("out.ids", out.ids, (n,), (torch.int32,), logits.device)
    check_tensor("out.logprobs", out.logprobs, (n,), (torch.float32,), logits.device)
    # the low bits of the fp32 that a narrow logit becomes are zero and need no search
    shift = {torch.bfloat16: 16, torch.float16: 12, torch.float32: 0}[logits.dtype]
    together = min(INTERPRETED_ROWS, triton.next_power_of_2(n)) if interpreted() else 1
    arguments = {
        **{"logits": logits, **rows._asdict(), "ids": out.ids, "logprobs": out.logprobs},
        **{"stride": logits.stride(0), "n": n, "vocab": vocab},
        **{"SHIFT": shift, "ROWS": together, "BLOCK": min(BLOCK, triton.next_power_of_2(vocab))},
    }
    return Launch(_sample, (triton.cdiv(n, together),), arguments, warps=WARPS if vocab > 1024 else 4)


@triton.jit
def _sample(
    logits,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    pass_index,
    position,
    ids,
    logprobs,
    stride,
    n,
    vocab,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < n
    start = logits + (row.to(tl.int64) * stride)[:, None]
    best, at, normal = _first_look(start, live, vocab, ROWS, BLOCK)
    heat = tl.load(temperature + row, mask=live, other=0.0).to(tl.float32)
    drawn = live & (heat > 0.0)
    heat = tl.where(drawn, heat, 1.0)
    peak = tl.div_rn(best, heat)
    # comparisons that a NaN does not pass; dividing by the temperature may overflow
    numbers = (best < float("inf")) & (best > float("-inf")) & (peak < float("inf")) & (peak > float("-inf"))
    drawn &= numbers
    if tl.max(drawn.to(tl.int32), 0) > 0:
        k = tl.load(top_k + row, mask=drawn, other=0)
        p = tl.load(top_p + row, mask=drawn, other=1.0)
        floor = tl.load(min_p + row, mask=drawn, other=0.0).to(tl.float32)
        draw = _uniform(
            tl.load(seed + row, mask=drawn, other=0),
            tl.load(pass_index + row, mask=drawn, other=0),
            tl.load(position + row, mask=drawn, other=0),
        )
        at = tl.where(drawn, _draw(start, drawn, vocab, best, peak, heat, k, p, floor, draw, SHIFT, ROWS, BLOCK), at)
    chosen = tl.load(logits + row.to(tl.int64) * stride + at, mask=numbers & live, other=0.0).to(tl.float32)
    tl.store(ids + row, tl.where(numbers, at, -1), mask=live)
    tl.store(logprobs + row, tl.where(numbers, chosen - normal, float("nan")), mask=live)


@triton.jit
def _first_look(start, live, vocab, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of each row the largest logit, NaN where one is; its first place; the log of the sum of exp(logit)"""
    LOWEST: tl.constexpr = -3.4028234663852886e38
    lane = tl.arange(0, BLOCK)[None, :]
    top = tl.full([ROWS, BLOCK], LOWEST, tl.float32)
    place = tl.full([ROWS, BLOCK], 0, tl.int32)
    total = tl.full([ROWS, BLOCK], 0.0, tl.float32)
    strange = tl.full([ROWS, BLOCK], 0, tl.int32)
    for first in range(0, vocab, BLOCK):
        at = first + lane
        x = tl.load(start + at, mask=live[:, None] & (at < vocab), other=float("-inf")).to(tl.float32)
        strange |= (x != x).to(tl.int32)
        higher = x > top
        peak = tl.where(higher, x, top)
        total = total * tl.exp(top - peak) + tl.exp(x - peak)
        place = tl.where(higher, at, place)
        top = peak
    best = tl.max(top, 1)
    at = tl.min(tl.where(top == best[:, None], place, vocab), 1)
    normal = best + tl.log(tl.sum(total * tl.exp(top - best[:, None]), 1))
    best = tl.where(best == LOWEST, float("-inf"), best)
    return tl.where(tl.max(strange, 1) > 0, float("nan"), best), at, normal


@triton.jit
def _draw(
    start,
    live,
    vocab,
    best,
    peak,
    heat,
    top_k,
    top_p,
    min_p,
    uniform,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The tokens drawn, by inversion of the distribution function"""
    lane = tl.arange(0, BLOCK)[None, :]
    LOWEST: tl.constexpr = -(1 << (31 - SHIFT))
    least = tl.full([ROWS], LOWEST, tl.int32)  # tokens with a lower key are out
    ties_from = tl.full([ROWS], 0, tl.int32)  # and those with just this key that stand before here
    unit = tl.full([ROWS], 1.0, tl.float32)
    cut = (top_k > 0) & (top_k < vocab)
    if tl.max(cut.to(tl.int32), 0) > 0:
        found = _search(start, live, vocab, peak, heat, least, unit, top_k.to(tl.float32), True, SHIFT, ROWS, BLOCK)
        least = tl.where(cut, found, least)
    cut = top_p < 1.0
    if tl.max(cut.to(tl.int32), 0) > 0:
        tail = (1.0 - top_p).to(tl.float32)
        mass = _mass(start, live, vocab, peak, heat, least, ties_from, unit, 0.0 * unit, SHIFT, ROWS, BLOCK)
        mass = mass.to(tl.float32)
        edge = _search(start, live, vocab, peak, heat, least, mass, tail, False, SHIFT, ROWS, BLOCK)
        edge = tl.minimum(edge, _key(best, SHIFT))  # the likeliest always stays
        found = _ties_from(start, live, vocab, peak, heat, least, edge, mass, tail, SHIFT, ROWS, BLOCK)
        ties_from = tl.where(cut, found, ties_from)
        least = tl.where(cut, edge, least)
    total = _mass(start, live, vocab, peak, heat, least, ties_from, unit, 0.0 * unit, SHIFT, ROWS, BLOCK)
    mass = total.to(tl.float32)
    floor = min_p * tl.div_rn(unit, mass)  # the likeliest token's weight is 1
    if tl.max(floor, 0) > 0.0:
        total = _mass(start, live, vocab, peak, heat, least, ties_from, mass, floor, SHIFT, ROWS, BLOCK)
    goal = uniform * total
    passed = tl.full([ROWS], 0.0, tl.float64)
    token = tl.full([ROWS], -1, tl.int32)
    last = tl.full([ROWS], -1, tl.int32)
    for first in range(0, vocab, BLOCK):
        at = first + lane
        weight = _kept(start, live, at, vocab, peak, heat, least, ties_from, mass, floor, SHIFT)
        here = tl.sum(weight, 1)
        crossed = (token < 0) & (passed + here > goal)
        if tl.max(crossed.to(tl.int32), 0) > 0:
            beyond = (passed[:, None] + tl.cumsum(weight, 1) > goal[:, None]) & (weight > 0.0)
            found = tl.min(tl.where(beyond, at, vocab), 1)
            token = tl.where(crossed & (found < vocab), found, token)
        last = tl.maximum(last, tl.max(tl.where(weight > 0.0, at, -1), 1))
        passed += here
    return tl.where(token < 0, last, token)  # a draw that rounds up to the total


@triton.jit
def _key(x, SHIFT: tl.constexpr):
    """Whole numbers in the order of logits: the bits of a float, those of negative ones turned round"""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0 equals 0, its bits do not
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _look(start, live, at, vocab, peak, heat, SHIFT: tl.constexpr):
    """(weight, relative to the likeliest token's; key) of the tokens `at`"""
    x = tl.load(start + at, mask=live[:, None] & (at < vocab), other=float("-inf")).to(tl.float32)
    return tl.exp(tl.div_rn(x, heat[:, None]) - peak[:, None]), _key(x, SHIFT)


@triton.jit
def _kept(start, live, at, vocab, peak, heat, least, ties_from, mass, floor, SHIFT: tl.constexpr):
    """The weights of the tokens `at`, in fp64, 0 of those that are out; floor: of weight / mass"""
    weight, key = _look(start, live, at, vocab, peak, heat, SHIFT)
    stays = (key > least[:, None]) | ((key == least[:, None]) & (at >= ties_from[:, None]))
    stays &= tl.div_rn(weight, mass[:, None]) >= floor[:, None]
    return tl.where(stays, weight, 0.0).to(tl.float64)


@triton.jit
def _mass(
    start,
    live,
    vocab,
    peak,
    heat,
    least,
    ties_from,
    mass,
    floor,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK)[None, :]
    total = tl.full([ROWS], 0.0, tl.float64)
    for first in range(0, vocab, BLOCK):
        total += tl.sum(_kept(start, live, first + lane, vocab, peak, heat, least, ties_from, mass, floor, SHIFT), 1)
    return total


@triton.jit
def _search(
    start,
    live,
    vocab,
    peak,
    heat,
    least,
    mass,
    bound,
    COUNTING: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest key t such that `bound` tokens or more have one of at least t (counting), or such that those in
    question with a lower one weigh at most `bound` of `mass`; found from the highest bits down, two a round"""
    lane = tl.arange(0, BLOCK)[None, :]
    BITS: tl.constexpr = 32 - SHIFT
    found = tl.full([ROWS], -(1 << (BITS - 1)), tl.int32)
    for taken in range(2, BITS + 1, 2):
        step = 1 << (BITS - taken)
        one = tl.full([ROWS, BLOCK], 0.0, tl.float64)
        two = tl.full([ROWS, BLOCK], 0.0, tl.float64)
        three = tl.full([ROWS, BLOCK], 0.0, tl.float64)
        for first in range(0, vocab, BLOCK):
            at = first + lane
            weight, key = _look(start, live, at, vocab, peak, heat, SHIFT)
            if COUNTING:
                amount = tl.where((at < vocab) & live[:, None], 1.0, 0.0).to(tl.float64)
                one += tl.where(key >= found[:, None] + step, amount, 0.0)
                two += tl.where(key >= found[:, None] + 2 * step, amount, 0.0)
                three += tl.where(key >= found[:, None] + 3 * step, amount, 0.0)
            else:
                amount = tl.where(key >= least[:, None], tl.div_rn(weight, mass[:, None]), 0.0).to(tl.float64)
                one += tl.where(key < found[:, None] + step, amount, 0.0)
                two += tl.where(key < found[:, None] + 2 * step, amount, 0.0)
                three += tl.where(key < found[:, None] + 3 * step, amount, 0.0)
        # sums of fp32 numbers rounded to such, which is what torch compares
        if COUNTING:
            steps = (tl.sum(one, 1).to(tl.float32) >= bound).to(tl.int32)
            steps += (tl.sum(two, 1).to(tl.float32) >= bound).to(tl.int32)
            steps += (tl.sum(three, 1).to(tl.float32) >= bound).to(tl.int32)
        else:
            steps = (tl.sum(one, 1).to(tl.float32) <= bound).to(tl.int32)
            steps += (tl.sum(two, 1).to(tl.float32) <= bound).to(tl.int32)
            steps += (tl.sum(three, 1).to(tl.float32) <= bound).to(tl.int32)
        found += steps * step
    return found


@triton.jit
def _ties_from(
    start,
    live,
    vocab,
    peak,
    heat,
    least,
    edge,
    mass,
    tail,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """From which place on tokens with the key `edge` stay: the first of them drop out while the tail has room"""
    lane = tl.arange(0, BLOCK)[None, :]
    below = tl.full([ROWS], 0.0, tl.float64)
    ties = tl.full([ROWS], 0, tl.int32)
    share = tl.full([ROWS], 0.0, tl.float32)
    for first in range(0, vocab, BLOCK):
        at = first + lane
        weight, key = _look(start, live, at, vocab, peak, heat, SHIFT)
        portion = tl.div_rn(weight, mass[:, None])
        below += tl.sum(tl.where((key >= least[:, None]) & (key < edge[:, None]), portion, 0.0).to(tl.float64), 1)
        tied = (key == edge[:, None]) & (at < vocab)
        ties += tl.sum(tied.to(tl.int32), 1)
        share = tl.maximum(share, tl.max(tl.where(tied, portion, 0.0), 1))
    each = tl.maximum(share, 1e-30).to(tl.float64)
    room = (tail.to(tl.float64) - below) / each
    dropped = tl.minimum(tl.maximum(room, 0.0), 1e9).to(tl.int32)
    # that may be one off, as sums are rounded to fp32
    dropped += ((below + (dropped + 1).to(tl.float64) * each).to(tl.float32) <= tail).to(tl.int32)
    dropped -= ((below + dropped.to(tl.float64) * each).to(tl.float32) > tail).to(tl.int32)
    dropped = tl.minimum(tl.maximum(dropped, 0), ties - 1)
    from_here = tl.full([ROWS], 0, tl.int32)
    if tl.max(dropped, 0) > 0:
        seen = tl.full([ROWS], 0, tl.int32)
        for first in range(0, vocab, BLOCK):
            at = first + lane
            _, key = _look(start, live, at, vocab, peak, heat, SHIFT)
            tied = ((key == edge[:, None]) & (at < vocab)).to(tl.int32)
            rank = seen[:, None] + tl.cumsum(tied, 1)
            gone = (tied > 0) & (rank <= dropped[:, None])
            from_here = tl.maximum(from_here, tl.max(tl.where(gone, at + 1, 0), 1))
            seen += tl.sum(tied, 1)
    return from_here


@triton.jit
def _uniform(seed, pass_index, position):
    """`engine.sampling.uniform`"""
    state = seed.to(tl.uint64, bitcast=True)
    state = _splitmix64(state ^ _splitmix64((pass_index.to(tl.int64) + 1).to(tl.uint64, bitcast=True)))
    state = _splitmix64(state ^ _splitmix64((position.to(tl.int64) + 1).to(tl.uint64, bitcast=True)))
    return (state >> 11).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def _splitmix64(value):
    """Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014)"""
    value = value + 0x9E3779B97F4A7C15
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return value ^ (value >> 31)
