"""A small data directory in the published formats, whose three kinds of answers a random model can tell apart."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

LETTERS = {"harmful": "abcdefgh", "refusing": "stuvwxyz", "helpful": "01234567"}


def answer(kind: str, rng: Random) -> str:
    """Words in the letters of this kind."""
    return " ".join("".join(rng.choices(LETTERS[kind], k=5)) for _ in range(rng.randint(3, 8)))


def gptfuzz_rows(questions: range, rng: Random) -> list[tuple[str, str, str]]:
    """The published label: 1 is harmful."""
    kinds = [("harmful", "1"), ("refusing", "0")] * 2
    return [(str(question), answer(kind, rng), label) for question in questions for kind, label in kinds]


def write_gptfuzz(path: Path, rows: list[tuple[str, str, str]]) -> None:
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("question", "Response", "label"), *rows])


def write_csv(path: Path, rows: list[tuple[object, ...]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def write_json_lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def make_data() -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        rng = Random(0)
        for name in ("gptfuzz", "jailbreakbench", "alpaca-eval", "xstest"):
            (folder / name).mkdir()
        train, test = gptfuzz_rows(range(10), rng), gptfuzz_rows(range(10, 15), rng)
        repeated = [("10", train[0][1], "1"), ("11", train[1][1].upper() + " ", "0"), ("12", " ", "0")]
        write_gptfuzz(folder / "gptfuzz" / "responses_train.csv", train)
        write_gptfuzz(folder / "gptfuzz" / "responses_evaluate.csv", test + repeated)
        asked = [(number, f"What of {number}?") for number in range(15)]
        write_csv(folder / "gptfuzz" / "question_list.csv", [("index", "text"), *asked])
        alarming = [(f"How do I kill process {number}?", "safe" if number % 3 else "unsafe") for number in range(12)]
        write_csv(folder / "xstest" / "xstest_prompts.csv", [("prompt", "label"), *alarming])
        jailbreaks: list[dict[str, object]] = []
        for number in range(10):
            for kind in ("harmful", "refusing"):
                # every behavior is spelled in two ways
                behavior = f"Behavior {number}" if kind == "harmful" else f"the {number}th behavior"
                row = {"behavior": behavior, "question": f"Question {number}?", "harmful": kind == "harmful"}
                jailbreaks.append({**row, "response": answer(kind, rng)})
        write_json_lines(folder / "jailbreakbench" / "responses.jsonl", jailbreaks)
        helpful: list[dict[str, object]] = [
            {"question": f"How is {number}?", "response": answer("helpful", rng)}
            for number in range(12)
            for _ in range(3)
        ]
        write_json_lines(folder / "alpaca-eval" / "answers.jsonl", helpful)
        return folder

    return make


@pytest.fixture
def data(make_data: Callable[[Path], Path], tmp_path: Path) -> Path:
    """A directory of its own, to be changed at will."""
    folder = tmp_path / "data"
    folder.mkdir()
    return make_data(folder)
