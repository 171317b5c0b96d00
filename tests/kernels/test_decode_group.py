"""Sequences at one distance read in one call: the same as each alone, whatever stands behind their ends."""

from __future__ import annotations

import pytest
import torch

from stockade.kernels.paged_attention import DecodeGroup, LayerKV, SequenceSpan, paged_attention


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(5, 5, 5), (1, 7, 3, 8), (16, 2)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 100), (6, 1, 24)])
def test_a_group_is_what_its_sequences_are_alone(
    lengths: tuple[int, ...], heads: int, kv_heads: int, dim: int, dtype: torch.dtype, cap: float | None
) -> None:
    generator = torch.Generator().manual_seed(3)
    step, first = 20, 11
    kv = torch.randn(2 * kv_heads, 128, dim, generator=generator).to(dtype)
    cache = LayerKV(kv, kv[:kv_heads].unsqueeze(0), kv[kv_heads:].unsqueeze(0))
    q = torch.randn(1 + len(lengths), heads, dim, generator=generator).to(dtype)
    longest = max(lengths)
    beyond = torch.arange(longest) >= torch.tensor(lengths).unsqueeze(1)
    mask = torch.zeros(len(lengths), longest, dtype=dtype).masked_fill_(beyond, float("-inf"))[:, None, None]
    group = DecodeGroup(1, len(lengths), first, step, longest, mask if beyond.any() else None)
    alone = [SequenceSpan(1 + i, 1, ((first + i * step, n),)) for i, n in enumerate(lengths)]
    before = SequenceSpan(0, 1, ((0, 4),))
    together = paged_attention(q, cache, [before, group], dim**-0.5, cap)
    apart = paged_attention(q, cache, [before, *alone], dim**-0.5, cap)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(together, apart, atol=tolerance, rtol=tolerance)
