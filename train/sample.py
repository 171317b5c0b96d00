"""Answers together with the features of one layer and pooling: what a fit sees. It fits nothing itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .card import Pooling
from .data import Example
from .features import Features


@dataclass(frozen=True, eq=False)
class Sample:
    """Answers with what a head reads of them: states [answers, hidden], and of their beginnings, if any, states
    [beginnings, hidden], the number of the answer and the tokens [beginnings]."""

    examples: list[Example]
    states: Tensor
    beginnings: Tensor
    owners: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, examples: list[Example], features: Features, layer: int, pooling: Pooling) -> Sample:
        if pooling == "mean":
            return cls(examples, features.mean[layer], features.beginnings[layer], features.owners, features.lengths)
        none = torch.empty(0, dtype=torch.long)
        return cls(examples, features.last[layer], features.last[layer][:0], none, none)

    def __add__(self, other: Sample) -> Sample:
        return Sample(
            self.examples + other.examples,
            torch.cat((self.states, other.states)),
            torch.cat((self.beginnings, other.beginnings)),
            torch.cat((self.owners, other.owners + len(self.examples))),
            torch.cat((self.lengths, other.lengths)),
        )

    def only(self, keep: Tensor) -> Sample:
        """keep: [answers] bool."""
        examples = [example for example, its in zip(self.examples, keep.tolist(), strict=True) if its]
        kept = keep[self.owners]
        number = keep.cumsum(0) - 1
        return Sample(
            examples, self.states[keep], self.beginnings[kept], number[self.owners[kept]], self.lengths[kept]
        )

    @property
    def harmless(self) -> Tensor:
        """[answers] bool."""
        return torch.tensor([example.harmless for example in self.examples])
