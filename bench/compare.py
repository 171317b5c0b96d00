"""What changed between two runs of the same measurement, beyond what chance explains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from rich.table import Table

from ..console import plain_table
from .document import Document, as_written

RESAMPLES = 2000
LEVEL = 99.0  # %: of many figures that did not change, one in a hundred seems to


class Change(NamedTuple):
    """One figure, then and now. ratio: now over then, with the 99 % interval that chance leaves; the interval is None
    where the documents have single figures only."""

    what: str
    then: float
    now: float
    ratio: float
    low: float | None
    high: float | None
    less_is_better: bool = True

    @property
    def verdict(self) -> str:
        if self.low is None or self.high is None:
            return "no interval"
        if self.low <= 1.0 <= self.high:
            return "within noise"
        return "better" if (self.ratio < 1.0) == self.less_is_better else "worse"


class Comparison(NamedTuple):
    """kind: of both documents. differs: what of settings, machine, versions and commit is not the same."""

    kind: str
    differs: list[str]
    changes: list[Change]


def compare(then: Document, now: Document) -> Comparison:
    """Figures of both that bear the same name; medians of independent samples by bootstrap (Efron 1979), in pairs
    where the same request was measured in both."""
    with as_written(now):
        return _compare(then, now)


def _compare(then: Document, now: Document) -> Comparison:
    differs = [
        f"{name}.{key}: {mine.get(key)} → {theirs.get(key)}"
        for name, mine, theirs in (
            ("settings", then.settings, now.settings),
            ("machine", then.machine, now.machine),
            ("versions", then.versions, now.versions),
        )
        for key in sorted({*mine, *theirs})
        if mine.get(key) != theirs.get(key)
    ]
    if then.commit != now.commit:
        differs.append(f"commit: {then.commit} → {now.commit}")
    before, after = dict(_samples(then)), dict(_samples(now))
    changes = [_change(name, before[name], after[name]) for name in before if name in after]
    single = {name: value for name, value in _singles(now).items() if name not in after}
    old = _singles(then)
    changes += [_interval_change(name, old[name], value) for name, value in single.items() if name in old]
    return Comparison(now.kind, differs, changes)


def _samples(document: Document) -> Iterator[tuple[str, np.ndarray]]:
    """By name, every measured value of a figure."""
    found: dict[str, list[float]] = {}
    for name, unit in document.units.items():
        if document.kind == "latency":
            for cell, one in unit.items():
                for measure in ("ttft", "e2e"):
                    found.setdefault(f"{cell}: {measure} s", []).append(one[measure])
        elif document.kind == "throughput":
            loop, level, _, guard = name.split(" ")
            # e2e stands seventh; see `driving.Served`
            found.setdefault(f"{guard}, {loop} {level}: whole reply s", []).extend(one[6] for one in unit["served"])
        elif document.kind == "serve" and name.startswith("pair"):
            for way, took in unit["seconds"].items():
                if way != "bare engine":
                    found.setdefault(f"{way}: time over the bare engine's", []).append(
                        took / unit["seconds"]["bare engine"]
                    )
    for name, values in found.items():
        yield name, np.array(values)


class _Single(NamedTuple):
    value: float
    low: float | None
    high: float | None
    less_is_better: bool


def _singles(document: Document) -> dict[str, _Single]:
    """Figures of which a document has one each, perhaps with an interval."""
    out: dict[str, _Single] = {}
    for name, paths in document.more.get("variants", {}).items():
        for path, figure in paths.items():
            low, high = figure["added_ms_interval"]
            out[f"{name}, {path}: added ms"] = _Single(figure["added_ms"], low, high, True)
            spread = figure["total_ms_spread"]
            out[f"{name}, {path}: whole reply ms"] = _Single(spread["median"], spread["p10"], spread["p90"], True)
    for name, pair, ratio in _ratios(document):
        out[f"{name}: {pair}"] = _Single(ratio["median"], ratio["low"], ratio["high"], False)
    for row in document.rows if document.kind in ("decode", "training") else ():
        for side, spread in row["tokens_per_s"].items():
            name = f"{row['workload']}, {side}: tokens/s"
            out[name] = _Single(spread["median"], spread["p10"], spread["p90"], False)
    for row in document.rows if document.kind == "capacity" else ():
        if row["replicas"] is not None:
            name = f"{row['guard']}, {row['placement']}: devices"
            out[name] = _Single(row["devices"], None, None, True)
    return out


def _ratios(document: Document) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(workload, pair, ratio) of measurements in turn."""
    for row in document.rows:
        if document.kind in ("decode", "training"):
            yield row["workload"], "times as fast", row["ratio"]
        elif document.kind == "onnx":
            for pair, ratio in row["ratios"].items():
                yield f"{row['batch']} x {row['tokens']}", pair, ratio
        elif document.kind == "peers":
            for measure, ratio in row["ratios"].items():
                yield row["peer"], f"{measure} over the first one's", ratio


def _change(name: str, then: np.ndarray, now: np.ndarray) -> Change:
    random = np.random.default_rng(0)
    paired = len(then) == len(now)
    first = random.integers(0, len(then), (RESAMPLES, len(then)))
    # the same rounds of both where there are as many: what made a request slow then may do so now
    second = first if paired else random.integers(0, len(now), (RESAMPLES, len(now)))
    ratios = np.median(now[second], axis=1) / np.median(then[first], axis=1)
    low, high = np.percentile(ratios, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    before, after = float(np.median(then)), float(np.median(now))
    return Change(name, before, after, after / before, float(low), float(high))


def _interval_change(name: str, then: _Single, now: _Single) -> Change:
    """From two intervals: they have to lie apart."""
    ratio = now.value / then.value if then.value else float("nan")
    if then.low is None or then.high is None or now.low is None or now.high is None:
        return Change(name, then.value, now.value, ratio, None, None, now.less_is_better)
    apart = now.low > then.high or now.high < then.low
    bounds = (ratio, ratio) if apart else (min(ratio, 1.0), max(ratio, 1.0))
    return Change(name, then.value, now.value, ratio, *bounds, now.less_is_better)


def comparison_table(comparison: Comparison) -> Table:
    """For a terminal: what moved how far, and whether that means anything."""
    beyond = sum(change.verdict in ("better", "worse") for change in comparison.changes)
    table = plain_table(
        f"{comparison.kind}: {beyond} of {len(comparison.changes)} figures changed beyond noise",
        ["", "then", "now", "moved by", ""],
        right=["then", "now", "moved by"],
    )
    for change in sorted_changes(comparison):
        figures = f"{change.then:,.4g}", f"{change.now:,.4g}", f"{100.0 * (change.ratio - 1.0):+.1f} %"
        table.add_row(change.what, *figures, change.verdict)
    return table


def sorted_changes(comparison: Comparison) -> list[Change]:
    """Those beyond noise first, the largest first."""

    def rank(change: Change) -> tuple[bool, float]:
        return change.verdict not in ("better", "worse"), -abs(np.log(max(change.ratio, 1e-9)))

    return sorted(comparison.changes, key=rank)
