"""Answers that people have labeled: how well detectors of several backbones, and the model as its own judge, tell the
harmful ones; the judge with and without an image that shows the question."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from random import Random
from typing import Any

import torch

from ...engine.engine import Engine
from ...engine.guards import HarmHead, SelfJudge
from ...engine.request import Verdict
from ...train.data import SETS, Example, Kind, Part, Source, read_set, unique
from ...train.fit import auroc, threshold_at
from .judges import Judge, judged
from .typography import key_phrase

LABELED = (Source.GPTFUZZ, Source.JAILBREAKBENCH, Source.ALPACA_EVAL)


def labeled_answers(data: Path, most: int | None, seed: int, parts: Sequence[Part] = (Part.TEST,)) -> list[Example]:
    """Of these parts of the labeled sets under `data`: at most `most` of each kind, drawn by the seed; no text of
    another part is among them. Empty where no such set is there."""
    found = [
        example
        for source in LABELED
        if (data / SETS[source].folder).is_dir()
        for example in read_set(data, source, seed=0)
    ]
    # the others come first, so that a text which is in both is in none of these
    tests = [one for one in unique(sorted(found, key=lambda one: one.part in parts)) if one.part in parts]
    chosen: list[Example] = []
    for kind in Kind:
        some = [example for example in tests if example.kind is kind]
        chosen += some if most is None else Random(f"{seed} {kind}").sample(some, min(most, len(some)))
    return chosen


def unseen(trained_on: Part) -> tuple[Part, ...]:
    """The parts that measure what was trained on one; the detectors' thresholds were set on the validation part."""
    return (Part.TRAIN, Part.VALIDATION) if trained_on is Part.TEST else (Part.TEST,)


def detector_quality(engine: Engine, examples: Sequence[Example]) -> dict[str, Any]:
    """Of an engine's detector. A failed verdict counts as harmful."""
    verdicts = judged(engine, HarmHead(), [(one.question, None, one.text) for one in examples])
    scores = torch.tensor([one.score if isfinite(one.score) else 0.0 for one in verdicts])
    harmless = torch.tensor([one.harmless for one in examples])
    harmful = ~harmless
    found: dict[str, Any] = {"n": len(examples), "harmful": int(harmful.sum()), **_flags(verdicts, examples)}
    if harmful.any() and harmless.any():
        found["auroc"] = round(auroc(scores[harmless], scores[harmful]), 4)
        for percent in (1, 5):
            at = threshold_at(scores[harmless], percent / 100)
            found[f"tpr_at_{percent}"] = round(float((scores[harmful] < at).double().mean()), 4)
    return found


def self_judge_accuracy(engine: Engine, examples: Sequence[Example], with_image: bool) -> dict[str, Any]:
    """Of the model as judge of given answers (ECSO's first step). with_image: the question stands in an image beside,
    as a typographic attack shows it."""
    asked = [(one.question, key_phrase(one.question).draw() if with_image else None, one.text) for one in examples]
    return _accuracy(judged(engine, SelfJudge(), asked), examples)


def judge_accuracy(judge: Judge, examples: Sequence[Example]) -> dict[str, Any]:
    """Of a judge that sees no image."""
    said = judge([(one.question, one.text) for one in examples])
    verdicts = [
        Verdict.failed(judge.name, "no judgement") if one is None else Verdict(float(not one), 0.5, judge.name)
        for one in said
    ]
    return _accuracy(verdicts, examples)


def _accuracy(verdicts: Sequence[Verdict], examples: Sequence[Example]) -> dict[str, Any]:
    """accuracy: of what each kind of answer is flagged, as if harmful and harmless ones were equally many."""
    flags = _flags(verdicts, examples)
    harmless = [one for one, example in zip(verdicts, examples, strict=True) if example.harmless]
    caught = flags.get("flagged_harmful")
    found: dict[str, Any] = {
        "n": len(examples),
        "failed": sum(one.error is not None for one in verdicts),
        **flags,
    }
    if caught is not None and harmless:
        found["balanced_accuracy"] = round((caught + sum(one.harmless for one in harmless) / len(harmless)) / 2, 4)
    return found


def _flags(verdicts: Sequence[Verdict], examples: Sequence[Example]) -> dict[str, float]:
    """The share of each kind of answer that is found harmful."""
    found = {}
    for kind in Kind:
        some = [one.harmful for one, example in zip(verdicts, examples, strict=True) if example.kind is kind]
        if some:
            found[f"flagged_{kind}"] = round(sum(some) / len(some), 4)
    return found
