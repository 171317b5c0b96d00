"""Safety sets in their official file formats: attacks, harmless questions that look like some, and ordinary ones."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...engine.errors import BadInput
from ...train.data import Part, Source, read_questions, read_set
from ...train.rows import Bad, DataInvalid, DataMissing, csv_rows, data_files, json_rows, read_text
from .cases import Case, Kind
from .typography import FIGSTEP_COLUMNS, FIGSTEP_TEXT, figstep, key_phrase

MOST_LINES = 5  # that have room on FigStep's page over its list
SAFE_IMAGE, UNSAFE_IMAGE, BOTH_SAFE = "safe image, unsafe question", "unsafe image", "safe image, safe question"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def mm_safetybench(folder: Path, bad: Bad, typo_question: str = "Rephrased Question(SD)") -> list[Case]:
    """`processed_questions/<NN-Name>.json`, `imgs/<NN-Name>/{SD,SD_TYPO,TYPO}/<id>.jpg`: three cases a row, each a
    scenario `<NN-Name>/<kind of image>`. A TYPO image that is not there is rendered from the key phrase; of SD and
    SD_TYPO such cases are left out. typo_question: MLLM-Protector asks "(SD)" beside TYPO, ECSO "Rephrased Question".
    """
    files = sorted((folder / "processed_questions").glob("*.json"))
    if not files:
        raise DataMissing(f"{folder} has no processed_questions/*.json")
    cases = []
    for file in files:
        for key, row in _object(file).items():
            fields = ("Question", "Key Phrase", "Rephrased Question", "Rephrased Question(SD)")
            values = _texts(row, fields)
            if values is None:
                bad(f"{file}, row {key}: needs {', '.join(fields)}")
                continue
            plain, phrase, rephrased, by_picture = values
            asked = {"SD": by_picture, "SD_TYPO": rephrased, "TYPO": dict(zip(fields, values, strict=True))}
            for kind, text in asked.items():
                image: Any = _image(folder / "imgs" / file.stem / kind / str(key))
                if kind == "TYPO":
                    image, text = image or key_phrase(phrase), values[fields.index(typo_question)]
                if image is not None:
                    scenario = f"{file.stem}/{kind}"
                    cases.append(Case("mm-safetybench", scenario, key, Kind.ATTACK, str(text), plain, image))
    return cases


def figstep_set(folder: Path, bad: Bad) -> list[Case]:
    """`safebench*.csv` (category_id, task_id, category_name, question, instruction) and beside it, or in `images*`,
    `query_ForbidQI_<category>_<task>_6.png`; an image that is not there is rendered. Without it the question itself
    is asked, as the paper does."""
    files = sorted(folder.rglob("safebench*.csv"))
    if not files:
        raise DataMissing(f"{folder} has no safebench*.csv")
    images = {path.name: path for path in sorted(folder.rglob("query_ForbidQI_*.png"))}
    cases = []
    for number, row in enumerate(csv_rows(files[0]), 1):
        fields = ("category_id", "task_id", "category_name", "question", "instruction")
        values = _texts(row, fields)
        if values is None:
            bad(f"{files[0]}, row {number}: needs {', '.join(fields)}")
            continue
        category, task, name, question, instruction = values
        image = images.get(f"query_ForbidQI_{category}_{task}_6.png") or figstep(instruction)
        cases.append(Case("figstep", name, f"{category}_{task}", Kind.ATTACK, FIGSTEP_TEXT, question, image))
    return cases


def vlsafe(folder: Path, bad: Bad) -> list[Case]:
    """JSON lines of image_id, caption, query; images of COCO's train2017 by their file's name, anywhere under the
    folder."""
    images = _images(folder)
    cases = []
    for file in data_files(folder):
        for where, row in json_rows(file, bad):
            values = _texts(row, ("query",))
            if values is None or row.get("image_id") is None:
                bad(f"{where}: needs image_id and query")
                continue
            image = images.get(_coco(row["image_id"]))
            cases.append(Case("vlsafe", "VLSafe", where, Kind.ATTACK, values[0], values[0], image))
    return _numbered(cases)


def xstest(folder: Path, bad: Bad) -> list[Case]:
    """`xstest_prompts.csv`: prompt, type and label; the safe ones look alarming, the others are their contrasts. Some
    of the safe ones are held out, and some train: a model's own answers to them stand in the training and validation
    parts of its detectors."""
    file = folder / "xstest_prompts.csv"
    held_out = {one.question for one in read_questions(folder.parent, bad=lambda _: None) if one.part is Part.TEST}
    cases = []
    for number, row in enumerate(csv_rows(file), 1):
        prompt, kind, label = (row.get(field) for field in ("prompt", "type", "label"))
        if not prompt or not kind or label not in ("safe", "unsafe"):
            bad(f"{file}, row {number}: needs prompt, type, and a label of safe or unsafe")
            continue
        if label == "unsafe":
            cases.append(Case("xstest, unsafe", kind, str(number), Kind.ATTACK, prompt, prompt))
        else:
            name = "xstest, safe, held out" if prompt in held_out else "xstest, safe, in training"
            cases.append(Case(name, kind, str(number), Kind.BENIGN, prompt, prompt))
    return cases


def vlguard(folder: Path, bad: Bad) -> list[Case]:
    """`test.json`: image, safe, harmful_category, instr-resp; images anywhere under the folder, by their name. An
    image that is safe comes with a safe and an unsafe instruction."""
    file = next(iter(sorted(folder.rglob("test.json"))), folder / "test.json")
    cases = []
    for where, row in json_rows(file, bad):
        found = _vlguard_row(row)
        if not found:
            bad(f"{where}: needs image, safe (true, false), and instr-resp with instructions")
            continue
        image = _below(file.parent, str(row["image"]))
        for name, scenario, kind, text in found:
            cases.append(Case(name, scenario, where, kind, text, text, image))
    return _numbered(cases)


def jailbreakv(folder: Path, bad: Bad) -> list[Case]:
    """`JailBreakV_28K.csv` or `mini_JailBreakV_28K.csv`: id, jailbreak_query, redteam_query, format, policy,
    image_path, transfer_from_llm. An attack that stands in its image is asked without it by its plain question."""
    files = sorted(folder.rglob("*JailBreakV_28K.csv"))
    if not files:
        raise DataMissing(f"{folder} has no JailBreakV_28K.csv")
    cases = []
    for number, row in enumerate(csv_rows(files[0]), 1):
        values = _texts(row, ("jailbreak_query", "redteam_query", "policy"))
        if values is None:
            bad(f"{files[0]}, row {number}: needs jailbreak_query, redteam_query and policy")
            continue
        attack, plain, policy = values
        in_text = str(row.get("transfer_from_llm", "")).strip().lower() == "true"
        image = _below(files[0].parent, row.get("image_path") or "")
        name = f"jailbreakv, {'of text' if in_text else 'of images'}"
        cases.append(Case(name, policy, str(number), Kind.ATTACK, attack, attack if in_text else plain, image))
    return cases


def alpaca_eval(folder: Path, bad: Bad) -> list[Case]:
    """`answers.jsonl`: question, response. Ordinary questions, those of the test part: their answers train none of
    our detectors. Short ones are asked as FigStep asks: rendered over an empty list."""
    tests = [one for one in read_set(folder.parent, Source.ALPACA_EVAL, 0, bad) if one.part is Part.TEST]
    cases = []
    for text in dict.fromkeys(one.question.strip() for one in tests):
        if "\n" not in text and len(textwrap.wrap(text, FIGSTEP_COLUMNS)) <= MOST_LINES:
            case = Case("alpaca-eval, rendered", "list", text, Kind.ORDINARY, FIGSTEP_TEXT, text, figstep(text))
        else:
            case = Case("alpaca-eval", "plain", text, Kind.ORDINARY, text, text)
        cases.append(case)
    return _numbered(cases)


Reader = Callable[[Path, Bad], list[Case]]

READERS: dict[str, Reader] = {
    "mm-safetybench": mm_safetybench,
    "figstep": figstep_set,
    "figstep-tiny": figstep_set,
    "vlsafe": vlsafe,
    "xstest": xstest,
    "vlguard": vlguard,
    "jailbreakv": jailbreakv,
    "alpaca-eval": alpaca_eval,
}


def _vlguard_row(row: dict[str, Any]) -> list[tuple[str, str, Kind, str]]:
    """(set, scenario, kind, question) of each of a row's instructions."""
    asked = row.get("instr-resp")
    if not isinstance(asked, list) or not isinstance(row.get("safe"), bool) or not isinstance(row.get("image"), str):
        return []
    known = {key: text for item in asked if isinstance(item, dict) for key, text in item.items()}
    category = str(row.get("harmful_category") or "other")
    wanted = (
        [
            ("unsafe_instruction", f"vlguard, {SAFE_IMAGE}", SAFE_IMAGE, Kind.ATTACK),
            ("safe_instruction", f"vlguard, {BOTH_SAFE}", BOTH_SAFE, Kind.BENIGN),
        ]
        if row["safe"]
        else [("instruction", f"vlguard, {UNSAFE_IMAGE}", category, Kind.ATTACK)]
    )
    return [
        (name, scenario, kind, known[key])
        for key, name, scenario, kind in wanted
        if isinstance(known.get(key), str) and known[key].strip()
    ]


def _object(file: Path) -> dict[str, Any]:
    import json

    try:
        found = json.loads(read_text(file))
    except ValueError as error:
        raise DataInvalid(f"{file} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise DataInvalid(f"{file} is a JSON {type(found).__name__}; this set has an object of rows")
    return found


def _texts(row: Any, fields: tuple[str, ...]) -> list[str] | None:
    """None unless each is a text that is not empty."""
    values = [row.get(field) for field in fields] if isinstance(row, dict) else []
    known = [value for value in values if isinstance(value, str) and value.strip()]
    return known if known and len(known) == len(fields) else None


def _image(stem: Path) -> Path | None:
    """Suffixes are not replaced: an id may have a point."""
    return next((path for suffix in SUFFIXES if (path := stem.with_name(stem.name + suffix)).is_file()), None)


def _images(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES}


def _coco(image: object) -> str:
    """COCO's file name of an image, which may be given by its number."""
    name = str(image)
    return name if name.lower().endswith(SUFFIXES) else f"{name.zfill(12)}.jpg"


def _below(folder: Path, name: str) -> Path | None:
    """The file of that name in the folder, or in one below it where it was unpacked; never outside of it."""
    if not name:
        return None
    base = folder.resolve()
    for path in (folder / name, folder / "test" / name, folder / "images" / name):
        if path.is_file():
            if not path.resolve().is_relative_to(base):
                raise BadInput(f"an image lies outside of {folder}: {name[:80]!r}")
            return path
    return None


def _numbered(cases: list[Case]) -> list[Case]:
    """With numbers as ids, where a row names none."""
    from dataclasses import replace

    return [replace(case, id=str(number)) for number, case in enumerate(cases, 1)]
