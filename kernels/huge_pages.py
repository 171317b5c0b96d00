"""Asks Linux to keep weights and key-value pages in huge pages of memory; elsewhere nothing happens.

A decoding step on a CPU streams all weights. In pages of 4 KiB the address look-ups cost as much as the bytes
(smol in bf16 in a virtual machine with two cores: the linears of a step take 25 ms; in pages of 2 MiB, 15 ms).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes, on x86-64 and on arm64 with 4 KiB base pages
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25  # since Linux 6.1; older kernels answer EINVAL


def collapse(tensors: Iterable[Tensor]) -> int:
    """Move tensors that hold their data already into huge pages; returns how many pages were made.

    Tensors may be packed for oneDNN. Neighbors share huge pages; those that weights fill less than half are left.
    """
    filled: dict[int, int] = {}
    for tensor in tensors:
        if tensor.device.type != "cpu":
            continue
        packed = tensor.is_mkldnn
        start = torch.ops.mkldnn.data_ptr(tensor) if packed else tensor.data_ptr()
        stop = start + (torch.ops.mkldnn._nbytes(tensor) if packed else tensor.nbytes)
        for page in range(start // HUGE_PAGE, -(-stop // HUGE_PAGE)):
            first, last = page * HUGE_PAGE, (page + 1) * HUGE_PAGE
            filled[page] = filled.get(page, 0) + min(stop, last) - max(start, first)
    return sum(
        _madvise(page * HUGE_PAGE, HUGE_PAGE, _MADV_COLLAPSE) for page in filled if filled[page] * 2 >= HUGE_PAGE
    )


def prefer(tensor: Tensor) -> None:
    """Ask for huge pages where a large tensor is not touched yet."""
    if tensor.device.type != "cpu":
        return
    start = -(-tensor.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    stop = (tensor.data_ptr() + tensor.nbytes) // HUGE_PAGE * HUGE_PAGE
    if stop > start:
        _madvise(start, stop - start, _MADV_HUGEPAGE)


def _madvise(start: int, length: int, advice: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice) == 0
