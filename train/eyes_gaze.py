"""Where the heads of the layer above the letters look before they learn: at the patches beside, in the same row.

Left to chance they would have to find out first that words run from left to right.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .eyes_model import CODE, LETTERS_AFTER, SIDE, Eyes

GAZES = (1, 2, 3, 4, 5, 6, 7, 8, -1, -2)  # for each head: how many patches further on it looks
_SHARPNESS = 25.0  # of queries and keys; a patch looked at gets all of a head's attention
_GAIN = 1.0  # how large what all heads bring is beside what a patch's state has of its own
_PENALTY = 1e-3


@torch.no_grad()
def look_along_rows(eyes: Eyes, pixels: Tensor) -> None:
    """Set queries and keys so that each head looks as `GAZES` says (at its own patch, where the row ends), values so
    that it brings the code of the letters there, and outputs so that each head writes where states hardly differ
    otherwise: what eleven patches say has to stand in one state side by side. The layers above look nowhere yet.

    pixels: [images, 3, height, width] of some pictures. What a patch's state says about its row and column is read by
    ridge regression.
    """
    states = eyes.spell(pixels)[0]
    layer = eyes.layers[LETTERS_AFTER]
    attention = layer.self_attn
    normed = layer.layer_norm1(states).flatten(0, 1)
    place, offset = _places(normed, len(pixels))
    letters = eyes.code.weight
    codes = normed @ letters.t()
    middle = codes.mean(0)
    # those of patches with letters differ the most from the middle; they are what has to be heard
    largest = (codes - middle).square().sum(1).quantile(0.9).sqrt()
    own = (states - states.mean((0, 1))).flatten(0, 1).square().sum(1).mean().sqrt()
    gain = _GAIN * own / (largest * len(GAZES) ** 0.5)
    spare = torch.linalg.eigh(torch.cov(states.flatten(0, 1).t())).eigenvectors  # least variance first
    for part in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
        part.weight.zero_()
        part.bias.zero_()
    for head, further in enumerate(GAZES):
        first = head * attention.head_dim
        rows, code = slice(first, first + 2 * SIDE), slice(first, first + CODE)
        moved = _moved(further).to(place)
        attention.q_proj.weight[rows] = _SHARPNESS * moved @ place
        attention.q_proj.bias[rows] = _SHARPNESS * moved @ offset
        attention.k_proj.weight[rows] = _SHARPNESS * place
        attention.k_proj.bias[rows] = _SHARPNESS * offset
        attention.v_proj.weight[code] = letters
        attention.v_proj.bias[code] = -middle
        attention.out_proj.weight[:, code] = gain * spare[:, head * CODE : (head + 1) * CODE]
    for above in eyes.layers[LETTERS_AFTER + 1 :]:
        above.self_attn.out_proj.weight.zero_()
        above.self_attn.out_proj.bias.zero_()


def _places(states: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """(weight [2 * SIDE, hidden], bias): a patch's row and its column, one-hot, from its state."""
    at = torch.arange(SIDE * SIDE, device=states.device)
    wanted = torch.cat([F.one_hot(at // SIDE, SIDE), F.one_hot(at % SIDE, SIDE)], 1).repeat(images, 1).to(states)
    known = torch.cat([states, torch.ones_like(states[:, :1])], 1)
    penalty = torch.full_like(known[0], _PENALTY * len(known))
    penalty[-1] = 0
    found = torch.linalg.solve(known.t() @ known + penalty.diag(), known.t() @ wanted).t()
    return found[:, :-1], found[:, -1]


def _moved(further: int) -> Tensor:
    """[2 * SIDE, 2 * SIDE]: from one-hot row and column to those so many columns further on, or the same."""
    matrix = torch.zeros(2 * SIDE, 2 * SIDE)
    matrix[:SIDE, :SIDE] = torch.eye(SIDE)
    for column in range(SIDE):
        there = column + further
        matrix[SIDE + (there if 0 <= there < SIDE else column), SIDE + column] = 1
    return matrix
