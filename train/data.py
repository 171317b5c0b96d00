"""The texts a head is fitted and measured on: read, freed of duplicates, split by question and by behavior.

Three kinds, always: harmful answers, refusing ones, and harmlessly helpful ones. Nothing is downloaded here.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from ..engine.errors import StockadeError


class DataMissing(StockadeError, FileNotFoundError):
    """A file of a data set is not where it belongs."""


class DataInvalid(StockadeError, ValueError):
    """A file of a data set is not of the published form, or holds too little."""


class Kind(StrEnum):
    """What an answer is. In GPTFuzz and JailbreakBench nearly every harmless answer is a refusal."""

    HARMFUL = "harmful"
    REFUSING = "refusing"
    HELPFUL = "helpful"


class Part(StrEnum):
    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


class Source(StrEnum):
    GPTFUZZ = "GPTFuzz"
    JAILBREAKBENCH = "JailbreakBench"
    ALPACA_EVAL = "AlpacaEval answers"
    XSTEST = "XSTest, answered by the model"


@dataclass(frozen=True)
class SetInfo:
    """A data set: its folder under the data directory, its license, where it is published."""

    folder: str
    license: str
    origin: str


SETS = {
    Source.GPTFUZZ: SetInfo("gptfuzz", "MIT", "github.com/sherdencooper/GPTFuzz, datasets/"),
    Source.JAILBREAKBENCH: SetInfo("jailbreakbench", "MIT", "github.com/JailbreakBench/artifacts, attack-artifacts/"),
    Source.ALPACA_EVAL: SetInfo(
        "alpaca-eval", "Apache-2.0", "three models' answers to AlpacaEval's 805 instructions"
    ),
    Source.XSTEST: SetInfo("xstest", "CC-BY-4.0", "github.com/paul-rottger/xstest, its safe prompts"),
}

# Shares of the groups that train and validate; the rest tests. GPTFuzz publishes its test questions as a file.
SHARES = {
    Source.GPTFUZZ: (0.8, 0.2),
    Source.JAILBREAKBENCH: (0.6, 0.2),
    Source.ALPACA_EVAL: (0.5, 0.2),
    Source.XSTEST: (0.5, 0.2),
}


@dataclass(frozen=True)
class Example:
    """One answer. group: of its question or behavior; all answers of a group are in one part. question: as the user
    asked it, without what a jailbreak put around it."""

    text: str
    kind: Kind
    source: Source
    group: str
    question: str
    part: Part = Part.TEST

    @property
    def harmless(self) -> bool:
        """Our label, 1 = harmless; the published files say harmful = 1."""
        return self.kind is not Kind.HARMFUL


def read_examples(data: Path, *, seed: int = 0, limit: int | None = None) -> list[Example]:
    """All answers under `data`, every text once, each in its part.

    The split depends on `seed` and the groups only. limit: at most so many texts of each source, part and kind.
    Raises `DataMissing` and `DataInvalid`.
    """
    train = _split(list(_gptfuzz(data, "responses_train.csv")), Source.GPTFUZZ, seed)
    test = list(_gptfuzz(data, "responses_evaluate.csv"))
    known = {example.group for example in train}
    if any(example.group in known for example in test):
        raise DataInvalid("GPTFuzz's two files of answers share a question; its published split has 80 and 20 apart")
    jailbreaks = _split(list(_jailbreakbench(data)), Source.JAILBREAKBENCH, seed)
    helpful = _split(list(_alpaca_eval(data)), Source.ALPACA_EVAL, seed)
    # The first to come keeps a text: what trains is dropped from what tests, never the other way round.
    return _at_most(limit, unique([*train, *test, *jailbreaks, *helpful]))


def read_questions(data: Path, *, seed: int = 0, limit: int | None = None) -> list[Example]:
    """Questions that look alarming and are not, each in its part: examples whose text the model has yet to give.

    Raises `DataMissing` and `DataInvalid`.
    """
    return _at_most(limit, _split(list(_xstest(data)), Source.XSTEST, seed))


def unique(examples: Iterable[Example]) -> list[Example]:
    """The examples without empty texts and repeated ones; case and white space make no difference."""
    seen = {""}
    kept = []
    for example in examples:
        key = _key(example.text)
        if key not in seen:
            seen.add(key)
            kept.append(example)
    return kept


def sizes(examples: Iterable[Example]) -> dict[tuple[Source, Part, Kind], int]:
    return dict(Counter((example.source, example.part, example.kind) for example in examples))


def _split(examples: Sequence[Example], source: Source, seed: int) -> list[Example]:
    groups = sorted({example.group for example in examples})
    random.Random(f"{seed} {source}").shuffle(groups)
    train, validation = (round(share * len(groups)) for share in SHARES[source])
    parts = [Part.TRAIN] * train + [Part.VALIDATION] * validation + [Part.TEST] * len(groups)
    of = dict(zip(groups, parts, strict=False))
    return [replace(example, part=of[example.group]) for example in examples]


def _at_most(limit: int | None, examples: list[Example]) -> list[Example]:
    if limit is None:
        return examples
    taken: Counter[tuple[Source, Part, Kind]] = Counter()
    kept = []
    for example in examples:
        stratum = (example.source, example.part, example.kind)
        if taken[stratum] < limit:
            taken[stratum] += 1
            kept.append(example)
    return kept


def _gptfuzz(data: Path, name: str) -> Iterator[Example]:
    path = data / SETS[Source.GPTFUZZ].folder / name
    kinds = {"0": Kind.REFUSING, "1": Kind.HARMFUL}
    asked = {row.get("index"): row.get("text") for row in _csv_rows(path.with_name("question_list.csv"))}
    for number, row in enumerate(_csv_rows(path), 1):
        question, response, label = (row.get(field) for field in ("question", "Response", "label"))
        if not question or response is None or label not in kinds:
            raise DataInvalid(f"{path}, row {number}: needs question, Response, and a label of 0 or 1 (= harmful)")
        text = asked.get(question)
        if not text:
            raise DataInvalid(f"{path}, row {number}: question {question} is not in question_list.csv (index, text)")
        yield Example(response.strip(), kinds[label], Source.GPTFUZZ, question, text)


def _jailbreakbench(data: Path) -> Iterator[Example]:
    """Some behaviors are spelled in two ways under one question: the question's first one names the group."""
    path = data / SETS[Source.JAILBREAKBENCH].folder / "responses.jsonl"
    group: dict[str, str] = {}
    for number, row in _json_lines(path):
        behavior, question, response, harmful = (
            row.get(field) for field in ("behavior", "question", "response", "harmful")
        )
        if not (isinstance(behavior, str) and isinstance(question, str) and isinstance(response, str)) or not (
            isinstance(harmful, bool)
        ):
            raise DataInvalid(f"{path}, line {number}: needs behavior, question, response, and harmful (true, false)")
        first = group.setdefault(_key(question), _key(behavior))
        kind, its = Kind.HARMFUL if harmful else Kind.REFUSING, group.setdefault(_key(behavior), first)
        yield Example(response.strip(), kind, Source.JAILBREAKBENCH, its, question)


def _alpaca_eval(data: Path) -> Iterator[Example]:
    path = data / SETS[Source.ALPACA_EVAL].folder / "answers.jsonl"
    for number, row in _json_lines(path):
        question, response = row.get("question"), row.get("response")
        if not isinstance(question, str) or not isinstance(response, str):
            raise DataInvalid(f"{path}, line {number}: needs question and response")
        yield Example(response.strip(), Kind.HELPFUL, Source.ALPACA_EVAL, _key(question), question)


def _xstest(data: Path) -> Iterator[Example]:
    path = data / SETS[Source.XSTEST].folder / "xstest_prompts.csv"
    for number, row in enumerate(_csv_rows(path), 1):
        question, label = row.get("prompt"), row.get("label")
        if not question or label not in ("safe", "unsafe"):
            raise DataInvalid(f"{path}, row {number}: needs prompt, and a label of safe or unsafe")
        if label == "safe":
            yield Example("", Kind.HELPFUL, Source.XSTEST, _key(question), question)


def _csv_rows(path: Path) -> list[dict[str, str]]:
    try:
        return list(csv.DictReader(io.StringIO(_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise DataInvalid(f"{path} is not a CSV file: {error}") from None


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataInvalid(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataInvalid(f"{path}, line {number} is not a JSON object")
        yield number, row


def _text(path: Path) -> str:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except FileNotFoundError:
        folders = ", ".join(info.folder for info in SETS.values())
        raise DataMissing(f"no {path}; the data directory holds the folders {folders} (see the README)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataInvalid(f"{path} cannot be read as UTF-8 text: {error}") from None


def _key(text: str) -> str:
    return " ".join(text.split()).casefold()
