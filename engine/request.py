"""The state of a request as the caller sees it: verdicts, the passes that ran, the reply."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from math import isfinite
from typing import Any


class Outcome(StrEnum):
    """How a request ended."""

    CLEAN = "clean"  # the first answer was judged harmless
    MENDED = "mended"  # a remedy's answer went out
    REFUSED = "refused"  # the refusal text went out
    UNGUARDED = "unguarded"  # no guard was asked for
    FLAGGED = "flagged"  # judged harmful and shown all the same: only where release="audit" was asked for


class FinishReason(StrEnum):
    STOP = "stop"  # an end token, a stop token or a stop string
    LENGTH = "length"  # max_tokens, or the end of the context
    REFUSED = "content_filter"  # the guard refused (OpenAI's word for it)
    ERROR = "error"  # the first answer could not be decoded
    ABORTED = "abort"


@dataclass(frozen=True)
class Verdict:
    """A judgement on one text. `score` is P(harmless) in [0, 1]; harmful means score < threshold.

    A score that is not a finite number is harmful. `error` says why there is no real score.
    """

    score: float
    threshold: float
    detector: str
    error: str | None = None
    detail: str | None = None

    @property
    def harmless(self) -> bool:
        return self.error is None and isfinite(self.score) and self.score >= self.threshold

    @property
    def harmful(self) -> bool:
        return not self.harmless

    @classmethod
    def failed(cls, detector: str, reason: str, threshold: float = 0.5) -> Verdict:
        """The verdict of a detector that gave none: harmful, with the reason."""
        return cls(score=float("nan"), threshold=threshold, detector=detector, error=reason)

    @property
    def reason(self) -> str:
        if self.error is not None:
            return self.error
        word = "harmless" if self.harmless else "harmful"
        return f"{word}: {self.score:.3f} against {self.threshold:.3f}"


@dataclass(frozen=True)
class Replaced:
    """In a stream: what was shown so far is not the answer; `text` takes its place.

    released: what had already been shown. reason: why.
    """

    text: str
    released: str
    reason: str


@dataclass
class PassRecord:
    """One pass as it ran. Times are seconds since the request was submitted.

    candidate: its text was meant for the user; `verdict` is then what a detector said of it. computed_tokens: those
    that went through the model. drafted, accepted: guessed tokens, and how many of them came true.
    """

    label: str
    model: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str | None = None
    verdict: Verdict | None = None
    error: str | None = None
    submitted: float = 0.0
    started: float | None = None
    first_token: float | None = None
    finished: float | None = None
    preemptions: int = 0
    candidate: bool = False
    computed_tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def seconds(self) -> float:
        return 0.0 if self.finished is None else self.finished - self.submitted


@dataclass
class Usage:
    """Tokens of one model in one request."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0


@dataclass
class Trace:
    """Where a request's time went, in seconds.

    exposed_screening: what answers waited for their screens after their last token. wasted_tokens: computed for
    passes that were started early and given up. unscreened_characters: shown under a guard before a verdict covered
    them; 0 unless release="audit" was asked for.
    """

    total: float = 0.0
    queued: float = 0.0
    first_token: float | None = None
    answer: float = 0.0
    guard: float = 0.0  # from the end of the first answer to the reply
    overhead: float = 0.0  # in the guard's loop and in preparing passes
    exposed_screening: float = 0.0
    wasted_tokens: int = 0
    unscreened_characters: int = 0


@dataclass
class Reply:
    """What a request ended with. `text` is what may be shown; every pass keeps its own text."""

    id: int
    text: str
    token_ids: list[int]
    outcome: Outcome
    finish_reason: FinishReason
    verdicts: list[Verdict] = field(default_factory=list)
    passes: list[PassRecord] = field(default_factory=list)
    usage: dict[str, Usage] = field(default_factory=dict)
    trace: Trace = field(default_factory=Trace)
    logprobs: list[list[tuple[int, float]]] | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The reply as plain JSON types; a score that is no number becomes null."""
        return _plain(asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not isfinite(value):
        return None
    return value
