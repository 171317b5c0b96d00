"""Everything under a data directory that a detector is trained and measured on: read, checked, freed of duplicates.

Whichever sets are there are taken. What measures is never trained on, under whatever name it comes again.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .data import SETS, Example, Kind, Part, Source, at_most, plain_key, read_set, sizes, split
from .formats import FORMS, Row, read_rows
from .refusals import check_signs, is_refusal
from .rows import Bad, DataInvalid, DataMissing, refuse

PUBLISHED = (Source.GPTFUZZ, Source.JAILBREAKBENCH, Source.ALPACA_EVAL)


@dataclass(frozen=True)
class Corpus:
    """pairs: (preferred, other) training answers to one question, as indices of `examples`. repeated: answers left
    out because their text came before; held_back: because they would train on what measures."""

    examples: list[Example]
    pairs: list[tuple[int, int]]
    repeated: int
    held_back: int

    def numbers(self, part: Part) -> list[int]:
        """Which of the examples are in a part."""
        return [number for number, example in enumerate(self.examples) if example.part is part]


def read_corpus(
    data: Path, *, seed: int = 0, limit: int | None = None, bad: Bad = refuse, more: Iterable[Example] = ()
) -> Corpus:
    """All sets that have a folder under `data`, and `more` examples that are in their parts already.

    limit: at most so many texts of each source, part and kind. Raises `DataMissing` where there is no set,
    `LabelsSwapped`, and `DataInvalid` for rows of the wrong form (unless `bad` takes note of them) and where a part
    lacks harmful or harmless answers, or the training part helpful ones.
    """
    found: list[Example] = []
    preferred: list[tuple[str, str]] = []  # keys of the texts of pairs, the better one first
    for source in (*PUBLISHED, *FORMS):
        if not (data / SETS[source].folder).is_dir():
            continue
        if source in PUBLISHED:
            some = read_set(data, source, seed, bad)
        else:
            rows = list(read_rows(data, source, bad))
            some = split([example for row in rows for example in _examples(row, source)], source, seed)
            preferred += [(plain_key(row[0].text), plain_key(row[1].text)) for row in rows if len(row) == 2]
        check_signs(str(source), ((example.text, example.harmless) for example in some))
        found += some
    if not found:
        folders = ", ".join(info.folder for info in SETS.values())
        raise DataMissing(f"{data} holds none of the folders {folders}")
    found += more
    kept, repeated, held_back = _clean(found)
    kept = at_most(limit, kept)
    _check(kept)
    return Corpus(kept, _pairs(kept, preferred, seed), repeated, held_back)


def last_questions(corpus: Corpus, seed: int) -> Corpus:
    """The harmful and the refusing validation answers as the training part, with as many of those that train, drawn
    by the seed. The helpful ones still validate; there are no pairs.

    Raises `DataInvalid` where no helpful answer validates.
    """
    unseen = [item for item in corpus.examples if item.part is Part.VALIDATION and item.kind is not Kind.HELPFUL]
    known = [item for item in corpus.examples if item.part is Part.TRAIN]
    drawn = random.Random(f"{seed} known").sample(known, min(len(unseen), len(known)))
    measure = [item for item in corpus.examples if item.part is Part.TEST]
    helpful = [item for item in corpus.examples if item.part is Part.VALIDATION and item.kind is Kind.HELPFUL]
    if not helpful:
        raise DataInvalid("no helpful answer validates: with the other ones trained on, nothing sets a threshold")
    return replace(
        corpus, examples=[*drawn, *(replace(item, part=Part.TRAIN) for item in unseen), *helpful, *measure], pairs=[]
    )


def _examples(row: Row, source: Source) -> list[Example]:
    """Sets other than GPTFuzz do not say which harmless answers refuse; the opening tells."""
    examples = []
    for question, text, harmless in row:
        kind = Kind.HARMFUL if not harmless else Kind.REFUSING if is_refusal(text) else Kind.HELPFUL
        examples.append(Example(text.strip(), kind, source, plain_key(question), question))
    return examples


def _clean(found: Sequence[Example]) -> tuple[list[Example], int, int]:
    """The examples without what repeats a text, and without training answers to questions that measure elsewhere;
    and how many of each were left out. The first to come keeps a text, and what measures comes from the set that is
    read first: GPTFuzz's, JailbreakBench's and AlpacaEval's parts stay what they are."""
    measures: dict[str, Source] = {}
    for example in found:
        if example.part is not Part.TRAIN:
            measures.setdefault(plain_key(example.question), example.source)
    seen = {""}
    kept: list[Example] = []
    repeated = held_back = 0
    for example in found:
        key = plain_key(example.text)
        if key in seen:
            repeated += 1
        elif example.part is Part.TRAIN and measures.get(plain_key(example.question), example.source) is not (
            example.source
        ):
            held_back += 1
        else:
            seen.add(key)
            kept.append(example)
    return kept, repeated, held_back


def _check(examples: Sequence[Example]) -> None:
    counts = sizes(examples)
    for part in Part:
        kinds = {kind for (_, its, kind), count in counts.items() if its is part and count}
        if Kind.HARMFUL not in kinds or not kinds - {Kind.HARMFUL}:
            raise DataInvalid(f"the {part} part needs harmful and harmless answers; more data is needed")
        if part is Part.TRAIN and Kind.HELPFUL not in kinds:
            raise DataInvalid(
                "the training part has no helpful answer (harmless, and no refusal): a detector that never saw one "
                "learns to flag all that does not refuse; add the folder alpaca-eval or answers of your own"
            )


def _pairs(examples: Sequence[Example], preferred: Iterable[tuple[str, str]], seed: int) -> list[tuple[int, int]]:
    """Of training answers: the pairs of sets that have them, and a harmless with a harmful answer to one question of
    those that have none."""
    place = {plain_key(example.text): number for number, example in enumerate(examples)}
    pairs = []
    paired: set[int] = set()
    for better, worse in preferred:
        one, other = place.get(better), place.get(worse)
        if one is None or other is None or one == other or paired & {one, other}:
            continue
        if examples[one].part is examples[other].part is Part.TRAIN:
            pairs.append((one, other))
            paired |= {one, other}
    groups: dict[tuple[Source, str], tuple[list[int], list[int]]] = {}
    for number, example in enumerate(examples):
        if example.part is Part.TRAIN and number not in paired:
            groups.setdefault((example.source, example.group), ([], []))[not example.harmless].append(number)
    rng = random.Random(f"{seed} pairs")
    for _, (harmless, harmful) in sorted(groups.items()):
        rng.shuffle(harmful)
        pairs += zip(harmless, harmful, strict=False)
    return pairs
