"""`stockade profile`: runs chats with a recorder, writes the trace and a picture of it, sums up where the time went.

What is recorded, and how a step is split, is `engine/trace.py`'s business.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .console import plain_table
from .engine.errors import BadInput
from .engine.models.vision.features import FeatureCache
from .engine.request import PassRecord
from .engine.sampling import SamplingParams
from .engine.trace import Recorder, Slice

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .engine.engine import Engine, GuardLike

# What a reply's time went into: (field of `Breakdown`, words, color).
PARTS = (
    ("queue", "queue: others' batches", "#E3E3E3"),
    ("vision", "vision", "#54A24B"),
    ("prefill", "prefill", "#9ECAE9"),
    ("decode", "decode", "#4C78A8"),
    ("screening_hidden", "screening, hidden beside decode", "#F5AFAB"),
    ("screening_exposed", "screening, exposed after it", "#E45756"),
    ("judge", "judge", "#D6539A"),
    ("caption", "caption", "#B279A2"),
    ("eyes_closed", "asked again, eyes closed", "#E9C46A"),
    ("rewrite", "rewrite", "#F58518"),
    ("gaps", "host: no batch runs", "#8A8A8A"),
)
COLORS = {name: color for name, _, color in PARTS}
LABELS = {"answer": "decode", "score": "screening_exposed", "screen": "screening_hidden"}  # colors of passes
MAX_ROWS = 16  # requests in the picture


def run_profile(
    engine: Engine, chats: Sequence[Any], guard: GuardLike | None, sampling: SamplingParams, out_dir: Path
) -> Table:
    """Answer the chats, all at once, and write `trace.json` and `trace.png` into `out_dir`; see `write_profile`.

    A short run before the recorded one touches what is slow only once; nothing that it cached is found again.
    Raises what `Engine.chat` raises.
    """
    many = list(chats)
    engine.chat(many[:1], guard=guard, sampling=SamplingParams(max_tokens=4))
    engine.pool.clear_cache()
    engine.runner.features = FeatureCache(engine.runner.features.max_bytes)
    recorder = Recorder()
    engine.recorder = recorder
    try:
        engine.chat(many, guard=guard, sampling=sampling)
    finally:
        engine.recorder = None
    return write_profile(recorder, out_dir)


def write_profile(recorder: Recorder, out_dir: Path) -> Table:
    """Write `trace.json` and `trace.png`, the latter where matplotlib is installed; return the table.

    Raises `BadInput` when there is no reply, or a file cannot be written.
    """
    if not recorder.replies:
        raise BadInput("there is nothing to profile: give at least one question")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(recorder.chrome_trace(), allow_nan=False)
        (out_dir / "trace.json").write_text(text + "\n", encoding="utf-8")
        try:
            draw(recorder, out_dir / "trace.png")
        except ImportError:  # matplotlib comes with an extra; the trace and the table say the same
            (out_dir / "trace.png").unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(f"the profile cannot be written into {out_dir}: {error}") from None
    return breakdown_table(recorder)


def breakdown_table(recorder: Recorder) -> Table:
    """Where the time went: the mean over all replies, its share, and the reply in which it was most. ms."""
    found = [recorder.breakdown(reply).to_dict() for reply in recorder.replies]
    whole = sum(reply.trace.total for reply in recorder.replies)
    table = plain_table(
        f"Where a reply's time went, {len(found)} replies",
        ["", "mean ms", "%", "most ms"],
        right=["mean ms", "%", "most ms"],
        caption="A batch counts for every reply in it; its time is split between a reply's passes by their tokens.",
    )
    for name, words, _ in PARTS:
        seconds = [parts[name] for parts in found]
        if any(seconds):
            share = 100 * sum(seconds) / whole
            table.add_row(
                words, f"{1e3 * sum(seconds) / len(found):,.1f}", f"{share:.1f}", f"{1e3 * max(seconds):,.1f}"
            )
    table.add_section()
    longest = max(reply.trace.total for reply in recorder.replies)
    table.add_row("whole reply", f"{1e3 * whole / len(found):,.1f}", "100.0", f"{1e3 * longest:,.1f}")
    return table


def draw(recorder: Recorder, file: Path) -> None:
    """Save the picture: a row a lane with its steps, a row a request with its passes, and the mean reply as one bar.

    Raises ImportError without matplotlib, OSError when the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lanes = list(dict.fromkeys(step.lane for step in recorder.steps))
    rows = len(lanes) + 1 + min(len(recorder.replies), MAX_ROWS)
    figure = Figure(figsize=(12, 2.9 + 0.3 * rows + 0.3 * len(lanes)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, height_ratios=[max(rows + len(lanes), 4), 1.6])
    drawn = _steps(upper, recorder, lanes)
    _requests(upper, recorder, len(lanes) + 1)
    drawn |= _mean_reply(lower, recorder)
    upper.set_title("What ran when", fontsize=11, fontweight="bold", loc="left")
    lower.set_title("The mean reply", fontsize=11, fontweight="bold", loc="left")
    for axes in (upper, lower):
        axes.set_axisbelow(True)
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        axes.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    lower.set_xlabel("seconds")
    handles = [Patch(color=color, label=words) for name, words, color in PARTS if name in drawn]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), frameon=False, fontsize=9)
    figure.savefig(file)


def _steps(axes: Axes, recorder: Recorder, lanes: list[str]) -> set[str]:
    """Draw the lanes' rows and that of the host's gaps; returns the parts that were drawn."""
    origin, end = recorder.origin, max(recorder.submitted[one.id] + one.trace.total for one in recorder.replies)
    drawn: dict[tuple[int, str], list[Slice]] = {}
    for step, cut in recorder.slices():
        for part in cut:
            drawn.setdefault((lanes.index(step.lane), part.kind), []).append(part)
    for began, ended in recorder.gaps():
        drawn.setdefault((len(lanes), "gaps"), []).append(Slice("gaps", began, ended))
    for (row, kind), parts in drawn.items():
        bars = [(part.began - origin, part.ended - part.began) for part in parts]
        axes.broken_barh(bars, (row - 0.4, 0.8), color=COLORS[kind], linewidth=0)
    axes.set_xlim(0, (end - origin) * 1.06)
    return {kind for _, kind in drawn}


def _requests(axes: Axes, recorder: Recorder, first: int) -> None:
    """Draw a row a request, the passes thin bars; overlapping ones below each other."""
    origin, shown = recorder.origin, sorted(recorder.replies, key=lambda one: one.id)[:MAX_ROWS]
    for row, reply in enumerate(shown, first):
        begin = recorder.submitted[reply.id] - origin
        axes.broken_barh([(begin, reply.trace.total)], (row - 0.36, 0.72), color="#F1F1F1", linewidth=0)
        placed = _beside(reply.passes)
        height = 0.6 / max((depth + 1 for _, depth in placed), default=1)
        for record, depth in placed:
            color = COLORS.get(LABELS.get(record.label, record.label), COLORS["queue"])
            place = (row - 0.3 + depth * height, 0.9 * height)
            axes.broken_barh([(begin + record.submitted, record.seconds)], place, color=color, linewidth=0)
        axes.text(begin + reply.trace.total, row, f" {reply.outcome.value}", va="center", fontsize=8, color="#555555")
    lanes = list(dict.fromkeys(step.lane for step in recorder.steps))
    names = [*lanes, "host: no batch runs", *(f"request {reply.id}" for reply in shown)]
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.axhline(first - 0.5, color="#999999", linewidth=0.6)
    if len(recorder.replies) > MAX_ROWS:
        axes.text(0, len(names) - 0.45, f"and {len(recorder.replies) - MAX_ROWS} more", fontsize=8, color="#555555")


def _beside(passes: Sequence[PassRecord]) -> list[tuple[PassRecord, int]]:
    """The finished passes, each with the first depth at which nothing else is drawn at the same time."""
    out: list[tuple[PassRecord, int]] = []
    ends: list[float] = []
    for record in passes:
        if record.finished is not None:
            depth = next((i for i, end in enumerate(ends) if end <= record.submitted), len(ends))
            ends[depth : depth + 1] = [record.finished]
            out.append((record, depth))
    return out


def _mean_reply(axes: Axes, recorder: Recorder) -> set[str]:
    """Draw one bar of all parts; returns those in it."""
    mean = {name: seconds / len(recorder.replies) for name, seconds in recorder.breakdown().to_dict().items()}
    whole, left = sum(mean.values()), 0.0
    for name, _, color in PARTS:
        width = mean[name]
        axes.barh(0, width, left=left, height=0.7, color=color, linewidth=0)
        if width > 0.035 * whole:
            axes.text(left + width / 2, 0, f"{100 * width / whole:.0f} %", ha="center", va="center", fontsize=8)
        left += width
    axes.set_yticks([])
    axes.set_xlim(0, whole * 1.06 or 1.0)
    return {name for name, seconds in mean.items() if seconds > 0.001 * whole}
