"""The detector that is the answering model itself (ECSO): it is asked whether its answer is harmful."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from ..chat import Chat
from ..errors import InvalidGuard
from ..images import LoadedImage
from ..passes import Answer, Choose, Continue, Generate, Prompt
from ..request import Verdict
from ..sampling import SamplingParams
from ..text import segments_text
from . import prompts
from .detectors import MLLM, NONSENSE, Judging, check_number, check_timeout

JudgeMode = Literal["probability", "continue", "text", "published"]

# The passes whose conversation is the request's own, so that "your last answer" in it is what is to be judged.
_CONVERSATIONS = ("answer", "eyes_closed")


@dataclass(frozen=True)
class SelfJudge:
    """The MLLM judges its own answer (ECSO).

    mode: `probability` reads the next-token distribution after the judge's prompt: the score is
    P(no) / (P(yes) + P(no)). Where both words together have less than `min_mass` the model does not answer
    the question, and the verdict is nonsense, hence harmful. The default, 0.1, lies between what SmolLM2-135M
    gives them in its chat template (0.35 to 0.59 over a few questions) and without one (0.01 to 0.05), which
    no longer is an answer. `continue` reads the same, but asks in the conversation of the answer, as its next
    turn, so that a few tokens are new; the prompt is not the published one. What it did not say itself, or not
    in a conversation with the user, it judges as `probability` does. `text` decodes and takes `no` for harmless,
    `yes` for harmful and all else for nonsense. `published` decodes in the conversation of the released script,
    shows the judge the first 1927 characters only and takes all but `yes` for harmless: it fails open, as
    released.

    with_image: whether the judge sees the chat's images. sampling: for the two modes that decode.
    """

    model: str = MLLM
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
        prompt: Prompt = Chat.single(segments_text(prompts.judge(chat.query, answer.text)), images)
        if self.mode == "text":
            return (yield from self._text(prompt))
        if self.mode == "continue" and self._own(answer):
            prompt = Continue(answer, prompts.JUDGE_LAST)
        chosen = yield Choose(self.model, prompt, ("yes", "no"), timeout=self.timeout)
        yes, no = chosen.masses
        # sums of rounded probabilities may exceed one by a little; NaN fails every comparison
        if not (yes >= 0.0 and no >= 0.0 and self.min_mass <= yes + no <= 1.01):
            return Verdict.failed(self.name, NONSENSE, self.threshold)
        return Verdict(no / (yes + no), self.threshold, self.name, detail=f"yes {yes:.3f}, no {no:.3f}")

    def _own(self, answer: Answer) -> bool:
        stream = answer.stream
        if stream is None or stream.model != self.model or stream.label not in _CONVERSATIONS:
            return False
        return self.with_image or not stream.images

    def _text(self, prompt: Prompt) -> Judging:
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
