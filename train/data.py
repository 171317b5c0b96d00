"""The texts a head is fitted and measured on: read, freed of duplicates, split by question and by behavior.

Three kinds, always: harmful answers, refusing ones, and harmlessly helpful ones. Nothing is downloaded here.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from .rows import Bad, DataInvalid, csv_rows, json_rows, refuse


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
    CONTRAST = "like XSTest, answered by the model"
    PKU = "PKU-SafeRLHF"
    BEAVERTAILS = "BeaverTails"
    SPA_VL = "SPA-VL"
    PLAIN = "files of your own"


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
    Source.CONTRAST: SetInfo("", "that of this project", "train/contrast.py"),
    Source.PKU: SetInfo("pku-saferlhf", "CC-BY-NC-4.0", "PKU-Alignment/PKU-SafeRLHF on the Hugging Face hub"),
    Source.BEAVERTAILS: SetInfo("beavertails", "CC-BY-NC-4.0", "PKU-Alignment/BeaverTails on the Hugging Face hub"),
    Source.SPA_VL: SetInfo("spa-vl", "Apache-2.0", "sqrti/SPA-VL on the Hugging Face hub"),
    Source.PLAIN: SetInfo("plain", "yours", "yours"),
}

# Shares of the groups that train and validate; the rest tests. GPTFuzz publishes its test questions as a file.
SHARES = {
    Source.GPTFUZZ: (0.8, 0.2),
    Source.JAILBREAKBENCH: (0.6, 0.2),
    Source.ALPACA_EVAL: (0.5, 0.2),
    Source.XSTEST: (0.5, 0.2),
    Source.PKU: (0.8, 0.1),
    Source.BEAVERTAILS: (0.8, 0.1),
    Source.SPA_VL: (0.8, 0.1),
    Source.PLAIN: (0.8, 0.1),
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
    """All answers of GPTFuzz, JailbreakBench and AlpacaEval under `data`, every text once, each in its part.

    The split depends on `seed` and the groups only. limit: at most so many texts of each source, part and kind.
    Raises `DataMissing` and `DataInvalid`.
    """
    sets = (Source.GPTFUZZ, Source.JAILBREAKBENCH, Source.ALPACA_EVAL)
    # The first to come keeps a text: what trains is dropped from what tests, never the other way round.
    return at_most(limit, unique(example for source in sets for example in read_set(data, source, seed)))


def read_set(data: Path, source: Source, seed: int, bad: Bad = refuse) -> list[Example]:
    """The answers of GPTFuzz, JailbreakBench or AlpacaEval, each in its part, repeated ones included.

    Raises `DataMissing` and `DataInvalid`.
    """
    if source is Source.JAILBREAKBENCH:
        return split(list(_jailbreakbench(data, bad)), source, seed)
    if source is Source.ALPACA_EVAL:
        return split(list(_alpaca_eval(data, bad)), source, seed)
    train = split(list(_gptfuzz(data, "responses_train.csv", bad)), source, seed)
    test = list(_gptfuzz(data, "responses_evaluate.csv", bad))
    known = {example.group for example in train}
    if any(example.group in known for example in test):
        raise DataInvalid("GPTFuzz's two files of answers share a question; its published split has 80 and 20 apart")
    return [*train, *test]


def read_questions(data: Path, *, seed: int = 0, limit: int | None = None, bad: Bad = refuse) -> list[Example]:
    """Questions that look alarming and are not, each in its part: examples whose text the model has yet to give.

    Raises `DataMissing` and `DataInvalid`.
    """
    return at_most(limit, split(list(_xstest(data, bad)), Source.XSTEST, seed))


def unique(examples: Iterable[Example]) -> list[Example]:
    """The examples without empty texts and repeated ones; case and white space make no difference."""
    seen = {""}
    kept = []
    for example in examples:
        key = plain_key(example.text)
        if key not in seen:
            seen.add(key)
            kept.append(example)
    return kept


def sizes(examples: Iterable[Example]) -> dict[tuple[Source, Part, Kind], int]:
    return dict(Counter((example.source, example.part, example.kind) for example in examples))


def split(examples: Sequence[Example], source: Source, seed: int) -> list[Example]:
    """The examples of a set, all of a group in one part."""
    groups = sorted({example.group for example in examples})
    random.Random(f"{seed} {source}").shuffle(groups)
    train, validation = (round(share * len(groups)) for share in SHARES[source])
    parts = [Part.TRAIN] * train + [Part.VALIDATION] * validation + [Part.TEST] * len(groups)
    of = dict(zip(groups, parts, strict=False))
    return [replace(example, part=of[example.group]) for example in examples]


def exchanged(examples: Sequence[Example], seed: int) -> list[Example]:
    """What tested trains and, a fifth of its groups, validates; what trained and validated tests. For a judge that
    shares no question and no answer with the detectors it judges."""
    groups = sorted({(example.source, example.group) for example in examples if example.part is Part.TEST})
    random.Random(f"{seed} exchanged").shuffle(groups)
    of = dict.fromkeys(groups, Part.TRAIN)
    for source in Source:
        its = [group for group in groups if group[0] is source]
        of.update(dict.fromkeys(its[: round(len(its) / 5)], Part.VALIDATION))
    return [
        replace(example, part=of[example.source, example.group] if example.part is Part.TEST else Part.TEST)
        for example in examples
    ]


def at_most(limit: int | None, examples: list[Example]) -> list[Example]:
    """The first `limit` of each source, part and kind."""
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


def plain_key(text: str) -> str:
    """The text without what makes no difference: case and white space."""
    return " ".join(text.split()).casefold()


def _gptfuzz(data: Path, name: str, bad: Bad) -> Iterator[Example]:
    path = data / SETS[Source.GPTFUZZ].folder / name
    kinds = {"0": Kind.REFUSING, "1": Kind.HARMFUL}
    asked = {row.get("index"): row.get("text") for row in csv_rows(path.with_name("question_list.csv"))}
    for number, row in enumerate(csv_rows(path), 1):
        question, response, label = (row.get(field) for field in ("question", "Response", "label"))
        if not question or response is None or label not in kinds:
            bad(f"{path}, row {number}: needs question, Response, and a label of 0 or 1 (= harmful)")
            continue
        text = asked.get(question)
        if not text:
            bad(f"{path}, row {number}: question {question} is not in question_list.csv (index, text)")
            continue
        yield Example(response.strip(), kinds[label], Source.GPTFUZZ, question, text)


def _jailbreakbench(data: Path, bad: Bad) -> Iterator[Example]:
    """Some behaviors are spelled in two ways under one question: the question's first one names the group."""
    path = data / SETS[Source.JAILBREAKBENCH].folder / "responses.jsonl"
    group: dict[str, str] = {}
    for where, row in json_rows(path, bad):
        behavior, question, response, harmful = (
            row.get(field) for field in ("behavior", "question", "response", "harmful")
        )
        if not (isinstance(behavior, str) and isinstance(question, str) and isinstance(response, str)) or not (
            isinstance(harmful, bool)
        ):
            bad(f"{where}: needs behavior, question, response, and harmful (true, false)")
            continue
        first = group.setdefault(plain_key(question), plain_key(behavior))
        kind, its = Kind.HARMFUL if harmful else Kind.REFUSING, group.setdefault(plain_key(behavior), first)
        yield Example(response.strip(), kind, Source.JAILBREAKBENCH, its, question)


def _alpaca_eval(data: Path, bad: Bad) -> Iterator[Example]:
    for where, row in json_rows(data / SETS[Source.ALPACA_EVAL].folder / "answers.jsonl", bad):
        question, response = row.get("question"), row.get("response")
        if not isinstance(question, str) or not isinstance(response, str):
            bad(f"{where}: needs question and response")
            continue
        yield Example(response.strip(), Kind.HELPFUL, Source.ALPACA_EVAL, plain_key(question), question)


def _xstest(data: Path, bad: Bad) -> Iterator[Example]:
    path = data / SETS[Source.XSTEST].folder / "xstest_prompts.csv"
    for number, row in enumerate(csv_rows(path), 1):
        question, label = row.get("prompt"), row.get("label")
        if not question or label not in ("safe", "unsafe"):
            bad(f"{path}, row {number}: needs prompt, and a label of safe or unsafe")
        elif label == "safe":
            yield Example("", Kind.HELPFUL, Source.XSTEST, plain_key(question), question)
