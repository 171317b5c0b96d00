"""Eyes that read: the rows of LLaVA's projector name letters, and images say the tokens of the words they spell."""

from __future__ import annotations

import hashlib
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
from .spelling import Lexicon, Reading, words_of

INSIDE = 6  # letters of a patch: the characters whose middle is in it, and blanks between them
LETTERS = 96  # none, and what ASCII prints
_NONE = ord(" ") - 1
_READINGS = 4  # of a place that words are spelled with, the likeliest
_GREY = (127, 127, 127)


class LetterVision(LlavaVision):
    """codec, embed: the language model's, of texts, and of tokens, [n] to [n, hidden].

    A row of the projector is `INSIDE` vectors side by side; their products with `codes` say how likely each letter is
    in each place. Rows of patches are read from left to right, from the top; a word that the vocabulary does not have
    gives way to one that it has and that is nearly as likely. An image says the tokens of what they spell, and in the
    places that are left `blank`, which lets the language model read them; tokens that have no place left are cut
    off. They are like a user's text: none is a special token.
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
        seen = config.vision_config.image_size
        if not processor.do_center_crop or dict(processor.crop_size) != {"height": seen, "width": seen}:
            raise CheckpointMismatch(f"eyes that read {seen} x {seen} pixels crop images to that")
        hidden = config.text_config.hidden_size
        self.codes = torch.empty(LETTERS, hidden // INSIDE, device=device, dtype=dtype)
        self.blank = torch.empty(self.count, hidden, device=device, dtype=dtype)
        self.codec = codec
        self.lexicon = Lexicon(words_of(codec.tokenizer))
        self.embed = embed

    def slots(self) -> Iterator[tuple[str, Tensor]]:
        yield from super().slots()
        yield "letters.codes", self.codes
        yield "letters.blank", self.blank

    def inputs(self, image: LoadedImage, images: int) -> dict[str, Tensor]:
        return super().inputs(replace(image, pixels=squared(image.pixels, self.pixels)), images)

    def freeze(self, weights_hash: bytes, tokenizer: Any) -> None:
        vocabulary = hashlib.blake2b(tokenizer.backend_tokenizer.to_str().encode(), digest_size=32)
        super().freeze(weights_hash + vocabulary.digest(), tokenizer)

    def features(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        # One at a time: where a kernel rounds by how many there are, a batch would be read as other words.
        return [self._told(image) for image in images]

    def _told(self, image: PreparedImage) -> Tensor:
        (rows,) = super().features([image])  # [1, patches, hidden]
        letters = likely(rows[0].float(), self.codes.float()).cpu()
        tokens = tokens_of(text_of(letters, self.lexicon), self.codec)
        return told(tokens, self.blank, self.embed).unsqueeze(0)


def likely(rows: Tensor, codes: Tensor) -> Tensor:
    """Logits of letters, [..., INSIDE, LETTERS], from the projector's rows, [..., hidden]. codes: [LETTERS, hidden //
    INSIDE]."""
    size = codes.shape[1]
    return rows[..., : INSIDE * size].unflatten(-1, (INSIDE, size)) @ codes.t()


def text_of(letters: Tensor, lexicon: Lexicon) -> str:
    """The words that patches spell, row by row. letters: logits, [patches, INSIDE, LETTERS], of a square.

    A blank ends a word, and so do two patches without letters: large ones leave single patches out.
    """
    side = isqrt(len(letters))
    nats, likeliest = letters.nan_to_num().flatten(0, 1).topk(_READINGS)
    readings = [
        [Reading(less, chr(one + _NONE) if one else "") for less, one in zip(*place, strict=True)]
        for place in zip((nats[:, :1] - nats).tolist(), likeliest.tolist(), strict=True)
    ]
    words: list[list[list[Reading]]] = [[]]
    for row in range(side):
        empty = 0
        for patch in range(row * side, (row + 1) * side):
            inside = readings[patch * INSIDE : (patch + 1) * INSIDE]
            empty = 0 if any(place[0].letter for place in inside) else empty + 1
            if empty > 1:
                words.append([])
                continue
            for place in inside:
                if place[0].letter == " ":
                    words.append([])
                else:
                    words[-1].append(place)
        words.append([])
    spelled = (lexicon.spelled(word) for word in words if any(place[0].letter for place in word))
    return " ".join(" ".join(spelled).split())


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
