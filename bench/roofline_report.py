"""`stockade bench roofline`: predicted latencies as a table and as JSON, held against measured ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from transformers import AutoConfig

from ..engine.errors import BadInput, CheckpointMissing
from ..engine.models.bundles import smol_folder
from ..engine.models.decoder import DecoderConfig
from ..engine.models.shapes import named_config
from ..engine.models.sources import BUNDLES
from .roofline import VARIANTS, Eyes, Prediction, Setup, Shape


class Measured(NamedTuple):
    """ms and % that a variant was measured to add."""

    added_ms: float
    added_percent: float


@dataclass(frozen=True)
class RooflineReport:
    """predictions: by a name for people. measured: by variant, to hold against the first prediction."""

    predictions: dict[str, Prediction]
    measured: dict[str, Measured]

    def ratios(self) -> dict[str, float]:
        """Measured over predicted added latency of the first prediction, by variant."""
        first = next(iter(self.predictions.values()))
        return {
            name: 1e-3 * found.added_ms / first.costs[name].added
            for name, found in self.measured.items()
            if first.costs[name].added > 0
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "benchmark": "roofline",
            "predicted": {name: prediction.to_dict() for name, prediction in self.predictions.items()},
            "measured": {name: found._asdict() for name, found in self.measured.items()},
            "measured_over_predicted": {name: round(ratio, 3) for name, ratio in self.ratios().items()},
        }

    def table(self) -> RenderableType:
        ratios = self.ratios()
        tables = []
        for number, (title, prediction) in enumerate(self.predictions.items()):
            tables.append(_table(title, prediction, {} if number else self.measured, {} if number else ratios))
        return Group(*tables)


def _table(title: str, prediction: Prediction, measured: dict[str, Measured], ratios: dict[str, float]) -> Table:
    machine, setup = prediction.machine, prediction.setup
    table = Table(
        title=f"{title}: {setup.prompt} tokens in, {setup.answer} out, batch {setup.batch}, chunk {setup.chunk}, "
        "predicted for a harmless reply",
        caption=f"{machine.bandwidth / 1e9:,.1f} GB/s x {machine.memory_efficiency:g}, "
        f"{machine.flops / 1e12:,.2f} TFLOP/s x {machine.compute_efficiency:g}, ridge {machine.ridge:,.0f} FLOP/B; "
        f"prefill {1e3 * prediction.prefill:,.2f} ms, step {1e3 * prediction.step:,.2f} ms, "
        f"reply {1e3 * prediction.reply:,.1f} ms",
    )
    table.add_column("variant", no_wrap=True)
    headings = ["added ms", "%", "exposed ms", "%", "published adds ms", "%"]
    for heading in [*headings, *(["measured ms", "%", "measured / predicted"] if measured else [])]:
        table.add_column(heading, justify="right")
    for name, cost in prediction.costs.items():
        cells = []
        for seconds in (cost.added, cost.exposed, cost.published):
            cells += [f"{1e3 * seconds:,.3f}", f"{prediction.percent(seconds):.2f}"]
        if name in measured:
            ratio = f"{ratios[name]:.2f}" if name in ratios else ""
            cells += [f"{measured[name].added_ms:,.2f}", f"{measured[name].added_percent:.2f}", ratio]
        table.add_row(name, *cells)
    return table


def read_measured(file: Path) -> dict[str, Measured]:
    """What `stockade bench overhead --json FILE` measured on the harmless path, for the variants known here.

    Raises `BadInput` for a file that cannot be read, is no such document, or holds none of the variants.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        found = {
            name: Measured(*(_median(figures["harmless"][key]) for key in Measured._fields))
            for name, figures in document["variants"].items()
            if name in VARIANTS
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{file} is no JSON document of `stockade bench overhead`: {error!r}") from None
    if not found:
        raise BadInput(f"{file} holds none of the variants {', '.join(VARIANTS)}")
    return found


def _median(value: Any) -> float:
    """A number, or the median of a spread."""
    return float(value["median"] if isinstance(value, dict) else value)


def setup_of(model: str, detector: str | None = None, weight_bytes: int = 2) -> Setup:
    """The setup for a bundle, a checkpoint folder or a named shape, with eyes where the model has them.

    Raises `CheckpointMissing` for a model that is not there, `UnknownArchitecture` for a decoder that this engine
    does not have.
    """
    config = _config(model)
    shape = _shape(config, weight_bytes)
    other = None if detector is None else _shape(_config(detector), weight_bytes)
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return Setup(shape, other)
    patches = (vision.image_size // vision.patch_size) ** 2
    # features come from an inner layer, counted from the end; those above it need not run
    layers = vision.num_hidden_layers + 1 + min(-1, config.vision_feature_layer)
    eyes = Eyes(patches + 1, layers, vision.hidden_size, vision.intermediate_size, patches)
    return Setup(shape, other, eyes)


def _shape(config: Any, weight_bytes: int) -> Shape:
    return Shape.of(DecoderConfig.from_pretrained(config.get_text_config()), weight_bytes)


def _config(source: str) -> Any:
    if source in BUNDLES:
        return AutoConfig.from_pretrained(smol_folder())
    named = named_config(source)
    if named is not None:
        return named
    if not (Path(source) / "config.json").is_file():
        raise CheckpointMissing(f"{source} is no bundle, no named shape and no folder with a config.json")
    return AutoConfig.from_pretrained(source)
