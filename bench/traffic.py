"""What is asked, and when: requests of given sizes that arrive by a rate, in bursts, or as a trace file says.

It asks nothing of anybody; `driving` does.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from ..engine.errors import BadInput

COLUMNS = ("arrival", "prompt_tokens", "images", "answer_tokens")
OPTIONAL = ("harmful",)
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0", "")


class BadTrace(BadInput):
    """A trace file has other columns than it must have, or a value that is none."""


class Item(NamedTuple):
    """A request to be. arrival: seconds from the beginning. harmful: the guard is to find its first answer so."""

    arrival: float
    prompt_tokens: int
    images: int
    answer_tokens: int
    harmful: bool = False


@dataclass(frozen=True)
class Sizes:
    """Of every request where no trace says otherwise. harmful: which part of them is."""

    prompt_tokens: int = 64
    images: int = 0
    answer_tokens: int = 64
    harmful: float = 0.0

    def __post_init__(self) -> None:
        """Raises `BadInput` for sizes below one, images below zero, or a part that is none."""
        for name, least in (("prompt_tokens", 1), ("images", 0), ("answer_tokens", 2)):
            if getattr(self, name) < least:
                raise BadInput(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not 0.0 <= self.harmful <= 1.0:
            raise BadInput(f"harmful is a part from 0 to 1, not {self.harmful}")

    def item(self, arrival: float, random: Random) -> Item:
        return Item(arrival, self.prompt_tokens, self.images, self.answer_tokens, random.random() < self.harmful)


def arriving(sizes: Sizes, random: Random, rate: float, burst: int = 1) -> Iterator[Item]:
    """Requests without end, the first at 0: bursts of `burst` at the same moment, at exponential intervals, `rate`
    requests a second in the long run. burst = 1 is a Poisson process. Raises `BadInput` for a rate that is none."""
    if not rate > 0 or not isfinite(rate) or burst < 1:
        raise BadInput(f"a rate is above 0 and a burst at least 1, not {rate} and {burst}")
    at = 0.0
    while True:
        yield from (sizes.item(at, random) for _ in range(burst))
        at += random.expovariate(rate / burst)


def read_trace(file: Path) -> list[Item]:
    """The requests of a trace in order of arrival, the first at 0: CSV with a header, or a JSON object a line.

    Columns: arrival (seconds), prompt_tokens, images, answer_tokens, and if wanted harmful. Raises `BadTrace` for
    other columns or values, with the line, and OSError where the file cannot be read.
    """
    items = [_item(f"{file.name}, line {number}", record) for number, record in _records(file)]
    if not items:
        raise BadTrace(f"{file} has no requests")
    items.sort(key=lambda item: item.arrival)
    first = items[0].arrival
    return [item._replace(arrival=item.arrival - first) for item in items]


def rate_of(items: list[Item]) -> float:
    """Requests a second, from the first arrival to the last; 0 where all arrive at once."""
    took = items[-1].arrival - items[0].arrival
    return (len(items) - 1) / took if took > 0 else 0.0


def faster(items: list[Item], factor: float) -> list[Item]:
    """The same requests at `factor` times the rate."""
    return [item._replace(arrival=item.arrival / factor) for item in items]


def _records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, values by column)."""
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            yield from (
                _json_lines(file, lines) if file.suffix in (".jsonl", ".ndjson", ".json") else _csv(file, lines)
            )
    except UnicodeDecodeError as error:
        raise BadTrace(f"{file.name} is no text: {error}") from None


def _json_lines(file: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise BadTrace(f"{file.name}, line {number}: not a JSON object: {error}") from None
        if not isinstance(record, dict):
            raise BadTrace(f"{file.name}, line {number}: not a JSON object")
        _check_columns(f"{file.name}, line {number}", list(record))
        yield number, record


def _csv(file: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        reader = csv.DictReader(lines, restkey="", strict=True)
        _check_columns(file.name, list(reader.fieldnames or ()))
        for row in reader:
            if "" in row or None in row.values():
                raise BadTrace(f"{file.name}, line {reader.line_num}: not as many values as columns")
            yield reader.line_num, dict(row)
    except csv.Error as error:
        raise BadTrace(f"{file.name} is no CSV file: {error}") from None


def _check_columns(where: str, names: list[str]) -> None:
    missing = [name for name in COLUMNS if name not in names]
    unknown = [name for name in names if name not in (*COLUMNS, *OPTIONAL)]
    doubled = sorted({one for one, other in pairwise(sorted(names)) if one == other})
    wrong = [
        f"{what} {', '.join(repr(name) for name in found)}"
        for what, found in (("lacks", missing), ("has an unknown", unknown), ("repeats", doubled))
        if found
    ]
    if wrong:
        allowed = f"{', '.join(COLUMNS)}, and if wanted {', '.join(OPTIONAL)}"
        raise BadTrace(f"{where}: it {' and '.join(wrong)}; the columns of a trace are {allowed}")


def _item(where: str, record: dict[str, Any]) -> Item:
    try:
        arrival = float(record["arrival"])
        sizes = [_whole(record[name]) for name in COLUMNS[1:]]
        harmful = _truth(record.get("harmful", False))
    except (TypeError, ValueError) as error:
        raise BadTrace(f"{where}: {error}") from None
    if not isfinite(arrival):
        raise BadTrace(f"{where}: arrival must be a number of seconds, not {record['arrival']!r}")
    prompt_tokens, images, answer_tokens = sizes
    try:
        Sizes(prompt_tokens, images, answer_tokens)
    except BadInput as error:
        raise BadTrace(f"{where}: {error}") from None
    return Item(arrival, prompt_tokens, images, answer_tokens, harmful)


def _whole(value: Any) -> int:
    number = float(value)
    if isinstance(value, bool) or not number.is_integer():
        raise ValueError(f"tokens and images are whole numbers, not {value!r}")
    return int(number)


def _truth(value: Any) -> bool:
    word = str(value).strip().lower()
    if word not in (*_TRUE, *_FALSE):
        raise ValueError(f"harmful is true or false, not {value!r}")
    return word in _TRUE
