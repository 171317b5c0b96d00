"""How well logits tell answers apart, by kind and source: the numbers of a card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .beginnings import found_after
from .card import Flagged, Quality
from .data import Example, Kind, Source
from .fit import auroc, threshold_at


class Beginnings(NamedTuple):
    """Of some answers: logits, the number of the answer, its tokens until there; [beginnings] each."""

    logits: Tensor
    owners: Tensor
    lengths: Tensor


def where(examples: Sequence[Example], kind: Kind, source: Source | None = None) -> Tensor:
    """[examples] bool: of that kind, and of that source where one is given."""
    return torch.tensor([example.kind is kind and source in (None, example.source) for example in examples])


def quality(harmful: Tensor, harmless: Tensor) -> Quality:
    """Of logits [n], [m]; harmful is below 0."""
    at_1, at_5 = (float((harmful < threshold_at(harmless, share)).double().mean()) for share in (0.01, 0.05))
    caught = float((harmful < 0).double().mean())
    return Quality(len(harmful), len(harmless), auroc(harmless, harmful), at_1, at_5, caught)


def flagged(
    examples: Sequence[Example], logits: Tensor, beginnings: Beginnings, early: float | None
) -> list[Flagged]:
    """What is below 0, and below `early` (None: nothing) before it ends, for each kind and source."""
    found = torch.full((len(logits),), torch.inf)
    if early is not None:
        found = found_after(beginnings.logits, beginnings.owners, beginnings.lengths, len(logits), early)
    rows = []
    for kind in Kind:
        for source in Source:
            some = where(examples, kind, source)
            if some.any():
                soon = found[some]
                tokens = float(soon[soon.isfinite()].median()) if soon.isfinite().any() else None
                share = float((logits[some] < 0).double().mean())
                rows.append(Flagged(source, kind, len(soon), share, float(soon.isfinite().double().mean()), tokens))
    return rows
