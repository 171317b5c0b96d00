"""Forced rewrites: the engine says the target, token for token, and needs fewer steps with drafts."""

from __future__ import annotations

from random import Random

import pytest
import torch

from stockade.bench import rewrites
from stockade.bench.report import WrongPath
from stockade.bench.rewrites import RewriteConfig, edited, run_rewrites
from stockade.bench.workload import sources


def test_a_target_keeps_its_share_of_the_original() -> None:
    random = Random(0)
    for length in (5, 40, 128):
        original, other = list(range(length)), list(range(1000, 1000 + length))
        for keep in (0.0, 0.6, 1.0):
            target, share = edited(original, other, keep, random)
            kept = sum(mine == theirs for mine, theirs in zip(target, original, strict=True))
            assert share == kept / length >= keep
            assert all(token in (original[at], other[at]) for at, token in enumerate(target))
    assert edited(original, other, 0.6, random)[1] < 0.75  # and not much more than it has to


def test_drafts_save_steps_and_change_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    with sources("tiny-llama") as weights:
        engine = weights.engine(torch.float32)
        report = run_rewrites(engine, RewriteConfig(tokens=48, repeats=3))
        assert report.plain.median == 48  # one token a step, the first one in the step of the prompt
        assert report.drafted.median < 48 and report.ratio.median == pytest.approx(
            48 / report.drafted.median, rel=0.1
        )
        assert report.kept >= 0.6 and 0 < report.accepted.median <= 1
        # a bias that does not force anything is noticed: what comes out then is no target
        monkeypatch.setattr(rewrites, "_BIAS", 0.0)
        with pytest.raises(WrongPath, match="is not its target"):
            run_rewrites(engine, RewriteConfig(tokens=48, repeats=1))
