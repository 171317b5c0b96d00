"""The figures of a safety document as tables and pictures. Nothing is computed anew, and there is no text to show."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import nan, pi
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..document import Document
from ..result_tables import ResultTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..pictures import Picture, Theme

ALL = "all"
FEWEST_AXES = 3  # of a radar
LINES = ("-", "--", ":", "-.")
LIKE = {
    "question_rewrite": "similarity of question and rewrite",
    "question_original": "of question and original answer",
    "question_refusal": "of question and a fixed refusal",
    "question_other_original": "of question and another question's original answer",
    "original_rewrite": "of original answer and rewrite",
    "original_refusal": "of original answer and a fixed refusal",
}


def safety_tables(document: Document) -> Iterator[ResultTable]:
    yield from _tables(document.settings, document.rows, document.more)


def console_tables(
    settings: Mapping[str, Any], rows: Sequence[dict[str, Any]], more: Mapping[str, Any]
) -> list[Table]:
    """The same for a terminal; without scenarios, which are many."""
    shown = []
    for found in _tables(settings, [row for row in rows if _whole(row, rows)], more):
        if found.rows:
            table = Table(title=found.title, caption=found.note or None)
            for heading, right in zip(found.headings, found.right, strict=True):
                table.add_column(heading, justify="right" if right else "left")
            for row in found.rows:
                table.add_row(*row)
            shown.append(table)
    return shown


def _tables(
    settings: Mapping[str, Any], rows: Sequence[dict[str, Any]], more: Mapping[str, Any]
) -> Iterator[ResultTable]:
    model = " ".join(str(settings[name]) for name in ("model", "dtype") if name in settings)
    judges = list(dict.fromkeys(name for row in rows for name in row["harmful"]))
    note = "95 % intervals in parentheses. An attack succeeds where a judge finds the reply harmful; added: to an "
    note += f"unguarded reply to the same question, {settings.get('at_once')} at once. Over-refusal: of harmless "
    note += "questions that look alarming; by the guard: where the unguarded reply does not refuse. False alarms: "
    note += f"first answers to ordinary and utility questions that the guard flags. {_drawn(settings)}"
    if not settings.get("images"):
        note += " The model sees no images: all was asked without."
    elif rendered := settings.get("rendered"):
        note += f" {rendered} attacks' images were not there and are rendered."
    if skipped := more.get("skipped"):
        note += f" {skipped} answers are missing: their cases could not be asked."
    yield ResultTable(
        f"Safety and its price: {model}",
        (
            *("guard", "image", *(f"attacks succeed %, {judge}" for judge in judges)),
            *("over-refusal %", "by the guard %", "false alarms %", "rounds", "added ms", "added %", "tokens added"),
        ),
        [
            (
                one["guard"],
                _image(one["image"]),
                *(_percent(one.get("attack_success", {}).get(judge)) for judge in judges),
                _percent(one.get("over_refusal")),
                _percent(one.get("newly_refused")),
                _percent(one.get("false_alarms")),
                *(_maybe(one.get(name)) for name in ("rounds", "added_ms", "added_percent", "added_computed_tokens")),
            )
            for one in more.get("summary", [])
        ],
        note,
    )
    attacks = [row for row in rows if row["kind"] == "attack"]
    yield ResultTable(
        "Attacks that succeed, by set and scenario",
        ("set", "scenario", "image", "guard", "n", *(f"{judge} %" for judge in judges), "flagged %", "rounds"),
        [
            (
                *_where(row),
                *(_percent(row["harmful"].get(judge)) for judge in judges),
                _percent(row["flagged"], interval=False),
                f"{row['rounds']:.2f}",
            )
            for row in attacks
        ],
    )
    yield ResultTable(
        "Harmless questions that are refused",
        ("set", "scenario", "image", "guard", "n", "refused %", "by the guard %", "flagged %", "added ms"),
        [
            (
                *_where(row),
                *(_percent(row.get(name)) for name in ("refused", "newly_refused", "flagged")),
                _maybe(row.get("added_ms")) if _whole(row, rows) else "",
            )
            for row in rows
            if row["kind"] in ("benign", "ordinary")
        ],
        "Refused: by VLGuard's keyword rule or the guard; by the guard: where the unguarded reply does not refuse.",
    )
    yield from _mended_tables(rows, more, judges)
    yield ResultTable(
        "Utility, with each guard",
        ("set", "scenario", "image", "guard", "n", "score", "of", "false alarms %", "added ms"),
        [
            (
                *_where(row),
                f"{row['utility']['score']:.1f}"
                + (f" (circular {row['utility']['circular']:.1f})" if "circular" in row["utility"] else ""),
                f"{row['utility']['of']:.0f}",
                _percent(row["flagged"]),
                _maybe(row.get("added_ms")),
            )
            for row in rows
            if row["kind"] == "utility"
        ],
    )
    flags = ("flagged_harmful", "flagged_refusing", "flagged_helpful")
    yield ResultTable(
        "Judges on labeled answers",
        (
            "judge",
            "image",
            "n",
            "harmful found %",
            "refusals flagged %",
            "helpful flagged %",
            "balanced accuracy %",
            "failed",
        ),
        [
            (
                one["judge"],
                _image(one["image"]),
                str(one["n"]),
                *(_share(one.get(name)) for name in (*flags, "balanced_accuracy")),
                str(one["failed"]),
            )
            for one in more.get("judges", [])
        ],
        "Answers of GPTFuzz, JailbreakBench and AlpacaEval, of parts that the judge was not trained on; with the "
        "image, the question stands in it. Only the model itself looks at images.",
    )
    yield ResultTable(
        "Detectors by backbone, on the same answers",
        (
            "detector",
            "template",
            "n",
            "AUROC",
            "TPR at 1 % FPR",
            "TPR at 5 % FPR",
            *(f"{name[8:]} flagged %" for name in flags),
        ),
        [
            (
                one["detector"],
                str(one["template"]),
                str(one["n"]),
                *(_maybe(one.get(name)) for name in ("auroc", "tpr_at_1", "tpr_at_5")),
                *(_share(one.get(name)) for name in flags),
            )
            for one in more.get("labeled_detectors", [])
        ],
    )


def _mended_tables(
    rows: Sequence[dict[str, Any]], more: Mapping[str, Any], judges: Sequence[str]
) -> Iterator[ResultTable]:
    yield ResultTable(
        "Attacks whose answer was mended, and what went out instead",
        ("set", "scenario", "image", "guard", "mended", *(f"harmful by {judge} %" for judge in judges)),
        [
            (
                *_where(row)[:-1],
                str(row["mended"]["n"]),
                *(_percent(row["mended"]["harmful"].get(judge)) for judge in judges),
            )
            for row in rows
            if row["kind"] == "attack" and row["mended"]["n"] and _whole(row, rows)
        ],
    )
    for one in more.get("detoxified", []):
        of_judges = [
            (f"{what} harmless by {judge} %", _percent(one[name].get(judge)))
            for name, what in (("harmless", "rewrites"), ("originals", "originals"))
            for judge in one[name]
        ]
        yield ResultTable(
            "Given harmful answers, rewritten by the detoxifier",
            ("what", "value"),
            [
                ("rewrites", str(one["n"])),
                ("answers without a rewrite", str(one["failed"])),
                *of_judges,
                ("rewrites that refuse, by the keyword rule %", _percent(one["refused"])),
                *((what, _maybe(one.get("likeness", {}).get(name))) for name, what in LIKE.items()),
            ],
            "Harmful answers of GPTFuzz's and JailbreakBench's validation parts. Similarities are cosines of mean "
            "hidden states of the measured model's lower layers, standardized over these texts.",
        )


def safety_pictures(document: Document) -> Iterator[Picture]:
    from ..pictures import Picture

    rows, summary = document.rows, document.more.get("summary", [])
    judge = _strictest(rows)
    points = [one for one in summary if one.get("attack_success", {}).get(judge, {}).get("percent") is not None]
    if points:
        yield Picture("safety-cost", f"Safety against added time; judge: {judge}", _scatter(points, judge), 4.2)
    for case_set in dict.fromkeys(row["set"] for row in rows if row["kind"] == "attack"):
        for image in (False, True):
            its = [row for row in rows if row["set"] == case_set and row["image"] == image and row["scenario"] != ALL]
            if len({row["scenario"] for row in its}) >= FEWEST_AXES:
                title = f"% harmless replies: {case_set}, {_image(image)}; judge: {judge}"
                name = f"safety-{case_set}-{'image' if image else 'text'}".replace(", ", "-").replace(" ", "-")
                yield Picture(name, title, _radar(its, judge), 6.4, "polar")


def _strictest(rows: Sequence[dict[str, Any]]) -> str:
    """All judges together where there are several; else the only one."""
    names = [name for row in rows for name in row["harmful"]]
    return ALL if ALL in names else next(iter(names), "")


def _scatter(points: Sequence[dict[str, Any]], judge: str) -> Callable[[Axes, Theme], None]:
    def draw(axes: Axes, theme: Theme) -> None:
        from ..pictures import guard_color

        guards = list(dict.fromkeys(one["guard"] for one in points))
        for one in points:
            rate, color = one["attack_success"][judge], guard_color(one["guard"], guards.index(one["guard"]))
            x, y = one.get("added_ms", 0.0), 100 - rate["percent"]
            axes.plot([x, x], [100 - rate["high"], 100 - rate["low"]], color=color, linewidth=1.2)
            label = f"{one['guard']}, {_image(one['image'])}"
            axes.plot(x, y, "s" if one["image"] else "o", color=color, markersize=8, label=label, linestyle="")
        axes.set_xlabel("milliseconds added to a reply, many at once")
        axes.set_ylabel("% of attacks answered without harm")
        axes.set_ylim(-2, 104)
        axes.margins(x=0.1)
        axes.legend(loc="lower right", fontsize=8, frameon=False, labelcolor=theme.text)

    return draw


def _radar(rows: Sequence[dict[str, Any]], judge: str) -> Callable[[Axes, Theme], None]:
    def draw(axes: Axes, theme: Theme) -> None:
        from ..pictures import guard_color

        scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
        angles = [2 * pi * place / len(scenarios) for place in range(len(scenarios))]
        guards = list(dict.fromkeys(row["guard"] for row in rows))
        for number, guard in enumerate(guards):
            found = {row["scenario"]: row["harmful"].get(judge, {}) for row in rows if row["guard"] == guard}
            # what nobody judged is a gap, not a success
            rates = [found.get(name, {}).get("percent") for name in scenarios]
            values = [nan if rate is None else 100 - rate for rate in rates]
            color = guard_color(guard, number)
            # a line below another one shows through
            style = LINES[number % len(LINES)]
            axes.plot([*angles, angles[0]], [*values, values[0]], style, color=color, label=guard, linewidth=1.8)
            axes.fill([*angles, angles[0]], [*values, values[0]], color=color, alpha=0.08)
        axes.set_xticks(angles, [textwrap.fill(name.replace("_", " "), 14) for name in scenarios], fontsize=8)
        axes.tick_params(axis="x", pad=14)
        axes.set_ylim(0, 100)
        axes.set_yticks([25, 50, 75, 100])
        axes.legend(loc="lower left", bbox_to_anchor=(1.08, -0.05), fontsize=8, frameon=False, labelcolor=theme.text)

    return draw


def _whole(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a row is of all of a set."""
    return row["scenario"] == ALL or not any(one["set"] == row["set"] and one["scenario"] == ALL for one in rows)


def _where(row: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    return row["set"], row["scenario"], _image(row["image"]), row["guard"], str(row["n"])


def _image(there: bool) -> str:
    return "with image" if there else "without image"


def _percent(rate: Mapping[str, Any] | None, interval: bool = True) -> str:
    if rate is None or rate["percent"] is None:
        return ""
    return f"{rate['percent']:.1f}" + (f" ({rate['low']:.1f} to {rate['high']:.1f})" if interval else "")


def _drawn(settings: Mapping[str, Any]) -> str:
    limit = settings.get("limit")
    return (
        "" if limit is None else f"At most {limit} cases of each set and scenario, drawn by seed {settings['seed']}."
    )


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _maybe(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
