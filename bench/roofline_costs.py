"""What steps would cost on a machine that was not measured: bytes and operations of a batch against its roofline.

The prices of `capacity` where there is no run to fit them to. They are lower bounds, and say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .cost_fit import Demand, LaneNotMeasured, StepLoad
from .replica import Limits
from .roofline import Eyes, Machine, Setup, Shape

H200_BYTES = 141e9  # its memory
USABLE = 0.9  # the part of it that weights and pages may take


class _Per(NamedTuple):
    """Bytes of all layers' weights, of a token's keys and values; operations of a row in all layers, of a row and a
    token that it attends to, of a row of logits; bytes of the output matrix."""

    weights: float
    kv: float
    row: float
    attention: float
    head: float
    head_bytes: float


@dataclass(frozen=True)
class RooflineCosts:
    """machine: bandwidth and FLOP/s, with what is reached of them. shapes: by model, each a lane of its own."""

    machine: Machine
    shapes: Mapping[str, Shape]
    eyes: Eyes | None = None
    source: str = "roofline, not measured"

    def lane(self, model: str) -> str:
        if model not in self.shapes:
            raise LaneNotMeasured(
                f"there is no shape of {model!r} to count bytes of, only of {', '.join(self.shapes)}"
            )
        return model

    def demand(self, lane: str, load: StepLoad) -> Demand:
        """Weights once a batch; keys and values of what decode rows attend to; of other rows the products alone,
        for their keys and values are read once for many of them."""
        per, machine = self._per[lane], self.machine
        moved = per.weights + per.kv * (load.read + load.prefill + load.guard)
        flops = per.row * load.rows + per.attention * (load.read + load.pairs)
        if load.decode or lane != "detector":
            moved += per.head_bytes
            flops += per.head * max(1, load.decode)
        if self.eyes is not None and load.images:
            vision = self.eyes.encode(load.images)
            moved, flops = moved + vision.bytes, flops + vision.flops
        memory = moved / (machine.bandwidth * machine.memory_efficiency)
        return Demand(memory, flops / (machine.flops * machine.compute_efficiency), machine.pass_overhead)

    @cached_property
    def _per(self) -> dict[str, _Per]:
        return {
            name: _Per(
                weights=shape.layers * shape.layer_weights * shape.weight_bytes,
                kv=shape.layers * shape.kv_bytes,
                row=2.0 * shape.layers * shape.layer_weights,
                attention=4.0 * shape.heads * shape.head_dim * shape.layers,
                head=2.0 * shape.vocab * shape.hidden,
                head_bytes=shape.vocab * shape.hidden * shape.weight_bytes,
            )
            for name, shape in self.shapes.items()
        }


def roofline_costs(setup: Setup, machine: Machine) -> RooflineCosts:
    """Of a setup's model, of its detector, and of a detoxifier as large as the model without its eyes."""
    shapes = {"mllm": setup.model, "detector": setup.detector or setup.model, "detoxifier": setup.model}
    return RooflineCosts(machine, shapes, setup.eyes, f"roofline of {machine.name}, not measured")


def gpu_limits(costs: RooflineCosts, memory: float = H200_BYTES) -> Limits:
    """An engine's defaults on a GPU with so many bytes: all that the weights leave are pages."""
    shapes = costs.shapes.values()
    weights = sum(
        (shape.layers * shape.layer_weights + 2 * shape.vocab * shape.hidden) * shape.weight_bytes for shape in shapes
    )
    model = costs.shapes["mllm"]
    room = int((memory * USABLE - weights) / (model.layers * model.kv_bytes))
    return Limits(budget=8192, max_sequences=128, free_rows=64, page=16, kv_tokens=max(room, 1))
