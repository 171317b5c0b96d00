"""What eyes are asked while they learn: the letters in patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.models.vision.letters import INSIDE, letter
from .eyes_model import SIDE, Eyes, patch_at, pixels_of
from .pictures import Line, Picture

_BLANK_PATCH = 0.15  # weight of a patch without letters; most have none


def letters_of(lines: Sequence[Line]) -> Tensor:
    """The letters in each patch, [patches, INSIDE] int64, 0 for none. Of two lines in one row of patches only the
    first counts."""
    letters = torch.zeros(SIDE * SIDE, INSIDE, dtype=torch.int64)
    used: set[int] = set()
    for line in lines:
        row = patch_at(line.y)
        if row in used:
            continue
        used.add(row)
        inside: dict[int, list[int]] = {}
        for character, x in zip(line.text, line.xs, strict=True):
            inside.setdefault(patch_at(x), []).append(letter(character))
        for column, some in inside.items():
            letters[row * SIDE + column, : len(some)] = torch.tensor(some[:INSIDE])
    return letters


def letters_loss(eyes: Eyes, pictures: Sequence[Picture], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of the letters in each patch; that there is none is a letter, too. The eyes are computed in `dtype`."""
    named = eyes.computed(dtype, pixels_of([picture.image for picture in pictures]).to(device))
    letters = torch.stack([letters_of(picture.lines) for picture in pictures]).to(device)
    loss = F.cross_entropy(named.flatten(0, -2).float(), letters.flatten(), reduction="none").view(letters.shape)
    weight = torch.where((letters > 0).any(-1), 1.0, _BLANK_PATCH)
    return (loss.mean(-1) * weight).sum() / weight.sum()
