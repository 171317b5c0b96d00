"""Which kernels run on a device: the one place that chooses between Triton and plain torch. It imports no kernel."""

from __future__ import annotations

import functools
import os
import warnings
from importlib.util import find_spec
from typing import Literal, TypeAlias, get_args

import torch

Backend: TypeAlias = Literal["triton", "reference"]
VARIABLE = "STOCKADE_KERNELS"
LEAST_CAPABILITY = (8, 0)  # bf16 in matrix units, copies to shared memory that do not wait


class KernelsUnavailable(RuntimeError):
    """`STOCKADE_KERNELS` asks for kernels that cannot run here, or for none that exist."""


def chosen(device: torch.device) -> Backend:
    """What runs on a device: Triton on CUDA where it works, plain torch elsewhere, or what `STOCKADE_KERNELS` names.

    Warns once where a GPU has to do without Triton. Raises `KernelsUnavailable` where the variable names Triton and
    it cannot run, or names nothing known.
    """
    wanted = asked()
    if wanted == "reference":
        return "reference"
    missing = missing_for_triton(device)
    if wanted == "triton":
        if missing is not None:
            raise KernelsUnavailable(f"{VARIABLE}=triton, but {missing}; unset it, or set it to reference")
        return "triton"
    if device.type != "cuda":
        return "reference"
    if missing is not None:
        _warn(f"no Triton kernels on {device}: {missing}; plain torch runs instead, which is slower")
        return "reference"
    return "triton"


def asked() -> Backend | None:
    """What `STOCKADE_KERNELS` names; None where it is not set. Raises `KernelsUnavailable` for an unknown name."""
    wanted = os.environ.get(VARIABLE) or None
    for known in get_args(Backend):
        if wanted == known:
            return known
    if wanted is not None:
        raise KernelsUnavailable(f"{VARIABLE} is {wanted!r}; it may be {' or '.join(get_args(Backend))}")
    return None


def fused(device: torch.device) -> Backend | None:
    """Which kernels run a decoder's fused layers, static batches and graphs; None where its plain layers run.

    Fused layers in plain torch are slower than plain ones: they are for tests, and run only when asked for.
    """
    backend = chosen(device)
    return backend if backend == "triton" or asked() is not None else None


def missing_for_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device; None where they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= LEAST_CAPABILITY:
            return None
        name, least = torch.cuda.get_device_name(device), ".".join(map(str, LEAST_CAPABILITY))
        return f"{name} has compute capability {capability[0]}.{capability[1]}, and {least} is the least that works"
    if device.type == "cpu" and interpreted():
        return None
    return f"on the {device.type} Triton runs only in its interpreter (TRITON_INTERPRET=1)"


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, which is for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@functools.cache
def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)
