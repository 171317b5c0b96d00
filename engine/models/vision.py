"""Images for the decoder: the checkpoint's own processor, vision tower and projector, from `transformers`."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnknownArchitecture
from ..images import LoadedImage


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image as the vision tower takes it.

    key: hash of the processed pixels and of the tower's and projector's weights. pixels: [3, height, width].
    tokens: how many rows of the decoder's input it becomes.
    """

    key: bytes
    pixels: Tensor
    tokens: int


class VisionAdapter(nn.Module):
    """LLaVA's eyes: features of one or several tower layers, two linear maps into the decoder's width.

    config is a `transformers` LlavaConfig; `processor` its PIL image processor. Weights are empty until its
    `slots` are filled; `freeze` hashes them.
    """

    def __init__(self, config: Any, processor: Any, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        from transformers import AutoModel
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

        if config.vision_config.model_type not in ("clip_vision_model", "siglip_vision_model"):
            raise UnknownArchitecture(
                f"unknown vision tower {config.vision_config.model_type!r}; known: clip_vision_model, "
                "siglip_vision_model"
            )
        self.config = config
        self.processor = processor
        self.device = device
        self.dtype = dtype
        with torch.device(device):
            self.vision_tower = AutoModel.from_config(config.vision_config).to(dtype).eval()
            self.multi_modal_projector = LlavaMultiModalProjector(config).to(dtype).eval()
        self.requires_grad_(False)
        side = config.vision_config.image_size // config.vision_config.patch_size
        rows = side * side + int(hasattr(self._embeddings(), "class_embedding"))
        self._crop = 1 if config.vision_feature_select_strategy == "default" else 0
        self.tokens_per_image = rows - self._crop
        self.weights_hash = b""
        self._prepared: OrderedDict[bytes, PreparedImage] = OrderedDict()

    def slots(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by its checkpoint name without `vision_model.`, as a tensor to copy into."""
        for name, tensor in self.named_parameters():
            yield name.replace("vision_tower.vision_model.", "vision_tower."), tensor.data

    def freeze(self, weights_hash: bytes) -> None:
        self.weights_hash = weights_hash

    def prepare(self, image: LoadedImage) -> PreparedImage:
        """Resize and normalize one image; remembers the last few, since a request's passes share theirs."""
        prepared = self._prepared.get(image.key)
        if prepared is None:
            pixels = self.processor(images=[image.pixels], return_tensors="pt")["pixel_values"][0]
            pixels = pixels.to(self.dtype).contiguous()
            digest = hashlib.blake2b(self.weights_hash, digest_size=32)
            digest.update(pixels.view(torch.uint8).numpy())
            prepared = PreparedImage(digest.digest(), pixels, self.tokens_per_image)
            self._prepared[image.key] = prepared
            if len(self._prepared) > 64:
                self._prepared.popitem(last=False)
        self._prepared.move_to_end(image.key)
        return prepared

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """pixels [images, 3, height, width] -> features [images, tokens_per_image, hidden]."""
        states = self.vision_tower(pixels.to(self.device), output_hidden_states=True).hidden_states
        layers = self.config.vision_feature_layer
        chosen = [states[layer][:, self._crop :] for layer in ([layers] if isinstance(layers, int) else layers)]
        return self.multi_modal_projector(torch.cat(chosen, -1))

    def _embeddings(self) -> nn.Module:
        tower = self.vision_tower
        return getattr(tower, "vision_model", tower).embeddings


class FeatureCache:
    """Features of the images seen last, least recently used first out. max_bytes bounds what it holds."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, key: bytes) -> Tensor | None:
        features = self._features.get(key)
        if features is None:
            self.misses += 1
            return None
        self.hits += 1
        self._features.move_to_end(key)
        return features

    def put(self, key: bytes, features: Tensor) -> None:
        """Keep features [tokens, hidden]; one image larger than the whole cache is not kept."""
        size = features.nbytes
        if key in self._features or size > self.max_bytes:
            return
        self._features[key] = features
        self.bytes += size
        while self.bytes > self.max_bytes:
            self.bytes -= self._features.popitem(last=False)[1].nbytes
