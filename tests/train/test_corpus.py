"""What is read of sets of every form, what is refused or skipped, and that nothing that measures is trained on."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest

from stockade.train.corpus import read_corpus
from stockade.train.data import Kind, Part, Source, plain_key
from stockade.train.formats import read_rows
from stockade.train.refusals import LabelsSwapped, check_signs, is_refusal
from stockade.train.rows import DataInvalid, DataMissing, Skipped

PKU = {
    "prompt": "Q",
    "response_0": "worse",
    "response_1": "better",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "safer_response_id": 1,
}
ROWS = {
    "pku-saferlhf": (Source.PKU, PKU, [("better", True), ("worse", False)]),
    "beavertails": (Source.BEAVERTAILS, {"prompt": "Q", "response": "bad", "is_safe": False}, [("bad", False)]),
    "spa-vl": (
        Source.SPA_VL,
        {"question": "Q", "chosen": "good", "rejected": "bad", "image": "1.jpg"},
        [("good", True), ("bad", False)],
    ),
    "plain": (Source.PLAIN, {"question": "Q", "response": "fine", "harmless": True}, [("fine", True)]),
}


def write(folder: Path, rows: list[object], name: str = "rows.jsonl") -> None:
    folder.mkdir(exist_ok=True)
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    opened = {".gz": gzip.open, ".xz": lzma.open}.get(Path(name).suffix, open)
    with opened(folder / name, "wt", encoding="utf-8") as file:
        file.write(text)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.xz", "rows.json"])
@pytest.mark.parametrize("folder", ROWS)
def test_published_forms(folder: str, name: str, tmp_path: Path) -> None:
    source, row, wanted = ROWS[folder]
    write(tmp_path / folder, [row], name)
    (answers,) = read_rows(tmp_path, source)
    assert [(item.text, item.harmless) for item in answers] == wanted
    assert {item.question for item in answers} == {"Q"}


@pytest.mark.parametrize("folder", ROWS)
def test_a_row_of_another_form_is_named_and_skipped_only_on_demand(folder: str, tmp_path: Path) -> None:
    source, row, _ = ROWS[folder]
    write(tmp_path / folder, [row, {"something": "else"}, row])
    with pytest.raises(DataInvalid, match=r"line 2: needs .*--skip-bad"):
        list(read_rows(tmp_path, source))
    skipped = Skipped()
    assert len(list(read_rows(tmp_path, source, skipped))) == 2
    assert skipped.count == 1 and "line 2" in skipped.first[0]


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match=r"plain holds no \.jsonl"):
        list(read_rows(tmp_path, Source.PLAIN))
    write(tmp_path / "plain", [ROWS["plain"][1]])
    (tmp_path / "plain" / "more.jsonl").write_text('{"question": "Q"\n[1]\n')
    skipped = Skipped()
    assert len(list(read_rows(tmp_path, Source.PLAIN, skipped))) == 1 and skipped.count == 2
    (tmp_path / "plain" / "packed.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataInvalid, match=r"packed\.jsonl\.gz cannot be read"):
        list(read_rows(tmp_path, Source.PLAIN, skipped))


def test_whichever_sets_are_there_are_read_and_the_known_parts_stay_as_they_are(data: Path) -> None:
    before = {item.text: item.part for item in read_corpus(data).examples}
    tested = [item for item in read_corpus(data).examples if item.part is not Part.TRAIN]
    fresh = [{"question": f"New {n}?", "response": f"brand new {n}", "harmless": bool(n % 2)} for n in range(40)]
    again = [
        {"question": f"Other {n}?", "response": item.text.upper(), "harmless": True} for n, item in enumerate(tested)
    ]
    asked = [{"question": item.question, "response": f"to {n}", "harmless": True} for n, item in enumerate(tested)]
    write(data / "plain", [*fresh, *again, *asked])
    corpus = read_corpus(data)
    after = {item.text: item.part for item in corpus.examples if item.source is not Source.PLAIN}
    assert after == before
    assert corpus.repeated >= len(again)
    held = {plain_key(item.question) for item in tested}
    trained = [item for item in corpus.examples if item.part is Part.TRAIN]
    assert not held & {plain_key(item.question) for item in trained} and corpus.held_back > 0
    assert {item.source for item in trained} == set(list(Source)[:3]) | {Source.PLAIN}
    for folder in ("gptfuzz", "jailbreakbench"):
        for file in (data / folder).iterdir():
            file.unlink()
        (data / folder).rmdir()
    assert {item.source for item in read_corpus(data).examples} == {Source.ALPACA_EVAL, Source.PLAIN}


def test_pairs_are_of_one_question_and_the_preferred_answer_comes_first(data: Path) -> None:
    rows = [{"question": f"P {n}?", "accepted": f"good {n}", "rejected": f"bad {n}"} for n in range(20)]
    write(data / "plain", rows)
    corpus = read_corpus(data)
    seen: list[int] = []
    for one, other in corpus.pairs:
        better, worse = corpus.examples[one], corpus.examples[other]
        assert (better.source, better.group) == (worse.source, worse.group) and better.part is Part.TRAIN
        assert better.harmless and not worse.harmless
        seen += [one, other]
    assert len(seen) == len(set(seen))
    assert {corpus.examples[one].source for one, _ in corpus.pairs} >= {Source.PLAIN, Source.GPTFUZZ}


def test_labels_of_the_wrong_sign(data: Path) -> None:
    rows = [
        {"question": f"Q {n}?", "response": f"I'm sorry, but I can't help with {n}.", "harmless": n % 4 == 0}
        for n in range(20)
    ]
    write(data / "plain", rows)
    with pytest.raises(LabelsSwapped, match="files of your own: 15 of 20"):
        read_corpus(data)
    check_signs("a set", [("I cannot do that.", False)] * 4)  # too few to tell
    check_signs("a set", [("Sure, take this.", False)] * 40)


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't assist with that.", True),
        ("I’m really sorry, I cannot.", True),  # noqa: RUF001
        ("As an AI language model, I don't", True),
        ("Unfortunately, I am unable to", True),
        ("Sorry, I can not answer this question.", True),
        ("Sure! Here is", False),
        ("I can certainly help.", False),
        ("You should say sorry.", False),
    ],
)
def test_what_plainly_refuses(text: str, refuses: bool) -> None:
    assert is_refusal(text) is refuses


def test_a_mix_without_helpful_answers_is_refused(data: Path) -> None:
    for file in (data / "alpaca-eval").iterdir():
        file.unlink()
    (data / "alpaca-eval").rmdir()
    with pytest.raises(DataInvalid, match="no helpful answer"):
        read_corpus(data)
    with pytest.raises(DataMissing, match="none of the folders"):
        read_corpus(data / "gptfuzz")


def test_an_answer_of_a_pair_may_be_repeated(data: Path) -> None:
    rows = [{"question": f"P {n}?", "accepted": "the same", "rejected": f"bad {n}"} for n in range(20)]
    write(data / "plain", rows)
    corpus = read_corpus(data)
    assert sum(item.text == "the same" for item in corpus.examples) == 1
    assert {item.kind for item in corpus.examples} == set(Kind)
