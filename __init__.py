"""stockade: an inference engine for multimodal LLMs in which the guard is part of the engine.

The names below are imported on first use: torch and transformers take seconds, `stockade --help` should not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.async_engine import AsyncEngine
    from .engine.chat import Chat
    from .engine.engine import Engine
    from .engine.errors import StockadeError
    from .engine.guards import (
        Cascade,
        Detoxify,
        EyesClosed,
        GenerativeGuard,
        Guard,
        HarmHead,
        Probe,
        Refuse,
        SelfJudge,
    )
    from .engine.images import ImageLimits
    from .engine.models.sources import Attached, Classifier
    from .engine.request import FinishReason, Outcome, PassRecord, Replaced, Reply, Verdict
    from .engine.running import Request
    from .engine.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "AsyncEngine",
    "Attached",
    "Cascade",
    "Chat",
    "Classifier",
    "Detoxify",
    "Engine",
    "EyesClosed",
    "FinishReason",
    "GenerativeGuard",
    "Guard",
    "HarmHead",
    "ImageLimits",
    "Outcome",
    "PassRecord",
    "Probe",
    "Refuse",
    "Replaced",
    "Reply",
    "Request",
    "SamplingParams",
    "SelfJudge",
    "StockadeError",
    "Verdict",
]

_HOMES = {
    "AsyncEngine": "async_engine",
    "Attached": "models.sources",
    "Cascade": "guards",
    "Chat": "chat",
    "Classifier": "models.sources",
    "Detoxify": "guards",
    "Engine": "engine",
    "EyesClosed": "guards",
    "FinishReason": "request",
    "GenerativeGuard": "guards",
    "Guard": "guards",
    "HarmHead": "guards",
    "ImageLimits": "images",
    "Outcome": "request",
    "PassRecord": "request",
    "Probe": "guards",
    "Refuse": "guards",
    "Replaced": "request",
    "Reply": "request",
    "Request": "running",
    "SamplingParams": "sampling",
    "SelfJudge": "guards",
    "StockadeError": "errors",
    "Verdict": "request",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".engine.{_HOMES[name]}", __name__), name)
