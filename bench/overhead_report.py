"""`stockade bench overhead` as tables and as JSON: what each guard adds, and which targets that meets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table

from .estimates import Estimate
from .published import Lengths
from .report import Spread
from .rewrites import RewriteReport
from .side_by_side import Run, Variant
from .variants import DEFAULT, DETECTOR_ALONE, MIXED, PATHS, counterpart

NOT_DONE = "attached adapters need a model of the engine's own decoder"
Key = tuple[str, str]
"""A variant's name and path."""


@dataclass(frozen=True)
class OverheadConfig:
    """variants: guards to measure. repeats, harmful_repeats, published_repeats: measured runs of each guard on the
    harmless and on the harmful path, and of each published pipeline; all that run in one repeat answer the same
    question of `prompt_tokens` tokens, step by step in turn. lengths: new tokens of each pass. saturation_pairs: how
    often `concurrent` questions are answered at once, in `saturation_tokens` tokens each, without a guard and with
    it, in turn too; mixed_pairs: the same where a part `harmful` of them takes the harmful path. rewrites: forced
    texts."""

    variants: tuple[str, ...] = DEFAULT
    repeats: int = 9
    harmful_repeats: int = 3
    published_repeats: int = 3
    prompt_tokens: int = 64
    lengths: Lengths = field(default_factory=lambda: Lengths(128, 2, 64, 128))
    concurrent: int = 8
    saturation_pairs: int = 20
    saturation_tokens: int = 64
    harmful: float = 0.05
    mixed_pairs: int = 10
    rewrites: int = 10
    seed: int = 0


class Figure(NamedTuple):
    """One variant on one path, in seconds. added: steady seconds beyond those of the same question's unguarded run;
    added_wall: all seconds beyond; added_step: in a step that only decodes. Of what is added, added_exposed comes
    after the answer's last step and hidden before, beside its decoding; wasted is that part of both which was thrown
    away. exposed, step, screened, accepted, wasted_tokens: see `Run`. lost: share of the throughput of many requests
    at once; None where that was not measured."""

    total: Spread
    added: Estimate
    added_wall: Estimate
    hidden: Estimate
    added_exposed: Estimate
    wasted: Estimate
    wasted_tokens: int
    baseline: float
    exposed: Spread
    step: Spread
    added_step: Estimate
    screened: int
    accepted: Spread
    passes: tuple[str, ...]
    prompt_tokens: int
    new_tokens: int
    lost: Estimate | None

    @property
    def added_percent(self) -> Estimate:
        return self.added.scaled(100.0 / self.baseline)

    @property
    def exposed_percent(self) -> float:
        return 100.0 * self.exposed.median / self.baseline


class Mixed(NamedTuple):
    """A guard on traffic of which a share is harmful: seconds that it adds to a request, and the share of the
    throughput that it costs, both in the mean, with their intervals over pairs of runs."""

    harmful: float
    added: Estimate
    lost: Estimate

    @classmethod
    def of(cls, pairs: Sequence[Sequence[float]], at_once: int) -> Mixed:
        """pairs: seconds added to `at_once` requests, seconds without the guard, and how many were harmful."""
        return cls(
            sum(harmful for _, _, harmful in pairs) / (at_once * len(pairs)),
            Estimate.of_mean(added / at_once for added, _, _ in pairs),
            Estimate.of_mean((added for added, _, _ in pairs), (added + off for added, off, _ in pairs)),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "harmful_share": round(self.harmful, 4),
            "n": self.added.n,
            "added_ms": _round(1e3 * self.added.median),
            "added_ms_interval": [_round(1e3 * bound) for bound in self.added[2:]],
            "lost_throughput_percent": _round(100 * self.lost.median),
            "lost_throughput_percent_interval": [_round(100 * bound) for bound in self.lost[2:]],
        }


class Goal(NamedTuple):
    """A target: `measured` may be at most, or has to be at least, `target`."""

    what: str
    at_most: bool
    target: float
    unit: str
    measured: Estimate | float

    @property
    def value(self) -> float:
        return self.measured.median if isinstance(self.measured, Estimate) else self.measured

    @property
    def met(self) -> bool:
        return self._meets(self.value)

    @property
    def certain(self) -> bool:
        """Whether all of the interval says the same."""
        if not isinstance(self.measured, Estimate):
            return True
        return self._meets(self.measured.low) == self._meets(self.measured.high)

    def _meets(self, value: float) -> bool:
        return value <= self.target if self.at_most else value >= self.target

    def to_dict(self) -> dict[str, Any]:
        interval = [self.measured.low, self.measured.high] if isinstance(self.measured, Estimate) else None
        return {
            "what": self.what,
            "at_most" if self.at_most else "at_least": self.target,
            "unit": self.unit,
            "measured": _round(self.value),
            "interval": None if interval is None else [_round(bound) for bound in interval],
            "met": self.met,
            "certain": self.certain,
        }


def figures(
    variants: Sequence[Variant], runs: Mapping[Key, Mapping[int, Run]], lost: Mapping[str, Estimate]
) -> dict[str, dict[str, Figure]]:
    """Sum up, by variant, then by path. Runs of the same repeat asked the same question, so added latency is a
    difference of pairs. Variants that have not run yet, or whose unguarded run is not there, are left out."""
    out: dict[str, dict[str, Figure]] = {}
    for variant in variants:
        base = runs[variant.baseline, PATHS[0]]
        mine = {repeat: run for repeat, run in runs[variant.name, variant.path].items() if repeat in base}
        if not mine:
            continue
        last = list(mine.values())[-1]
        added = {repeat: run.steady - base[repeat].steady for repeat, run in mine.items()}
        exposed = {repeat: run.exposed - base[repeat].exposed for repeat, run in mine.items()}
        out.setdefault(variant.name, {})[variant.path] = Figure(
            total=Spread.of(run.seconds for run in mine.values()),
            added=Estimate.of(added.values()),
            added_wall=Estimate.of(run.seconds - base[repeat].seconds for repeat, run in mine.items()),
            hidden=Estimate.of(added[repeat] - exposed[repeat] for repeat in mine),
            added_exposed=Estimate.of(exposed.values()),
            wasted=Estimate.of(run.wasted for run in mine.values()),
            wasted_tokens=last.wasted_tokens,
            baseline=Spread.of(run.seconds for run in base.values()).median,
            exposed=Spread.of(run.exposed for run in mine.values()),
            step=Spread.of(seconds for run in mine.values() for seconds in run.steps or (0.0,)),
            added_step=Estimate.of(_step_differences(mine, base)),
            screened=max(run.screened for run in mine.values()),
            accepted=Spread.of(run.accepted for run in mine.values()),
            passes=last.passes,
            prompt_tokens=last.prompt_tokens,
            new_tokens=last.new_tokens,
            lost=lost.get(variant.name) if variant.path == PATHS[0] else None,
        )
    return out


def _step_differences(runs: Mapping[int, Run], base: Mapping[int, Run]) -> list[float]:
    """Seconds that a decode step takes longer than the same step of the same question's unguarded run."""
    pairs = (zip(run.steps, base[repeat].steps, strict=False) for repeat, run in runs.items())
    return [mine - theirs for steps in pairs for mine, theirs in steps] or [0.0]


@dataclass(frozen=True)
class OverheadReport:
    """figures: by variant, then by path. mixed: by guard. rewrites: None where they have not run yet. not_done:
    guards that the model cannot have. chunk: tokens that the separate detector reads at a time."""

    config: OverheadConfig
    model: str
    dtype: str
    figures: dict[str, dict[str, Figure]]
    mixed: dict[str, Mixed]
    rewrites: RewriteReport | None
    not_done: tuple[str, ...]
    chunk: int

    def goals(self) -> list[Goal]:
        """The project's targets, as far as what they are about was measured."""
        return list(self._goals())

    def _goals(self) -> Iterator[Goal]:
        known = self.figures
        at_most = {
            "protector-separate": 6.0,
            "protector-adapter": 2.5,
            "probe": 1.0,
            "ecso": 5.0,
            "ecso-continued": 5.0,
        }
        for name, target in at_most.items():
            if name in known:
                yield Goal(f"{name}: added, harmless", True, target, "%", known[name]["harmless"].added_percent)
        if "protector-separate" in known and DETECTOR_ALONE in known:
            figure, alone = known["protector-separate"]["harmless"], known[DETECTOR_ALONE]["harmless"].total.median
            what = "protector-separate:"
            yield Goal(f"{what} added / prefill of the answer", True, 1.25, "x", figure.added.scaled(1.0 / alone))
            yield Goal(f"{what} exposed", True, 1.5, "%", figure.exposed_percent)
            yield Goal(f"{what} exposed, chunk", True, self.chunk, "tokens", figure.screened)
        if "probe" in known:
            figure = known["probe"]["harmless"]
            yield Goal("probe: added to a decode step", True, 150.0, "us", figure.added_step.scaled(1e6))
            yield Goal("probe: closing row", True, 1.0, "%", figure.exposed_percent)
        for name in ("ecso", "ecso-continued"):
            if name in known and "published-ecso" in known:
                ratio = known["published-ecso"]["harmless"].added.median / known[name]["harmless"].added.median
                yield Goal(f"{name}: times less added than published", False, 5.0, "x", ratio)
        for name in self.config.variants:
            if all("harmful" in known.get(one or "", ()) for one in (name, counterpart(name))):
                yield Goal(f"{name}: harmful, times faster than published", False, 3.0, "x", self._speedup(name))
        for name, target in (("protector-adapter", 4.0), ("probe", 1.0)):
            if name in known and (lost := known[name]["harmless"].lost) is not None:
                yield Goal(f"{name}: lost throughput", True, target, "%", lost.scaled(100.0))
        if self.rewrites is not None:
            yield Goal("rewrite with drafts: times fewer steps", False, 1.8, "x", self.rewrites.ratio)

    def _speedup(self, name: str) -> float:
        other = counterpart(name)
        assert other is not None
        return self.figures[other]["harmful"].total.median / self.figures[name]["harmful"].total.median

    def _variant(self, name: str) -> dict[str, Any]:
        out = {path: _plain(figure) for path, figure in self.figures[name].items()}
        theirs = self.figures.get(counterpart(name) or "", {})
        if not {"harmless", "harmful"} <= theirs.keys() & out.keys():
            return out
        out["harmless"] |= {
            "published_added_ms": _round(1e3 * theirs["harmless"].added.median),
            "published_added_percent": _round(theirs["harmless"].added_percent.median),
        }
        out["harmful"] |= {
            "published_total_ms": _round(1e3 * theirs["harmful"].total.median),
            "speedup_over_published": _round(self._speedup(name)),
        }
        return out

    def rows(self) -> list[dict[str, Any]]:
        """A row a guard and path, of every guard the one on mixed traffic last."""
        out: list[dict[str, Any]] = []
        for name in self.figures:
            out += [{"guard": name, "path": path, **figure} for path, figure in self._variant(name).items()]
            if name in self.mixed:
                out.append({"guard": name, "path": MIXED, **self.mixed[name].to_dict()})
        return out

    def more(self) -> dict[str, Any]:
        return {
            "variants": {name: self._variant(name) for name in self.figures},
            "mixed": {name: mixed.to_dict() for name, mixed in self.mixed.items()},
            "rewrites": None if self.rewrites is None else self.rewrites.to_dict(),
            "not_done": dict.fromkeys(self.not_done, NOT_DONE),
            "chunk_tokens": self.chunk,
            "targets": [goal.to_dict() for goal in self.goals()],
        }

    def table(self) -> RenderableType:
        return Group(self._latencies(), *([self._traffic()] if self.mixed else []), self._targets())

    def _traffic(self) -> Table:
        config = self.config
        share = 100 * next(iter(self.mixed.values())).harmful
        table = Table(
            title=f"traffic with {share:.3g} % harmful answers, {config.concurrent} requests at once, "
            f"{config.saturation_tokens} tokens an answer: means (95 % interval)"
        )
        table.add_column("guard")
        for heading in ("n", "added ms a request", "lost throughput %"):
            table.add_column(heading, justify="right")
        for name, mixed in self.mixed.items():
            table.add_row(name, str(mixed.added.n), str(mixed.added.scaled(1e3)), str(mixed.lost.scaled(100.0)))
        return table

    def _latencies(self) -> Table:
        config = self.config
        table = Table(title=f"{self.model} {self.dtype}: {config.lengths.answer} tokens an answer, medians")
        for heading in ("variant", "path", "passes"):
            table.add_column(heading)
        for heading in (
            "n",
            "tokens in, out",
            "ms",
            "added ms",
            "%",
            "hidden",
            "exposed",
            "wasted",
            "step ms",
            "lost %",
        ):
            table.add_column(heading, justify="right")
        for name, paths in self.figures.items():
            for path, figure in paths.items():
                table.add_row(
                    name,
                    path,
                    " ".join(figure.passes),
                    str(figure.total.n),
                    f"{figure.prompt_tokens}, {figure.new_tokens}",
                    f"{1e3 * figure.total.median:,.0f}",
                    f"{1e3 * figure.added.median:,.1f}",
                    f"{figure.added_percent.median:.1f}",
                    *(f"{1e3 * part.median:,.1f}" for part in (figure.hidden, figure.added_exposed, figure.wasted)),
                    f"{1e3 * figure.step.median:.2f}",
                    "" if figure.lost is None else f"{100.0 * figure.lost.median:.1f}",
                )
            table.add_section()
        for name in self.not_done:
            table.add_row(name, "not done", NOT_DONE)
        return table

    def _targets(self) -> Table:
        table = Table(title="targets")
        table.add_column("what")
        for heading in ("target", "measured (95 % interval)", "met"):
            table.add_column(heading, justify="right")
        for goal in self.goals():
            sign = "≤" if goal.at_most else "≥"
            measured = str(goal.measured) if isinstance(goal.measured, Estimate) else f"{goal.measured:,.2f}"
            met = ("yes" if goal.met else "no") + ("" if goal.certain else ", perhaps")
            table.add_row(goal.what, f"{sign} {goal.target:g} {goal.unit}", measured, met)
        return table


def _plain(figure: Figure) -> dict[str, Any]:
    added, percent = figure.added.scaled(1e3), figure.added_percent
    lost = figure.lost
    return {
        "n": figure.total.n,
        "total_ms": _round(1e3 * figure.total.median),
        "total_ms_spread": figure.total.scaled(1e3).to_dict(),
        "baseline_ms": _round(1e3 * figure.baseline),
        "added_ms": _round(added.median),
        "added_ms_interval": [_round(added.low), _round(added.high)],
        "added_percent": _round(percent.median),
        "added_percent_interval": [_round(percent.low), _round(percent.high)],
        "hidden_ms": figure.hidden.scaled(1e3).to_dict(),
        "added_exposed_ms": figure.added_exposed.scaled(1e3).to_dict(),
        "wasted_ms": figure.wasted.scaled(1e3).to_dict(),
        "wasted_tokens": figure.wasted_tokens,
        "exposed_ms": _round(1e3 * figure.exposed.median),
        "exposed_percent": _round(figure.exposed_percent),
        "step_ms": _round(1e3 * figure.step.median),
        "added_wall_ms": figure.added_wall.scaled(1e3).to_dict(),
        "added_step_us": figure.added_step.scaled(1e6).to_dict(),
        "exposed_screened_tokens": figure.screened,
        "accepted_drafts": figure.accepted.median,
        "lost_throughput_percent": None if lost is None else lost.scaled(100.0).to_dict(),
        "passes": list(figure.passes),
        "prompt_tokens": figure.prompt_tokens,
        "new_tokens": figure.new_tokens,
    }


def _round(value: float) -> float:
    return round(value, 3)
