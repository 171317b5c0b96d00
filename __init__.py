"""stockade: an inference engine for multimodal LLMs in which the guard is part of the engine."""

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
