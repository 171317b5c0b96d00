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
    """Answers with what a head reads of them: states [answers, hidden] and tokens `sizes` [answers], and of their
    beginnings, if any, states [beginnings, hidden], the number of the answer and the tokens [beginnings]."""

    examples: list[Example]
    states: Tensor
    beginnings: Tensor
    owners: Tensor
    lengths: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, examples: list[Example], features: Features, layer: int, pooling: Pooling) -> Sample:
        if pooling == "mean":
            early = (features.beginnings[layer], features.owners, features.lengths)
            return cls(examples, features.mean[layer], *early, features.sizes)
        none = torch.empty(0, dtype=torch.long)
        return cls(examples, features.last[layer], features.last[layer][:0], none, none, features.sizes)

    def __add__(self, other: Sample) -> Sample:
        return Sample(
            self.examples + other.examples,
            torch.cat((self.states, other.states)),
            torch.cat((self.beginnings, other.beginnings)),
            torch.cat((self.owners, other.owners + len(self.examples))),
            torch.cat((self.lengths, other.lengths)),
            torch.cat((self.sizes, other.sizes)),
        )

    def only(self, keep: Tensor) -> Sample:
        """keep: [answers] bool."""
        examples = [example for example, its in zip(self.examples, keep.tolist(), strict=True) if its]
        kept = keep[self.owners]
        number = keep.cumsum(0) - 1
        early = (self.beginnings[kept], number[self.owners[kept]], self.lengths[kept])
        return Sample(examples, self.states[keep], *early, self.sizes[keep])

    @property
    def harmless(self) -> Tensor:
        """[answers] bool."""
        return torch.tensor([example.harmless for example in self.examples])
