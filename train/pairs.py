"""Conversations in LLaVA's format: what a multimodal model is fine-tuned on, from files and mixed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .data import plain_key
from .refusals import is_refusal
from .rows import Bad, DataInvalid, DataMissing, json_rows, refuse

IMAGE = "<image>"


class Turn(NamedTuple):
    question: str
    answer: str


class Conversation(NamedTuple):
    """image: its file's name; it stands before the first question, as in LLaVA's data."""

    turns: tuple[Turn, ...]
    image: str | None


class Mixed(NamedTuple):
    """What is trained, and how many repeated conversations were left out."""

    items: list[Conversation]
    repeated: int


def read_mixed(safe: Iterable[Path], utility: Iterable[Path], share: float, seed: int, bad: Bad = refuse) -> Mixed:
    """The conversations of `safe`, and of `utility` as many as make `share` of all (all of them where there are too
    few), drawn by `seed`.

    Raises `DataMissing` for files without any, `DataInvalid` for a share out of range, for rows of another form
    (unless `bad` takes note of them), and for utility data that mostly refuses.
    """
    if not 0 <= share < 1:
        raise DataInvalid(f"the share of utility data must be at least 0 and less than 1, not {share}")
    first = [item for path in safe for item in _read(path, bad)]
    if not first:
        raise DataMissing("the files hold no conversation")
    more = [item for path in utility for item in _read(path, bad)]
    refusing = sum(is_refusal(turn.answer) for item in more for turn in item.turns)
    if 2 * refusing > sum(len(item.turns) for item in more) > 0:
        raise DataInvalid(f"{refusing} of the utility data's answers refuse: are safe and utility data exchanged?")
    items = _unique(first)
    rest = _unique(more, {_key(item) for item in items})
    repeated = len(first) + len(more) - len(items) - len(rest)
    random.Random(f"{seed} utility").shuffle(rest)
    return Mixed([*items, *rest[: round(len(items) * share / (1 - share))]], repeated)


def _read(path: Path, bad: Bad) -> list[Conversation]:
    found = []
    for where, row in json_rows(path, bad):
        if "refused" in row and "conversations" not in row:
            continue  # a query that ECSO found no safe answer to, in the file that keeps its work
        item = _conversation(row)
        if item is None:
            bad(f"{where}: needs conversations of human and gpt in turn; with an image, {IMAGE} once, at the first")
        else:
            found.append(item)
    return found


def _conversation(row: dict[str, Any]) -> Conversation | None:
    said, image = row.get("conversations"), row.get("image")
    if not isinstance(said, list) or not said or len(said) % 2 or not (image is None or isinstance(image, str)):
        return None
    texts: list[str] = []
    for place, item in enumerate(said):
        text = item.get("value") if isinstance(item, dict) else None
        if not isinstance(text, str) or not text.strip() or item.get("from") != ("human", "gpt")[place % 2]:
            return None
        texts.append(text)
    marks = [text.count(IMAGE) for text in texts]
    if marks != [int(image is not None), *([0] * (len(texts) - 1))]:
        return None
    texts[0] = texts[0].replace(IMAGE, "")
    stripped = [text.strip() for text in texts]
    if not all(stripped):
        return None
    return Conversation(tuple(map(Turn, stripped[::2], stripped[1::2])), image)


def _key(item: Conversation) -> str:
    return "\n".join((str(item.image), *(plain_key(text) for turn in item.turns for text in turn)))


def _unique(items: Sequence[Conversation], seen: set[str] | None = None) -> list[Conversation]:
    known = set(seen or ())
    kept = []
    for item in items:
        key = _key(item)
        if key not in known:
            known.add(key)
            kept.append(item)
    return kept
