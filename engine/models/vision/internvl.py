"""InternVL's eyes: an image in tiles of its own aspect ratio, and small and whole behind them, between two marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointMismatch, UnknownArchitecture
from ...images import LoadedImage
from .adapter import Placement, PreparedImage, VisionAdapter, in_tiles, marker

TILES = {"crop_to_patches": True}  # what its processor asks of the image processor, which by itself makes one tile


class InternVision(VisionAdapter):
    def __init__(self, config: Any, processor: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.tile_rows = tile_rows(config)
        made = int(processor.size["height"]), int(processor.size["width"])
        taken = tuple(config.vision_config.image_size)
        if made != taken:
            raise CheckpointMismatch(
                f"the image processor makes tiles of {made} pixels; the vision tower takes {taken}"
            )
        super().__init__(config, processor, device, dtype)

    @property
    def fewest_tokens(self) -> int:
        return self.tile_rows + 2

    def tokens(self, size: tuple[int, int], images: int) -> int:
        width, height = size
        return self.tile_rows * self.processor.get_number_of_image_patches(height, width, TILES) + 2

    def inputs(self, image: LoadedImage, images: int) -> dict[str, Tensor]:
        given = self.processor(images=[image.pixels], return_tensors="pt", **TILES)
        return {"pixel_values": given["pixel_values"]}  # [tiles, 3, height, width]

    def freeze(self, weights_hash: bytes, tokenizer: Any) -> None:
        super().freeze(weights_hash, tokenizer)
        marks = marker(tokenizer, "start_image_token", "<img>"), marker(tokenizer, "end_image_token", "</img>")
        self.marks = tokenizer.convert_tokens_to_ids(list(marks))

    def place(self, inputs: Mapping[str, Tensor]) -> Placement:
        count = self.tile_rows * len(inputs["pixel_values"])
        rows = torch.arange(-1, count + 1)
        rows[-1] = -1
        begin, end = self.marks
        return Placement([begin, *[self.image_token_id] * count, end], rows, None, count + 2)

    def features(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        return in_tiles(images, lambda tiles: self.eyes.get_image_features(tiles.to(self.device)).pooler_output)


def tile_rows(config: Any) -> int:
    """How many rows a tile becomes: the tower's make a square, and neighbors in it are put side by side.

    Raises `UnknownArchitecture` where the tower's rows make no such squares.
    """
    vision, side_by_side = config.vision_config, round(1 / config.downsample_ratio)
    sides = [pixels // patch for pixels, patch in zip(vision.image_size, vision.patch_size, strict=True)]
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    square = sides[0] == sides[1] and sides[0] % side_by_side == 0 and side_by_side * config.downsample_ratio == 1
    if not square or not isinstance(layer, int) or strategy != "default":
        raise UnknownArchitecture(
            f"rows {sides} shuffled by {config.downsample_ratio}, of the layer {layer!r}, selected by {strategy!r}; "
            "known: a square whose side the ratio divides, of one layer, selected by 'default'"
        )
    return (sides[0] // side_by_side) ** 2
