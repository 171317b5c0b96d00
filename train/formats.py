"""Sets of answers in the forms they are published in, and files of one's own: from rows to questions and answers.

PKU-SafeRLHF, BeaverTails and SPA-VL as JSON lines; their pictures are not read here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .data import SETS, Source
from .rows import Bad, DataMissing, data_files, json_rows, refuse


class Answered(NamedTuple):
    """A question's answer, and whether that is harmless."""

    question: str
    text: str
    harmless: bool


Row = tuple[Answered, ...]
"""One answer, or two to one question: the preferred one first."""

FORMS = {
    Source.PKU: "prompt, response_0, response_1, is_response_0_safe, is_response_1_safe, safer_response_id",
    Source.BEAVERTAILS: "prompt, response, is_safe",
    Source.SPA_VL: "question, chosen, rejected",
    Source.PLAIN: "question and response with harmless (true or false), or question, accepted and rejected",
}


def read_rows(data: Path, source: Source, bad: Bad = refuse) -> Iterator[Row]:
    """The rows of all files of a set under `data`. Raises `DataMissing` and `DataInvalid`."""
    folder = data / SETS[source].folder
    files = data_files(folder) if folder.is_dir() else []
    if not files:
        raise DataMissing(f"{folder} holds no .jsonl, .jsonl.gz, .jsonl.xz or .json file")
    for path in files:
        for where, row in json_rows(path, bad):
            answers = _FORMS[source](row)
            if answers is None:
                bad(f"{where}: needs {FORMS[source]}")
            else:
                yield answers


def _pku(row: dict[str, Any]) -> Row | None:
    question, safer = row.get("prompt"), row.get("safer_response_id")
    texts = [row.get(f"response_{number}") for number in (0, 1)]
    safe = [row.get(f"is_response_{number}_safe") for number in (0, 1)]
    if not _strings(question, *texts) or not _booleans(*safe) or safer not in (0, 1):
        return None
    return tuple(Answered(str(question), str(texts[number]), bool(safe[number])) for number in (safer, 1 - safer))


def _beavertails(row: dict[str, Any]) -> Row | None:
    question, text, safe = row.get("prompt"), row.get("response"), row.get("is_safe")
    if not _strings(question, text) or not _booleans(safe):
        return None
    return (Answered(str(question), str(text), bool(safe)),)


def _spa_vl(row: dict[str, Any]) -> Row | None:
    return _pair(row.get("question"), row.get("chosen"), row.get("rejected"))


def _plain(row: dict[str, Any]) -> Row | None:
    if "response" not in row:
        return _pair(row.get("question"), row.get("accepted"), row.get("rejected"))
    question, text, harmless = row.get("question"), row.get("response"), row.get("harmless")
    if not _strings(question, text) or not _booleans(harmless):
        return None
    return (Answered(str(question), str(text), bool(harmless)),)


def _pair(question: Any, accepted: Any, rejected: Any) -> Row | None:
    """The paper's labels: an accepted answer is harmless, a rejected one is not."""
    if not _strings(question, accepted, rejected):
        return None
    return (Answered(question, accepted, True), Answered(question, rejected, False))


def _strings(*values: Any) -> bool:
    return all(isinstance(value, str) and value.strip() for value in values)


def _booleans(*values: Any) -> bool:
    return all(isinstance(value, bool) for value in values)


_FORMS = {Source.PKU: _pku, Source.BEAVERTAILS: _beavertails, Source.SPA_VL: _spa_vl, Source.PLAIN: _plain}
