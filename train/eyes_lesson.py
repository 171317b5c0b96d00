"""What eyes are asked while they learn: the letters of patches, and the tokens that begin in them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .eyes_model import SIDE, Eyes, pixels_of
from .eyes_targets import EMPTY, Speller, Wanted, wanted
from .pictures import Picture

_OTHERS = 256  # tokens of a step's choice besides those that are right
# and, of a token's own, some of its nearest vectors and some words that begin alike: these are what it is taken for
_NEAREST = 16
_NEAR = 48  # of so many
_ALIKE = 8
_AT_ONCE = 1024  # tokens whose nearest are looked for
_BEGINNING = 3  # letters that are alike
# Of a vector that is said. Squares of distances between `smol`'s vectors are 13, to the nearest 4: with a variance of
# 1 even the exact vector leaves doubts, and blends of several cost little more.
_VARIANCE = 0.25
_NEARNESS = 0.5  # weight of the distance to the wanted vector beside the choice among vectors
_MINDED = 0.7  # share of this distance that counts errors as the language model minds them; the rest counts all alike
_WINDOWS = 0.3  # weight of the letters around beside it
_PLACES = 0.3  # weight of naming a patch's row and column beside its letters
_BLANK_PATCH = 0.15  # weight of the letter of a patch that has none; most have none


class Lesson:
    """What eyes are asked. embedding: what is said for each token, [vocabulary, hidden]. empty: [patches, hidden].
    sensitivity: how much an error minds, as `Reader.sensitivity` has it, [hidden, hidden]."""

    def __init__(self, speller: Speller, embedding: Tensor, empty: Tensor, sensitivity: Tensor) -> None:
        self.speller = speller
        tokenizer = speller.tokenizer
        self.embedding = embedding
        self.dtype = embedding.dtype
        self.empty = empty
        even = torch.eye(len(sensitivity), device=sensitivity.device)
        self.metric = (1 - _MINDED) * even + _MINDED * sensitivity
        added = set(tokenizer.get_added_tokens_decoder())
        known = [id for id in range(min(tokenizer.get_vocab_size(), len(embedding))) if id not in added]
        self.vocabulary = torch.tensor(known, device=embedding.device)
        # the vocabulary in the order of its first letters, and where in it each token's like begin, and how many
        begins = [text.strip().lower()[:_BEGINNING] for text in tokenizer.decode_batch([[id] for id in known])]
        order = sorted(range(len(known)), key=begins.__getitem__)
        self.by_beginning = self.vocabulary[torch.tensor(order, device=embedding.device)]
        self.alike = torch.zeros(len(embedding), 2, dtype=torch.long, device=embedding.device)
        place = 0
        for _, group in itertools.groupby(order, key=begins.__getitem__):
            members = list(group)
            self.alike[self.vocabulary[torch.tensor(members)]] = torch.tensor([place, len(members)]).to(self.alike)
            place += len(members)

    @cached_property
    def nearest(self) -> Tensor:
        """Of each token others, those with the nearest vectors, [vocabulary, at most _NEAR], int32."""
        vectors = self.embedding[self.vocabulary]
        halves = vectors.float().square().sum(1) / 2
        count = min(_NEAR, len(vectors) - 1)
        found = torch.zeros(len(self.embedding), count, dtype=torch.int32, device=vectors.device)
        for first in range(0, len(vectors), _AT_ONCE):
            some = vectors[first : first + _AT_ONCE]
            scores = (some @ vectors.t()).float() - halves
            scores[torch.arange(len(some)), torch.arange(first, first + len(some))] = -torch.inf
            found[self.vocabulary[first : first + _AT_ONCE]] = self.vocabulary[scores.topk(count).indices].int()
        return found

    def letters_loss(self, eyes: Eyes, pictures: Sequence[Picture]) -> Tensor:
        """Of the letters in each patch, and of where it is."""
        _, letters, places = eyes.computed(self.dtype, Eyes.spell, self.pixels(pictures))
        at = torch.arange(SIDE * SIDE, device=self.empty.device).repeat(len(pictures))
        rows, columns = places.flatten(0, 1).float().split(SIDE, dim=-1)
        place = F.cross_entropy(rows, at // SIDE) + F.cross_entropy(columns, at % SIDE)
        return _spelling(letters, self.asked(pictures).letters) + _PLACES * place

    def words_loss(self, eyes: Eyes, states: Tensor, patch: Tensor, tokens: Tensor, windows: Tensor) -> Tensor:
        """Of the tokens that patches say, and of the letters around. states: [n, hidden], as `Eyes.look_around` makes
        them; patch, tokens: [n]; windows: [n, WINDOW]."""
        spelled, said = eyes.computed(self.dtype, Eyes.say, states)
        return self._choice(said, patch, tokens) + _WINDOWS * _spelling(spelled, windows.long())

    def _choice(self, said: Tensor, patch: Tensor, target: Tensor) -> Tensor:
        """Loss of what patches say, [patches, hidden], where `target` is right: choice among vectors and distance."""
        others = torch.randint(len(self.vocabulary), (_OTHERS,)).to(target.device)
        candidates, places = torch.unique(
            torch.cat([target.clamp_min(0), self.vocabulary[others]]), return_inverse=True
        )
        spoken = (target != EMPTY).nonzero().flatten()
        rivals = self._rivals(target[spoken])
        vectors = self.embedding[rivals]
        against = torch.full((len(target), rivals.shape[1]), -torch.inf, device=target.device)
        likely = _likely((vectors @ said[spoken, :, None]).squeeze(-1), vectors)
        against[spoken] = likely.masked_fill(rivals == target[spoken, None], -torch.inf)
        scores = self._scores(said, self.empty[patch], self.embedding[candidates])
        right = torch.where(target == EMPTY, 0, places[: len(target)] + 1)
        exact = torch.where(
            (target == EMPTY)[:, None], self.empty[patch], self.embedding[target.clamp_min(0)].float()
        )
        error = said.float() - exact
        distance = ((error @ self.metric) * error).sum(-1).mean() / 2
        return F.cross_entropy(torch.cat([scores, against], 1), right) + _NEARNESS * distance

    def _rivals(self, tokens: Tensor) -> Tensor:
        """Of each token some whose vectors are the nearest, and some that begin with the same letters: [tokens,
        _NEAREST + _ALIKE]. The token itself may be among these."""
        device = self.by_beginning.device
        drawn = torch.randint(self.nearest.shape[1], (len(tokens), _NEAREST)).to(device)
        first, count = self.alike[tokens].unbind(1)
        alike = first[:, None] + (torch.rand(len(tokens), _ALIKE).to(device) * count[:, None]).long()
        return torch.cat([self.nearest[tokens].gather(1, drawn).long(), self.by_beginning[alike]], 1)

    @torch.no_grad()
    def said(self, eyes: Eyes, pictures: Sequence[Picture]) -> float:
        """The share of the pictures' tokens that their patches say, of the whole vocabulary and nothing."""
        right, all = 0, 0
        for first in range(0, len(pictures), 8):
            some = pictures[first : first + 8]
            tokens = self.asked(some).tokens
            vectors = eyes.computed(self.dtype, Eyes.see, self.pixels(some))
            image, patch = (tokens != EMPTY).nonzero(as_tuple=True)
            scores = self._scores(vectors[image, patch], self.empty[patch], self.embedding[self.vocabulary])
            found = scores.argmax(-1)
            meant = torch.where(found == 0, EMPTY, self.vocabulary[(found - 1).clamp_min(0)])
            right += int((meant == tokens[image, patch]).sum())
            all += len(image)
        return right / max(1, all)

    def lettered(self, some: Iterable[Sequence[Picture]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels and letters of pictures, as many at once as there come."""
        for pictures in some:
            yield self.pixels(pictures), self.asked(pictures).letters

    def pixels(self, pictures: Sequence[Picture]) -> Tensor:
        """On the lesson's device, [images, 3, height, width]."""
        return pixels_of([picture.image for picture in pictures]).to(self.empty.device)

    def asked(self, pictures: Sequence[Picture]) -> Wanted:
        """Of all pictures, with their number as the first dimension."""
        asked = [wanted(picture.lines, self.speller, picture.caption) for picture in pictures]
        return Wanted(*(torch.stack(values).to(self.empty.device) for values in zip(*asked, strict=True)))

    def _scores(self, said: Tensor, empty: Tensor, known: Tensor) -> Tensor:
        """Which vector was meant: `_likely` of [patches, 1 + known], the empty one first."""
        nothing = _likely((said.float() * empty).sum(-1), empty)
        return torch.cat([nothing[:, None], _likely(said @ known.t(), known)], dim=1)


def _likely(products: Tensor, vectors: Tensor) -> Tensor:
    """That vectors [..., hidden] were meant, whose products with what is said are given: log-probabilities but for a
    constant, of normal distributions with variance `_VARIANCE` around them, one of which made what is said."""
    return (products.float() - vectors.float().square().sum(-1) / 2) / _VARIANCE


def _spelling(named: Tensor, letters: Tensor) -> Tensor:
    """named: [..., n, 95]. letters: [..., n]. That there is none is a letter, too, and as important in a patch with
    letters as any."""
    loss = F.cross_entropy(named.flatten(0, -2).float(), letters.flatten(), reduction="none")
    weight = torch.where((letters > 0).any(-1, keepdim=True), 1.0, _BLANK_PATCH).expand(letters.shape).flatten()
    return (loss * weight).sum() / weight.sum()
