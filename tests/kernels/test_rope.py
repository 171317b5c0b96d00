"""Rotary embedding: in place against the plain form and against the rotation it stands for."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from stockade.kernels.rope import rope_, rope_angles, rope_reference

SHAPES = [(1, 1, 2), (5, 3, 64), (9, 2, 100), (4, 7, 24), (0, 2, 8)]


def frequencies(dim: int) -> torch.Tensor:
    return 1.0 / 10000 ** (torch.arange(0, dim, 2).float() / dim)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    positions = torch.randint(0, 5000, shape[:1], generator=generator)
    cos, sin = rope_angles(positions, frequencies(shape[-1]), 1.0, dtype)
    return torch.randn(shape, generator=generator).to(dtype), cos, sin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_place_equals_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, cos, sin = inputs(shape, dtype)
    want = rope_reference(x, cos, sin)
    got = rope_(x, cos, sin)
    assert got.data_ptr() == x.data_ptr()
    tolerance = 1e-6 if dtype is torch.float32 else 0.04  # one rounding less
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape])
def test_it_is_the_rotation_of_llama_and_bf16_is_no_worse(shape: tuple[int, ...]) -> None:
    x, cos, sin = inputs(shape, torch.bfloat16)
    half = shape[-1] // 2
    plain_sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
    theirs = apply_rotary_pos_emb(x, x, cos, plain_sin, unsqueeze_dim=-1)[0] if cos.dim() < 3 else None
    if theirs is None:  # the angles have the axis of the heads already
        theirs = apply_rotary_pos_emb(x, x, cos.squeeze(1), plain_sin.squeeze(1), unsqueeze_dim=1)[0]
    turned = torch.cat((-x[..., half:], x[..., :half]), -1).double()
    exact = x.double() * cos.double() + turned * plain_sin.double()
    ours = rope_(x.clone(), cos, sin)
    assert (ours - exact).norm() <= (theirs - exact).norm() * 1.01


def test_a_view_is_rotated_without_its_neighbors() -> None:
    x, cos, sin = inputs((5, 6, 24), torch.float32)
    before = x.clone()
    rope_(x[:, :4], cos, sin)
    assert torch.equal(x[:, 4:], before[:, 4:])
    torch.testing.assert_close(x[:, :4], rope_reference(before[:, :4], cos, sin))


def test_only_the_distance_of_two_positions_counts() -> None:
    q, k = torch.randn(2, 1, 1, 64, generator=torch.Generator().manual_seed(3)).unbind(0)

    def dot(first: int, second: int) -> float:
        angles = [rope_angles(torch.tensor([n]), frequencies(64), 1.0, torch.float32) for n in (first, second)]
        return float((rope_(q.clone(), *angles[0]) * rope_(k.clone(), *angles[1])).sum())

    assert dot(7, 3) == pytest.approx(dot(1007, 1003), abs=1e-3)
    assert dot(7, 3) != pytest.approx(dot(7, 4), abs=1e-2)
