"""What the patches of a picture are to say: the tokens of its text where they begin, and the letters there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .eyes_model import BEFORE, FIRST_LETTER, LETTERS, SIDE, WINDOW, patch_at
from .pictures import Line

EMPTY = -1


class Wanted(NamedTuple):
    """tokens: [patches] int64, EMPTY for none. letters: [patches, LETTERS] int64, 0 for none. windows: [patches,
    WINDOW], the letters of a word around where it begins in the patch, or where the patch does in the word."""

    tokens: Tensor
    letters: Tensor
    windows: Tensor


@dataclass(frozen=True)
class Speller:
    """How texts are said: word by word, in the tokens that the language model knows them by. tokenizer: a
    `tokenizers.Tokenizer`."""

    tokenizer: Any

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def spelled(self, line: str) -> tuple[list[int], list[int]]:
        """A line's tokens, and which character of it each begins with."""
        ids: list[int] = []
        starts: list[int] = []
        for found in re.finditer(r"\S+", line):
            # digits are tokens of their own: a blank before one would be one more
            blank = "" if found.group()[0].isdigit() else " "
            encoded = self.tokenizer.encode(blank + found.group(), add_special_tokens=False)
            ids += encoded.ids
            starts += [found.start() + max(0, begin - len(blank)) for begin, _ in encoded.offsets]
        return ids, starts


def wanted(lines: Sequence[Line], speller: Speller, caption: str = "") -> Wanted:
    """A token stands in the patch where its first character is, or further right where that is taken; the tokens of
    a scene's caption stand in the first patches. Of two lines in one row of patches only the first counts.
    """
    tokens = [EMPTY] * (SIDE * SIDE)
    letters = [[0] * LETTERS for _ in tokens]
    windows = [[0] * WINDOW for _ in tokens]
    if caption:
        ids = speller.ids(f" {caption}")[: len(tokens)]
        tokens[: len(ids)] = ids
    used: set[int] = set()
    for line in lines:
        row = patch_at(line.y)
        if row in used:
            continue
        used.add(row)
        columns = [patch_at(x) for x in line.xs]
        ids, starts = speller.spelled(line.text)
        for place, token in zip(_spread([columns[start] for start in starts]), ids, strict=False):
            tokens[row * SIDE + place] = token
        inside: dict[int, list[int]] = {}  # by patch, which characters are in it
        for place, column in enumerate(columns):
            if line.text[place] != " ":
                inside.setdefault(column, []).append(place)
        for column, places in inside.items():
            some = [ord(line.text[place]) - FIRST_LETTER for place in places[:LETTERS]]
            letters[row * SIDE + column][: len(some)] = some
            begins = [place for place in places if place == 0 or line.text[place - 1] == " "]
            windows[row * SIDE + column] = _window(line.text, begins[-1] if begins else places[0])
    return Wanted(torch.tensor(tokens), torch.tensor(letters), torch.tensor(windows))


def _window(text: str, place: int) -> list[int]:
    """The letters of a word before and from a place in it, 0 beyond its ends."""
    first, end = text.rfind(" ", 0, place) + 1, text.find(" ", place) % (len(text) + 1)
    places = range(place - BEFORE, place - BEFORE + WINDOW)
    return [ord(text[at]) - FIRST_LETTER if first <= at < end else 0 for at in places]


def _spread(columns: Sequence[int]) -> list[int]:
    """Places in one row, each once and in order, at or right of where they are wanted while there is room.

    There are fewer places than columns where a row has not enough.
    """
    places: list[int] = []
    for column in columns[:SIDE]:
        places.append(max(column, places[-1] + 1 if places else 0))
    last = SIDE
    for number in reversed(range(len(places))):
        places[number] = last = min(places[number], last - 1)
    return places
