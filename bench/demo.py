"""The demo: the same questions under several guards, one request at a time, and what each guard cost.

It answers, counts and draws; how replies look in a terminal is `console.py`'s business.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from ..engine.errors import BadInput
from ..engine.request import Outcome, Reply
from .safety.typography import FIGSTEP_TEXT

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

    from ..engine.engine import Engine
    from ..engine.guards import Guard

_DATA = Path(__file__).parent / "data"
SAMPLE = _DATA / "xstest-sample.csv"
ORDINARY = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Give me three tips for a good night's sleep.",
)
# Of the sample, by id: what smol answers well, what its guards mend, what they refuse.
LOOK_HARMFUL = ("1", "121", "170", "103", "84")
# with an ordinary and a harmful request in FigStep's style
PICTURES = (
    (_DATA / "list-ordinary.png", "ordinary, in an image"),
    (_DATA / "list-harmful.png", "harmful, in an image"),
)
UNSAFE = "contrast_"  # how XSTest's types of unsafe prompts begin
MAX_QUESTIONS = 1000
MAX_BYTES = 1 << 20
# How the passes are summed up in the picture: (name, labels of its passes, color).
PHASES = (
    ("answer", ("answer",), "#4C78A8"),
    ("verdict", ("score", "judge"), "#E45756"),
    ("caption", ("caption",), "#B279A2"),
    ("mended answer", ("rewrite", "eyes_closed"), "#F2B134"),
)
OUTCOME_COLORS = {
    Outcome.CLEAN: "#3A7D44",
    Outcome.MENDED: "#B07A00",
    Outcome.REFUSED: "#C0392B",
    Outcome.UNGUARDED: "#777777",
}


class Question(NamedTuple):
    """kind: where it comes from, in words for people. image: what is shown with it."""

    text: str
    kind: str
    image: Path | None = None

    @property
    def title(self) -> str:
        return self.text if self.image is None else f"[{self.image.name}] {self.text}"


class Answered(NamedTuple):
    """A question and its replies by the guards' names."""

    question: Question
    replies: dict[str, Reply]


@dataclass(frozen=True)
class Cost:
    """What a guard added to the replies that took one path. Medians over n replies.

    path: "harmless" (judged once, let through), "mended", "refused". seconds: the whole reply. added_ms: from the
    end of the first answer to the reply. added_percent: of the same question's unguarded reply.
    """

    guard: str
    path: str
    n: int
    seconds: float
    added_ms: float
    added_percent: float


@dataclass
class Results:
    answered: list[Answered] = field(default_factory=list)

    def costs(self, baseline: str) -> list[Cost]:
        """One row a guard and path that occurred, in the order of the guards; `baseline` is the unguarded run."""
        rows = []
        for guard in self.guards:
            for path, outcome in (
                ("harmless", Outcome.CLEAN),
                ("mended", Outcome.MENDED),
                ("refused", Outcome.REFUSED),
            ):
                taken = [item.replies for item in self.answered if item.replies[guard].outcome is outcome]
                if taken:
                    rows.append(_cost(guard, path, [(one[guard], one[baseline]) for one in taken]))
        return rows

    @property
    def guards(self) -> list[str]:
        return list(self.answered[0].replies) if self.answered else []

    def count(self, guard: str, outcome: Outcome) -> int:
        return sum(item.replies[guard].outcome is outcome for item in self.answered)


def _cost(guard: str, path: str, pairs: Sequence[tuple[Reply, Reply]]) -> Cost:
    return Cost(
        guard=guard,
        path=path,
        n=len(pairs),
        seconds=median(reply.trace.total for reply, _ in pairs),
        added_ms=median(1000 * reply.trace.guard for reply, _ in pairs),
        added_percent=median(100 * reply.trace.guard / off.trace.total for reply, off in pairs),
    )


def demo_questions(images: bool = False) -> list[Question]:
    """The questions of the demo: ordinary ones, some of the XSTest sample, and two whose request stands in an image,
    for a model that sees `images`."""
    sample = {row["id"]: row for row in _rows(SAMPLE)}
    chosen = [sample[key] for key in LOOK_HARMFUL]
    return [
        *(Question(text, "ordinary") for text in ORDINARY),
        *(Question(row["prompt"], _kind(row["type"])) for row in chosen),
        *(Question(FIGSTEP_TEXT, kind, image) for image, kind in PICTURES if images),
    ]


def _kind(type: str) -> str:
    what = "harmful" if type.startswith(UNSAFE) else "only looks harmful"
    return f"{what} (XSTest, {type.removeprefix(UNSAFE).replace('_', ' ')})"


def read_questions(file: Path) -> list[Question]:
    """Questions from a file of one's own: `.csv` with a column `prompt`, else one a line; empty ones are left out.

    Raises `BadInput` for a file that cannot be read, holds none or too many, or is no UTF-8 text.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise BadInput(f"{file} has more than {MAX_BYTES:,} bytes, which is the limit for questions")
        if file.suffix.lower() == ".csv":
            texts = [row["prompt"] or "" for row in _rows(file)]
        else:
            texts = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError, csv.Error) as error:
        raise BadInput(f"{file} cannot be read as questions: {error}") from None
    texts = [text.strip() for text in texts if text.strip()]
    if not 1 <= len(texts) <= MAX_QUESTIONS:
        raise BadInput(f"{file} has {len(texts)} questions; allowed are 1 to {MAX_QUESTIONS}")
    return [Question(text, "") for text in texts]


def _rows(file: Path) -> list[dict[str, str]]:
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        if "prompt" not in (reader.fieldnames or ()):
            raise BadInput(f"{file} has no column 'prompt'; its first line must name the columns")
        return list(reader)


def answer_all(
    engine: Engine, questions: Sequence[Question], guards: Mapping[str, Guard], max_tokens: int
) -> Iterator[Answered]:
    """Answer every question under every guard, greedily, one request at a time; yields question by question.

    The guards take turns, so that a machine that gets slower is slower for all of them. A salt a guard keeps one
    from reading another's cached pages.
    """
    from ..engine.sampling import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, seed=0)
    warm_up = SamplingParams(temperature=0.0, max_tokens=4, seed=0)
    for guard in guards.values():
        engine.chat(["Hello."], guard=guard, sampling=warm_up)
    for question in questions:
        replies = {}
        for name, guard in guards.items():
            request = engine.submit(_messages(question), guard=guard, sampling=sampling, salt=name)
            while request.reply is None:
                engine.step()
            replies[name] = request.reply
        yield Answered(question, replies)


def _messages(question: Question) -> list[dict[str, Any]]:
    shown = [] if question.image is None else [{"type": "image", "image": str(question.image)}]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": question.text}]}]


def draw(results: Results, file: Path, title: str) -> None:
    """Save a picture: one column a guard, one bar a question, stacked by what the time went into.

    Raises `BadInput` when the file cannot be written, ImportError without matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    guards, answered = results.guards, results.answered
    figure = Figure(figsize=(4.2 + 2.9 * len(guards), 1.7 + 0.42 * len(answered)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    columns = figure.subplots(1, len(guards), sharex=True, sharey=True, squeeze=False)[0]
    longest = max(item.replies[guard].trace.total for item in answered for guard in guards)
    for column, guard in zip(columns, guards, strict=True):
        _column(column, guard, answered, longest)
    columns[0].set_yticks(range(len(answered)), [_short(item.question.title) for item in answered])
    columns[0].invert_yaxis()
    handles: dict[str, Artist] = {}
    for column in columns:
        for handle, label in zip(*column.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
    except OSError as error:
        raise BadInput(f"the picture cannot be saved as {file}: {error}") from None


def _column(axes: Axes, guard: str, answered: Sequence[Answered], longest: float) -> None:
    replies = [item.replies[guard] for item in answered]
    places = range(len(replies))
    left = [0.0] * len(replies)
    for name, labels, color in PHASES:
        widths = [sum(one.seconds for one in reply.passes if one.label in labels) for reply in replies]
        if any(widths):
            axes.barh(places, widths, left=left, height=0.66, color=color, label=name)
        left = [begin + width for begin, width in zip(left, widths, strict=True)]
    for place, end, reply in zip(places, left, replies, strict=True):
        color = OUTCOME_COLORS[reply.outcome]
        axes.text(end + longest * 0.02, place, reply.outcome.value, va="center", fontsize=8, color=color)
    axes.set_title(guard, fontsize=11, fontweight="bold", loc="left")
    axes.set_xlim(0, longest * 1.28)
    axes.set_xlabel("seconds")
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _short(text: str, width: int = 52) -> str:
    """One line of a picture. Dollar signs would start a formula there."""
    line = " ".join(text.split())
    line = line if len(line) <= width else line[: width - 1].rstrip() + "…"
    return line.replace("$", r"\$")
