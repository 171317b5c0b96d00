"""What the patches of a picture are to say: the tokens of its text where they begin, and the letters there."""

from __future__ import annotations

from collections.abc import Sequence
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


def wanted(picture: Picture, tokenizer: Any) -> Wanted:
    """A token stands in the patch where its first character is, or further right where that is taken; the tokens of
    a scene's caption stand in the first patches. Of two lines in one row of patches only the first counts.

    tokenizer: a `tokenizers.Tokenizer`.
    """
    tokens = [EMPTY] * (SIDE * SIDE)
    letters = [[0] * LETTERS for _ in tokens]
    if picture.caption:
        ids = tokenizer.encode(f" {picture.caption}", add_special_tokens=False).ids[: len(tokens)]
        tokens[: len(ids)] = ids
    used: set[int] = set()
    for line in picture.lines:
        row = patch_at(line.y)
        if row in used:
            continue
        used.add(row)
        columns = [patch_at(x) for x in line.xs]
        ids, starts = _tokens(line, tokenizer)
        for place, token in zip(_spread([columns[start] for start in starts]), ids, strict=False):
            tokens[row * SIDE + place] = token
        taken: dict[int, int] = {}
        for column, mark in zip(columns, line.text, strict=True):
            number = taken.get(column, 0)
            if mark != " " and number < LETTERS:
                letters[row * SIDE + column][number] = ord(mark) - FIRST_LETTER
                taken[column] = number + 1
    return Wanted(torch.tensor(tokens), torch.tensor(letters))


def _tokens(line: Line, tokenizer: Any) -> tuple[list[int], list[int]]:
    """A line's tokens, and which character of it each begins with; a blank before a word is the word's."""
    # digits are tokens of their own: a blank before one would be one more
    blank = 0 if line.text[0].isdigit() else 1
    encoded = tokenizer.encode(" " * blank + line.text, add_special_tokens=False)
    starts = []
    for start, end in encoded.offsets:
        start, end = max(0, start - blank), end - blank
        starts.append(start + 1 if line.text[start] == " " and end > start + 1 else start)
    return encoded.ids, starts


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
