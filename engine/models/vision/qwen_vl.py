"""The eyes of Qwen2.5-VL and Qwen3-VL: any resolution, cut into patches; an image's rotary positions are its rows and
columns. What Qwen3-VL adds to the decoder's first layers are features of layers of the tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointMismatch
from .adapter import Placement, PreparedImage, VisionAdapter


class QwenVision(VisionAdapter):
    def __init__(self, config: Any, processor: Any, device: torch.device, dtype: torch.dtype) -> None:
        vision = config.vision_config
        ours = (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
        theirs = (processor.patch_size, processor.temporal_patch_size, processor.merge_size)
        if ours != theirs:
            raise CheckpointMismatch(
                f"the image processor makes grids of (patch, frames, merge) {theirs}; the vision tower takes {ours}"
            )
        super().__init__(config, processor, device, dtype)
        self.merge: int = vision.spatial_merge_size

    @property
    def fewest_tokens(self) -> int:
        side = self.config.vision_config.patch_size * self.merge
        return max(1, -(-int(self.processor.size["shortest_edge"]) // side**2))

    def tokens(self, size: tuple[int, int], images: int) -> int:
        width, height = size
        return self.processor.get_number_of_image_patches(height, width) // self.merge**2

    def place(self, inputs: Mapping[str, Tensor]) -> Placement:
        """Position ids as in Qwen2-VL (Wang et al. 2024, M-RoPE): one moment in time, rows, columns."""
        _, height, width = (inputs["image_grid_thw"][0] // torch.tensor([1, self.merge, self.merge])).tolist()
        grid = torch.zeros(3, height, width, dtype=torch.long)
        grid[1] = torch.arange(height)[:, None]
        grid[2] = torch.arange(width)
        count = height * width
        return Placement([self.image_token_id] * count, torch.arange(count), grid.flatten(1), max(height, width))

    def features(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        pixels = torch.cat([image.inputs["pixel_values"] for image in images])  # [patches of all, 3 * 2 * 14 * 14]
        grids = torch.cat([image.inputs["image_grid_thw"] for image in images])
        found = self.eyes.get_image_features(pixels.to(self.device), grids.to(self.device))
        # one tensor a level, or with newer releases one for each image in it
        levels = [found.pooler_output, *(getattr(found, "deepstack_features", None) or [])]
        rows = torch.stack([level if isinstance(level, Tensor) else torch.cat(level) for level in levels])
        return list(rows.split([image.tokens for image in images], 1))
