"""States of words that nobody drew, put together from patches of pictures: a vocabulary takes millions of examples.

Heads that look along a row carry the code of the letters there unchanged. So what the layer above the letters has of
a patch depends on its own state and on ten codes, each of which some patch of some picture has for the same letters.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .eyes_gaze import GAZES
from .eyes_model import CODE, LETTER_COUNT, LETTERS, LETTERS_AFTER, SIDE, Eyes
from .eyes_targets import EMPTY, Speller, wanted
from .pictures import Line

_SHELVED_BLANK = 0.15  # share of patches without letters that a library has
_SILENT_BESIDE = 0.15  # share of patches with letters around, where no token begins, that are learned from,
_SILENT = 0.05  # and of those with none


class Library(NamedTuple):
    """Patches in the order of the letters in them. keys: the letters as one number each, [kinds], ascending; first,
    counts: of each kind's patches, [kinds]. Of patches: which one of a picture it was, [n]; its state below the gaze,
    [n, hidden]; its letters' code, [n, CODE]."""

    keys: Tensor
    first: Tensor
    counts: Tensor
    patch: Tensor
    states: Tensor
    codes: Tensor


class Examples(NamedTuple):
    """Patches of pages that are not drawn. kinds: of a `Library`, of the patch itself and of those at GAZES, [n, 1 +
    heads]; tokens: [n]; windows: [n, WINDOW], uint8."""

    kinds: Tensor
    tokens: Tensor
    windows: Tensor


@torch.no_grad()
def library(eyes: Eyes, drawn: Iterable[tuple[Tensor, Tensor]]) -> Library:
    """drawn: pixels of pictures, [images, 3, height, width], and their letters as `Wanted` has them.

    Of each kind the half is kept whose letters the eyes read best: a state is made of eleven patches, and one that
    misleads spoils it. Of patches without letters, which most are, fewer.
    """
    layer = eyes.layers[LETTERS_AFTER]
    parts: list[tuple[Tensor, ...]] = []
    for pixels, letters in drawn:
        states, named, _ = eyes.spell(pixels)
        codes = layer.self_attn.v_proj(layer.layer_norm1(states))[..., :CODE]
        doubt = F.cross_entropy(named.flatten(0, -2).float(), letters.flatten(), reduction="none")
        doubt = doubt.view(letters.shape).sum(-1)
        key = keys_of(letters)
        kept = (key != 0) | (torch.rand(key.shape).to(key.device) < _SHELVED_BLANK)
        image, patch = kept.nonzero(as_tuple=True)
        parts.append((*(value[image, patch] for value in (key, doubt, states, codes)), patch))
    key, doubt, states, codes, patch = (torch.cat(values) for values in zip(*parts, strict=True))
    order = doubt.argsort()
    order = order[key[order].argsort(stable=True)]
    keys, counts = key[order].unique_consecutive(return_counts=True)
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(order), device=order.device) - first.repeat_interleave(counts)
    best = (counts + 1) // 2
    order = order[rank < best.repeat_interleave(counts)]
    return Library(keys, best.cumsum(0) - best, best, patch[order], states[order], codes[order])


def examples(library: Library, pages: Iterable[tuple[Line, ...]], speller: Speller) -> Examples:
    """Of pages, all patches where a token begins, and some of the others, as far as the library has their letters."""
    device = library.keys.device
    column = torch.arange(SIDE)
    seen = torch.stack([torch.where(((at := column + by) >= 0) & (at < SIDE), at, column) for by in (0, *GAZES)], 1)
    parts = []
    for lines in pages:
        tokens, letters, windows = wanted(lines, speller)
        around = keys_of(letters).view(SIDE, SIDE)[:, seen].flatten(0, 1)  # [patches, 1 + heads]
        share = torch.where((around != 0).any(1), _SILENT_BESIDE, _SILENT)
        chosen = (tokens != EMPTY) | (torch.rand(len(tokens)) < share)
        parts.append((around[chosen], tokens[chosen], windows[chosen].byte()))
    around, tokens, windows = (torch.cat(values).to(device) for values in zip(*parts, strict=True))
    kinds = torch.searchsorted(library.keys, around).clamp_max(len(library.keys) - 1)
    known = (library.keys[kinds] == around).all(1)
    return Examples(kinds[known].int(), tokens[known], windows[known])


@torch.no_grad()
def composed(eyes: Eyes, library: Library, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """States behind the layer's attention, as `Eyes.look_around` makes them, [n, hidden], and which patches of a
    picture they are of, [n]. kinds: of `Examples`; which patch of its kind each is, is chosen at random."""
    attention = eyes.layers[LETTERS_AFTER].self_attn
    kinds = kinds.long()
    chosen = library.first[kinds] + (torch.rand(kinds.shape).to(kinds.device) * library.counts[kinds]).long()
    # at the end of a row heads look at their own patch
    chosen = torch.where(kinds == kinds[:, :1], chosen[:, :1], chosen)
    heads = [slice(head * attention.head_dim, head * attention.head_dim + CODE) for head in range(len(GAZES))]
    writes = torch.cat([attention.out_proj.weight[:, head] for head in heads], 1)
    brought = library.codes[chosen[:, 1:]].flatten(1) @ writes.t() + attention.out_proj.bias
    return library.states[chosen[:, 0]] + brought, library.patch[chosen[:, 0]]


def keys_of(letters: Tensor) -> Tensor:
    """One number for the letters of a patch, 0 for none. letters: [..., LETTERS]."""
    places = torch.tensor([LETTER_COUNT**place for place in reversed(range(LETTERS))], device=letters.device)
    return (letters * places).sum(-1)
