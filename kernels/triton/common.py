"""What all Triton kernels share: how a launch is described, argument checks, the dtype of products. No operation."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class KernelArgumentError(ValueError):
    """An argument that a kernel cannot take; its name comes first in the message."""


class Target(NamedTuple):
    """What launch decisions depend on. arch: 90 for sm_90, or "gfx942". processors: SMs, or compute units."""

    backend: Literal["cuda", "hip"]
    arch: int | str
    processors: int


def target_of(device: torch.device) -> Target:
    """The target of a device. Where no GPU is (the interpreter, tensors on "meta"), that of an H200."""
    if device.type != "cuda":
        return Target("cuda", 90, 132)
    properties = torch.cuda.get_device_properties(device)  # torch keeps them
    if torch.version.hip is not None:
        return Target("hip", properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Target("cuda", 10 * properties.major + properties.minor, properties.multi_processor_count)


class Launch(NamedTuple):
    """One launch as a value: what `run` launches is also what `compiled` compiles ahead of time.

    arguments: by name, constexprs included. A kernel is specialized by which integers and addresses 16 divides.
    """

    kernel: Any  # what @triton.jit makes
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 3

    def run(self) -> None:
        """Launch it on the current stream of the current device; `check_device` knows that the tensors are there."""
        self.kernel[self.grid](
            **self.arguments,
            num_warps=self.warps,
            num_stages=self.stages,
            enable_fp_fusion=True,  # Triton's default is going to change, and it says so unless this is said
        )


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter: TRITON_INTERPRET=1, set before triton is imported."""
    return bool(triton.knobs.runtime.interpret)


def compute_type(dtype: torch.dtype) -> tl.dtype:
    """The dtype, as a constexpr, in which tiles loaded in `dtype` meet in `tl.dot`; the sum is fp32 always.

    Triton's interpreter keeps bf16 as the integers of its bits and computes with these. There it is fp32.
    """
    if interpreted() or dtype is torch.float32:
        return tl.float32
    return tl.bfloat16 if dtype is torch.bfloat16 else tl.float16


Dim: TypeAlias = int | str  # an exact size, or the name of one that may be any


def check(holds: bool, message: str) -> None:
    """Raise `KernelArgumentError` with a message that begins with the argument's name, unless it holds."""
    if not holds:
        raise KernelArgumentError(message)


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[Dim, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    *,
    contiguous: bool = True,
) -> None:
    """Raise `KernelArgumentError` unless the tensor has this shape, one of these dtypes, and is on this device.

    contiguous: in full; else in its last dimension only.
    """
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    check(fits, f"{name}: its shape is {list(tensor.shape)}, not [{', '.join(map(str, shape))}]")
    allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    check(tensor.dtype in dtypes, f"{name}: its dtype is {str(tensor.dtype).removeprefix('torch.')}, not {allowed}")
    check(tensor.device == device, f"{name}: it is on {tensor.device}, not on {device}")
    if contiguous:
        check(tensor.is_contiguous(), f"{name}: it is not contiguous (strides {tensor.stride()})")
    else:
        check(tensor.stride(-1) == 1, f"{name}: its last dimension is not contiguous (strides {tensor.stride()})")


def check_device(name: str, tensor: Tensor) -> None:
    """Raise `KernelArgumentError` unless kernels can be launched where the tensor is."""
    device = tensor.device
    if device.type == "cuda":
        current = torch.cuda.current_device()
        check(device.index == current, f"{name}: it is on {device}, and the current device is cuda:{current}")
    elif device.type != "meta":  # whose launches are planned and compiled, never run
        allowed = device.type == "cpu" and interpreted()
        check(allowed, f"{name}: it is on {device}; Triton kernels run on CUDA, or on a CPU under TRITON_INTERPRET=1")


@triton.jit
def tanh(x):
    """tanh of fp32, from exp2 alone (libdevice is not in the interpreter). Saturates at -1 and 1."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))  # 2 log2(e)
