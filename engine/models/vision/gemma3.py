"""The eyes of Gemma 3: a square image becomes a few rows, which attend to each other in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointMismatch, UnknownArchitecture
from ...images import LoadedImage
from .adapter import Placement, PreparedImage, VisionAdapter


class Gemma3Vision(VisionAdapter):
    whole = True
    around = "\n\n"

    def __init__(self, config: Any, processor: Any, device: torch.device, dtype: torch.dtype) -> None:
        if processor.do_pan_and_scan:
            raise UnknownArchitecture(
                "pan and scan cuts images into crops, which is not done; known: one image whole"
            )
        size = (processor.size["height"], processor.size["width"])
        if size != (config.vision_config.image_size,) * 2:
            raise CheckpointMismatch(
                f"the image processor makes images of {size[0]}x{size[1]} pixels; the vision tower takes "
                f"{config.vision_config.image_size}x{config.vision_config.image_size}"
            )
        super().__init__(config, processor, device, dtype)
        self.count: int = config.mm_tokens_per_image

    @classmethod
    def placeholder_id(cls, config: Any) -> int:
        return int(config.boi_token_index)

    @property
    def fewest_tokens(self) -> int:
        return self.count + 2

    def tokens(self, size: tuple[int, int], images: int) -> int:
        return self.count + 2

    def inputs(self, image: LoadedImage, images: int) -> dict[str, Tensor]:
        return {"pixel_values": self.processor(images=[image.pixels], return_tensors="pt")["pixel_values"]}

    def place(self, inputs: Mapping[str, Tensor]) -> Placement:
        config = self.config
        ids = [config.boi_token_index, *[config.image_token_index] * self.count, config.eoi_token_index]
        rows = torch.tensor([-1, *range(self.count), -1])
        return Placement(ids, rows, None, len(ids))

    def features(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        pixels = torch.cat([image.inputs["pixel_values"] for image in images])  # [images, 3, height, width]
        found = self.eyes.get_image_features(pixel_values=pixels.to(self.device))
        return [rows.unsqueeze(0) for rows in found.pooler_output]
