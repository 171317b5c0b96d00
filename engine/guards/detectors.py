"""What a detector is, what it may do besides, and checks that all of them share; no detector itself.

A detector may raise: the loop turns every exception, and every verdict that is none, into a harmful one.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from math import isfinite
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

from ..chat import Chat
from ..errors import InvalidGuard, PassTimeout, TooLong
from ..passes import Answer, Ask, ModelTraits, Screen
from ..request import Verdict

MLLM = "mllm"  # the model that gives the first answer
NONSENSE = "nonsense"
_MAX_REASON = 200  # characters

Judging: TypeAlias = Generator[Ask, Any, Verdict]
Part = TypeVar("Part")


@runtime_checkable
class Detector(Protocol):
    """`judge` reads the chat and the answer's text. `incremental`: can run along while the text is decoded."""

    @property
    def name(self) -> str: ...

    @property
    def incremental(self) -> bool: ...

    def judge(self, chat: Chat, answer: Answer) -> Judging: ...


@runtime_checkable
class Screening(Protocol):
    """A detector that can read an answer to a chat while it is decoded; its `judge` reads `answer.screened`."""

    def screening(self, chat: Chat) -> Screen | None: ...


@runtime_checkable
class Bindable(Protocol):
    """A detector or remedy that leaves something to its models: `bind` gives it with that filled in.

    Raises `InvalidGuard` where the models do not fit.
    """

    def bind(self, traits: Mapping[str, ModelTraits]) -> Any: ...


def bound(part: Part, traits: Mapping[str, ModelTraits]) -> Part:
    """A detector or remedy for an engine with these models (by name).

    Raises `InvalidGuard` if a model that it names is not there or does not fit.
    """
    model = getattr(part, "model", None)
    if model is not None and model not in traits:
        raise InvalidGuard(f"this guard needs a model {model!r}; this engine has {', '.join(sorted(traits))}")
    return part.bind(traits) if isinstance(part, Bindable) else part


def screen_of(detector: Detector, chat: Chat) -> Screen | None:
    """What reads along while an answer to the chat is decoded; None where the detector comes afterwards only."""
    if not detector.incremental or not isinstance(detector, Screening):
        return None
    return detector.screening(chat)


def is_sound(verdict: Any) -> bool:
    """Whether a detector's result is a verdict: one that failed, or a score in [0, 1] against a number."""
    if not isinstance(verdict, Verdict):
        return False
    if verdict.error is not None:
        return True
    # NaN fails the comparison
    return 0.0 <= verdict.score <= 1.0 and isinstance(verdict.threshold, int | float)


def reason_of(error: Exception) -> str:
    """Why there is no result, in a word or a line."""
    if isinstance(error, PassTimeout):
        return "timeout"
    if isinstance(error, TooLong):
        return "too_long"
    return (str(error) or type(error).__name__)[:_MAX_REASON]


def check_number(name: str, value: float) -> None:
    """Raises `InvalidGuard` unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise InvalidGuard(f"{name} must be a finite number, not {value!r}")


def check_count(name: str, value: int, least: int) -> None:
    """Raises `InvalidGuard` unless `value` is a whole number, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidGuard(f"{name} must be a whole number of at least {least}, not {value!r}")


def check_timeout(seconds: float | None) -> None:
    """Raises `InvalidGuard` unless `seconds` is None or a finite number above zero."""
    if seconds is None:
        return
    check_number("timeout", seconds)
    if seconds <= 0:
        raise InvalidGuard(f"timeout must be more than 0 seconds, not {seconds}")


def is_probability(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and isfinite(value) and 0.0 <= value <= 1.0
