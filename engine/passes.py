"""What a guard's loop may ask of the engine. A loop is a generator: it yields passes, results come back.

A failed pass is raised inside the generator at its `yield`, as a `PassError`. Nothing here runs anything.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from .chat import Chat
from .sampling import SamplingParams
from .text import Segment

if TYPE_CHECKING:
    from .request import Outcome, Verdict
    from .sequence import PlacedImage


@dataclass(frozen=True)
class Continue:
    """The sequence of an answer, and more behind it; nothing before is encoded again, and its pages are found again.

    message: one more user turn in the model's chat template. segments: text as it is, for raw prompts.
    """

    answer: Answer
    message: str | None = None
    segments: tuple[Segment, ...] = ()


Prompt: TypeAlias = "Chat | tuple[Segment, ...] | tuple[int, ...] | Continue"
"""A chat goes through the model's own chat template; segments and token ids are taken as they are."""

ReleaseMode = Literal["verdict", "window", "audit"]
"""What of a guarded answer leaves when: all of it after the verdict; what a screened beginning covers, once that is
clear; everything at once, verdicts being for the record only."""

Release = Literal["hold", "window", "audit", "live"]
"""When the text of a `Generate` may leave: when the loop has decided; as far as a screened prefix is clear; at once,
with verdicts for the record; at once, because nothing guards it."""


@dataclass(frozen=True)
class Screen:
    """A detector that reads an answer while it is decoded.

    before: the detector's text up to the answer, which it reads as a sequence of its own; None: its head reads the
    answer's own hidden states. threshold, prefix_threshold: harmful below them, for the finished text and for a
    beginning of it; None takes the head's own. stop_below: the answer is stopped when `patience` beginnings in a
    row score less; None: never. chunk: tokens read at a time; None: from the load. timeout: seconds from the end of
    the answer.
    """

    model: str
    before: tuple[Segment, ...] | None = ()
    threshold: float | None = None
    prefix_threshold: float | None = None
    stop_below: float | None = None
    patience: int = 2
    chunk: int | None = None
    timeout: float | None = None


@dataclass(frozen=True)
class Ahead:
    """A prompt that will follow the answer if that is harmful, as a function of the answer's text.

    What of it is known is computed beside the decoding once a screen that reads along finds a beginning harmful, in
    rows that cost the step nothing.
    """

    model: str
    prompt: Callable[[str], Prompt]


@dataclass(frozen=True)
class Generate:
    """Decode an answer. `sampling=None` takes the request's own parameters.

    `label` names the pass in replies and traces ("answer", "caption", "rewrite" …). timeout: seconds from when the
    pass is asked for (for a started one, waited for), queueing included. release: when its text may leave.
    candidate: its text is meant for the user, and a verdict may follow. screen, ahead: what runs beside it.
    draft_tokens: see `SamplingParams`; None takes theirs. The result is an `Answer`.
    """

    model: str
    prompt: Prompt
    label: str = "answer"
    sampling: SamplingParams | None = None
    timeout: float | None = None
    release: Release = "hold"
    candidate: bool = True
    screen: Screen | None = None
    ahead: Ahead | None = None
    draft_tokens: int | None = None


@dataclass(frozen=True)
class Score:
    """One forward pass of a detector over a text; the result is a `Scored`.

    `pool_from` is the index of the segment with which pooling starts (a head that pools the mean reads the
    answer's tokens only); tokens before it are context. A chat goes through the detector's own template, and may end
    with the assistant's turn. A detector that is an adapter on the answering model may continue the answer's own
    sequence.
    """

    model: str
    prompt: tuple[Segment, ...] | Chat | Continue
    pool_from: int = 0
    label: str = "score"
    timeout: float | None = None


@dataclass(frozen=True)
class Choose:
    """Read the full next-token distribution after a prompt; the result is a `Chosen`.

    Each word stands for every single token that spells it, whatever its case, with or without a space or a
    word-start mark before it. beginnings: further words; one that no single token spells is recognized by its first
    token, which counts whatever follows.
    """

    model: str
    prompt: Prompt
    words: tuple[str, ...]
    label: str = "judge"
    timeout: float | None = None
    beginnings: tuple[str, ...] = ()


Pass: TypeAlias = "Generate | Score | Choose"


@dataclass(frozen=True)
class Start:
    """Begin a pass before it is certain to be needed; the result, at once, is its `Handle`.

    It runs in rows and pages that nothing else wants, and its text is never shown by itself.
    """

    what: Pass


class Handle(NamedTuple):
    """A pass that was started."""

    number: int


@dataclass(frozen=True)
class Wait:
    """The result of a started pass, which is from now on as urgent as any other."""

    handle: Handle


@dataclass(frozen=True)
class Cancel:
    """Give a started pass up; what it computed is counted as wasted."""

    handle: Handle


Ask: TypeAlias = "Pass | Start | Wait | Cancel"


class Stream(NamedTuple):
    """The tokens of a finished sequence, prompt included, and what they stand for in the prefix index of the weights
    whose `Backbone.cache_key` is named. model: the name under which they answered."""

    model: str
    backbone: str
    tokens: tuple[int, ...]
    content: tuple[int, ...]
    images: tuple[PlacedImage, ...]
    prompt_tokens: int
    label: str = ""  # of the pass that generated it


class Screened(NamedTuple):
    """What a screen found: P(harmless) of the whole text, or why there is none. threshold: the head's own."""

    screen: Screen
    score: float
    threshold: float
    error: str | None = None


class Answer(NamedTuple):
    """What `Generate` returns. `ids` are the generated tokens, `text` their text without stop strings.

    screened: of its `Screen`, where it had one. stopped_early: by that screen; the text is a beginning only.
    """

    text: str
    ids: tuple[int, ...] = ()
    screened: Screened | None = None
    stopped_early: bool = False
    finish_reason: str = "stop"
    stream: Stream | None = None


class Scored(NamedTuple):
    """What `Score` returns: P(harmless), and the head's own threshold."""

    score: float
    threshold: float


class Chosen(NamedTuple):
    """What `Choose` returns: the probability mass of each word, then of each beginning; they need not sum to one."""

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
    """What a loop may know of a model.

    template, threshold: of its head, None without a head. chat_only: it understands chats only. backbone:
    equal for models on the same weights. continues: its head reads the end of a sequence of the backbone's own, as
    an activated adapter does. in_context: its head was fitted on the hidden states of the model that answers.
    reads_along: it can read a text while that grows. special_tokens: those that its tokenizer knows, by their text.
    """

    template: str | None = None
    chat_only: bool = False
    backbone: int = 0
    continues: bool = False
    in_context: bool = False
    reads_along: bool = True
    threshold: float | None = None
    special_tokens: frozenset[str] = frozenset()


Loop: TypeAlias = "Generator[Ask, Any, Decision]"
