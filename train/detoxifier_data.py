"""Makes a detoxifier's training data: a harmless answer to each harmful one of a set, by a teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..engine.guards.prompts import rewrite_with_question
from ..engine.text import segments_text
from .corpus import read_corpus
from .data import Kind, Part, plain_key
from .journal import Journal
from .loop import Progress
from .rows import Bad, DataMissing, json_rows, refuse
from .teachers import Teacher
from .triples import Triple


class Harmful(NamedTuple):
    question: str
    text: str


class Made(NamedTuple):
    """Triples in the file, and harmful answers for which the teacher had none: the next run asks for them again."""

    triples: int
    failed: int


def read_harmful(source: Path, *, seed: int = 0, bad: Bad = refuse) -> list[Harmful]:
    """The harmful answers of a file (rows with question and harmful), or those of the sets under a data directory
    that train: what measures is left alone.

    Raises `DataMissing` and `DataInvalid`.
    """
    if source.is_dir():
        examples = read_corpus(source, seed=seed, bad=bad).examples
        found = [
            Harmful(item.question, item.text)
            for item in examples
            if item.part is Part.TRAIN and item.kind is Kind.HARMFUL
        ]
    else:
        found = []
        for where, row in json_rows(source, bad):
            question, text = row.get("question"), row.get("harmful")
            if isinstance(question, str) and isinstance(text, str) and text.strip():
                found.append(Harmful(question, text.strip()))
            else:
                bad(f"{where}: needs question and harmful")
    unique = {plain_key(item.text): item for item in reversed(found)}
    if not unique:
        raise DataMissing(f"{source} holds no harmful answer")
    return list(reversed(unique.values()))


def paired_triples(data: Path, *, seed: int = 0, bad: Bad = refuse) -> list[Triple]:
    """Harmful training answers with a harmless one that a set itself has to the same question, mostly a refusal: what
    the released script trains on. Raises as `read_harmful` does."""
    corpus = read_corpus(data, seed=seed, bad=bad)
    both = [(corpus.examples[one], corpus.examples[other]) for one, other in corpus.pairs]
    found = [
        Triple(worse.question, worse.text, better.text) for better, worse in both if better.harmless > worse.harmless
    ]
    if not found:
        raise DataMissing(f"{data} holds no question with a harmful and a harmless answer")
    return found


def make_triples(
    harmful: Sequence[Harmful], teacher: Teacher, out: Path, *, progress: Progress | None = None
) -> Made:
    """Ask the teacher by the published prompt for what `out` has not yet; each triple is written when it is there."""
    failed = 0
    with Journal(out) as journal:
        keys = [_key(item) for item in harmful]
        left = [place for place, key in enumerate(keys) if key not in journal.rows]
        questions = [segments_text(rewrite_with_question(*harmful[place])) for place in left]
        for done, (number, text) in enumerate(teacher(questions), 1):
            item = harmful[left[number]]
            if text is None or not text.strip() or plain_key(text) == plain_key(item.text):
                failed += 1
            else:
                row = {"question": item.question, "harmful": item.text, "harmless": text.strip()}
                journal.add(keys[left[number]], row)
            if progress is not None:
                progress("rewriting", done, len(left))
        return Made(len(journal.rows), failed)


def write_triples(triples: Sequence[Triple], out: Path) -> Made:
    """Add what `out` has not yet, in the form that `make_triples` writes."""
    with Journal(out) as journal:
        for item in triples:
            key = _key(Harmful(item.question, item.harmful))
            if key not in journal.rows:
                journal.add(key, item._asdict())
        return Made(len(journal.rows), 0)


def _key(item: Harmful) -> str:
    return hashlib.sha256("\n".join(map(plain_key, item)).encode()).hexdigest()[:16]
