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
NOTHING = -1  # said where no token stands
_NONE = ord(" ") - 1
_GREY = (127, 127, 127)


class LetterVision(LlavaVision):
    """codec, embed: the language model's, of texts, and of tokens, [n] to [n, hidden].

    A row of the projector is `INSIDE` vectors side by side; their products with `codes` say how likely each letter is
    in each place. Rows of patches are read from left to right; a token's embedding stands where its word begins, or
    further right. The other patches say `blank`, each its own. Letters are text like a user's: none is a special
    token.
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
        tokens = torch.stack([tokens_of(one, self.codec) for one in letters]).to(self.device)
        said = torch.where(tokens[..., None] == NOTHING, self.blank, self.embed(tokens.clamp_min(0)))
        return list(said.unsqueeze(1))


def likely(rows: Tensor, codes: Tensor) -> Tensor:
    """Logits of letters, [..., INSIDE, LETTERS], from the projector's rows, [..., hidden]. codes: [LETTERS, hidden //
    INSIDE]."""
    size = codes.shape[1]
    return rows[..., : INSIDE * size].unflatten(-1, (INSIDE, size)) @ codes.t()


def tokens_of(letters: Tensor, codec: Codec) -> Tensor:
    """The tokens that patches say, [patches], NOTHING for none. letters: [patches, INSIDE], of a square, 0 for none.

    A blank ends a word, and so do two patches without letters. Of a row with more tokens than patches the last are
    left out.
    """
    side = isqrt(len(letters))
    said = [NOTHING] * len(letters)
    for row, patches in enumerate(letters.view(side, side, INSIDE).tolist()):
        tokens: list[int] = []
        columns: list[int] = []
        for word, column in _words(patches):
            if len(tokens) >= side:
                break
            try:
                found = codec.encode([Untrusted(f" {word}")], add_special_tokens=False)
            except InvalidMessage:
                continue  # some vocabularies have no other tokens for what spells a special one
            if len(found) > 1 and not codec.tokenizer.decode(found[:1]).strip():
                found = found[1:]  # the blank, a token of its own before digits, is a patch of its own, too
            tokens += found
            columns += range(column, column + len(found))
        for place, token in zip(_spread(columns, side), tokens, strict=False):
            said[row * side + place] = token
    return torch.tensor(said)


def _words(patches: Sequence[Sequence[int]]) -> Iterator[tuple[str, int]]:
    """The words of a row of patches' letters, and the column where each begins."""
    word, begin, empty = "", 0, 0
    for column, inside in enumerate([*patches, [letter(" ")]]):
        text = "".join(chr(one + _NONE) for one in inside if one)
        empty = 0 if text else empty + 1
        for character in text or " " * (empty > 1):
            if character != " ":
                begin = begin if word else column
                word += character
            elif word:
                yield word, begin
                word = ""


def _spread(columns: Sequence[int], side: int) -> list[int]:
    """Places in a row, each once and in order, at or right of where they are wanted while there is room.

    There are fewer places than columns where a row has not enough.
    """
    places: list[int] = []
    for column in columns[:side]:
        places.append(max(column, places[-1] + 1 if places else 0))
    last = side
    for number in reversed(range(len(places))):
        places[number] = last = min(places[number], last - 1)
    return places


def letter(character: str) -> int:
    """The number of a character that ASCII prints, from 1: " "."""
    return ord(character) - _NONE


def squared(image: Image.Image, side: int) -> Image.Image:
    """A whole RGB image in a square, grey beside it."""
    return ImageOps.pad(image, (side, side), Image.Resampling.BICUBIC, _GREY)
