"""Remedies: what turns a harmful answer into another one. They judge nothing.

A remedy may raise: the loop then refuses, with the reason.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from ..chat import Chat
from ..errors import InvalidGuard
from ..images import LoadedImage
from ..passes import Answer, Generate, Pass, Prompt
from ..request import FinishReason
from ..sampling import SamplingParams
from ..text import segments_text
from . import prompts
from .detectors import check_timeout

Mending: TypeAlias = Generator[Pass, Any, Answer]


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


@dataclass(frozen=True)
class Detoxify:
    """A detoxifier rewrites the answer (MLLM-Protector).

    with_question: the prompt of the released training script; without, that of its inference script.
    chat_template: puts the prompt into the model's chat template, for a detoxifier that is a chat model; the
    released detoxifier takes it raw. None: as the model's traits say, which `Guard.bind` fills in, else raw.
    sampling: None takes the request's own.
    """

    model: str = "detoxifier"
    with_question: bool = True
    chat_template: bool | None = None
    sampling: SamplingParams | None = None
    timeout: float | None = None
    name: str = "detoxify"
    keeps_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_timeout(self.timeout)

    def mend(self, chat: Chat, answer: Answer) -> Mending:
        if self.with_question:
            segments = prompts.rewrite_with_question(chat.query, answer.text)
        else:
            segments = prompts.rewrite(answer.text)
        prompt: Prompt = Chat.single(segments_text(segments)) if self.chat_template else segments
        return (yield Generate(self.model, prompt, "rewrite", self.sampling, self.timeout))


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

    def mend(self, chat: Chat, answer: Answer) -> Mending:
        message = prompts.without_hints(chat.query)
        if chat.images:
            request = self._prompt(prompts.caption(chat.query), chat.images)
            caption = yield Generate(
                self.model, request, "caption", self.caption_sampling, self.timeout, candidate=False
            )
            hints = prompts.published_text(caption.text) if self.published else caption.text
            if self.published or hints.strip():
                message = prompts.eyes_closed(chat.query, hints)
        second = yield Generate(self.model, self._prompt(message), "eyes_closed", self.sampling, self.timeout)
        if self.published:
            return second._replace(text=prompts.published_text(second.text))
        return second

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
