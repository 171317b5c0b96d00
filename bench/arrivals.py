"""When requests come and how large they are: random arrivals, bursts, and traces from a file."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..engine.errors import BadInput

COLUMNS = ("arrival", "prompt_tokens", "images", "answer_tokens")
OPTIONAL = ("harmful",)


class BadTrace(BadInput):
    """A trace's file has wrong columns or values, or no requests."""


class Arrival(NamedTuple):
    """arrival: seconds from the beginning. harmful: None leaves it to chance."""

    arrival: float
    prompt_tokens: int
    images: int
    answer_tokens: int
    harmful: bool | None = None


def poisson(rate: float, count: int, random: np.random.Generator) -> np.ndarray:
    """Seconds of `count` arrivals that know nothing of each other, `rate` a second. Raises `BadInput`."""
    return np.cumsum(random.exponential(1.0 / _positive("rate", rate), count))


def bursts(rate: float, size: int, count: int, random: np.random.Generator, share: float = 1.0) -> np.ndarray:
    """Seconds of `count` arrivals, on average `rate` a second, that come in bursts at once.

    share: the part of a burst's `size` requests that come here, each by a throw of its own: what a replica behind a
    router that chooses at random sees. Raises `BadInput`.
    """
    _positive("rate", rate)
    if size < 1 or not 0.0 < share <= 1.0:
        raise BadInput(
            f"a burst has at least one request, and a share of it is above 0 and at most 1: {size}, {share}"
        )
    none = (1.0 - share) ** size  # bursts of which nothing comes here
    times: list[float] = []
    now = 0.0
    while len(times) < count:
        now += random.exponential(size * share / rate / (1.0 - none))
        here = 0
        while not here:
            here = int(random.binomial(size, share))
        times += [now] * here
    return np.array(times[:count])


def read_trace(file: Path) -> list[Arrival]:
    """Requests from a CSV file with a header or a JSON-lines file (`.jsonl`), in the order of their arrival.

    Columns: arrival (seconds), prompt_tokens, images, answer_tokens, and harmful (0 or 1, true or false) where that is
    known. Raises `BadTrace`, and OSError where the file cannot be read.
    """
    rows = sorted(_rows(file))
    if not rows:
        raise BadTrace(f"{file} has no requests")
    return rows


def _rows(file: Path) -> Iterator[Arrival]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        if file.suffix == ".jsonl":
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except ValueError as error:
                        raise BadTrace(f"{file}, line {number}: {error}") from None
                    if not isinstance(row, Mapping):
                        raise BadTrace(f"{file}, line {number}: a request is an object, not {type(row).__name__}")
                    yield _arrival(file, number, row)
            return
        for number, row in enumerate(csv.DictReader(lines), 2):
            yield _arrival(file, number, row)


def _arrival(file: Path, number: int, row: Mapping[Any, Any]) -> Arrival:
    unknown = [str(name) for name in row if name not in (*COLUMNS, *OPTIONAL)]
    missing = [name for name in COLUMNS if name not in row]
    if unknown or missing:
        raise BadTrace(
            f"{file}, line {number}: the columns are {', '.join(COLUMNS)} and perhaps {', '.join(OPTIONAL)}; "
            + "; ".join(
                f"{what} {', '.join(names)}"
                for what, names in (("unknown:", unknown), ("missing:", missing))
                if names
            )
        )
    try:
        found = Arrival(
            float(row["arrival"]),
            int(row["prompt_tokens"]),
            int(row["images"]),
            int(row["answer_tokens"]),
            _flag(row.get("harmful")),
        )
    except (TypeError, ValueError) as error:
        raise BadTrace(f"{file}, line {number}: {error}") from None
    if not isfinite(found.arrival) or found.arrival < 0 or found.prompt_tokens < 1 or found.answer_tokens < 1:
        raise BadTrace(f"{file}, line {number}: arrival is at least 0, prompt_tokens and answer_tokens at least 1")
    if found.images < 0:
        raise BadTrace(f"{file}, line {number}: images is at least 0, not {found.images}")
    return found


def _flag(value: Any) -> bool | None:
    if value is None or value == "":
        return None
    known = {"0": False, "false": False, "1": True, "true": True}
    found = known.get(str(value).lower())
    if found is None:
        raise ValueError(f"harmful is 0 or 1, not {value!r}")
    return found


def _positive(name: str, value: float) -> float:
    if not (isfinite(value) and value > 0):
        raise BadInput(f"{name} must be above 0, not {value}")
    return value
