"""What the engine asks of a family's eyes: how many tokens an image becomes, which, and with what features.

Towers, projectors and image processors are those of `transformers`; a family says only how its own are used.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from ...errors import CheckpointMismatch, UnsupportedImage
from ...images import LoadedImage

REMEMBERED_BYTES = 256 << 20
TILES_AT_ONCE = 16  # bounds the tower's memory, however many tiles images have


class Placement(NamedTuple):
    """What stands in a prompt for one image.

    ids: its tokens. rows: [tokens] int64, the row of the image's features that each token takes instead of its
    embedding, -1 for a marker that is text. grid: [3, tokens] int64, the tokens' rotary positions (time, height,
    width) from the image's first on, None where they count up like text. advance: by how much the text behind the
    image counts on.
    """

    ids: Sequence[int]
    rows: Tensor
    grid: Tensor | None
    advance: int

    @classmethod
    def plain(cls, token: int, count: int) -> Placement:
        """So many tokens of one kind, a row of features each, at positions like text."""
        return cls([token] * count, torch.arange(count), None, count)


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image as the tower takes it (`inputs`) and as the prompt holds it (`place`).

    key: hash of everything its features and its place depend on, the weights of tower and projector included.
    """

    key: bytes
    inputs: Mapping[str, Tensor] = field(repr=False)
    place: Placement = field(repr=False)

    @property
    def tokens(self) -> int:
        return len(self.place.ids)


class VisionAdapter(nn.Module, ABC):
    """The eyes of one checkpoint. A family's adapter says what is abstract here, and overrides what differs.

    config: the checkpoint's `transformers` configuration; processor: its PIL image processor. `eyes` is the family's
    model without its language model; its weights are empty until the `slots` are filled and `freeze` is called.
    """

    language = "language_model"  # the part of the family's model that the engine's own decoder replaces
    reads_prompt = False  # whether an image's features depend on the text around it
    chat_template: str | None = None  # for checkpoints that come without one
    whole = False  # whether an image's rows attend to each other in both directions, hence are computed together
    around = ""  # what the family's processor writes before and behind each image

    def __init__(self, config: PretrainedConfig, processor: Any, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.config: Any = config
        self.processor = processor
        self.tokenizer: Any = None
        self.device = device
        self.dtype = dtype
        self.image_token_id = image_token_id(config)
        with torch.device(device):
            self.eyes: Any = AutoModel.from_config(_without_layers(config), dtype=dtype).eval()
        delattr(self.eyes, self.language)
        self.requires_grad_(False)
        self.weights_hash = b""
        self._prepared: OrderedDict[tuple[bytes, int], PreparedImage] = OrderedDict()
        self._prepared_bytes = 0

    def read(self, folder: Path) -> None:
        """What the checkpoint's folder has for the eyes besides weights and image processor."""

    @classmethod
    def placeholder_id(cls, config: Any) -> int:
        """The token that stands for an image in the family's templates."""
        return image_token_id(config)

    @property
    @abstractmethod
    def fewest_tokens(self) -> int:
        """The fewest tokens an image becomes: what bounds how many images a context can hold."""

    @abstractmethod
    def tokens(self, size: tuple[int, int], images: int) -> int:
        """How many tokens an image of this (width, height) becomes in a prompt with so many images.

        It is asked before any pixel is touched, so that an image that cannot fit costs nothing.
        """

    @abstractmethod
    def place(self, inputs: Mapping[str, Tensor]) -> Placement:
        """What stands in the prompt for an image with these `inputs`."""

    @abstractmethod
    def features(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        """Of each image [1 + n, rows, hidden]: what its tokens take for their embeddings, and what is added to the
        output of the decoder's first n layers."""

    def inputs(self, image: LoadedImage, images: int) -> dict[str, Tensor]:
        """The tower's inputs for one image of a prompt with so many, on the CPU."""
        return dict(self.processor(images=[image.pixels], return_tensors="pt"))

    def prepare(self, images: Sequence[LoadedImage], text: str) -> list[PreparedImage]:
        """All images of one prompt. text: the prompt without its images, empty unless the family `reads_prompt`.

        Raises `UnsupportedImage` for an image that the family's processor refuses.
        """
        return [self._remembered(image, len(images)) for image in images]

    @torch.inference_mode()
    def encode(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        """Features of each image [1 + n, rows, hidden], as `features` says."""
        features = self.features(images)
        for image, found in zip(images, features, strict=True):
            if found.shape[1] != image.place.rows.max() + 1:
                raise CheckpointMismatch(
                    f"the vision tower gives {found.shape[1]} rows for an image; its processor's grid says "
                    f"{int(image.place.rows.max()) + 1}"
                )
        return features

    def slots(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by its canonical name, as a tensor to copy into."""
        for name, tensor in self.eyes.named_parameters():
            yield name.replace("vision_tower.vision_model.", "vision_tower."), tensor.data

    def freeze(self, weights_hash: bytes, tokenizer: Any) -> None:
        """Call once, when the slots are filled, with their hash and the checkpoint's tokenizer."""
        self.weights_hash = weights_hash
        self.tokenizer = tokenizer

    def key(self, *parts: bytes | Tensor) -> bytes:
        """A hash of the weights and of these parts."""
        digest = hashlib.blake2b(self.weights_hash, digest_size=32)
        for part in parts:
            if isinstance(part, bytes):
                digest.update(part)
            else:
                digest.update(f"{part.dtype} {tuple(part.shape)}\n".encode())
                digest.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.digest()

    def _remembered(self, image: LoadedImage, images: int) -> PreparedImage:
        """The last few are remembered, since a request's passes share theirs."""
        name = image.key, images
        prepared = self._prepared.pop(name, None)
        if prepared is None:
            prepared = self._prepare(image, images)
            self._prepared_bytes += _bytes(prepared)
        self._prepared[name] = prepared
        while self._prepared_bytes > REMEMBERED_BYTES and len(self._prepared) > 1:
            self._prepared_bytes -= _bytes(self._prepared.popitem(last=False)[1])
        return prepared

    def _prepare(self, image: LoadedImage, images: int) -> PreparedImage:
        try:
            given = self.inputs(image, images)
        except ValueError as error:
            width, height = image.pixels.size
            raise UnsupportedImage(f"the model's processor refuses an image of {width}x{height}: {error}") from error
        inputs = {
            name: (value.to(self.dtype) if value.is_floating_point() else value).contiguous()
            for name, value in given.items()
        }
        place = self.place(inputs)
        parts = [part for name in sorted(inputs) for part in (name.encode(), inputs[name])]
        return PreparedImage(self.key(*parts, repr(place.ids).encode()), inputs, place)


def image_token_id(config: Any) -> int:
    """The token that holds a row of an image's features; in most templates it stands for a whole image, too.

    Raises `CheckpointMismatch` where the configuration names none.
    """
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if token is None:
        raise CheckpointMismatch(f"the {config.model_type} configuration names no image_token_id; it has to")
    return int(token)


def in_tiles(images: Sequence[PreparedImage], tower: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Features of each image [1, rows, hidden], by a tower that takes some tiles [tiles, 3, height, width] and gives
    [tiles, rows of each, hidden]."""
    counts = [len(image.inputs["pixel_values"]) for image in images]
    tiles = torch.cat([image.inputs["pixel_values"] for image in images])
    found = torch.cat([tower(some) for some in tiles.split(TILES_AT_ONCE)])
    return [rows.flatten(0, 1).unsqueeze(0) for rows in found.split(counts)]


def marker(tokenizer: Any, attribute: str, usual: str) -> str:
    """The text of a token that marks images: what the tokenizer has under that attribute, else the usual one.

    Raises `CheckpointMismatch` for one that is no added token, since a user's text could spell it.
    """
    text = str(getattr(tokenizer, attribute, None) or usual)
    if text not in tokenizer.get_added_vocab():
        raise CheckpointMismatch(f"the tokenizer has no added token {text!r}, which marks images for this model")
    return text


def _bytes(image: PreparedImage) -> int:
    return sum(value.nbytes for value in image.inputs.values())


def _without_layers(config: PretrainedConfig) -> PretrainedConfig:
    """The same configuration with a language model of nearly no weights."""
    config = copy.deepcopy(config)
    text: Any = config.get_text_config()
    text.num_hidden_layers = 0
    text.vocab_size = 1
    text.pad_token_id = None
    if getattr(text, "layer_types", None):
        text.layer_types = []
    return config
