"""The eyes of LLaVA-NeXT and LLaVA-OneVision: the image small and whole, then in tiles, a mark behind each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from ...errors import CheckpointMismatch
from ...images import LoadedImage
from .adapter import Placement, PreparedImage, VisionAdapter
from .llava import check_tower, tile_rows


class LlavaNextVision(VisionAdapter):
    def __init__(self, config: Any, processor: Any, device: torch.device, dtype: torch.dtype) -> None:
        check_tower(config)
        self.side = config.vision_config.image_size // config.vision_config.patch_size
        if tile_rows(config) != self.side**2:
            raise CheckpointMismatch(
                f"the vision tower gives {tile_rows(config)} rows for a tile; {self.side} x {self.side} are wanted"
            )
        known = [list(shape) for shape in config.image_grid_pinpoints]
        given = [list(shape) for shape in processor.image_grid_pinpoints]
        tile = _tile(processor)
        if (given, tile) != (known, config.vision_config.image_size):
            raise CheckpointMismatch(
                f"the image processor makes tiles of {tile} pixels in grids {given}; the model takes "
                f"{config.vision_config.image_size} in {known}"
            )
        super().__init__(config, processor, device, dtype)

    @property
    def fewest_tokens(self) -> int:
        return self.side**2

    def tokens(self, size: tuple[int, int], images: int) -> int:
        columns, rows = self.tiled(size)
        return self.side**2 + rows * (columns + 1)  # the small one; each row ends with a newline

    def tiled(self, size: tuple[int, int]) -> tuple[int, int]:
        """(columns, rows) of features that an image of this (width, height) has in its tiles, borders left out."""
        width, height = size
        best = select_best_resolution((height, width), self.config.image_grid_pinpoints)
        rows, columns = (self.side * (pixels // self.config.vision_config.image_size) for pixels in best)
        # rounded as `transformers` rounds, whose features they have to fit
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        return columns, rows

    def inputs(self, image: LoadedImage, images: int) -> dict[str, Tensor]:
        given = self.processor(images=[image.pixels], return_tensors="pt")
        return {"pixel_values": given["pixel_values"][0], "image_sizes": given["image_sizes"]}

    def place(self, inputs: Mapping[str, Tensor]) -> Placement:
        height, width = inputs["image_sizes"][0].tolist()
        return Placement.plain(self.image_token_id, self.tokens((width, height), 1))

    def features(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        return self.packed(images)

    def packed(self, images: Sequence[PreparedImage], **options: Any) -> list[Tensor]:
        pixels = torch.cat([image.inputs["pixel_values"] for image in images])  # [tiles of all, 3, height, width]
        sizes = torch.cat([image.inputs["image_sizes"] for image in images])
        found = self.eyes.get_image_features(
            pixel_values=pixels.to(self.device), image_sizes=sizes.to(self.device), **options
        )
        return [rows.unsqueeze(0) for rows in found.pooler_output]


class LlavaOnevisionVision(LlavaNextVision):
    """An image alone is cut into tiles, and many rows of features are scaled down; one of several is not cut."""

    def tokens(self, size: tuple[int, int], images: int) -> int:
        return super().tokens(size, images) if images == 1 else self.side**2 + 1

    def tiled(self, size: tuple[int, int]) -> tuple[int, int]:
        columns, rows = super().tiled(size)
        most = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = sqrt(rows * columns / (most * self.side**2))
        return (int(columns // ratio), int(rows // ratio)) if ratio > 1.1 else (columns, rows)

    def inputs(self, image: LoadedImage, images: int) -> dict[str, Tensor]:
        if images == 1:
            return super().inputs(image, images)
        # a second image, of which nothing is kept, tells the processor that the first is not alone
        given = self.processor(images=[[image.pixels, Image.new("RGB", (1, 1))]], return_tensors="pt")
        return {"pixel_values": given["pixel_values"][0], "image_sizes": given["image_sizes"][:1]}

    def place(self, inputs: Mapping[str, Tensor]) -> Placement:
        height, width = inputs["image_sizes"][0].tolist()
        alone = len(inputs["pixel_values"]) > 1
        return Placement.plain(self.image_token_id, self.tokens((width, height), 1 if alone else 2))

    def features(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for alone in (True, False):
            some = [at for at, image in enumerate(images) if (len(image.inputs["pixel_values"]) > 1) == alone]
            if some:
                # how many images each prompt has: one, or any number but one
                prompts = [1] * len(some) if alone else [max(2, len(some))]
                rows = self.packed([images[at] for at in some], batch_num_images=prompts)
                found.update(zip(some, rows, strict=True))
        return [found[at] for at in range(len(images))]


def _tile(processor: Any) -> int:
    """Pixels of a tile's side, as the image processor cuts them."""
    for size in (processor.crop_size, processor.size):
        if size:
            return int(size["height"] or size["shortest_edge"])
    return 0
