"""The eyes of Idefics3 and SmolVLM: an image in rows of tiles, and small and whole behind, named in text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointMismatch, UnknownArchitecture
from ...images import LoadedImage
from .adapter import Placement, PreparedImage, VisionAdapter, in_tiles, marker

MOST_PIXELS = 4096  # of a side: more its processor never makes


class Idefics3Vision(VisionAdapter):
    language = "text_model"

    def __init__(self, config: Any, processor: Any, device: torch.device, dtype: torch.dtype) -> None:
        vision, scale = config.vision_config, config.scale_factor
        side = vision.image_size // vision.patch_size
        if side % scale:
            raise UnknownArchitecture(f"{side} x {side} rows shuffled by {scale}; known: sides that it divides")
        self.tile_rows = (side // scale) ** 2
        self.tile, self.longest = processor.max_image_size["longest_edge"], processor.size["longest_edge"]
        if not processor.do_resize or self.tile != vision.image_size or not 0 < (self.longest or 0) <= MOST_PIXELS:
            raise CheckpointMismatch(
                f"the image processor scales images to {self.longest} pixels and cuts tiles of {self.tile}; "
                f"the model takes at most {MOST_PIXELS} and {vision.image_size}"
            )
        super().__init__(config, processor, device, dtype)

    def freeze(self, weights_hash: bytes, tokenizer: Any) -> None:
        super().freeze(weights_hash, tokenizer)
        self.places: dict[tuple[int, int], Placement] = {}  # there are few grids
        self.placed((0, 0))  # which checks the tokenizer

    @property
    def fewest_tokens(self) -> int:
        return self.tile_rows + 3

    def tokens(self, size: tuple[int, int], images: int) -> int:
        return len(self.placed(self.grid(size)).ids)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tiles of an image of this (width, height); (0, 0) if it is one tile.

        Every step is rounded as its processor rounds it.
        """
        if not self.processor.do_image_splitting:
            return 0, 0
        width, height = size
        if width >= height:
            width, height = self.longest, max(even(self.longest / (width / height)), 1)
        else:
            width, height = max(even(self.longest * (width / height)), 1), self.longest
        ratio = width / height
        if width >= height:
            columns = ceil(width / self.tile)
            rows = ceil(int(columns * self.tile / ratio) / self.tile)
        else:
            rows = ceil(height / self.tile)
            columns = ceil(int(rows * self.tile * ratio) / self.tile)
        return (rows, columns) if rows * columns > 1 else (0, 0)

    def inputs(self, image: LoadedImage, images: int) -> dict[str, Tensor]:
        given = self.processor(images=[image.pixels], return_tensors="pt", return_row_col_info=True)
        grid = torch.tensor([given["rows"][0][0], given["cols"][0][0]])
        return {"pixel_values": given["pixel_values"][0], "grid": grid}  # [tiles, 3, side, side]

    def place(self, inputs: Mapping[str, Tensor]) -> Placement:
        rows, columns = inputs["grid"].tolist()
        return self.placed((rows, columns))

    def placed(self, grid: tuple[int, int]) -> Placement:
        """What stands in the prompt for so many rows and columns of tiles."""
        if grid not in self.places:
            ids = self.tokenizer(self.written(*grid), add_special_tokens=False)["input_ids"]
            shown = torch.tensor(ids) == self.image_token_id
            self.places[grid] = Placement(ids, torch.where(shown, shown.cumsum(0) - 1, -1), None, len(ids))
        return self.places[grid]

    def written(self, rows: int, columns: int) -> str:
        """The markers of the tiles, as a text of which only the outermost have to be tokens of their own."""
        around = marker(self.tokenizer, "fake_image_token", "<fake_token_around_image>")
        whole = getattr(self.tokenizer, "global_image_token", None) or "<global-img>"
        tile = self.tokenizer.convert_ids_to_tokens(self.image_token_id) * self.tile_rows
        text = ""
        for row in range(1, rows + 1):
            text += "".join(f"{around}<row_{row}_col_{column}>{tile}" for column in range(1, columns + 1)) + "\n"
        return text + ("\n" if rows else "") + f"{around}{whole}{tile}{around}"

    def features(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        return in_tiles(images, self.tower)

    def tower(self, tiles: Tensor) -> Tensor:
        # not its `get_image_features`, which leaves out tiles without any color
        return self.eyes.connector(self.eyes.vision_model(tiles.to(self.device)).last_hidden_state)


def even(pixels: float) -> int:
    """Rounded down, then up to an even number."""
    return int(pixels) + int(pixels) % 2
