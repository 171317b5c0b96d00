"""The text of a sequence while it is decoded: pieces, stop strings, and never a part of one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockade.engine.models.shapes import byte_tokenizer
from stockade.engine.output import OutputText
from stockade.engine.text import Codec

CODEC = Codec(byte_tokenizer(384))


def ids_of(text: str) -> list[int]:
    return CODEC.encode_text(text, add_special_tokens=False)


def feed(text: OutputText, ids: list[int]) -> list[str]:
    """The pieces shown token by token, as the engine does: it ends with the token that completes a stop string."""
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            break
    pieces.append(text.flush())
    return pieces


@given(
    text=st.text(alphabet="aböЖ語😀 \n", max_size=40),
    stop=st.lists(st.text(alphabet="aböЖ語😀 ", min_size=1, max_size=4), max_size=3),
)
def test_pieces_join_to_the_text_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    output = OutputText(CODEC.detokenizer(), tuple(stop))
    pieces = feed(output, ids_of(text))
    assert "".join(pieces) == output.text
    assert text.startswith(output.text)
    assert not any(item in output.text for item in stop)
    assert output.stopped == any(item in text for item in stop)
    if not output.stopped:
        assert output.text == text
    else:
        assert any(text[len(output.text) :].startswith(item) for item in stop)


@given(text=st.text(alphabet="ab", min_size=1, max_size=30), stop=st.text(alphabet="ab", min_size=2, max_size=5))
def test_exactly_what_may_begin_a_stop_string_is_held_back(text: str, stop: str) -> None:
    output = OutputText(CODEC.detokenizer(), (stop,))
    shown = seen = ""
    for token in ids_of(text):
        seen += CODEC.decode([token])
        shown += output.push(token)
        if output.stopped:
            assert shown == seen[: seen.index(stop)]
            break
        held = next(n for n in range(len(stop) - 1, -1, -1) if seen.endswith(stop[:n]))
        assert shown == seen[: len(seen) - held]


def test_a_stop_string_across_tokens_is_cut() -> None:
    output = OutputText(CODEC.detokenizer(), ("END",))
    assert feed(output, ids_of("one ENtwo END three")) == [*feed_plain("one ENtwo "), *[""] * 4]
    assert output.text == "one ENtwo " and output.stopped


def feed_plain(text: str) -> list[str]:
    """What the pieces of "one ENtwo " look like: "E" and "N" wait until "t" decides."""
    pieces = list(text)
    first = text.index("E")
    pieces[first : first + 3] = ["", "", "ENt"]
    return pieces


def test_half_a_character_waits_and_is_replaced_at_the_end() -> None:
    output = OutputText(CODEC.detokenizer(), ())
    first, *rest = ids_of("é")
    assert rest and output.push(first) == ""
    assert output.flush() == "\ufffd" and output.text == "\ufffd"


@pytest.mark.parametrize("stop", [("\ufffd",), ("a", "ab", "b")])
def test_the_earliest_stop_string_wins(stop: tuple[str, ...]) -> None:
    output = OutputText(CODEC.detokenizer(), stop)
    feed(output, [*ids_of("xyz"), *ids_of("é")[:1], *ids_of("ab")])
    assert output.text in ("xyz", "xyz\ufffd") and output.stopped
