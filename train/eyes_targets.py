"""What the patches of a picture are to say: the tokens of its text where they begin, and the letters there."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .eyes_model import FIRST_LETTER, LETTERS, SIDE, patch_at
from .pictures import Line, Picture

EMPTY = -1


class Wanted(NamedTuple):
    """tokens: [patches] int64, EMPTY for none. letters: [patches, LETTERS] int64, 0 for none."""

    tokens: Tensor
    letters: Tensor


@dataclass(frozen=True)
class Speller:
    """How texts are said. tokenizer: a `tokenizers.Tokenizer`. whole: words that are said by their own token; of any
    other word each patch says the letters in it. Eyes can learn a thousand words by heart, not a vocabulary."""

    tokenizer: Any
    whole: frozenset[str] = frozenset()

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return found

    def spelled(self, line: Line, columns: Sequence[int]) -> tuple[list[int], list[int]]:
        """A line's tokens, and which character of it each begins with. columns: of each character's patch."""
        ids: list[int] = []
        starts: list[int] = []
        for found in re.finditer(r"\S+", line.text):
            word, first = found.group(), found.start()
            for begin, end in self._pieces(word, columns[first : first + len(word)]):
                # digits are tokens of their own: a blank before one would be one more
                blank = " " if begin == 0 and not word[0].isdigit() else ""
                tokens = self.ids(blank + word[begin:end])
                ids += tokens
                starts += [first + begin] * len(tokens)
        return ids, starts

    def _pieces(self, word: str, columns: Sequence[int]) -> list[tuple[int, int]]:
        bare = len(re.match("[A-Za-z]*", word)[0])  # type: ignore[index]
        if word[:bare].lower() in self.whole and word[1:bare] == word[1:bare].lower():
            return [(0, bare), (bare, len(word))] if bare < len(word) else [(0, bare)]
        changes = [place for place in range(1, len(word)) if columns[place] != columns[place - 1]]
        return list(itertools.pairwise([0, *changes, len(word)]))


def wanted(picture: Picture, speller: Speller) -> Wanted:
    """A token stands in the patch where its first character is, or further right where that is taken; the tokens of
    a scene's caption stand in the first patches. Of two lines in one row of patches only the first counts.
    """
    tokens = [EMPTY] * (SIDE * SIDE)
    letters = [[0] * LETTERS for _ in tokens]
    if picture.caption:
        ids = speller.ids(f" {picture.caption}")[: len(tokens)]
        tokens[: len(ids)] = ids
    used: set[int] = set()
    for line in picture.lines:
        row = patch_at(line.y)
        if row in used:
            continue
        used.add(row)
        columns = [patch_at(x) for x in line.xs]
        ids, starts = speller.spelled(line, columns)
        for place, token in zip(_spread([columns[start] for start in starts]), ids, strict=False):
            tokens[row * SIDE + place] = token
        taken: dict[int, int] = {}
        for column, mark in zip(columns, line.text, strict=True):
            number = taken.get(column, 0)
            if mark != " " and number < LETTERS:
                letters[row * SIDE + column][number] = ord(mark) - FIRST_LETTER
                taken[column] = number + 1
    return Wanted(torch.tensor(tokens), torch.tensor(letters))


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
