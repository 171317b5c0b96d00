"""`stockade bench capacity` as a table, as sentences and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .capacity import FULL, Found, Plan
from .cost_fit import FittedCosts

ASSUMED = (
    "Requests go to replicas at random; e2e_p95_routed_s is that of up to four replicas behind a router that knows "
    "their load.",
    "A harmful answer is mended once, and the mended one passes.",
    "Rewrites take a step a token: drafts, and prompts that were computed ahead, would make them cheaper.",
    f"A detector's own devices are planned to be busy {100 * FULL:.0f} % of the time, and never make it wait.",
    "Lanes that run at the same time on one device share it evenly.",
    "Processor cores beside a device cost nothing.",
)
ROUGH = 0.15  # of a step's time: where costs fit worse, the answer says so


@dataclass(frozen=True)
class CapacityReport:
    """found: by guard and placement; refused: why there is none. price: of a device and hour."""

    plan: Plan
    found: Mapping[tuple[str, str], Found]
    refused: Mapping[tuple[str, str], str] = field(default_factory=dict)
    price: float = 1.0

    @property
    def baseline(self) -> Found | None:
        return self.found.get(("off", "same"))

    def rows(self) -> list[dict[str, Any]]:
        """One a guard and placement; seconds, and prices in whatever a device's was given in."""
        rows = [self._row(found) for found in self.found.values()]
        return rows + [
            {"guard": guard, "placement": placement, "replicas": None, "refused": why}
            for (guard, placement), why in self.refused.items()
        ]

    def _row(self, found: Found) -> dict[str, Any]:
        rate, base, seen = self.plan.traffic.requests_per_second, self.baseline, found.seen
        price = found.devices * self.price
        row: dict[str, Any] = {
            "guard": found.guard,
            "placement": found.placement,
            "replicas": found.replicas,
            "devices": found.devices,
            "price_per_hour": price,
            "price_per_1000_requests": 1000.0 * price / (3600.0 * rate),
            "devices_over_unguarded": None if base is None else found.devices / base.devices,
            "work_over_unguarded": None if base is None else base.share / found.share,
            "most_requests_per_s_of_a_replica": rate * found.share,
            "alone_s": found.alone,
            "alone_harmful_s": found.alone_harmful,
            "added_alone_s": None if base is None else found.alone - base.alone,
        }
        for name, values in (("ttft", seen.ttft), ("itl", seen.itl), ("e2e", seen.e2e)):
            for percent in (50, 95):
                row[f"{name}_p{percent}_s"] = float(np.percentile(values, percent))
        row |= {
            "e2e_p95_routed_s": found.routed,
            "objective_met": seen.met,
            "busy": seen.busy[0],
            "detector_busy": seen.busy[-1] if len(seen.busy) > 1 else None,
            "requests_under_way": seen.under_way,
            "preempted": seen.preempted,
            "refused": None,
        }
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}

    def settings(self) -> dict[str, Any]:
        plan = self.plan
        traffic = asdict(plan.traffic)
        trace = traffic.pop("trace")
        return {
            "costs": plan.costs.source,
            **traffic,
            "rate": plan.traffic.requests_per_second,
            "trace_requests": len(trace),
            "sizes": asdict(plan.sizes),
            "limits": asdict(plan.limits),
            "objective": plan.objective.to_dict(),
            "target": plan.target,
            "price": self.price,
            "seed": plan.seed,
        }

    def more(self) -> dict[str, Any]:
        """What is assumed, in words, and the answer."""
        return {"assumed": list(ASSUMED), "answer": self.sentences()}

    def sentences(self) -> list[str]:
        """What each guard costs, for people."""
        plan, base = self.plan, self.baseline
        traffic = plan.traffic
        harmful = f" with {100 * traffic.harmful:g} % harmful answers" if traffic.harmful else ""
        out = []
        if base is not None:
            out.append(
                f"{traffic.requests_per_second:g} requests/s{harmful} take {_devices(base)} without a guard "
                f"({plan.objective or 'no objective'} for {100 * plan.target:g} % of them)."
            )
        for (guard, placement), found in self.found.items():
            if guard == "off" or base is None:
                continue
            where = "" if placement == "same" else f" ({placement})"
            ratio = base.share / found.share * found.devices / found.replicas
            added = 1e3 * (found.alone - base.alone)
            price = (found.devices - base.devices) * self.price
            out.append(
                f"{guard}{where} takes {_devices(found)}: {ratio:.2f} times the work, {price:+,.2f} an hour; "
                f"{added:,.1f} ms more for a harmless request alone, {found.alone_harmful:.2f} s for a harmful one."
            )
        out += [f"{guard} ({placement}) cannot hold it: {why}" for (guard, placement), why in self.refused.items()]
        errors = [fit.error for fit in plan.costs.lanes.values()] if isinstance(plan.costs, FittedCosts) else []
        if max(errors, default=0.0) > ROUGH:
            out.append(
                f"This is rough: measured steps miss their own fit by {100 * max(errors):.0f} % in the median; "
                "measure them again on a quiet machine."
            )
        return out

    def table(self) -> RenderableType:
        table = Table(title=f"costs: {self.plan.costs.source}")
        table.add_column("guard", no_wrap=True)
        for heading in (
            "devices",
            "price/h",
            "x off",
            "req/s each",
            "alone s",
            "harmful s",
            "p50 s",
            "p95 s",
            "held %",
        ):
            table.add_column(heading, justify="right", no_wrap=True)
        base = self.baseline
        for found in self.found.values():
            ratio = None if base is None else base.share / found.share * found.devices / found.replicas
            p50, p95 = np.percentile(found.seen.e2e, [50, 95])
            table.add_row(
                found.guard + ("" if found.placement == "same" else f", {found.placement}"),
                f"{found.devices:,}",
                f"{found.devices * self.price:,.2f}",
                "" if ratio is None else f"{ratio:.2f}",
                f"{self.plan.traffic.requests_per_second * found.share:.3g}",
                *(f"{value:.3g}" for value in (found.alone, found.alone_harmful, p50, p95)),
                f"{100 * found.seen.met:.1f}",
            )
        return Group(table, *(Text(sentence) for sentence in self.sentences()))


def _devices(found: Found) -> str:
    extra = f" and {found.detectors} for detectors" if found.detectors else ""
    return f"{found.replicas:,} {'device' if found.replicas == 1 else 'devices'}{extra}"
