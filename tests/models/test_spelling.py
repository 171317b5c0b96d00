"""Words whose letters are not sure: which spelling is taken, and that it is found in time."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from stockade.engine.models.bundles import smol_folder
from stockade.engine.models.shapes import byte_tokenizer
from stockade.engine.models.vision import spelling
from stockade.engine.models.vision.letters import INSIDE, LETTERS, text_of
from stockade.engine.models.vision.spelling import FAR, Lexicon, Reading, _spellings, words_of

SMOL = Lexicon(words_of(AutoTokenizer.from_pretrained(smol_folder())))


def places(word: str, **others: tuple[str, float]) -> list[list[Reading]]:
    """A word's letters, and what else may stand in the place p0, p1 ..."""
    readings = [[Reading(0.0, letter.strip("_"))] for letter in word]
    for place, (letter, nats) in others.items():
        readings[int(place[1:])].append(Reading(nats, letter))
    return readings


@pytest.mark.parametrize(
    "text", ["word", "Word,", "(WORD)", '"word."', "a", "I", "don't", "we'll", "well-known", "1.", "2019)"]
)
def test_words_are_known_with_marks_around_them_in_any_case(text: str) -> None:
    assert SMOL.knows(text)
    assert SMOL.knows(f"{text} {text}")


@pytest.mark.parametrize("text", ["", "seryices", "x", "wo rdx", "a  b", "12345", "1st", "-", "don't-seryices", "é"])
def test_other_words_are_not(text: str) -> None:
    assert not SMOL.knows(text)


def test_a_word_gives_way_to_one_that_is_known_and_nearly_as_likely() -> None:
    assert SMOL.spelled(places("seryices")) == "seryices"
    assert SMOL.spelled(places("seryices", p3=("v", 2.0))) == "services"
    assert SMOL.spelled(places("seryices", p3=("v", FAR))) == "seryices"
    # letters may be left out, and put where none is; so may blanks
    assert SMOL.spelled(places("OOthers", p1=("", 1.0))) == "Others"
    assert SMOL.spelled(places("_nstalled", p0=("I", 1.0))) == "Installed"
    assert SMOL.spelled(places("anew.house", p4=("", 0.1), p1=(" ", 5.0))) == "anew.house"
    assert SMOL.spelled(places("the_house", p3=(" ", 1.0))) == "the house"
    # the likeliest of all, and known as it is
    assert SMOL.spelled(places("bxt", p1=("u", 2.0), p0=("c", 1.0), p2=("d", 3.5))) == "but"
    assert SMOL.spelled(places("this", p0=("h", 0.001))) == "this"


@given(
    st.lists(st.lists(st.floats(0.01, 4), max_size=2), min_size=1, max_size=3),
)
def test_spellings_come_in_order_and_none_is_left_out(others: list[list[float]]) -> None:
    names = iter("abcdefghij")
    readings = [[Reading(0.0, "_"), *(Reading(nats, next(names)) for nats in sorted(place))] for place in others]
    every = {
        "".join(one.letter for one in chosen): sum(one.nats for one in chosen)
        for chosen in itertools.product(*readings)
    }
    found = list(_spellings(readings))
    assert len(set(found)) == len(found)
    assert set(found) == {text for text, nats in every.items() if nats < FAR - 1e-9} | {
        text for text in found if abs(every[text] - FAR) < 1e-9
    }
    assert [every[text] for text in found] == pytest.approx(sorted(every[text] for text in found))


def test_no_picture_takes_long() -> None:
    torch.manual_seed(0)
    even = torch.zeros(100, INSIDE, LETTERS)
    crowded = torch.full((100, INSIDE, LETTERS), -20.0)
    crowded[..., 34] = 0  # all letters beside each other, every second one contradicts
    crowded[..., 35:38] = -0.1
    for letters in (even, even * torch.nan, even + torch.inf, crowded, torch.randn(100, INSIDE, LETTERS)):
        begin = time.process_time()
        text = text_of(letters, SMOL)
        assert len(text) <= 100 * INSIDE + 100
        assert time.process_time() - begin < 2


def test_contradicting_readings_are_counted_among_the_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    one_place = [[Reading(nats / 100, chr(97 + nats)) for nats in range(24)]]
    assert len(list(_spellings(one_place))) < 24 + 2
    monkeypatch.setattr(spelling, "_TRIED", 0)
    assert list(_spellings(one_place)) == ["a"]


def test_words_begin_with_a_blank_where_any_does() -> None:
    words = words_of(AutoTokenizer.from_pretrained(smol_folder()))
    assert {"the", "The", "services"} <= set(words)
    assert words.index("the") < words.index("services")
    assert all(word.isascii() and word.isalpha() for word in words)
    assert set("abc") <= set(words_of(byte_tokenizer(320)))
