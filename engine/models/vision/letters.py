"""Eyes that read: the rows of LLaVA's projector name letters, and patches say the tokens of the words they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import isqrt
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ...errors import CheckpointMismatch, InvalidMessage
from ...images import LoadedImage
from ...text import Codec, Untrusted
from .adapter import PreparedImage
from .llava import LlavaVision

INSIDE = 6  # letters of a patch: the characters whose middle is in it, and blanks between them
LETTERS = 96  # none, and what ASCII prints
_NONE = ord(" ") - 1
_GREY = (127, 127, 127)


class LetterVision(LlavaVision):
    """codec, embed: the language model's, of texts, and of tokens, [n] to [n, hidden].

    A row of the projector is `INSIDE` vectors side by side; their products with `codes` say how likely each letter is
    in each place. Rows of patches are read from left to right, from the top. An image says the tokens of what they
    spell, and in the places that are left `blank`, which lets the language model read them. They are like a user's
    text: none is a special token.
    """

    def __init__(
        self,
        config: Any,
        processor: Any,
        device: torch.device,
        dtype: torch.dtype,
        codec: Codec,
        embed: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(config, processor, device, dtype)
        self.pixels = processor.size.get("height")
        if self.pixels is None or self.pixels != processor.size.get("width"):
            raise CheckpointMismatch(f"eyes that read shrink images to squares, not to {dict(processor.size)}")
        if isqrt(self.count) ** 2 != self.count:
            raise CheckpointMismatch(f"eyes that read have a square of patches, not {self.count}")
        hidden = config.text_config.hidden_size
        self.codes = torch.empty(LETTERS, hidden // INSIDE, device=device, dtype=dtype)
        self.blank = torch.empty(self.count, hidden, device=device, dtype=dtype)
        self.codec = codec
        self.embed = embed

    def slots(self) -> Iterator[tuple[str, Tensor]]:
        yield from super().slots()
        yield "letters.codes", self.codes
        yield "letters.blank", self.blank

    def inputs(self, image: LoadedImage, images: int) -> dict[str, Tensor]:
        return super().inputs(replace(image, pixels=squared(image.pixels, self.pixels)), images)

    def features(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        rows = torch.cat(super().features(images))  # [images, patches, hidden]
        letters = likely(rows.float(), self.codes.float()).argmax(-1).cpu()
        return [told(tokens_of(text_of(one), self.codec), self.blank, self.embed).unsqueeze(0) for one in letters]


def likely(rows: Tensor, codes: Tensor) -> Tensor:
    """Logits of letters, [..., INSIDE, LETTERS], from the projector's rows, [..., hidden]. codes: [LETTERS, hidden //
    INSIDE]."""
    size = codes.shape[1]
    return rows[..., : INSIDE * size].unflatten(-1, (INSIDE, size)) @ codes.t()


def text_of(letters: Tensor) -> str:
    """The words that patches spell, row by row. letters: [patches, INSIDE], of a square, 0 for none.

    A blank ends a word, and so do two patches without letters: large ones leave single patches out.
    """
    side = isqrt(len(letters))
    text = ""
    for row in letters.view(side, side, INSIDE).tolist():
        empty = 0
        for inside in row:
            spelled = "".join(chr(one + _NONE) for one in inside if one)
            empty = 0 if spelled else empty + 1
            text += spelled or " " * (empty > 1)
        text += " "
    return " ".join(text.split())


def tokens_of(text: str, codec: Codec) -> list[int]:
    """Its tokens, none of them special. There are none where a vocabulary spells a special token in no other way."""
    try:
        return codec.encode([Untrusted(text)], add_special_tokens=False) if text else []
    except InvalidMessage:
        return []


def told(tokens: Sequence[int], blank: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """What an image says, [patches, hidden], as `blank` is: tokens while there is room, and `blank` behind them."""
    tokens = tokens[: len(blank)]
    words = embed(torch.tensor(tokens, dtype=torch.int64, device=blank.device))
    return torch.cat([words, blank[len(tokens) :]])


def letter(character: str) -> int:
    """The number of a character that ASCII prints, from 1: " "."""
    return ord(character) - _NONE


def squared(image: Image.Image, side: int) -> Image.Image:
    """A whole RGB image in a square, grey beside it."""
    return ImageOps.pad(image, (side, side), Image.Resampling.BICUBIC, _GREY)
