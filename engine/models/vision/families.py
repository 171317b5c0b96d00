"""Which adapter belongs to which architecture."""

from __future__ import annotations

from .adapter import VisionAdapter
from .llava import LlavaVision
from .qwen_vl import QwenVision

# `model_type` of a checkpoint's configuration -> its eyes
ADAPTERS: dict[str, type[VisionAdapter]] = {
    "llava": LlavaVision,
    "qwen2_5_vl": QwenVision,
    "qwen3_vl": QwenVision,
}
