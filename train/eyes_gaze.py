"""Where the heads of a tower's upper layers look before they learn: at the patches beside, in the same row.

Left to chance they would have to find out first that words run from left to right.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .eyes_model import SIDE, Eyes

# By layer above the letters, for each head: how many patches further on it looks.
GAZES = ((1, 2, 3, 4), (5, 6, 7, -1))
_SHARPNESS = 10.0  # of queries and keys; a patch looked at gets nearly all of a head's attention
_PENALTY = 1e-3


@torch.no_grad()
def look_along_rows(eyes: Eyes, pixels: Tensor) -> None:
    """Set queries and keys so that each head looks as `GAZES` says (at its own patch, where the row ends), and values
    so that it brings what names the letters there.

    pixels: [images, 3, height, width] of some pictures. What a patch's state says about its row and column is read by
    ridge regression.
    """
    weight = eyes.letters.weight
    letters = torch.linalg.svd(weight - weight.mean(0), full_matrices=False).Vh
    states = eyes.vision_tower.embeddings(pixels)
    layers = eyes.vision_tower.encoder.layers
    lower, upper = layers[: -len(GAZES)], layers[-len(GAZES) :]
    for layer in lower:
        states = layer(states, None)
    for layer, gazes in zip(upper, GAZES, strict=True):
        attention = layer.self_attn
        place, offset = _places(layer.layer_norm1(states).flatten(0, 1), len(pixels))
        width = attention.head_dim
        for part in (attention.q_proj, attention.k_proj, attention.v_proj):
            part.weight.zero_()
            part.bias.zero_()
        for head, further in enumerate(gazes):
            rows = slice(head * width, head * width + 2 * SIDE)
            moved = _moved(further).to(place)
            attention.q_proj.weight[rows] = _SHARPNESS * moved @ place
            attention.q_proj.bias[rows] = _SHARPNESS * moved @ offset
            attention.k_proj.weight[rows] = _SHARPNESS * place
            attention.k_proj.bias[rows] = _SHARPNESS * offset
            attention.v_proj.weight[head * width : (head + 1) * width] = letters[:width]
        torch.nn.init.orthogonal_(attention.out_proj.weight, 0.7)
        attention.out_proj.bias.zero_()
        states = layer(states, None)


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
