"""Documents of measurements as pictures, light or dark. Needs matplotlib, which comes with the extra `bench`."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .document import Document, as_written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A color for each guard, the same in all pictures, and readable on white and on black (Tableau's ten, lightened).
COLORS = {
    "off": "#7F8C8D",
    "protector-separate": "#D9534F",
    "protector-adapter": "#E08E2B",
    "probe": "#2FA36B",
    "ecso": "#4C7FC9",
    "ecso-continued": "#5FB7D4",
    "stockade": "#4C7FC9",
    "transformers": "#E08E2B",
}
OTHERS = ("#9B6FC4", "#C76DA2", "#A68A64", "#6C9A8B", "#B5B04B", "#6E7FA3")
PARTS = (
    ("hidden", "beside the decoding", "#8FB4E8"),
    ("exposed", "after the last token", "#D9534F"),
    ("wasted", "thrown away", "#B08CC9"),
)


class Theme(NamedTuple):
    name: str
    text: str
    back: str
    grid: str


LIGHT = Theme("light", "#1F2328", "#FFFFFF", "#E3E6E8")
DARK = Theme("dark", "#E6EDF3", "#0D1117", "#30363D")


class Picture(NamedTuple):
    """name: of its file. title: what it shows. draw: onto axes. projection: of the axes, None for plain ones."""

    name: str
    title: str
    draw: Callable[[Axes, Theme], None]
    height: float = 3.6
    projection: str | None = None

    def png(self, theme: Theme = LIGHT) -> bytes:
        """Raises ImportError without matplotlib."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8.4, self.height), dpi=130, layout="constrained", facecolor=theme.back)
        FigureCanvasAgg(figure)
        axes = figure.subplots(subplot_kw={"projection": self.projection})
        self.draw(axes, theme)
        _dress(figure, axes, theme, self.title)
        file = io.BytesIO()
        # without a date or a version in it, the same figures make the same file
        figure.savefig(file, format="png", metadata={"Software": None})
        return file.getvalue()


def pictures(document: Document) -> list[Picture]:
    """What can be drawn of a document; nothing for most kinds. Raises `BadDocument`."""
    make = _KINDS.get(document.kind)
    with as_written(document):
        return [] if make is None else list(make(document))


def _latency(document: Document) -> Iterable[Picture]:
    cells = [row for row in document.rows if row["path"] == "harmless" and row["release"] in ("live", "verdict")]
    sizes = list(dict.fromkeys((row["prompt_tokens"], row["images"], row["answer_tokens"]) for row in cells))
    for size in sizes[:2]:
        lines: dict[str, list[float]] = {}
        for found in document.units.values():
            for name, one in found.items():
                row = next((row for row in cells if _cell_name(row) == name), None)
                if row is not None and (row["prompt_tokens"], row["images"], row["answer_tokens"]) == size:
                    lines.setdefault(row["guard"], []).append(1e3 * one["e2e"])
        if lines:
            prompt, images, answer = size
            title = f"Whole replies: {prompt} tokens in, {images} images, {answer} out, harmless"
            yield Picture(f"latency-{prompt}-{images}-{answer}", title, _cdf(lines))


def _cell_name(row: Mapping[str, Any]) -> str:
    from .latency import Cell

    return Cell(**{name: row[name] for name in Cell._fields}).name


def _cdf(lines: Mapping[str, list[float]]) -> Callable[[Axes, Theme], None]:
    def draw(axes: Axes, theme: Theme) -> None:
        for number, (name, values) in enumerate(lines.items()):
            ordered = np.sort([min(values), *values])
            parts = np.arange(len(ordered)) / len(values)
            label = f"{name} (n = {len(values)})"
            axes.step(ordered, 100 * parts, where="post", color=_color(name, number), label=label, linewidth=1.8)
        axes.set_xlabel("milliseconds")
        axes.set_ylabel("% of the requests are done")
        axes.set_ylim(0, 102)
        axes.legend(loc="lower right", fontsize=8, frameon=False, labelcolor=theme.text)

    return draw


def _throughput(document: Document) -> Iterable[Picture]:
    def draw(axes: Axes, theme: Theme) -> None:
        guards = list(dict.fromkeys(row["guard"] for row in document.rows))
        for number, guard in enumerate(guards):
            color = _color(guard, number)
            closed = sorted((row for row in rows if row["guard"] == guard), key=lambda row: row["level"])
            x = [row["requests_per_s"] for row in closed]
            axes.plot(x, [row["e2e_ms"]["p50"] for row in closed], "o-", color=color, label=guard, markersize=4)
            low, high = ([row["e2e_ms"][name] for row in closed] for name in ("p50", "p95"))
            axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
            found = document.more.get("knees", {}).get(guard)
            if found is not None:
                axes.plot(found["rate"], 1e3 * found["latency"], "*", color=color, markersize=13)
        bound = document.settings.get("objective", {}).get("e2e")
        if bound is not None:
            axes.axhline(1e3 * bound, color=theme.text, linestyle=":", linewidth=1)
        axes.set_yscale("log")
        for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis(lambda value, _: f"{value:,.0f}" if f"{value:e}"[0] in "125" else "")
        axes.set_xlabel("requests/s")
        axes.set_ylabel("whole reply, ms: p50 to p95")
        axes.set_xlim(left=0)
        axes.legend(loc="upper left", fontsize=8, frameon=False, labelcolor=theme.text)

    rows = [row for row in document.rows if row["loop"] == "closed"]
    if rows:
        sizes = document.settings["sizes"]
        title = f"Latency by throughput, {100 * sizes['harmful']:g} % harmful; a star is the knee"
        yield Picture("throughput", title, draw)


def _overhead(document: Document) -> Iterable[Picture]:
    known = document.more.get("variants", {})
    guards = [
        name
        for name in known
        if not name.startswith(("off", "transformers", "published", "detector-alone"))
        and "hidden_ms" in known[name].get("harmless", {})
    ]

    def draw(axes: Axes, theme: Theme) -> None:
        for row, name in enumerate(guards):
            figure = known[name]["harmless"]
            names = ("hidden_ms", "added_exposed_ms", "wasted_ms")
            hidden, exposed, wasted = (max(0.0, figure[key]["median"]) for key in names)
            # what was thrown away is a part of both
            kept = max(0.0, 1.0 - wasted / (hidden + exposed)) if hidden + exposed > 0 else 0.0
            parts = {"exposed": kept * exposed, "hidden": kept * hidden, "wasted": min(wasted, hidden + exposed)}
            left = 0.0
            for part, words, color in PARTS:
                axes.barh(row, parts[part], left=left, height=0.6, color=color, label=words if not row else None)
                left += parts[part]
            low, high = figure["added_ms_interval"]
            axes.plot([low, high], [row, row], color=theme.text, linewidth=1.2)
            axes.text(
                max(high, left), row, f"  {figure['added_percent']:.1f} %", va="center", color=theme.text, fontsize=9
            )
        axes.set_yticks(range(len(guards)), guards)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel("milliseconds added to a harmless reply, with its 95 % interval")
        axes.legend(loc="lower right", fontsize=8, frameon=False, labelcolor=theme.text)

    if guards:
        yield Picture("overhead", "Where a guard's time goes", draw, 1.3 + 0.42 * len(guards))


def _decode(document: Document) -> Iterable[Picture]:
    works = {row["workload"]: row["tokens_per_s"] for row in document.rows}

    def draw(axes: Axes, theme: Theme) -> None:
        for side, name in enumerate(("stockade", "transformers")):
            values = [work[name]["median"] for work in works.values()]
            at = np.arange(len(values)) + 0.38 * (side - 0.5)
            axes.bar(at, values, width=0.36, color=COLORS[name], label=name)
            for x, value in zip(at, values, strict=True):
                axes.text(x, value, f"{value:,.0f}", ha="center", va="bottom", color=theme.text, fontsize=8)
        axes.set_xticks(range(len(works)), list(works))
        axes.set_yscale("log")
        axes.set_ylabel("tokens/s")
        axes.legend(fontsize=8, frameon=False, labelcolor=theme.text)

    if works:
        yield Picture("decode", "Decoding and prefill, the same weights", draw)


def _capacity(document: Document) -> Iterable[Picture]:
    rows = [row for row in document.rows if row["replicas"] is not None]

    def draw(axes: Axes, theme: Theme) -> None:
        sizes = np.logspace(0, 4, 60)
        for number, row in enumerate(rows):
            each = row["most_requests_per_s_of_a_replica"] * row["replicas"] / row["devices"]
            label = row["guard"] + ("" if row["placement"] == "same" else f", {row['placement']}")
            style = "-" if row["placement"] == "same" else "--"
            axes.plot(sizes * each, np.ceil(sizes), style, color=_color(row["guard"], number), label=label)
        axes.axvline(document.settings["rate"], color=theme.text, linestyle=":", linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("requests/s")
        axes.set_ylabel("devices")
        axes.legend(fontsize=8, frameon=False, labelcolor=theme.text)

    def cost(axes: Axes, theme: Theme) -> None:
        for number, row in enumerate(rows):
            axes.barh(number, row["price_per_hour"], height=0.6, color=_color(row["guard"], number))
            text = f"  {row['devices']:,} devices, p95 {row['e2e_p95_s']:.2g} s"
            axes.text(row["price_per_hour"], number, text, va="center", color=theme.text, fontsize=9)
        names = [row["guard"] + ("" if row["placement"] == "same" else f", {row['placement']}") for row in rows]
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.margins(x=0.35)
        axes.set_xlabel("price an hour")

    if rows:
        settings = document.settings
        title = f"{settings['rate']:g} requests/s, {100 * settings['harmful']:g} % harmful (simulated)"
        yield Picture("capacity-price", title, cost, 1.2 + 0.42 * len(rows))
        yield Picture("capacity", "Devices by load (simulated)", draw)


def _kernels(document: Document) -> Iterable[Picture]:
    rows = [row for row in document.rows if row.get("flops") and row.get("bytes")]
    ceilings = document.more.get("ceilings") or {}

    def draw(axes: Axes, theme: Theme) -> None:
        intensity = np.array([row["flops"] / row["bytes"] for row in rows])
        reach = np.logspace(np.log10(intensity.min() / 3), np.log10(intensity.max() * 3), 100)
        if ceilings:
            bound = np.minimum(reach * ceilings["bandwidth"], ceilings["flops"])
            axes.plot(reach, bound / 1e9, color=theme.text, linewidth=1.2, label="ceilings of this run")
        names = list(dict.fromkeys(row["operation"] for row in rows))
        palette = (*OTHERS, *COLORS.values())
        for one, row in zip(intensity, rows, strict=True):
            number = names.index(row["operation"])
            plain = row["way"] == "reference"
            label = row["operation"] if row["operation"] not in axes.get_legend_handles_labels()[1] else None
            color, mark = palette[number % len(palette)], "x" if plain else "o"
            alpha = 0.45 if plain else 0.95
            axes.plot(one, row["gflop_per_s"], mark, label=label, color=color, alpha=alpha, markersize=6)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("operations a byte")
        axes.set_ylabel("GFLOP/s; a cross is the plain reference")
        axes.legend(fontsize=7, frameon=False, labelcolor=theme.text, loc="upper left", bbox_to_anchor=(1.0, 1.0))

    if rows:
        yield Picture("kernels", "Operations under the roofline", draw, 4.2)


def _safety(document: Document) -> Iterable[Picture]:
    from .safety.shown import safety_pictures

    return safety_pictures(document)


_KINDS: dict[str, Callable[[Document], Iterable[Picture]]] = {
    "latency": _latency,
    "throughput": _throughput,
    "overhead": _overhead,
    "decode": _decode,
    "capacity": _capacity,
    "kernels": _kernels,
    "safety": _safety,
}


def guard_color(name: str, number: int) -> str:
    """A guard's own, whichever variant of it is shown."""
    return COLORS.get(name) or COLORS.get(f"{name}-separate") or _color(name, number)


def _color(name: str, number: int) -> str:
    return COLORS.get(name, OTHERS[number % len(OTHERS)])


def _dress(figure: Figure, axes: Axes, theme: Theme, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=theme.text)
    axes.set_facecolor(theme.back)
    axes.set_axisbelow(True)
    bars = any(label.get_text() for label in axes.get_yticklabels()) and axes.yaxis_inverted()
    axes.grid(axis="x" if bars else "both", color=theme.grid, linewidth=0.7)
    axes.tick_params(colors=theme.text, labelsize=9)
    axes.xaxis.label.set_color(theme.text)
    axes.yaxis.label.set_color(theme.text)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("bottom", "left", "polar"))
        spine.set_color(theme.grid)
