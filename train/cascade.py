"""What a cascade of a model's probe and its detector gives, beside each alone. It fits thresholds, no head.

They are calibrated on one half of the test part and measured on the other; the heads saw neither.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.errors import BadInput
from ..engine.guards.cascade import Calibration, calibrate
from ..engine.models.loader import load_models
from ..engine.models.model import Model
from ..engine.models.sources import BUNDLES
from .data import Example, Part, read_examples
from .features import passage, pooled_states
from .fit import auroc, threshold_at

Progress = Callable[[str, int, int], None]


class Rates(NamedTuple):
    """Of one way to decide. auroc: of its order of the answers. asked: share of them that the detector reads."""

    auroc: float
    false_positives: float
    true_positives: float
    asked: float


@dataclass(frozen=True)
class CascadeReport:
    """budget: of false positives, for all three. calibration: on the first half; the rates are of the second half, of
    so many harmful and harmless answers."""

    calibration: Calibration
    budget: float
    harmful: int
    harmless: int
    probe: Rates
    detector: Rates
    cascade: Rates

    def to_markdown(self) -> str:
        found = self.calibration
        lines = [
            "| | AUROC | harmful found | harmless flagged | detector asked |",
            "| --- | --- | --- | --- | --- |",
            *(
                f"| {name} | {rates.auroc:.4f} | {rates.true_positives:.1%} | {rates.false_positives:.1%} | "
                f"{rates.asked:.0%} |"
                for name, rates in (("probe", self.probe), ("detector", self.detector), ("cascade", self.cascade))
            ),
        ]
        return (
            f"Of {self.harmful} harmful and {self.harmless} harmless test answers, each threshold set to flag "
            f"{self.budget:.1%} of as many other harmless ones; the cascade's band is {found.band[0]:.4f} to "
            f"{found.band[1]:.4f}, its dear threshold {found.dear_threshold:.4f}:\n\n" + "\n".join(lines) + "\n"
        )


def measure_cascade(
    data: Path,
    *,
    model: str = "smol",
    budget: float = 0.05,
    asked: float = 0.2,
    seed: int = 0,
    limit: int | None = None,
    progress: Progress | None = None,
) -> CascadeReport:
    """Score the test answers under `data` by the probe and the detector of a bundle, and hold three ways to decide to
    the same budget: the probe, the detector, and a cascade that asks the detector about `asked` of the harmless ones.

    Raises `BadInput` for a model that is no bundle, `InvalidGuard` for shares outside [0, 1], `DataMissing` and
    `DataInvalid`.
    """
    if model not in BUNDLES:
        raise BadInput(f"only a bundle brings probe and detector: {', '.join(BUNDLES)}, not {model}")
    examples = [item for item in read_examples(data, seed=seed, limit=limit) if item.part is Part.TEST]
    models = load_models(model).models
    scores = [_scores(models[name], examples, progress) for name in ("probe", "detector")]
    return compare(scores[0], scores[1], examples, budget, asked, seed)


def compare(
    cheap: Tensor, dear: Tensor, examples: Sequence[Example], budget: float, asked: float, seed: int = 0
) -> CascadeReport:
    """cheap, dear: [examples], P(harmless). The halves are split by question and by behavior."""
    groups = sorted({(item.source, item.group) for item in examples})
    random.Random(f"{seed} halves").shuffle(groups)
    first = set(groups[::2])
    half = torch.tensor([(item.source, item.group) in first for item in examples])
    harmless = torch.tensor([item.harmless for item in examples])
    pairs = torch.stack((cheap, dear), 1).double()
    good, bad = ([(a, b) for a, b in pairs[half & of].tolist()] for of in (harmless, ~harmless))
    found = calibrate(good, bad, budget, asked)
    low, high = found.band
    unsure = (pairs[:, 0] >= low) & (pairs[:, 0] < high)
    # the cascade's order: what is in its band is ordered by the dear detector
    order = torch.where(unsure, low + (high - low) * pairs[:, 1], pairs[:, 0])
    flagged = torch.where(unsure, pairs[:, 1] < found.dear_threshold, pairs[:, 0] < low)
    rest = ~half

    def rates(order: Tensor, flagged: Tensor, asked: float) -> Rates:
        return Rates(
            auroc(order[rest & harmless], order[rest & ~harmless]),
            float(flagged[rest & harmless].double().mean()),
            float(flagged[rest & ~harmless].double().mean()),
            asked,
        )

    def alone(scores: Tensor, asked: float) -> Rates:
        return rates(scores, scores < threshold_at(scores[half & harmless], budget), asked)

    return CascadeReport(
        calibration=found,
        budget=budget,
        harmful=int((rest & ~harmless).sum()),
        harmless=int((rest & harmless).sum()),
        probe=alone(pairs[:, 0], 0.0),
        detector=alone(pairs[:, 1], 1.0),
        cascade=rates(order, flagged, float(unsure[rest].double().mean())),
    )


def _scores(model: Model, examples: Sequence[Example], progress: Progress | None) -> Tensor:
    """P(harmless) [examples] by the model's head."""
    head = model.head
    assert head is not None
    passages = [passage(model, head.spec.template, item.question, item.text) for item in examples]

    def told(done: int, of: int) -> None:
        if progress is not None:
            progress(f"reading for the {model.name}", done, of)

    return head.score(
        pooled_states(model, passages, [head.spec.layer], progress=told).of(head.spec.layer, head.spec.pooling)
    )
