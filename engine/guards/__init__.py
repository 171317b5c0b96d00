"""Guards as plain Python: prompts, detectors, remedies and the loop. Nothing here runs a model."""

from .detectors import Detector, HarmHead, SelfJudge
from .loop import Guard, guarded
from .remedies import Detoxify, EyesClosed, Refuse, Remedy

__all__ = [
    "Detector",
    "Detoxify",
    "EyesClosed",
    "Guard",
    "HarmHead",
    "Refuse",
    "Remedy",
    "SelfJudge",
    "guarded",
]
