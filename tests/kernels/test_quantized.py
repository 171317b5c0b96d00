"""Maps with weights of 8 bits: what is stored, and what is multiplied, against fp64."""

from __future__ import annotations

import pytest
import torch

from stockade.kernels.quantized import FP8, LARGEST, CannotQuantize, Kind, QuantizedLinear, quantize_rows

NAN = float("nan")


def made(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    spread = torch.logspace(-2, 2, outputs).unsqueeze(1)  # rows of very different size
    weight = torch.randn(outputs, inputs, generator=generator) * spread
    return torch.randn(rows, inputs, generator=generator).to(dtype), weight.to(dtype)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_weights_are_stored_to_half_a_unit_of_their_row(kind: str) -> None:
    _, weight = made(1, 64, 48, torch.float32)
    weight[3] = 0.0
    linear = QuantizedLinear(weight, kind)
    stored = linear.weight.double() * linear.scale.double().unsqueeze(1)
    unit = stored.abs() / 16 + 2**-10 * linear.scale.unsqueeze(1) if kind == "fp8" else linear.scale.unsqueeze(1) / 2
    assert ((stored - weight).abs() <= unit * 1.0001).all()
    largest = linear.weight.double().abs().amax(1)
    assert largest[3] == 0 and (largest[:3] == LARGEST[kind]).all()


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("biased", [False, True])
def test_fp8_products_are_those_of_the_stored_numbers(rows: int, biased: bool) -> None:
    x, weight = made(rows, 64, 48, torch.bfloat16)
    bias = torch.arange(48).bfloat16() if biased else None
    linear = QuantizedLinear(weight, "fp8", bias)
    narrow, scale = quantize_rows(x)
    want = (narrow.double() * scale.unsqueeze(1)) @ (linear.weight.double() * linear.scale.unsqueeze(1)).T
    want = want if bias is None else want + bias
    got = linear(x)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-6, atol=0.2)
    plain = x.double() @ weight.double().T + (0 if bias is None else bias)
    assert (got - plain).norm() / plain.norm() < 0.06  # three bits of mantissa on both sides


@pytest.mark.parametrize("rows", [5, 40])  # widened on their way, and before
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_int8_products_are_those_of_the_stored_numbers(dtype: torch.dtype, rows: int) -> None:
    x, weight = made(rows, 64, 48, dtype)
    linear = QuantizedLinear(weight, "int8")
    want = x.double() @ (linear.weight.double() * linear.scale.to(dtype).double().unsqueeze(1)).T
    got = linear(x)
    assert got.dtype is dtype
    atol = 0.5 if dtype is torch.float16 else 0.05  # its weights meet their scales first, and are up to 400
    torch.testing.assert_close(got.double(), want, rtol=2**-6 if dtype is torch.bfloat16 else 2e-3, atol=atol)
    assert (got - x.double() @ weight.double().T).norm() / want.norm() < 0.015


def test_sums_of_int8_in_fp16_do_not_pass_its_largest() -> None:
    weight, x = torch.full((16, 64), 0.1), torch.full((3, 64), 20.0)  # 128; before the scale 162,560
    got = QuantizedLinear(weight, "int8")(x.half())
    torch.testing.assert_close(got.float(), x @ weight.T, rtol=0.01, atol=0)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_halves_are_those_of_the_outputs(kind: Kind) -> None:
    x, weight = made(3, 64, 64, torch.bfloat16)
    both = QuantizedLinear(weight, kind, torch.arange(64).bfloat16())
    assert torch.equal(torch.cat([half(x) for half in both.halves()], 1), both(x))


def test_what_is_no_number_stays_none() -> None:
    x, weight = made(3, 64, 48, torch.bfloat16)
    x[1, 5] = NAN
    got = QuantizedLinear(weight, "fp8")(x)
    assert got[1].isnan().all() and got[[0, 2]].isfinite().all()
    assert quantize_rows(torch.zeros(1, 16))[0].dtype is FP8


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.zeros(48, 60), "a weight of .48, 60."),
        (torch.zeros(64), "a weight of .64."),
        (torch.full((16, 16), NAN), "not finite"),
    ],
)
def test_what_cannot_be_quantized_is_refused(weight: torch.Tensor, said: str) -> None:
    with pytest.raises(CannotQuantize, match=said):
        QuantizedLinear(weight, "int8")


def test_fp8_weights_refuse_other_inputs_than_bf16() -> None:
    with pytest.raises(CannotQuantize, match="takes bfloat16"):
        QuantizedLinear(torch.ones(16, 16), "fp8")(torch.ones(1, 16))
