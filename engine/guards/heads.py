"""Detectors with a 1-logit head, over the answer's text or over the hidden states of the MLLM that gave it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from ..chat import Chat, Message
from ..errors import InvalidGuard
from ..passes import Answer, Continue, ModelTraits, Score, Scored, Screen, Screened
from ..request import Verdict
from ..text import Segment
from . import prompts
from .detectors import (
    MLLM,
    NONSENSE,
    Detector,
    Judging,
    bound,
    check_count,
    check_number,
    check_timeout,
    is_probability,
)


@dataclass(frozen=True)
class BaseHead:
    """What every head has; it is no detector by itself.

    threshold: harmful below it; None takes the head's own; a number below 0 or above 1 would force the verdict and
    is for benchmarks. prefix_threshold: the same for a beginning of the text, where it is screened. stop_below: the
    answer is stopped when `patience` beginnings in a row score less; None: never. chunk: tokens screened at a time;
    None: from the load. timeout: seconds of a pass, and of a screen from the end of the answer.

    Raises `InvalidGuard` for numbers that are none or out of range, and where `stop_below` is above `threshold`: an
    answer that is stopped must be a harmful one.
    """

    model: str
    threshold: float | None = field(default=None, kw_only=True)
    prefix_threshold: float | None = field(default=None, kw_only=True)
    stop_below: float | None = field(default=None, kw_only=True)
    patience: int = field(default=2, kw_only=True)
    chunk: int | None = field(default=None, kw_only=True)
    timeout: float | None = field(default=None, kw_only=True)
    name: str = field(default="head", kw_only=True)

    def __post_init__(self) -> None:
        for name in ("threshold", "prefix_threshold", "stop_below"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value)
        if self.stop_below is not None and self.threshold is not None and self.stop_below > self.threshold:
            raise InvalidGuard(f"stop_below must be at most the threshold {self.threshold}, not {self.stop_below}")
        check_count("patience", self.patience, 1)
        if self.chunk is not None:
            check_count("chunk", self.chunk, 1)
        check_timeout(self.timeout)

    def _screen(self, before: tuple[Segment, ...] | None) -> Screen:
        return Screen(
            self.model,
            before,
            self.threshold,
            self.prefix_threshold,
            self.stop_below,
            self.patience,
            self.chunk,
            self.timeout,
        )

    def _screened(self, answer: Answer, before: tuple[Segment, ...] | None) -> Screened | None:
        """What a screen found that read just what this head reads; when it stops and clears makes no difference."""
        found = answer.screened
        if found is None or (found.screen.model, found.screen.before) != (self.model, before):
            return None
        return found

    def _verdict(self, found: Scored | Screened) -> Verdict:
        if isinstance(found, Screened) and found.error is not None:
            return Verdict.failed(self.name, found.error or NONSENSE)
        threshold = self.threshold
        if threshold is None:
            threshold = found.threshold
            if not is_probability(threshold):
                return Verdict.failed(self.name, NONSENSE)
        if not is_probability(found.score):
            return Verdict.failed(self.name, NONSENSE, threshold)
        return Verdict(found.score, threshold, self.name)


@dataclass(frozen=True)
class HarmHead(BaseHead):
    """A classifier with one logit over the answer's text (MLLM-Protector's harm detector).

    template: `response`, `question_answer` (the question is the last user turn), `chat` (the whole conversation in
    the detector's own chat template, without images; it is read once the answer has ended), or None: the one that
    the head was trained on, which `bind` fills in. screen: reads the answer while it is decoded. continues: the model
    is an activated adapter on the MLLM's own weights, which reads the end of the answer's own sequence once it is
    there, instead of screening; texts of another conversation it reads in its template. None: as the model's traits
    say, which `bind` fills in.

    Raises `InvalidGuard` for an unknown template, and as `BaseHead` does.
    """

    model: str = "detector"
    template: str | None = None
    screen: bool = field(default=True, kw_only=True)
    continues: bool | None = field(default=None, kw_only=True)
    name: str = field(default="harm_head", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        templates = (*prompts.DETECTOR_TEMPLATES, prompts.FINISHED_CHAT)
        if self.template is not None and self.template not in templates:
            allowed = ", ".join(templates)
            raise InvalidGuard(f"template must be one of {allowed} or None, not {self.template!r}")
        if self.stop_below is not None and (self.continues or not self.screen):
            raise InvalidGuard("stop_below needs a head that screens: screen=True, and no activated adapter")

    @property
    def incremental(self) -> bool:
        return self.screen and not self.continues and self.template != prompts.FINISHED_CHAT

    def bind(self, traits: Mapping[str, ModelTraits]) -> HarmHead:
        """The head with what its model says of itself; raises `InvalidGuard` if that does not fit."""
        own = traits[self.model]
        if own.in_context:
            raise InvalidGuard(
                f"the head of {self.model!r} reads the hidden states of the model that answers; use Probe"
            )
        template = self.template or own.template
        if template is None:
            raise InvalidGuard(
                f"{self.model!r} has no head, or one that names no text template; give the guard one of "
                f"{', '.join(prompts.DETECTOR_TEMPLATES)}, or ask a guard model with GenerativeGuard"
            )
        able = own.continues and MLLM in traits and own.backbone == traits[MLLM].backbone
        if self.continues and not able:
            raise InvalidGuard(f"{self.model!r} cannot continue an answer: it is no activated adapter on {MLLM!r}")
        continues = True if able and self.continues is None else self.continues
        # an activated adapter scores the end of its invocation: it has nothing to say of a text still being written
        screen = self.screen and own.reads_along and not own.continues and template != prompts.FINISHED_CHAT
        if self.stop_below is not None and not screen:
            raise InvalidGuard(f"stop_below needs a head that screens; {self.model!r} reads a text when it has ended")
        return replace(self, template=template, continues=continues, screen=screen)

    def screening(self, chat: Chat) -> Screen | None:
        """What reads along while an answer to the chat is decoded; None where nothing does."""
        if not self.incremental or self.template is None:
            return None
        return self._screen(prompts.detector_before(self.template, chat.query))

    def judge(self, chat: Chat, answer: Answer) -> Judging:
        if self.template is None:
            raise InvalidGuard("a harm head needs a text template: bind its guard, or name one in HarmHead")
        if self.incremental:
            found = self._screened(answer, prompts.detector_before(self.template, chat.query))
            if found is not None:
                return self._verdict(found)
        if self.continues and _is_first(answer):
            return self._verdict((yield Score(self.model, Continue(answer), timeout=self.timeout)))
        if self.template == prompts.FINISHED_CHAT:
            finished = Chat((*chat.without_images().messages, Message("assistant", (answer.text,))))
            return self._verdict((yield Score(self.model, finished, timeout=self.timeout)))
        text = prompts.detector_text(self.template, chat.query, answer.text)
        return self._verdict((yield Score(self.model, text.segments, text.pool_from, timeout=self.timeout)))


@dataclass(frozen=True)
class Probe(BaseHead):
    """A head on the hidden states that the MLLM has anyway while it answers. There is nothing it could read later.

    fallback: judges what the MLLM has not written itself, such as a rewrite; None: that is a failed verdict, hence
    harmful.

    Raises `InvalidGuard` as `BaseHead` does.
    """

    model: str = "probe"
    fallback: Detector | None = None
    name: str = field(default="probe", kw_only=True)
    incremental: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fallback is not None and not isinstance(self.fallback, Detector):
            raise InvalidGuard(f"fallback must be None or a detector, not {self.fallback!r}")

    def bind(self, traits: Mapping[str, ModelTraits]) -> Probe:
        """The probe with its fallback bound; raises `InvalidGuard` unless it was fitted on the MLLM's states."""
        own = traits[self.model]
        if not own.in_context or MLLM not in traits or own.backbone != traits[MLLM].backbone:
            raise InvalidGuard(
                f"the head of {self.model!r} was not fitted on the hidden states of {MLLM!r}; a head that reads text "
                "is a HarmHead"
            )
        return replace(self, fallback=bound(self.fallback, traits))

    def screening(self, chat: Chat) -> Screen:
        """What reads along while an answer to the chat is decoded."""
        return self._screen(None)

    def judge(self, chat: Chat, answer: Answer) -> Judging:
        found = self._screened(answer, None)
        if found is not None:
            return self._verdict(found)
        if self.fallback is None:
            return Verdict.failed(self.name, "not screened")
        return (yield from self.fallback.judge(chat, answer))


def _is_first(answer: Answer) -> bool:
    """Whether the answer's sequence is the chat itself, as the MLLM answered it."""
    return answer.stream is not None and (answer.stream.model, answer.stream.label) == (MLLM, "answer")
