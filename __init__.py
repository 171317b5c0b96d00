"""stockade: an inference engine for multimodal LLMs in which the guard is part of the engine.

The names below are imported on first use: torch and transformers take seconds, `stockade --help` should not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.chat import Chat
    from .engine.engine import Engine, Request
    from .engine.errors import StockadeError
    from .engine.guards import Guard
    from .engine.images import ImageLimits
    from .engine.request import FinishReason, Outcome, PassRecord, Reply, Verdict
    from .engine.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "Chat",
    "Engine",
    "FinishReason",
    "Guard",
    "ImageLimits",
    "Outcome",
    "PassRecord",
    "Reply",
    "Request",
    "SamplingParams",
    "StockadeError",
    "Verdict",
]

_HOMES = {
    "Chat": "chat",
    "Engine": "engine",
    "FinishReason": "request",
    "Guard": "guards",
    "ImageLimits": "images",
    "Outcome": "request",
    "PassRecord": "request",
    "Reply": "request",
    "Request": "engine",
    "SamplingParams": "sampling",
    "StockadeError": "errors",
    "Verdict": "request",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".engine.{_HOMES[name]}", __name__), name)
