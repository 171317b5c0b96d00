"""Image features kept for later prompts, in bounded memory."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor


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

    def clear(self) -> None:
        self._features.clear()
        self.bytes = 0

    def put(self, key: bytes, features: Tensor) -> None:
        """Keep an image's features; one image larger than the whole cache is not kept."""
        size = features.nbytes
        if key in self._features or size > self.max_bytes:
            return
        self._features[key] = features
        self.bytes += size
        while self.bytes > self.max_bytes:
            self.bytes -= self._features.popitem(last=False)[1].nbytes
