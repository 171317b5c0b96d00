"""How well logits tell answers apart, by kind and source: the numbers of a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp
from typing import NamedTuple

import torch
from torch import Tensor

from .beginnings import found_after
from .card import Flagged, Quality, Stopped
from .data import Example, Kind, Source
from .fit import auroc, threshold_at


class Beginnings(NamedTuple):
    """Of some answers: logits, the number of the answer, its tokens until there; [beginnings] each. sizes: [answers],
    all tokens of each."""

    logits: Tensor
    owners: Tensor
    lengths: Tensor
    sizes: Tensor

    def found_after(self, threshold: float) -> Tensor:
        """The tokens of each answer's first beginning below the logit [answers], infinity where none is."""
        return found_after(self.logits, self.owners, self.lengths, len(self.sizes), threshold)


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
        found = beginnings.found_after(early)
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


def stopped(examples: Sequence[Example], beginnings: Beginnings, stated: Mapping[float, float]) -> list[Stopped]:
    """What prefix thresholds stop of some answers. stated: shares of harmless answers, and the logit of each."""
    kinds = [where(examples, kind) for kind in Kind]
    rows = []
    for share, logit in stated.items():
        found = beginnings.found_after(logit)
        in_time = found[kinds[0]] <= beginnings.sizes[kinds[0]] / 2
        ever = (float(found[its].isfinite().double().mean()) if its.any() else 0.0 for its in kinds)
        rows.append(Stopped(share, 1 / (1 + exp(-logit)), float(in_time.double().mean()), *ever))
    return rows
