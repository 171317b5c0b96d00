"""The texts of the pictures that eyes learn from, some held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from ..engine.errors import BadInput
from .rows import DataMissing

HELD_OUT = 10  # one of so many
_FIELDS = ("response", "text")


class Texts(NamedTuple):
    """held_out: what the eyes are measured with, and never trained on. answered: questions with what was answered to
    them, of the same that train has."""

    train: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    answered: tuple[tuple[str, str], ...] = ()

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join((*self.train, *self.held_out, *chain(*self.answered))).encode()).hexdigest()


def read_texts(files: Sequence[Path]) -> Texts:
    """Texts of `.jsonl` files (fields `response` or `text`), or the paragraphs of any other.

    One question of ten, or text where there is no question, is held out with all that was answered to it.
    Raises `DataMissing` for a file that cannot be read, `BadInput` for a row without a text.
    """
    keyed = [pair for file in files for pair in _read(file)]
    held = set(sorted({key for key, _ in keyed})[::HELD_OUT])
    return Texts(
        tuple(text for key, text in keyed if key not in held),
        tuple(text for key, text in keyed if key in held),
        tuple((key, text) for key, text in keyed if key not in held and key != text),
    )


def _read(file: Path) -> list[tuple[str, str]]:
    try:
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise DataMissing(f"{file} cannot be read as text: {error}") from None
    if file.suffix != ".jsonl":
        return [(text, text) for text in content.split("\n\n") if text.strip()]
    found = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = next(row[field] for field in _FIELDS if isinstance(row.get(field), str))
        except (ValueError, AttributeError, StopIteration):
            raise BadInput(f"{file}, line {number}: no object with a text in {' or '.join(_FIELDS)}") from None
        found.append((str(row.get("question", text)), text))
    return found
