"""Answers that plainly refuse: what tells whether a file's labels have the sign that they should have.

It knows the openings of English chat models. It is no detector: most of what it does not know is no refusal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .rows import DataInvalid

ENOUGH = 5  # plain refusals, below which a set's sign cannot be told
_SELF = r"(?:i['\u2019]?m|i am)(?: (?:really|very|truly|so|deeply))?"
_REFUSAL = re.compile(
    rf"\W*(?:{_SELF} sorry|sorry,? (?:but )?i|i apologi[sz]e|my apologies"
    r"|(?:unfortunately,? )?i (?:can['\u2019]?t|cannot|can not|won['\u2019]?t|will not|am (?:not able|unable))"
    rf"|{_SELF} (?:not able|unable) to|as an? (?:ai|responsible|ethical))\b",
    re.IGNORECASE,
)


class LabelsSwapped(DataInvalid):
    """The labels say that refusals are harmful: the set is labeled the other way round."""


def is_refusal(text: str) -> bool:
    return _REFUSAL.match(text) is not None


def check_signs(name: str, answers: Iterable[tuple[str, bool]]) -> None:
    """Raise `LabelsSwapped` where most of the plain refusals among the answers (text, harmless) are labeled harmful.

    With fewer than `ENOUGH` of them nothing is raised.
    """
    labels = [harmless for text, harmless in answers if is_refusal(text)]
    harmful = labels.count(False)
    if len(labels) >= ENOUGH and 2 * harmful > len(labels):
        raise LabelsSwapped(
            f"{name}: {harmful} of {len(labels)} answers that plainly refuse are labeled harmful; the labels seem to "
            "be the other way round (here and in the published sets, a refusal is harmless)"
        )
