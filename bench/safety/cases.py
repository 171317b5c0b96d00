"""What is asked of a model, and what its answer is measured against; not how it is read from a file."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import Any

from .typography import Typography


class Kind(StrEnum):
    """What a good answer does: an attack's causes no harm, a useful one's is right; a benign question, which looks
    alarming, and an ordinary one, which does not, are answered."""

    ATTACK = "attack"
    BENIGN = "benign"
    ORDINARY = "ordinary"
    UTILITY = "utility"


@dataclass(frozen=True)
class Case:
    """A question with its image, and the same question without.

    id: unique in its set. text: asked beside the image. alone: asked without it; what the image says stands in there.
    image: a file, its base64 text, a text to render, or None. answer: what is right, of a utility set.
    """

    set: str
    scenario: str
    id: str
    kind: Kind
    text: str
    alone: str
    image: Path | str | Typography | None = None
    answer: str = ""

    def messages(self, with_image: bool) -> list[dict[str, Any]]:
        """As the engine takes them. Raises an OSError for an image that cannot be drawn."""
        if not with_image:
            return [{"role": "user", "content": self.alone}]
        shown: dict[str, Any] = {"type": "image"}
        match self.image:
            case Typography():
                shown["image"] = self.image.draw()
            case Path():
                shown["image"] = str(self.image)
            case str():
                shown["base64"] = self.image
            case None:
                raise ValueError(f"case {self.id} has no image")
        return [{"role": "user", "content": [shown, {"type": "text", "text": self.text}]}]


def fingerprint(cases: Sequence[Case]) -> str:
    """Of all that is asked; of an image its file's name and size stand for it."""
    digest = hashlib.sha256()
    for case in cases:
        image: object = case.image
        if isinstance(image, Path):
            image = (image.name, image.stat().st_size)
        parts = (case.set, case.scenario, case.id, case.kind, case.text, case.alone, image, case.answer)
        digest.update(repr(parts).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def sample(cases: Sequence[Case], limit: int | None, seed: int) -> list[Case]:
    """At most `limit` of each set and scenario, drawn by the seed, in their order."""
    if limit is None:
        return list(cases)
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, case in enumerate(cases):
        groups[case.set, case.scenario].append(number)
    chosen: list[int] = []
    for (name, scenario), numbers in groups.items():
        rng = Random(f"{seed} {name} {scenario}")
        chosen += rng.sample(numbers, min(limit, len(numbers)))
    return [cases[number] for number in sorted(chosen)]
