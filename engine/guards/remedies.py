"""Remedies: what turns a harmful answer into another one, and what of that may begin early. They judge nothing.

A remedy may raise: the loop then refuses, with the reason.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from ..chat import Chat
from ..errors import InvalidGuard
from ..images import LoadedImage
from ..passes import Ahead, Answer, Ask, Generate, Handle, ModelTraits, Pass, Prompt, Wait
from ..request import FinishReason
from ..sampling import SamplingParams
from ..text import segments_text
from . import prompts
from .detectors import check_count, check_timeout

Mending: TypeAlias = Generator[Ask, Any, Answer]


@runtime_checkable
class Remedy(Protocol):
    """The last pass that `mend` yields is the one whose text it returns.

    `keeps_images` is false where that text was made without the chat's images; a detector that looks at
    images then judges it without them, too.
    """

    @property
    def name(self) -> str: ...

    @property
    def keeps_images(self) -> bool: ...

    def mend(self, chat: Chat, answer: Answer) -> Mending: ...


@runtime_checkable
class Prefilling(Protocol):
    """A remedy whose prompt is known as far as the answer is: it can be computed beside the answer's decoding."""

    def ahead(self, chat: Chat) -> Ahead | None: ...


@runtime_checkable
class Starting(Protocol):
    """A remedy whose first pass needs no answer: `start` is that pass, None where there is none.

    Where it was started before the verdict, `mend` gets its handle and waits for it instead of asking again.
    """

    def start(self, chat: Chat) -> Pass | None: ...

    def mend(self, chat: Chat, answer: Answer, started: Handle | None = None) -> Mending: ...


@dataclass(frozen=True)
class Detoxify:
    """A detoxifier rewrites the answer (MLLM-Protector).

    with_question: the prompt of the released training script; without, that of its inference script.
    chat_template: puts the prompt into the model's chat template, for a detoxifier that is a chat model; the
    released detoxifier takes it raw. None: as the model's traits say, which `bind` fills in, else raw.
    sampling: None takes the request's own. draft_tokens: a rewrite mostly repeats the answer, so that many tokens a
    step are guessed from it (see `SamplingParams`); 0: none; None: as the sampling says.
    """

    model: str = "detoxifier"
    with_question: bool = True
    chat_template: bool | None = None
    sampling: SamplingParams | None = None
    timeout: float | None = None
    draft_tokens: int | None = 12
    name: str = "detoxify"
    keeps_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_timeout(self.timeout)
        if self.draft_tokens is not None:
            check_count("draft_tokens", self.draft_tokens, 0)

    def bind(self, traits: Mapping[str, ModelTraits]) -> Detoxify:
        """The remedy with the chat template of its model."""
        return self if self.chat_template is not None else replace(self, chat_template=traits[self.model].chat_only)

    def ahead(self, chat: Chat) -> Ahead:
        return Ahead(self.model, partial(self._prompt, chat))

    def mend(self, chat: Chat, answer: Answer) -> Mending:
        prompt = self._prompt(chat, answer.text)
        return (
            yield Generate(self.model, prompt, "rewrite", self.sampling, self.timeout, draft_tokens=self.draft_tokens)
        )

    def _prompt(self, chat: Chat, text: str) -> Prompt:
        segments = prompts.rewrite_with_question(chat.query, text) if self.with_question else prompts.rewrite(text)
        return Chat.single(segments_text(segments)) if self.chat_template else segments


@dataclass(frozen=True)
class EyesClosed:
    """The MLLM describes the image with the query in mind, then answers without seeing it (ECSO).

    A request without an image (or with an empty caption) is asked again without hints. sampling: for the
    answer; None takes the request's own. caption_sampling: for the caption. published: raw prompts in the
    released script's conversation, texts stripped as there, an empty caption stays a hint.
    """

    model: str = "mllm"
    sampling: SamplingParams | None = None
    caption_sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0, max_tokens=256))
    timeout: float | None = None
    published: bool = False
    name: str = "eyes_closed"
    keeps_images: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_timeout(self.timeout)

    def start(self, chat: Chat) -> Generate | None:
        """The caption, where there is an image; the released script asks for it after the verdict."""
        return self._caption(chat) if chat.images and not self.published else None

    def mend(self, chat: Chat, answer: Answer, started: Handle | None = None) -> Mending:
        """started: of `start`, where that runs already."""
        message = prompts.without_hints(chat.query)
        if chat.images:
            caption = yield self._caption(chat) if started is None else Wait(started)
            hints = prompts.published_text(caption.text) if self.published else caption.text
            if self.published or hints.strip():
                message = prompts.eyes_closed(chat.query, hints)
        second = yield Generate(self.model, self._prompt(message), "eyes_closed", self.sampling, self.timeout)
        if self.published:
            return second._replace(text=prompts.published_text(second.text))
        return second

    def _caption(self, chat: Chat) -> Generate:
        request = self._prompt(prompts.caption(chat.query), chat.images)
        return Generate(self.model, request, "caption", self.caption_sampling, self.timeout, candidate=False)

    def _prompt(self, message: prompts.Segments, images: tuple[LoadedImage, ...] = ()) -> Prompt:
        if self.published:
            return prompts.vicuna_v1(message, images)
        return Chat.single(segments_text(message), images)


@dataclass(frozen=True)
class Refuse:
    """Says a fixed text instead; the loop ends with it and judges it no more. Empty text: `InvalidGuard`."""

    text: str = prompts.REFUSAL
    name: str = "refuse"
    keeps_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise InvalidGuard("a refusal needs a text that is not empty")

    def mend(self, chat: Chat, answer: Answer) -> Mending:
        yield from ()
        return Answer(self.text, finish_reason=FinishReason.REFUSED)
