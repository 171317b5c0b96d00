"""What a guard's loop may ask of the engine. A loop is a generator: it yields passes, results come back.

A failed pass is raised inside the generator at its `yield`, as a `PassError`. Nothing here runs anything.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from .chat import Chat
from .sampling import SamplingParams
from .text import Segment

if TYPE_CHECKING:
    from .request import Outcome, Verdict

Prompt: TypeAlias = "Chat | tuple[Segment, ...] | tuple[int, ...]"
"""A chat goes through the model's own chat template; segments and token ids are taken as they are."""


@dataclass(frozen=True)
class Generate:
    """Decode an answer. `sampling=None` takes the request's own parameters.

    `label` names the pass in replies and traces ("answer", "caption", "rewrite" …). timeout: seconds from when the
    pass is asked for, waiting included. live: its text may leave while it is decoded; nothing guards it.
    candidate: its text is meant for the user, and a verdict may follow. The result is an `Answer`.
    """

    model: str
    prompt: Prompt
    label: str = "answer"
    sampling: SamplingParams | None = None
    timeout: float | None = None
    live: bool = False
    candidate: bool = True


@dataclass(frozen=True)
class Score:
    """One forward pass of a detector over a text; the result is a `Scored`.

    `pool_from` is the index of the segment with which pooling starts (a head that pools the mean reads the
    answer's tokens only); tokens before it are context.
    """

    model: str
    prompt: tuple[Segment, ...]
    pool_from: int = 0
    label: str = "score"
    timeout: float | None = None


@dataclass(frozen=True)
class Choose:
    """Read the full next-token distribution after a prompt; the result is a `Chosen`.

    Each word stands for every single token that spells it, whatever its case, with or without a space or a
    word-start mark before it.
    """

    model: str
    prompt: Prompt
    words: tuple[str, ...]
    label: str = "judge"
    timeout: float | None = None


Pass: TypeAlias = "Generate | Score | Choose"


class Answer(NamedTuple):
    """What `Generate` returns. `ids` are the generated tokens, `text` their text without stop strings."""

    text: str
    ids: tuple[int, ...] = ()
    verdict: Verdict | None = None
    stopped_early: bool = False
    finish_reason: str = "stop"


class Scored(NamedTuple):
    """What `Score` returns: P(harmless), and the head's own threshold."""

    score: float
    threshold: float


class Chosen(NamedTuple):
    """What `Choose` returns: the probability mass of each word; they need not sum to one."""

    masses: tuple[float, ...]


class Judged(NamedTuple):
    """A text and the verdict on it."""

    text: str
    verdict: Verdict


class Decision(NamedTuple):
    """How a loop ended. Only `answer.text` may be shown; `reason` says why it refused."""

    answer: Answer
    outcome: Outcome
    judged: tuple[Judged, ...] = ()
    reason: str | None = None

    @property
    def verdicts(self) -> list[Verdict]:
        return [verdict for _, verdict in self.judged]


class ModelTraits(NamedTuple):
    """What a loop may know of a model: the text template of its head, and whether it understands chats only."""

    template: str | None = None
    chat_only: bool = False


Loop: TypeAlias = "Generator[Pass, Any, Decision]"
