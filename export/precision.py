"""How weights are stored in each precision, and their conversion, one matrix at a time. No graph, no file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
BLOCK = 32  # weights of an int4 matrix that share a scale
LEVELS = 127  # of an int8 number, either side of zero


class Part(NamedTuple):
    """A stored tensor: what is appended to the matrix's name, its dtype and shape."""

    suffix: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def matrix_parts(precision: Precision, outputs: int, inputs: int) -> list[Part]:
    """What a linear map [outputs, inputs] is stored as; outputs are axis 1 of the first part, or axis 0 for int4."""
    match precision:
        case "int8":
            return [Part("", torch.int8, (inputs, outputs)), Part(".scale", torch.float32, (outputs,))]
        case "int4":
            blocks = -(-inputs // BLOCK)
            return [
                Part("", torch.uint8, (outputs, blocks, BLOCK // 2)),
                Part(".scale", torch.float32, (outputs, blocks)),
            ]
    return [Part("", FLOATS[precision], (inputs, outputs))]


def embedding_parts(precision: Precision, rows: int, columns: int) -> list[Part]:
    """What an embedding is stored as: rows of int8 with a scale each where matrices are quantized."""
    if precision in FLOATS:
        return [Part("", FLOATS[precision], (rows, columns))]
    return [Part("", torch.int8, (rows, columns)), Part(".scale", torch.float32, (rows, 1))]


def convert_matrix(precision: Precision, weight: Tensor) -> Iterator[Tensor]:
    """weight [outputs, inputs], any float -> the tensors of `matrix_parts`.

    int8: symmetric, a scale an output (Jacob et al., arXiv 1712.05877); the scale is divided by LEVELS because inputs
    come as LEVELS times their share of their row's largest. int4: symmetric in blocks of BLOCK inputs, 8 stands for
    zero, the block's largest weight becomes -8.
    """
    match precision:
        case "int8":
            levels, scale = _rows(weight.float())
            yield levels.t()
            yield scale / LEVELS
        case "int4":
            yield from _blocks(weight.float())
        case _:
            yield weight.to(FLOATS[precision]).t()


def convert_embedding(precision: Precision, weight: Tensor) -> Iterator[Tensor]:
    """weight [rows, columns] -> the tensors of `embedding_parts`."""
    if precision in FLOATS:
        yield weight.to(FLOATS[precision])
        return
    levels, scale = _rows(weight.float())
    yield levels
    yield scale.unsqueeze(1)


def _rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1) / LEVELS
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (weight / scale.unsqueeze(1)).round().to(torch.int8), scale


def _blocks(weight: Tensor) -> Iterator[Tensor]:
    outputs, inputs = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -inputs % BLOCK)).view(outputs, -1, BLOCK)
    largest = padded.gather(2, padded.abs().argmax(2, keepdim=True))
    scale = largest / -8
    scale = torch.where(scale != 0, scale, torch.ones_like(scale))
    levels = (padded / scale + 8).round().clamp(0, 15).to(torch.uint8)
    yield levels[..., 0::2] | levels[..., 1::2] << 4
    yield scale.squeeze(2)
