"""The table of a `bench throughput`, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from .traffic import Sizes


def described(sizes: Sizes) -> str:
    seen = f", {sizes.images} images" if sizes.images else ""
    harmful = f", {100 * sizes.harmful:g} % harmful" if sizes.harmful else ""
    return f"{sizes.prompt_tokens} tokens in{seen}, {sizes.answer_tokens} out{harmful}; medians (p99)"


def loads_table(
    title: str, objective: str, rows: Sequence[Mapping[str, Any]], more: Mapping[str, Any]
) -> RenderableType:
    """rows, more: of the document. objective: that goodput is of, or nothing."""
    table = Table(
        title=title,
        caption="*: knee; ±: of rounds; ttft: first text; itl: between tokens; hits: prompt tokens found in pages"
        + (f"; good: {objective}" if objective else ""),
    )
    for heading in ("guard", "load"):
        table.add_column(heading, no_wrap=True)
    times = ("ttft", "itl", "reply", "queue")
    for heading in ("req/s", "±%", "tok/s", "good/s", *(f"{name} ms" for name in times), "pool %", "hits %"):
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for row in rows:
        if last not in (None, row["guard"]):
            table.add_section()
        last = row["guard"]
        table.add_row(
            *(row["guard"], _named(row) + ("*" if _is_knee(row, more) else "")),
            *(
                f"{row['requests_per_s']:.2f}",
                _spread(row),
                f"{row['tokens_per_s']:,.1f}",
                f"{row['goodput_per_s']:.2f}",
            ),
            *(
                f"{row[f'{name}_ms']['p50']:,.0f}"
                + (f" ({row[f'{name}_ms']['p99']:,.0f})" if name in ("ttft", "e2e") else "")
                for name in ("ttft", "itl", "e2e", "queued")
            ),
            *(f"{row['pool_percent']:.1f}", f"{row['prefix_hit_percent']:.0f}"),
        )
    asked = {(row["guard"], row["level"]): row["n"] for row in rows if row["loop"] != "closed"}
    held = (
        f"{guard} holds {rate:g} requests/s" + (f" (of {asked[guard, rate]} requests)" if rate else "")
        for guard, rate in more["held"].items()
    )
    return Group(table, *held)


def _named(row: Mapping[str, Any]) -> str:
    if row["loop"] == "closed":
        return f"{row['level']:g} at once"
    return f"{row['level']:.3g}/s" + (", trace" if row["loop"] == "trace" else "")


def _spread(row: Mapping[str, Any]) -> str:
    """Half of what lies between the slowest round and the fastest."""
    rates = row["between_rounds"]["requests_per_s"]
    return f"{50.0 * (rates['high'] - rates['low']) / row['requests_per_s']:.0f}"


def _is_knee(row: Mapping[str, Any], more: Mapping[str, Any]) -> bool:
    found = more["knees"].get(row["guard"])
    return row["loop"] == "closed" and found is not None and found["level"] == row["level"]
