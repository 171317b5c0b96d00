"""A short soak; `stockade bench serve --soak` runs the long one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from stockade.bench.soak import SoakConfig, run_soak
from stockade.engine.serving.audit import read_key, verify


def test_mixed_requests_with_faults_end_in_replies_or_typed_errors_and_leave_nothing(tmp_path: Path) -> None:
    report = run_soak(SoakConfig(requests=90, faults=0.1, at_once=24), lambda *_: None, tmp_path)
    assert report.complaints == []
    assert sum(count for ending, count in report.endings.items() if not ending.startswith("429")) == 90
    assert report.checked_characters > 100 and report.unscreened_characters == 0
    assert report.injected.total() > 3
    assert len(report.endings) > 6
    with open(tmp_path / "audit.jsonl", "rb") as lines:
        found = verify(lines, read_key(tmp_path / "audit.jsonl.key"))
    assert found.closed and found.decisions > 30


def test_a_soak_on_ray_is_told_like_every_measurement() -> None:
    pytest.importorskip("ray")
    from stockade.bench.soak_ray import RaySoakReport

    report = RaySoakReport(SoakConfig(8), 2, 1.0, Counter(clean=8), [], kills=1, logs=2)
    assert report.to_dict()["benchmark"] and report.to_dict()["kills"] == 1
    assert report.table().row_count == 4
