"""LLaVA-1.5's eyes: one square image, features of one or several tower layers, two linear maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import UnknownArchitecture
from .adapter import Placement, PreparedImage, VisionAdapter

TOWERS = ("clip_vision_model", "siglip_vision_model")


class LlavaVision(VisionAdapter):
    def __init__(self, config: Any, processor: Any, device: torch.device, dtype: torch.dtype) -> None:
        check_tower(config)
        super().__init__(config, processor, device, dtype)
        self.count = tile_rows(config)

    @property
    def fewest_tokens(self) -> int:
        return self.count

    def tokens(self, size: tuple[int, int], images: int) -> int:
        return self.count

    def place(self, inputs: Mapping[str, Tensor]) -> Placement:
        return Placement.plain(self.image_token_id, self.count)

    def features(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        pixels = torch.cat([image.inputs["pixel_values"] for image in images])  # [images, 3, height, width]
        found = self.eyes.get_image_features(pixel_values=pixels.to(self.device))
        return [rows.view(1, self.count, -1) for rows in found.pooler_output]


def check_tower(config: Any) -> None:
    """Raise `UnknownArchitecture` for a tower that gives no plain square of patches."""
    kind = config.vision_config.model_type
    if kind not in TOWERS:
        raise UnknownArchitecture(f"unknown vision tower {kind!r}; known: {', '.join(TOWERS)}")


def tile_rows(config: Any) -> int:
    """How many rows the tower gives for one square image, as the checkpoint selects them."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    has_class = config.vision_config.model_type == "clip_vision_model"
    return side * side + int(has_class) - int(config.vision_feature_select_strategy == "default")
