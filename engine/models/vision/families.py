"""Which adapter belongs to which architecture."""

from __future__ import annotations

from .adapter import VisionAdapter
from .gemma3 import Gemma3Vision
from .idefics3 import Idefics3Vision
from .instructblip import InstructBlipVision
from .internvl import InternVision
from .llava import LlavaVision
from .llava_next import LlavaNextVision, LlavaOnevisionVision
from .qwen_vl import QwenVision

# `model_type` of a checkpoint's configuration -> its eyes
ADAPTERS: dict[str, type[VisionAdapter]] = {
    "gemma3": Gemma3Vision,
    "idefics3": Idefics3Vision,
    "instructblip": InstructBlipVision,
    "internvl": InternVision,
    "llava": LlavaVision,
    "llava_next": LlavaNextVision,
    "llava_onevision": LlavaOnevisionVision,
    "qwen2_5_vl": QwenVision,
    "qwen3_vl": QwenVision,
    "smolvlm": Idefics3Vision,
}
