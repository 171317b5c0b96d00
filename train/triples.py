"""(question, harmful answer, harmless answer): what a detoxifier learns from, from files in several forms."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .data import plain_key
from .refusals import check_signs
from .rows import Bad, DataInvalid, DataMissing, json_rows, refuse

# The released script's target where both answers of a pair are unsafe.
SORRY = "Sorry, I can not answer this question."
FORM = (
    "question, harmful and harmless; or question (or prompt), accepted (or chosen) and rejected; or PKU-SafeRLHF's "
    "prompt, response_0, response_1, is_response_0_safe, is_response_1_safe, safer_response_id"
)


class Triple(NamedTuple):
    question: str
    harmful: str
    harmless: str


@dataclass(frozen=True)
class Triples:
    """repeated: those left out because their harmful answer came before."""

    items: list[Triple]
    repeated: int


def read_triples(paths: Iterable[Path], bad: Bad = refuse) -> Triples:
    """Those of all files, every harmful answer once.

    Raises `DataMissing`, `DataInvalid` for rows of another form (unless `bad` takes note of them), `LabelsSwapped`
    where the harmful answers are the ones that refuse.
    """
    items: list[Triple] = []
    seen: set[str] = set()
    repeated = 0
    for path in paths:
        some = list(_rows(path, bad))
        check_signs(str(path), [(item.harmful, False) for item in some] + [(item.harmless, True) for item in some])
        for item in some:
            key = plain_key(item.harmful)
            repeated += key in seen
            if key not in seen:
                seen.add(key)
                items.append(item)
    if not items:
        raise DataMissing("the files hold no triple of question, harmful answer and harmless answer")
    return Triples(items, repeated)


def split_triples(items: Sequence[Triple], share: float, seed: int) -> tuple[list[Triple], list[Triple]]:
    """(training, validation): about `share` of the questions validate, one at least.

    Raises `DataInvalid` where there is but one question.
    """
    questions = sorted({plain_key(item.question) for item in items})
    if len(questions) < 2:
        raise DataInvalid("triples of at least two questions are needed: some train, others measure")
    random.Random(f"{seed} triples").shuffle(questions)
    held = set(questions[: max(1, round(share * len(questions)))])
    parts: tuple[list[Triple], list[Triple]] = ([], [])
    for item in items:
        parts[plain_key(item.question) in held].append(item)
    return parts


def _rows(path: Path, bad: Bad) -> Iterator[Triple]:
    for where, row in json_rows(path, bad):
        found = _pku(row) if "response_0" in row else _plain(row)
        if found is None or not all(isinstance(text, str) and text.strip() for text in found):
            bad(f"{where}: needs {FORM}")
        else:
            yield Triple(*(text.strip() for text in found))


def _plain(row: dict[str, Any]) -> tuple[Any, Any, Any]:
    def first(*names: str) -> Any:
        return next((row[name] for name in names if name in row), None)

    return (
        first("question", "prompt"),
        first("harmful", "rejected"),
        first("harmless", "accepted", "chosen"),
    )


def _pku(row: dict[str, Any]) -> tuple[Any, Any, Any] | None:
    """As in the released script: the less safe answer, and the safer one where that is safe."""
    safer, safe = row.get("safer_response_id"), [row.get(f"is_response_{number}_safe") for number in (0, 1)]
    if safer not in (0, 1) or not all(isinstance(label, bool) for label in safe):
        return None
    better, worse = row.get(f"response_{safer}"), row.get(f"response_{1 - safer}")
    return row.get("prompt"), worse, better if any(safe) else SORRY
