"""A detector's weights in one data file beside the graph, written tensor by tensor: memory holds one at a time."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .graph import GraphSpec, external_tensors
from .precision import Precision, convert_embedding, convert_matrix
from .source import OpenDetector, rotary_tables

PAGE = 4096  # what a tensor of that size or more begins at a multiple of, so that it can be mapped into memory
CACHE_LINE = 64  # the same for smaller ones


def offsets_of(spec: GraphSpec) -> dict[str, int]:
    """Where each tensor begins in the data file, in bytes."""
    found, end = {}, 0
    for tensor in external_tensors(spec):
        size = tensor.part.dtype.itemsize * math.prod(tensor.part.shape)
        unit = PAGE if size >= PAGE else CACHE_LINE
        found[tensor.name] = -(-end // unit) * unit
        end = found[tensor.name] + size
    return found


def write_weights(path: Path, detector: OpenDetector, spec: GraphSpec) -> None:
    """Fill a new file with the detector's tensors. Raises OSError, and what reading them raises."""
    file = _WeightFile(path, spec)
    for name in ("cos", "sin"):
        table = rotary_tables(spec.config, spec.config.context)[name == "sin"]
        # the pairs of zeros behind a head are not turned
        width = spec.head_dim // 2 - table.shape[1]
        table = torch.nn.functional.pad(table, (0, width), value=1.0 if name == "cos" else 0.0)
        for stored in external_tensors(spec):
            if stored.kind == "rotary" and stored.name.startswith(name):
                file.write(stored.name, table.to(stored.part.dtype))
    for parameter, tensor in detector.tensors():
        _place(file, spec, parameter, tensor)


class _WeightFile:
    def __init__(self, path: Path, spec: GraphSpec) -> None:
        self._path = path
        self._offsets = offsets_of(spec)
        self._parts = {tensor.name: tensor.part for tensor in external_tensors(spec)}
        last = external_tensors(spec)[-1]
        size = last.part.dtype.itemsize * math.prod(last.part.shape)
        with open(path, "wb") as file:
            file.truncate(self._offsets[last.name] + size)

    def write(self, name: str, value: Tensor, axis: int = 0, start: int = 0) -> None:
        """Put a value at `start` of an axis of the tensor. It is mapped for that only: what is mapped counts as used
        memory."""
        part = self._parts[name]
        whole = np.memmap(self._path, _numpy(part.dtype), "r+", self._offsets[name], part.shape)
        target = torch.from_numpy(whole)
        if part.dtype == torch.bfloat16:
            target = target.view(torch.bfloat16)
        target.narrow(axis, start, value.shape[axis]).copy_(value)
        whole.flush()


def _numpy(dtype: torch.dtype) -> type:
    return {
        torch.float32: np.float32,
        torch.float16: np.float16,
        torch.bfloat16: np.int16,  # NumPy has none of its own
        torch.int8: np.int8,
        torch.uint8: np.uint8,
    }[dtype]


def _place(file: _WeightFile, spec: GraphSpec, stored: str, tensor: Tensor) -> None:
    """Write one tensor of the checkpoint, by its canonical name."""
    if stored == "model.embed_tokens.weight":
        for suffix, part in zip(("", ".scale"), convert_embedding(spec.precision, tensor), strict=False):
            file.write(f"embedding{suffix}", part)
        return
    if stored.startswith("head."):
        file.write(stored, tensor.float())
        return
    _, _, layer, block, module, *kind = stored.split(".")
    prefix = f"layers.{layer}."
    match block, module:
        case "input_layernorm", _:
            file.write(prefix + "input_norm", tensor)
        case "post_attention_layernorm", _:
            file.write(prefix + "post_norm", tensor)
        case "self_attn", ("q_norm" | "k_norm"):
            shrink = math.sqrt(spec.config.head_dim / spec.head_dim)
            file.write(prefix + module, _pad_halves(tensor.float() * shrink, spec, 1))
        case "self_attn", ("q_proj" | "k_proj" | "v_proj"):
            which = "qkv".index(module[0])
            heads = spec.config.heads if which == 0 else spec.config.kv_heads
            padded = _pad_end(tensor, spec, heads) if which == 2 else _pad_halves(tensor, spec, heads)
            _write(file, spec.precision, prefix + "qkv", padded, kind[0], sum(spec.qkv_sizes[:which]))
        case "self_attn", "o_proj":
            if kind == ["weight"]:
                tensor = _pad_end(tensor.t(), spec, spec.config.heads).t()
            _write(file, spec.precision, prefix + "o", tensor, kind[0])
        case "mlp", _:
            _write(file, spec.precision, prefix + module.removesuffix("_proj"), tensor, kind[0])


def _write(file: _WeightFile, precision: Precision, name: str, tensor: Tensor, kind: str, start: int = 0) -> None:
    """A linear map's weight [outputs, inputs] or its bias; start: of its outputs among those of the stored map."""
    if kind == "bias":
        file.write(f"{name}.bias", tensor, 0, start)
        return
    for suffix, part in zip(("", ".scale"), convert_matrix(precision, tensor), strict=False):
        inputs_first = suffix == "" and precision != "int4"
        file.write(name + suffix, part, 1 if inputs_first else 0, start)


def _pad_halves(tensor: Tensor, spec: GraphSpec, heads: int) -> Tensor:
    """[heads * head_dim, …] of queries or keys -> heads padded so that rotation still pairs what belongs together."""
    return _padded(tensor, heads, 2 * [spec.config.head_dim // 2], spec.head_dim)


def _pad_end(tensor: Tensor, spec: GraphSpec, heads: int) -> Tensor:
    """[heads * head_dim, …] -> zeros behind each head."""
    return _padded(tensor, heads, [spec.config.head_dim], spec.head_dim)


def _padded(tensor: Tensor, heads: int, pieces: list[int], width: int) -> Tensor:
    """Each head's pieces (sizes) spread evenly over `width` rows, the gaps filled with zeros."""
    if sum(pieces) == width:
        return tensor
    rest = tensor.shape[1:]
    wide = tensor.new_zeros(heads, width, *rest)
    start = 0
    for index, size in enumerate(pieces):
        wide.narrow(1, index * width // len(pieces), size).copy_(
            tensor.view(heads, sum(pieces), *rest).narrow(1, start, size)
        )
        start += size
    return wide.reshape(heads * width, *rest)
