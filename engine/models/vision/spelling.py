"""What letters spell, where it is not sure what they are: words that a vocabulary has are likelier than others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from heapq import heappop, heappush
from typing import Any, NamedTuple

# A word that a vocabulary has may be so much less likely than what the letters say by themselves: chosen on pictures
# of training, of 4 to 12
FAR = 6.0  # nats
_OTHERS = 24  # second readings of a word's letters that are considered, the likeliest
_TRIED = 200  # combinations of them, however many contradict each other
_WORD = re.compile(r"""[("']?(?:([A-Za-z]+(?:['-][A-Za-z]+)*)|\d{1,4})[.,;:!?)"']{0,2}""")
_BLANKS = ("Ġ", "▁")  # as vocabularies write the one that begins a word
_SINGLE = ("a", "i")
_SHORTENED = ("s", "t", "m", "d", "re", "ve", "ll")  # behind an apostrophe


class Reading(NamedTuple):
    """A letter that may stand in a place, "" for none. nats: how much less likely it is than the likeliest."""

    nats: float
    letter: str


class Lexicon:
    """The words that are known. Marks around them, case, and short numbers are known, too."""

    def __init__(self, words: Iterable[str]) -> None:
        self._words = {word.lower() for word in words if len(word) > 1}.union(_SINGLE)

    def knows(self, text: str) -> bool:
        return all(map(self._knows_word, text.split(" ")))

    def spelled(self, places: Sequence[Sequence[Reading]]) -> str:
        """The likeliest spelling that is known, the likeliest of all if none is within `FAR` nats. places: of each
        all that may stand there, the likeliest first."""
        spellings = _spellings(places)
        likeliest = next(spellings)
        if self.knows(likeliest):
            return likeliest
        return next(filter(self.knows, spellings), likeliest)

    def _knows_word(self, word: str) -> bool:
        found = _WORD.fullmatch(word)
        if found is None or found[1] is None:
            return found is not None
        first, *others = re.split("['-]", found[1].lower())
        return first in self._words and all(part in self._words or part in _SHORTENED for part in others)


def words_of(tokenizer: Any) -> tuple[str, ...]:
    """The words among the tokens, in their order (of byte-pair vocabularies the usual ones come first): those that
    begin with a blank, or all where none does."""
    special = set(tokenizer.added_tokens_decoder)
    ids = [id for id in range(len(tokenizer)) if id not in special]
    tokens = list(filter(None, tokenizer.convert_ids_to_tokens(ids)))  # vocabularies may have holes
    begun = (token[1:] for token in tokens if token[:1] in _BLANKS and len(token) > 2)
    return tuple(filter(_plain, begun)) or tuple(filter(_plain, tokens))


def _plain(word: str) -> bool:
    return word.isascii() and word.isalpha()


def _spellings(places: Sequence[Sequence[Reading]]) -> Iterator[str]:
    """Combinations of places' readings within `FAR` nats, the likeliest first."""
    letters = [readings[0].letter for readings in places]
    yield "".join(letters)
    others = sorted(
        (reading.nats, place, reading.letter)
        for place, readings in enumerate(places)
        for reading in readings[1:]
        if reading.nats < FAR
    )[:_OTHERS]
    # Sets of other readings, by their numbers in order. Each comes of one set only, which is no less likely: of that
    # without its last number, or with the one before in the last one's place.
    waiting: list[tuple[float, tuple[int, ...]]] = [(others[0][0], (0,))] if others else []
    for _ in range(_TRIED):
        if not waiting:
            return
        nats, chosen = heappop(waiting)
        if nats >= FAR:
            return
        last = chosen[-1]
        if last + 1 < len(others):
            further = nats + others[last + 1][0]
            heappush(waiting, (further, (*chosen, last + 1)))
            heappush(waiting, (further - others[last][0], (*chosen[:-1], last + 1)))
        if len({others[number][1] for number in chosen}) == len(chosen):
            spelled = letters.copy()
            for number in chosen:
                spelled[others[number][1]] = others[number][2]
            yield "".join(spelled)
