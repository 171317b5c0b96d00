"""InstructBLIP's eyes: a Q-Former reads the prompt and asks the tower's features for what that is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointMismatch
from ...images import LoadedImage
from ...text import Codec, Untrusted
from .adapter import REMEMBERED_BYTES, Placement, PreparedImage, VisionAdapter
from .features import FeatureCache


class InstructBlipVision(VisionAdapter):
    """Its prompts are read twice: by the language model, and by the Q-Former with a tokenizer of its own."""

    reads_prompt = True
    # It learned from prompts without roles, behind the image and the first token.
    chat_template = (
        "{% for message in messages %}{% for part in message.content if part.type == 'image' %}<image>{% endfor %}"
        "{% endfor %}{{ bos_token }}{% for message in messages %}{{ '' if loop.first else '\\n' }}"
        "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endfor %}"
    )

    def __init__(self, config: Any, processor: Any, device: torch.device, dtype: torch.dtype) -> None:
        side = config.vision_config.image_size
        taken = (side, side) if isinstance(side, int) else tuple(side)
        made = processor.size["height"], processor.size["width"]
        if made != taken:
            raise CheckpointMismatch(f"the image processor makes images of {made} pixels; the tower takes {taken}")
        super().__init__(config, processor, device, dtype)
        self.count: int = config.num_query_tokens
        self.most_read: int = config.qformer_config.max_position_embeddings
        self.seen = FeatureCache(REMEMBERED_BYTES)  # the tower's, which depend on the image alone

    def read(self, folder: Path) -> None:
        from ..backbones import load_tokenizer  # it imports the adapters

        self.reader = Codec(load_tokenizer(folder / "qformer_tokenizer"))
        if self.reader.vocab_size > self.config.qformer_config.vocab_size:
            raise CheckpointMismatch(
                f"{folder}: the Q-Former's tokenizer has {self.reader.vocab_size} tokens; it has weights for "
                f"{self.config.qformer_config.vocab_size}"
            )

    @property
    def fewest_tokens(self) -> int:
        return self.count

    def tokens(self, size: tuple[int, int], images: int) -> int:
        return self.count

    def prepare(self, images: Sequence[LoadedImage], text: str) -> list[PreparedImage]:
        """Of a text that is too long for it the Q-Former reads the beginning, as in its own release; the language
        model reads all of it."""
        text = text.removeprefix(self.tokenizer.bos_token or "")  # the language model's alone
        ids = self.reader.encode((Untrusted(text),), add_special_tokens=True)
        if len(ids) > self.most_read:
            ids = [*ids[: self.most_read - 1], ids[-1]]
        asked = torch.tensor([ids])
        return [
            PreparedImage(self.key(image.key, asked), {**image.inputs, "qformer_input_ids": asked}, image.place)
            for image in super().prepare(images, text)
        ]

    def place(self, inputs: Mapping[str, Tensor]) -> Placement:
        return Placement.plain(self.image_token_id, self.count)

    def features(self, images: Sequence[PreparedImage]) -> list[Tensor]:
        return [self.asked(image) for image in images]

    def asked(self, image: PreparedImage) -> Tensor:
        queries = self.eyes.query_tokens  # [1, count, Q-Former's hidden]
        states = self.eyes.qformer(
            input_ids=image.inputs["qformer_input_ids"].to(self.device),
            query_embeds=queries,
            encoder_hidden_states=self.tower(image.inputs["pixel_values"]),
        ).last_hidden_state  # [1, count + tokens of the text, Q-Former's hidden]
        return self.eyes.language_projection(states[:, : self.count])

    def tower(self, pixels: Tensor) -> Tensor:
        """[1, patches + 1, hidden], computed once for all the texts about an image."""
        key = self.key(pixels)
        found = self.seen.get(key)
        if found is None:
            found = self.eyes.vision_model(pixels.to(self.device)).last_hidden_state
            self.seen.put(key, found)
        return found
