"""How well a model with eyes reads: words of new pictures and of one's own, and questions about scenes."""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from ..engine.errors import BadInput
from .eyes_speech import TRANSCRIBE, Asked, scene_question
from .loop import Progress
from .pictures import Painter, Style
from .rows import DataMissing

if TYPE_CHECKING:
    from ..engine.engine import Engine

READ_STYLES: tuple[Style, ...] = ("list", "page", "banner")
_TOGETHER = 8  # pictures asked about at once


class Shown(NamedTuple):
    """A picture and the text that is in it."""

    image: Image.Image | Path
    text: str


@dataclass(frozen=True)
class Score:
    """right: words that were read, or questions that were answered rightly, of so many."""

    what: str
    pictures: int
    right: int
    of: int

    @property
    def share(self) -> float:
        return self.right / max(1, self.of)


def evaluate(
    engine: Engine,
    painter: Painter | None,
    count: int,
    *,
    own: Sequence[Shown] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Score]:
    """Scores by kind of picture, greedily. count: new pictures of each style and scenes, drawn by `painter`.

    Raises what `Engine.chat` raises, `ImagesNotSupported` for a model without eyes.
    """
    scores = []
    if painter is not None and count:
        for style in READ_STYLES:
            drawn = [painter.draw(random.Random(f"{seed} new {style} {number}"), style) for number in range(count)]
            shown = [Shown(picture.image, picture.text) for picture in drawn if picture.lines]
            scores.append(_read(engine, style, shown, progress))
        scores.append(
            _answered(
                engine,
                [scene_question(random.Random(f"{seed} new scene {number}")) for number in range(count)],
                progress,
            )
        )
    if own:
        scores.append(_read(engine, "your pictures", own, progress))
    return scores


def to_markdown(scores: Sequence[Score]) -> str:
    rows = "".join(
        f"| {score.what} | {score.pictures} | {score.right} of {score.of} | {score.share:.1%} |\n" for score in scores
    )
    return (
        "| pictures | n | right | share |\n| --- | --- | --- | --- |\n"
        + rows
        + "\nOf text: words that the answer to "
        f"“{TRANSCRIBE}” has in the same order, whatever their case; words it adds do not count. Of scenes: "
        "questions about a color or a number whose answer names the right one and no other.\n"
    )


def read_pictures(file: Path) -> list[Shown]:
    """Rows `image, text` of a CSV; images are named from its folder. Raises `DataMissing`, `BadInput`."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataMissing(f"{file} cannot be read: {error}") from None
    if not rows or not {"image", "text"} <= set(rows[0]):
        raise BadInput(f"{file} needs the columns image and text, and a row")
    return [Shown(file.parent / (row["image"] or ""), row["text"] or "") for row in rows]


def words_read(text: str, answer: str) -> tuple[int, int]:
    """How many of the text's words the answer has in the same order, and how many the text has."""
    wanted, found = (re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*", one.lower()) for one in (text, answer))
    blocks = SequenceMatcher(None, wanted, found, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks), len(wanted)


def _read(engine: Engine, what: str, shown: Sequence[Shown], progress: Progress | None) -> Score:
    longest = max((len(item.text.split()) for item in shown), default=0)
    answers = _ask(engine, what, [(item.image, TRANSCRIBE) for item in shown], 3 * longest + 16, progress)
    found = [words_read(item.text, answer) for item, answer in zip(shown, answers, strict=True)]
    return Score(what, len(shown), sum(right for right, _ in found), sum(of for _, of in found))


def _answered(engine: Engine, asked: Sequence[Asked], progress: Progress | None) -> Score:
    answers = _ask(engine, "scenes", [(item.picture.image, item.question) for item in asked], 24, progress)
    right = 0
    for item, answer in zip(asked, answers, strict=True):
        said = set(re.findall(r"[a-z]+|\d+", answer.lower()))
        right += bool(said & item.answers) and not said & item.others
    return Score("scenes", len(asked), right, len(asked))


def _ask(
    engine: Engine,
    what: str,
    questions: Sequence[tuple[Image.Image | Path, str]],
    max_tokens: int,
    progress: Progress | None,
) -> list[str]:
    from ..engine.guards import Guard
    from ..engine.sampling import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    answers: list[str] = []
    for first in range(0, len(questions), _TOGETHER):
        chats = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": str(image) if isinstance(image, Path) else image},
                        {"type": "text", "text": text},
                    ],
                }
            ]
            for image, text in questions[first : first + _TOGETHER]
        ]
        answers += [reply.text for reply in engine.chat(chats, guard=Guard.off(), sampling=sampling)]
        if progress is not None:
            progress(what, len(answers), len(questions))
    return answers
