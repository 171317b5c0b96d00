"""What is read, what is dropped, and that no question, behavior or text stands on two sides of the split."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

from stockade.train.data import Kind, Part, Source, read_examples, read_questions, sizes
from stockade.train.rows import DataInvalid, DataMissing

FILES = (
    "gptfuzz/responses_train.csv",
    "gptfuzz/responses_evaluate.csv",
    "jailbreakbench/responses.jsonl",
    "alpaca-eval/answers.jsonl",
    "gptfuzz/question_list.csv",
    "xstest/xstest_prompts.csv",
)


def key(text: str) -> str:
    return " ".join(text.split()).casefold()


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_in_two_parts_and_no_text_comes_twice(data: Path, seed: int):
    examples = read_examples(data, seed=seed)
    parts = defaultdict(set)
    for example in examples:
        parts[example.source, example.group].add(example.part)
    assert all(len(some) == 1 for some in parts.values())
    texts = [key(example.text) for example in examples]
    assert len(texts) == len(set(texts)) and "" not in texts


def test_every_part_has_every_kind(data: Path):
    counts = sizes(read_examples(data))
    for part in Part:
        assert counts[Source.GPTFUZZ, part, Kind.HARMFUL] and counts[Source.GPTFUZZ, part, Kind.REFUSING]
        assert counts[Source.JAILBREAKBENCH, part, Kind.HARMFUL]
        assert counts[Source.ALPACA_EVAL, part, Kind.HELPFUL]


def test_a_text_of_the_training_file_is_dropped_from_the_evaluation_file(data: Path):
    counts = sizes(read_examples(data))
    assert counts[Source.GPTFUZZ, Part.TEST, Kind.HARMFUL] == 10
    assert counts[Source.GPTFUZZ, Part.TEST, Kind.REFUSING] == 10
    assert sum(n for (source, *_), n in counts.items() if source is Source.GPTFUZZ) == 60


def test_our_label_is_the_opposite_of_the_published_one(data: Path):
    for example in read_examples(data):
        letter = example.text.strip()[0]
        assert example.harmless == (letter not in "abcdefgh")
        assert example.kind is (Kind.HARMFUL if letter in "abcdefgh" else example.kind)


def test_two_spellings_of_a_behavior_stay_together(data: Path):
    groups = defaultdict(set)
    for example in read_examples(data):
        if example.source is Source.JAILBREAKBENCH:
            groups[example.group].add(example.kind)
    assert len(groups) == 10
    assert all(kinds == {Kind.HARMFUL, Kind.REFUSING} for kinds in groups.values())


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_lines(data: Path):
    def split(seed: int) -> dict[str, Part]:
        return {example.text: example.part for example in read_examples(data, seed=seed)}

    first = split(0)
    assert split(0) == first
    assert any(split(seed) != first for seed in (1, 2, 3))
    path = data / FILES[3]
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    assert split(0) == first


def test_limit_is_of_each_source_part_and_kind(data: Path):
    assert set(sizes(read_examples(data, limit=1)).values()) == {1}


def test_every_answer_has_its_question(data: Path):
    for example in read_examples(data):
        number = example.group.rstrip("?").split()[-1].removesuffix("th")
        wanted = {
            Source.GPTFUZZ: f"What of {number}?",
            Source.JAILBREAKBENCH: f"Question {number}?",
            Source.ALPACA_EVAL: f"How is {number}?",
        }
        assert example.question == wanted[example.source]


def test_alarming_questions_are_the_safe_ones_and_have_no_answer_yet(data: Path):
    questions = read_questions(data)
    assert [item.question for item in questions] == [f"How do I kill process {n}?" for n in range(12) if n % 3]
    assert {item.part for item in questions} == set(Part)
    assert {(item.text, item.kind) for item in questions} == {("", Kind.HELPFUL)}
    assert len(read_questions(data, limit=1)) == 3


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(data: Path, name: str):
    (data / name).unlink()
    with pytest.raises(DataMissing, match=Path(name).name):
        read_questions(data) if "xstest" in name else read_examples(data)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (FILES[0], b"question,Response,label\n1,text,2\n"),
        (FILES[0], b"question,answer\n1,text\n"),
        (FILES[0], b'question,Response,label\n1,"text'),
        (FILES[1], b"question,Response,label\n1,\xff\xfe,0\n"),
        (FILES[1], b"question,Response,label\n3,a new text,0\n"),  # question 3 is a training question
        (FILES[2], b"[]\n"),
        (FILES[2], b"{\n"),
        (FILES[2], json.dumps({"behavior": "b", "question": "q", "response": "r", "harmful": "no"}).encode()),
        (FILES[2], json.dumps({"behavior": "b", "question": "q", "response": None, "harmful": True}).encode()),
        (FILES[3], json.dumps({"question": "q"}).encode()),
        (FILES[4], b"index,text\n0,one\n"),
        (FILES[5], b"prompt,label\nq,maybe\n"),
    ],
)
def test_a_file_of_another_form_is_refused(data: Path, name: str, content: bytes):
    (data / name).write_bytes(content)
    with pytest.raises(DataInvalid):
        read_questions(data) if "xstest" in name else read_examples(data)
