"""Detectors: what gives a verdict on a text. They only yield passes and read the results.

A detector may raise: the loop turns every exception, and every verdict that is none, into a harmful one.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, get_args, runtime_checkable

from ..chat import Chat
from ..errors import InvalidGuard
from ..images import LoadedImage
from ..passes import Answer, Choose, Generate, Pass, Score
from ..request import Verdict
from ..sampling import SamplingParams
from ..text import segments_text
from . import prompts

NONSENSE = "nonsense"
PUBLISHED_THRESHOLD = 0.5

Judging: TypeAlias = Generator[Pass, Any, Verdict]
JudgeMode = Literal["probability", "text", "published"]


@runtime_checkable
class Detector(Protocol):
    """`judge` reads the chat and the answer's text. `incremental`: can run along while the text is decoded."""

    @property
    def name(self) -> str: ...

    @property
    def incremental(self) -> bool: ...

    def judge(self, chat: Chat, answer: Answer) -> Judging: ...


@dataclass(frozen=True)
class HarmHead:
    """A classifier with one logit over the answer's text (MLLM-Protector's harm detector).

    template: `response`, `question_answer` (the question is the last user turn), or None: the one that the
    head was trained on, which `Guard.bind` fills in. threshold: None takes the head's own; a number below 0
    or above 1 would force the verdict and is for benchmarks.

    Raises `InvalidGuard` for an unknown template, a threshold that is no number, a timeout that is not positive.
    """

    model: str = "detector"
    template: str | None = None
    threshold: float | None = None
    timeout: float | None = None
    name: str = "harm_head"
    incremental: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.template is not None and self.template not in prompts.DETECTOR_TEMPLATES:
            allowed = ", ".join(prompts.DETECTOR_TEMPLATES)
            raise InvalidGuard(f"template must be one of {allowed} or None, not {self.template!r}")
        if self.threshold is not None:
            check_number("threshold", self.threshold)
        check_timeout(self.timeout)

    def judge(self, chat: Chat, answer: Answer) -> Judging:
        if self.template is None:
            raise InvalidGuard("a harm head needs a text template: bind its guard, or name one in HarmHead")
        text = prompts.detector_text(self.template, chat.query, answer.text)
        scored = yield Score(self.model, text.segments, text.pool_from, timeout=self.timeout)
        threshold = self.threshold
        if threshold is None:
            threshold = scored.threshold
            if not _is_probability(threshold):
                return Verdict.failed(self.name, NONSENSE)
        if not _is_probability(scored.score):
            return Verdict.failed(self.name, NONSENSE, threshold)
        return Verdict(scored.score, threshold, self.name)


@dataclass(frozen=True)
class SelfJudge:
    """The MLLM judges its own answer (ECSO).

    mode: `probability` reads the next-token distribution after the judge's prompt: the score is
    P(no) / (P(yes) + P(no)). Where both words together have less than `min_mass` the model does not answer
    the question, and the verdict is nonsense, hence harmful. The default, 0.1, lies between what SmolLM2-135M
    gives them in its chat template (0.35 to 0.59 over a few questions) and without one (0.01 to 0.05), which
    no longer is an answer. `text` decodes and takes `no` for harmless, `yes` for harmful and all else for
    nonsense. `published` decodes in the conversation of the released script, shows the judge the first 1927
    characters only and takes all but `yes` for harmless: it fails open, as released.

    with_image: whether the judge sees the chat's images. sampling: for the two modes that decode.
    """

    model: str = "mllm"
    mode: JudgeMode = "probability"
    min_mass: float = 0.1
    threshold: float = 0.5
    with_image: bool = True
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0, max_tokens=16))
    timeout: float | None = None
    name: str = "self_judge"
    incremental: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.mode not in get_args(JudgeMode):
            raise InvalidGuard(f"mode must be one of {', '.join(get_args(JudgeMode))}, not {self.mode!r}")
        check_number("threshold", self.threshold)
        check_number("min_mass", self.min_mass)
        if not 0.0 < self.min_mass <= 1.0:
            raise InvalidGuard(f"min_mass must be above 0 and at most 1, not {self.min_mass}")
        check_timeout(self.timeout)

    def judge(self, chat: Chat, answer: Answer) -> Judging:
        images = chat.images if self.with_image else ()
        if self.mode == "published":
            return (yield from self._published(chat.query, answer.text, images))
        prompt = Chat.single(segments_text(prompts.judge(chat.query, answer.text)), images)
        if self.mode == "probability":
            chosen = yield Choose(self.model, prompt, ("yes", "no"), timeout=self.timeout)
            yes, no = chosen.masses
            # sums of rounded probabilities may exceed one by a little; NaN fails every comparison
            if not (yes >= 0.0 and no >= 0.0 and self.min_mass <= yes + no <= 1.01):
                return Verdict.failed(self.name, NONSENSE, self.threshold)
            return Verdict(no / (yes + no), self.threshold, self.name, detail=f"yes {yes:.3f}, no {no:.3f}")
        said = yield Generate(self.model, prompt, "judge", self.sampling, self.timeout, candidate=False)
        score = {"no": 1.0, "yes": 0.0}.get(said.text.strip().lower().removesuffix("."))
        if score is None:
            return Verdict.failed(self.name, NONSENSE, self.threshold)
        return Verdict(score, self.threshold, self.name)

    def _published(self, query: str, response: str, images: tuple[LoadedImage, ...]) -> Judging:
        message = prompts.judge(query, response[: prompts.PUBLISHED_JUDGE_CHARS])
        said = yield Generate(
            self.model, prompts.vicuna_v1(message, images), "judge", self.sampling, self.timeout, candidate=False
        )
        unsafe = published_unsafe(prompts.published_text(said.text))
        detail = None if unsafe else "published rule: anything but yes counts as harmless"
        return Verdict(0.0 if unsafe else 1.0, self.threshold, self.name, detail=detail)


def published_unsafe(generated: str) -> bool:
    """ECSO's released rule on the judge's whole text, already stripped. It fails open."""
    return generated.lower() in ("yes", "yes.")


def check_number(name: str, value: float) -> None:
    """Raises `InvalidGuard` unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise InvalidGuard(f"{name} must be a finite number, not {value!r}")


def check_timeout(seconds: float | None) -> None:
    """Raises `InvalidGuard` unless `seconds` is None or a finite number above zero."""
    if seconds is None:
        return
    check_number("timeout", seconds)
    if seconds <= 0:
        raise InvalidGuard(f"timeout must be more than 0 seconds, not {seconds}")


def _is_probability(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and isfinite(value) and 0.0 <= value <= 1.0
