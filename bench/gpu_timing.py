"""Seconds of work on a device: by CUDA events, of calls in a graph, or by the clock where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import torch

from .report import Spread

Work = Callable[[], object]


def seconds(works: Sequence[Work], device: torch.device, repeats: int) -> Spread:
    """Seconds of one of `works`, the same on other inputs each, which run one after the other `repeats` times.

    On CUDA they are captured in a graph, so that no launch waits for the host, and several inputs keep what one call
    read from being in the cache of the next.
    """
    if device.type != "cuda":
        works[0]()
        return Spread.of([_clocked(works) for _ in range(repeats)])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and takes memory, before the capture
        for work in works:
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    graph.replay()
    took = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        took.append(began.elapsed_time(ended) * 1e-3 / len(works))
    return Spread.of(took)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _clocked(works: Sequence[Work]) -> float:
    began = perf_counter()
    for work in works:
        work()
    return (perf_counter() - began) / len(works)
