"""Utility sets in their official file formats, and how an answer to them is scored: what a guard must not cost."""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean

from ...train.rows import Bad, DataInvalid, DataMissing, read_text
from .cases import Case, Kind
from .sets import Reader, _below, _image, _object, _texts

OPTIONS = ("A", "B", "C", "D")
LETTER_ONLY = "Answer with the option's letter from the given choices directly."
ROTATED = 1_000_000  # MMBench numbers the rotated forms of a question by this much more


def mme(folder: Path, bad: Bad) -> list[Case]:
    """A folder a task, with `<id>.txt` (two lines: question, tab, Yes or No) beside the images, or in
    `questions_answers_YN` with the images in `images`."""
    tasks = sorted({path.parent for path in folder.rglob("*.txt")})
    if not tasks:
        raise DataMissing(f"{folder} has no <task>/*.txt")
    cases = []
    for place in tasks:
        split = place.name == "questions_answers_YN"
        task, images = (place.parent.name, place.parent / "images") if split else (place.name, place)
        for file in sorted(place.glob("*.txt")):
            image = _image(images / file.stem)
            for number, line in enumerate(read_text(file).splitlines(), 1):
                question, tab, answer = line.strip().rpartition("\t")
                if not line.strip():
                    continue
                if not tab or answer.strip().lower() not in ("yes", "no"):
                    bad(f"{file}, line {number}: needs question, tab, and Yes or No")
                    continue
                key, right = f"{task}/{file.stem}/{number}", answer.strip().lower()
                cases.append(Case("mme", task, key, Kind.UTILITY, question, question, image, right))
    return cases


def mm_vet(folder: Path, bad: Bad) -> list[Case]:
    """`mm-vet.json`: {id: {imagename, question, answer, capability}}, images in `images`."""
    file = next(iter(sorted(folder.rglob("mm-vet.json"))), folder / "mm-vet.json")
    cases = []
    for key, row in _object(file).items():
        values = _texts(row, ("imagename", "question", "answer"))
        skills = row.get("capability") if isinstance(row, dict) else None
        if values is None or not isinstance(skills, list) or not skills:
            bad(f"{file}, row {key}: needs imagename, question, answer and capability")
            continue
        name, question, answer = values
        scenario = "+".join(sorted(map(str, skills)))
        image = _below(file.parent, name)
        cases.append(Case("mm-vet", scenario, key, Kind.UTILITY, question, question, image, answer))
    return cases


def mmbench(folder: Path, bad: Bad) -> list[Case]:
    """`*.tsv`: index, question, hint, A to D, answer, category and image, as base64; a number there is the index of
    the row whose image it is. Files without answers (the test split's) are refused."""
    files = sorted(folder.glob("*.tsv"))
    if not files:
        raise DataMissing(f"{folder} has no *.tsv")
    cases: list[Case] = []
    for file in files:
        csv.field_size_limit(1 << 28)  # an image is a field
        rows = list(csv.DictReader(io.StringIO(read_text(file), newline=""), delimiter="\t"))
        images = {row.get("index"): row.get("image") or "" for row in rows}
        for number, row in enumerate(rows, 1):
            options = [(letter, row.get(letter)) for letter in OPTIONS if row.get(letter)]
            index, question, answer = (row.get(field) for field in ("index", "question", "answer"))
            if not index or not index.isdecimal() or not question or answer not in dict(options):
                bad(f"{file}, row {number}: needs index, question, options A to D, and an answer among them")
                continue
            hint = f"{row['hint']}\n" if row.get("hint") not in (None, "", "nan") else ""
            choices = "\n".join(f"{letter}. {text}" for letter, text in options)
            text = f"{hint}{question}\n{choices}\n{LETTER_ONLY}"
            image = images[index]
            image = images.get(image, "") if image.isdecimal() else image
            scenario = row.get("category") or "all"
            cases.append(Case("mmbench", scenario, index, Kind.UTILITY, text, text, image or None, answer))
    return cases


UTILITY_READERS: dict[str, Reader] = {"mme": mme, "mm-vet": mm_vet, "mmbench": mmbench}


def right(case: Case, text: str) -> float:
    """How right an answer is, from 0 to 1."""
    return _RIGHT[case.set](case, text)


def scores(name: str, cases: Sequence[Case], rights: Mapping[str, float]) -> dict[str, float]:
    """The set's own figures. rights: of the cases by id.

    MME (arXiv 2306.13394): accuracy and accuracy+ (both questions of an image right) of a task, summed over tasks,
    200 a task at most. MMBench (2307.06281): share of questions right, and where the file has their rotated forms,
    right in all of them. MM-Vet (2308.02490) as a mean, in percent; the published grade is GPT-4's, ours counts the
    parts of the right answer that are found in the given one."""
    if name == "mme":
        tasks: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for case in cases:
            tasks[case.scenario][case.id.rpartition("/")[0]].append(rights[case.id])
        of_questions = [mean(value for image in task.values() for value in image) for task in tasks.values()]
        of_images = [mean(min(image) for image in task.values()) for task in tasks.values()]
        return {
            "score": 100 * (sum(of_questions) + sum(of_images)),
            "of": 200.0 * len(tasks),
            "accuracy": 100 * mean(of_questions),
        }
    found = {"score": 100 * mean(rights[case.id] for case in cases), "of": 100.0}
    if name == "mmbench":
        forms: dict[int, list[float]] = defaultdict(list)
        for case in cases:
            forms[int(case.id) % ROTATED].append(rights[case.id])
        if len(forms) < len(cases):
            found["circular"] = 100 * mean(min(some) for some in forms.values())
    return found


def _yes_or_no(case: Case, text: str) -> float:
    """As MME reads it: the word, or what the first four letters say."""
    said = text.strip().lower()
    word = said if said in ("yes", "no") else next((one for one in ("yes", "no") if one in said[:4]), "other")
    return float(word == case.answer)


def _parts(case: Case, text: str) -> float:
    """The share of the parts that <AND> joins, of each any form that <OR> joins."""
    said = _plain(text)
    parts = [[_plain(form) for form in part.split("<OR>")] for part in case.answer.split("<AND>")]
    return mean(any(f" {form} " in f" {said} " for form in forms if form) for forms in parts)


def _letter(case: Case, text: str) -> float:
    """The first letter that stands alone."""
    found = re.search(r"\b([A-D])\b", text)
    return float(found is not None and found[1] == case.answer)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[\w.+-]*\w", text.casefold()))


_RIGHT: dict[str, Callable[[Case, str], float]] = {"mme": _yes_or_no, "mm-vet": _parts, "mmbench": _letter}


def check_answers(cases: Sequence[Case]) -> None:
    """Raises `DataInvalid` where a set has two cases of one name."""
    seen: set[tuple[str, str, str]] = set()
    for case in cases:
        key = (case.set, case.scenario, case.id)
        if key in seen:
            raise DataInvalid(f"{case.set}: {case.id} of {case.scenario} occurs twice")
        seen.add(key)
