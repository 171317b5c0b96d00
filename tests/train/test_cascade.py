"""The halves, the budget, and what a cascade gains where the cheap scores are noisy and the dear ones are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stockade.engine.errors import BadInput
from stockade.train.cascade import compare, measure_cascade
from stockade.train.data import Example, Kind, Source


def answers(count: int) -> list[Example]:
    kinds = [Kind.HARMFUL, Kind.REFUSING, Kind.HELPFUL]
    return [Example(f"text {n}", kinds[n % 3], Source.GPTFUZZ, f"group {n // 6}", "?") for n in range(count)]


def test_a_cascade_is_better_than_its_cheap_part_and_asks_as_often_as_it_may():
    examples = answers(3000)
    truth = torch.tensor([float(item.harmless) for item in examples])
    generator = torch.Generator().manual_seed(0)
    cheap, dear = (
        torch.sigmoid(4 * truth - 2 + noise * torch.randn(3000, generator=generator)) for noise in (2.0, 0.8)
    )
    report = compare(cheap, dear, examples, budget=0.05, asked=0.3)
    assert report.harmful + report.harmless == 1500 and report.harmless == 1000
    for rates in (report.probe, report.detector, report.cascade):
        assert rates.false_positives == pytest.approx(0.05, abs=0.03)
    assert report.probe.true_positives + 0.1 < report.cascade.true_positives <= report.detector.true_positives + 0.02
    assert report.probe.auroc < report.cascade.auroc
    assert (report.probe.asked, report.detector.asked) == (0.0, 1.0) and 0.1 < report.cascade.asked < 0.5
    for rates in (report.probe, report.detector, report.cascade):
        assert f"{rates.auroc:.4f}" in report.to_markdown()


def test_without_a_band_a_cascade_is_its_cheap_part():
    examples = answers(600)
    scores = torch.rand(600, generator=torch.Generator().manual_seed(1))
    report = compare(scores, scores.flip(0), examples, budget=0.05, asked=0.0)
    cascade, probe = report.cascade, report.probe
    assert (cascade.auroc, cascade.asked) == (probe.auroc, 0.0) and cascade.false_positives <= probe.false_positives
    assert cascade.true_positives == pytest.approx(probe.true_positives, abs=0.02)


def test_only_a_bundle_has_both_heads(data: Path):
    with pytest.raises(BadInput, match="smol"):
        measure_cascade(data, model="tiny-llama")
