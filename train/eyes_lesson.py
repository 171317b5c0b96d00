"""What eyes are asked while they learn: the letters in patches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.models.vision.letters import INSIDE, letter
from .eyes_model import SIDE, Eyes, patches_at, pixels_of
from .pictures import Line, Picture

_EITHER = 1 / 6  # of a patch: a letter or line whose middle is as near to a border may be said on either side of it
_NEVER = -1e4  # in place of the logarithm of 0, which has no gradient


class Said(NamedTuple):
    """A line as patches can say it. letters: of each character; columns: where its middle is, in patches from the
    left; row: the line's, from the top."""

    letters: tuple[int, ...]
    columns: tuple[float, ...]
    row: float


def lines_said(lines: Sequence[Line]) -> list[Said]:
    """From the top. Of two lines in one row of patches only the first counts, of a patch's letters the first
    `INSIDE`."""
    said: dict[int, Said] = {}
    for line in lines:
        row = patches_at(line.y)
        inside: Counter[int] = Counter()
        letters, columns = [], []
        for character, x in zip(line.text, line.xs, strict=True):
            column = patches_at(x)
            inside[int(column)] += 1
            if inside[int(column)] <= INSIDE:
                letters.append(letter(character))
                columns.append(column)
        said.setdefault(int(row), Said(tuple(letters), tuple(columns), row))
    return [said[row] for row in sorted(said)]


def letters_loss(eyes: Eyes, pictures: Sequence[Picture], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Minus the log-likelihood that patches say all lines and nothing else, a letter. Where a letter or line is near
    a border of patches, either side is right. The eyes are computed in `dtype`."""
    named = eyes.computed(dtype, pixels_of([picture.image for picture in pictures]).to(device))
    named = named.float().log_softmax(-1).unflatten(1, (SIDE, SIDE))  # [pictures, rows, columns, INSIDE, LETTERS]
    pages = [lines_said(picture.lines) for picture in pictures]
    pairs = [
        (page, row, number, line)
        for page, lines in enumerate(pages)
        for number, line in enumerate(lines)
        for row in _near([line.row])[:, 0].nonzero().flatten().tolist()
    ]
    nothing = named[..., 0].sum((-2, -1))  # [pictures, rows]
    lines = named.new_full((len(pages), SIDE, max(map(len, pages))), _NEVER)
    if pairs:
        at = torch.tensor([pair[:3] for pair in pairs], device=device).unbind(1)
        lines = lines.index_put(at, line_likelihoods(named[at[:2]], [pair[3] for pair in pairs]))
    # [pictures, 1 + most lines]: of the rows so far, where so many lines have been said
    total = F.pad(nothing.new_zeros(len(pages), 1), (0, lines.shape[-1]), value=_NEVER)
    for row in range(SIDE):
        another = F.pad(total[:, :-1] + lines[:, row], (1, 0), value=_NEVER)
        total = torch.logaddexp(total + nothing[:, row, None], another)
    counts = torch.tensor([len(page) for page in pages], device=device)
    letters = sum(len(line.letters) for page in pages for line in page)
    return -total.gather(1, counts[:, None]).sum() / max(1, letters)


def line_likelihoods(named: Tensor, lines: Sequence[Said]) -> Tensor:
    """Of each row of patches the log-likelihood that it says the line, [rows]. named: log-likelihoods of letters,
    [rows, SIDE, INSIDE, LETTERS], fp32."""
    longest = max(INSIDE, *(len(line.letters) for line in lines))
    letters = torch.zeros(len(lines), longest + INSIDE, dtype=torch.int64)
    allowed = torch.zeros(len(lines), SIDE, longest + INSIDE, dtype=torch.bool)
    for number, line in enumerate(lines):
        letters[number, : len(line.letters)] = torch.tensor(line.letters)
        allowed[number, :, : len(line.columns)] = _near(line.columns)
    letters, allowed = letters.to(named.device), allowed.to(named.device)
    each = named.gather(-1, letters[:, None, None].expand(-1, SIDE, INSIDE, -1))
    each = each.masked_fill(~allowed[:, :, None], _NEVER)  # [rows, SIDE, INSIDE, letters]
    begins = torch.arange(longest + 1, device=named.device)
    places = torch.arange(INSIDE, device=named.device)
    # [rows, SIDE, begins, 0 to INSIDE letters]: that a patch says so many letters from there on, then none
    some = F.pad(each[:, :, places, begins[:, None] + places].cumsum(-1), (1, 0))
    none = F.pad(named[..., 0].flip(-1).cumsum(-1).flip(-1), (0, 1))
    patch = some + none[:, :, None]
    # [rows, 1 + letters]: of the columns so far, where so many letters have been said
    total = F.pad(named.new_zeros(len(lines), 1), (0, longest), value=_NEVER)
    for column in range(SIDE):
        ways = total[..., None] + patch[:, column]
        total = torch.stack(
            [F.pad(ways[:, : longest + 1 - count, count], (count, 0), value=_NEVER) for count in range(INSIDE + 1)]
        ).logsumexp(0)
    ends = torch.tensor([len(line.letters) for line in lines], device=named.device)
    return total.gather(1, ends[:, None]).squeeze(1)


def _near(places: Sequence[float]) -> Tensor:
    """Whether a place may be said by a patch, [SIDE, places], bool. places: in patches from the first one's edge."""
    return (torch.tensor(places) - torch.arange(SIDE)[:, None] - 0.5).abs() <= 0.5 + _EITHER
