"""How near operations come to what this machine can do: bandwidth and FLOP/s, against ceilings of the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from math import ceil
from random import Random
from time import perf_counter
from typing import Any

import torch
from rich.table import Table

from ..engine.errors import BadInput
from .decode import read_bandwidth
from .kernel_cases import OPERATIONS, REFERENCE, Case, Cases, KernelSizes
from .report import Spread
from .roofline import Machine, Shape, Work, matmul_flops
from .units import Unit


@dataclass(frozen=True)
class KernelsConfig:
    """repeats: samples of every way, each of as many calls as take `sample` seconds. operations: () are all.
    ceiling_repeats: runs of which the best tells what the machine can do."""

    sizes: KernelSizes = field(default_factory=KernelSizes)
    repeats: int = 15
    sample: float = 3e-3
    operations: tuple[str, ...] = ()
    ceiling_repeats: int = 7
    seed: int = 0


class KernelsPlan:
    """A piece of work is one operation in one size, all its ways in turn; the ceilings come first."""

    kind = "kernels"
    limit = None

    def __init__(
        self, shape: Shape, config: KernelsConfig, model: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Raises `BadInput` for the name of an operation that is none."""
        if unknown := set(config.operations) - set(OPERATIONS):
            raise BadInput(f"no operation {min(unknown)!r} to measure; there are {', '.join(OPERATIONS)}")
        self.config, self.seed = config, config.seed
        self._cases = Cases(shape, config.sizes, device, dtype, config.seed)
        self.settings = {
            "model": model,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.type,
            "shape": asdict(shape),
            **asdict(config),
        }

    def warm_up(self) -> None:
        matmul_flops(self._cases.dtype, repeats=1, device=self._cases.device)

    def units(self, done: dict[str, Any]) -> Iterator[Unit]:
        yield "ceilings", self._ceilings
        for case in self._cases.all(self.config.operations or OPERATIONS):
            yield case.name, partial(self._measure, case)

    def _ceilings(self) -> dict[str, float]:
        device, repeats = self._cases.device, self.config.ceiling_repeats
        flops = matmul_flops(self._cases.dtype, repeats=repeats, device=device)
        return {"bandwidth": read_bandwidth(device, repeats), "flops": flops}

    @torch.inference_mode()
    def _measure(self, case: Case) -> dict[str, Any]:
        exact = case.exact().double()
        scale = float(exact.abs().max())
        errors = {name: float((way.result().double() - exact).abs().max()) / scale for name, way in case.ways.items()}
        device, random = self._cases.device, Random(f"{self.seed} {case.name}")
        calls = {}
        for name, way in case.ways.items():
            once = min(seconds(way.run, 1, device) for _ in range(3))
            calls[name] = max(1, ceil(self.config.sample / once))
        samples: dict[str, list[float]] = {name: [] for name in case.ways}
        for _ in range(self.config.repeats):
            for name in random.sample(list(case.ways), len(case.ways)):
                samples[name].append(seconds(case.ways[name].run, calls[name], device))
        return {
            "operation": case.operation,
            "what": case.what,
            "bytes": case.work.bytes,
            "flops": case.work.flops,
            "seconds": samples,
            "errors": errors,
        }

    def rows(self, done: dict[str, Any]) -> list[dict[str, Any]]:
        """A row an operation, size and way. of_ceiling_percent: the time that its bytes or operations need at least,
        whichever is more, as a part of what it took."""
        if "ceilings" not in done:
            return []
        machine = Machine("this", done["ceilings"]["bandwidth"], done["ceilings"]["flops"])
        out = []
        for name, found in done.items():
            if name == "ceilings":
                continue
            work = Work(found["bytes"], found["flops"])
            least = machine.seconds(work)
            for way, samples in found["seconds"].items():
                spread = Spread.of(samples)
                out.append(
                    {
                        "operation": found["operation"],
                        "what": found["what"],
                        "way": way,
                        "us": spread.scaled(1e6).to_dict(),
                        "bytes": work.bytes,
                        "flops": work.flops,
                        "gb_per_s": round(work.bytes / spread.median / 1e9, 3),
                        "gflop_per_s": round(work.flops / spread.median / 1e9, 3),
                        "bound": "memory"
                        if work.flops / machine.flops <= work.bytes / machine.bandwidth
                        else "compute",
                        "of_ceiling_percent": round(100.0 * least / spread.median, 2),
                        "error": float(f"{found['errors'][way]:.3g}"),
                    }
                )
        return out

    def more(self, done: dict[str, Any]) -> dict[str, Any]:
        """ceilings: bytes/s of reading or copying a large buffer, FLOP/s of a large matrix product."""
        return {"ceilings": done.get("ceilings")}

    def table(self, done: dict[str, Any]) -> Table:
        settings, ceilings = self.settings, done.get("ceilings") or {"bandwidth": 0.0, "flops": 0.0}
        table = Table(
            title=f"{settings['model']} {settings['dtype']} {settings['device']}: n = {self.config.repeats}, medians",
            caption=f"ceilings of this run: {ceilings['bandwidth'] / 1e9:,.1f} GB/s, "
            f"{ceilings['flops'] / 1e9:,.0f} GFLOP/s; what fits into a cache may be faster than memory",
        )
        for heading in ("operation", "size", "way"):
            table.add_column(heading, no_wrap=True)
        for heading in ("us", "GB/s", "GFLOP/s", "% of ceiling", "error"):
            table.add_column(heading, justify="right", no_wrap=True)
        last = None
        for row in self.rows(done):
            case = row["operation"], row["what"]
            table.add_row(
                *(case if case != last else ("", "")),
                row["way"],
                f"{row['us']['median']:,.1f}",
                *(f"{row[name]:,.1f}" for name in ("gb_per_s", "gflop_per_s")),
                f"{row['of_ceiling_percent']:.0f} ({row['bound']})",
                "" if row["way"] == REFERENCE else f"{row['error']:.1g}",
            )
            last = case
        return table


def seconds(run: Callable[[], object], calls: int, device: torch.device) -> float:
    """Of one call, in the mean of so many in a row, until the device has done them."""
    _wait(device)
    began = perf_counter()
    for _ in range(calls):
        run()
    _wait(device)
    return (perf_counter() - began) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
