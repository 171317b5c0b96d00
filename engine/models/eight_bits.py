"""Weights and pages of 8 bits: where they can be asked for, and for which models. It computes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import torch

from ...kernels.quantized import FP8_CAPABILITY, MULTIPLE, Kind
from ..errors import BadInput, CannotQuantize

if TYPE_CHECKING:
    from .decoder import DecoderConfig


def weights_named(name: str) -> Kind:
    """Raises `BadInput` for another name."""
    for kind in get_args(Kind):
        if name == kind:
            return kind
    raise BadInput(f"weights may be {' or '.join(get_args(Kind))}, or left as they are, not {name!r}")


def check_device(kind: Kind, device: torch.device, dtype: torch.dtype) -> None:
    """Raise `CannotQuantize` where a device cannot multiply such weights by rows of this dtype."""
    if (missing := missing_for(kind, device)) is not None:
        raise CannotQuantize(f"weights={kind!r}: {missing}")
    if kind == "fp8" and dtype is not torch.bfloat16:
        raise CannotQuantize(f"weights='fp8' multiplies rows of bf16; the engine's dtype is {dtype}")


def missing_for(kind: Kind, device: torch.device) -> str | None:
    """What a device lacks for weights of this kind; None for nothing."""
    if kind == "int8":
        return None
    if device.type != "cuda":
        return f"the {device.type} multiplies no fp8; int8 works"
    if (found := torch.cuda.get_device_capability(device)) < FP8_CAPABILITY:
        least = ".".join(map(str, FP8_CAPABILITY))
        return f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, fp8 needs {least}"
    return None


def check_pages(name: str, device: torch.device) -> None:
    """Raise `BadInput` for pages of another dtype than fp8, `CannotQuantize` for a GPU without it; on a CPU torch
    casts it, slowly."""
    if name != "fp8":
        raise BadInput(f"kv_dtype may be fp8, or left as the model's, not {name!r}")
    if device.type == "cuda" and (missing := missing_for("fp8", device)) is not None:
        raise CannotQuantize(f"kv_dtype='fp8': {missing}")


def check_sizes(config: DecoderConfig) -> None:
    """Raise `CannotQuantize` for layers whose maps have sizes that matrix units do not take."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    for name, size in (
        *(("hidden size", config.hidden_size), ("size of the MLP", config.ffn_size)),
        *(("width of all queries", queries), ("width of all keys", keys)),
    ):
        if size % MULTIPLE:
            raise CannotQuantize(f"a {name} of {size}; {MULTIPLE} has to divide it for weights of 8 bits")
