"""Rows of data files: CSV, JSON lines (gzip and xz too) and JSON lists, each with the place it came from."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engine.errors import StockadeError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".json")


class DataMissing(StockadeError, FileNotFoundError):
    """A file of a data set is not where it belongs."""


class DataInvalid(StockadeError, ValueError):
    """A file of a data set is not of the published form, or holds too little."""


Bad = Callable[[str], None]
"""Told of a row that cannot be used: raises, or takes note of it; the row is then skipped."""


def refuse(problem: str) -> None:
    """Raises `DataInvalid`."""
    raise DataInvalid(f"{problem} (--skip-bad leaves such rows out)")


@dataclass
class Skipped:
    """Takes note of rows that cannot be used; the first few by what was wrong with them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def __call__(self, problem: str) -> None:
        self.count += 1
        if len(self.first) < 20:
            self.first.append(problem)


def data_files(folder: Path) -> list[Path]:
    """The files of rows in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name.endswith(SUFFIXES))


def csv_rows(path: Path) -> list[dict[str, str]]:
    """Raises `DataMissing`, or `DataInvalid` for what is no CSV file."""
    try:
        return list(csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise DataInvalid(f"{path} is not a CSV file: {error}") from None


def json_rows(path: Path, bad: Bad = refuse) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, row) of each JSON object; a `.json` file is a list of them. Raises `DataMissing`, and
    `DataInvalid` for a file that cannot be read."""
    if path.suffix == ".json":
        try:
            found = json.loads(read_text(path))
        except ValueError as error:
            raise DataInvalid(f"{path} is not JSON: {error}") from None
        if not isinstance(found, list):
            raise DataInvalid(f"{path} is a JSON {type(found).__name__}; data is a list of objects")
        rows = [(f"{path}, entry {number}", row) for number, row in enumerate(found, 1)]
    else:
        rows = []
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if not line.strip():
                continue
            try:
                rows.append((f"{path}, line {number}", json.loads(line)))
            except (ValueError, RecursionError) as error:
                bad(f"{path}, line {number} is not JSON: {error}")
    for where, row in rows:
        if isinstance(row, dict):
            yield where, row
        else:
            bad(f"{where} is not a JSON object")


def read_text(path: Path) -> str:
    """The text of a file, decompressed. Raises `DataMissing` and `DataInvalid`."""
    opened: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            return file.read()
    except FileNotFoundError:
        raise DataMissing(f"no {path} (the README says what a data directory holds)") from None
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise DataInvalid(f"{path} cannot be read as UTF-8 text: {error}") from None
