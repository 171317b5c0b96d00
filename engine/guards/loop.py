"""The one loop of every guard: answer, judge, mend, judge again. What a guard is, and what is decided with it.

No model runs here, and nothing here knows the engine: `guarded` yields passes and gets their results. It fails
closed: whatever goes wrong in a detector or a remedy ends in the refusal, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..chat import Chat
from ..errors import Aborted, InvalidGuard, PassError, PassTimeout, TooLong
from ..passes import Answer, Decision, Generate, Judged, Loop, ModelTraits, Pass
from ..request import FinishReason, Outcome, Verdict
from ..sampling import SamplingParams
from ..text import Untrusted
from . import prompts
from .detectors import NONSENSE, PUBLISHED_THRESHOLD, Detector, HarmHead, JudgeMode, Judging, SelfJudge
from .remedies import Detoxify, EyesClosed, Mending, Refuse, Remedy

MAX_ROUNDS = 100
_MAX_REASON = 200  # characters


@dataclass(frozen=True)
class Released:
    """How a released script asks for its first answer, and what its verdicts must say about its rules."""

    conversation: Callable[..., prompts.Segments]
    sampling: SamplingParams
    tidy: Callable[[str], str]
    note: str


@dataclass(frozen=True)
class Guard:
    """A detector, a remedy and how often to try. Without a detector nothing is guarded.

    max_rounds: remedies at most, 0 to 100. recheck: whether a mended answer is judged before it goes out; the
    published scripts do not. refusal: what is said instead of an answer. released: set where the guard is a
    released script, with its defects.

    Raises `InvalidGuard` for values that make no guard.
    """

    detector: Detector | None = None
    remedy: Remedy = field(default_factory=Refuse)
    max_rounds: int = 1
    recheck: bool = True
    refusal: str = prompts.REFUSAL
    name: str = "guard"
    released: Released | None = None

    def __post_init__(self) -> None:
        rounds = self.max_rounds
        if isinstance(rounds, bool) or not isinstance(rounds, int) or not 0 <= rounds <= MAX_ROUNDS:
            raise InvalidGuard(f"max_rounds must be a whole number from 0 to {MAX_ROUNDS}, not {rounds!r}")
        if not isinstance(self.recheck, bool):
            raise InvalidGuard(f"recheck must be true or false, not {self.recheck!r}")
        if not isinstance(self.refusal, str) or not self.refusal.strip():
            raise InvalidGuard("refusal must be a text that is not empty")
        if self.detector is not None and not isinstance(self.detector, Detector):
            raise InvalidGuard(f"detector must be None or have name, incremental and judge, not {self.detector!r}")
        if not isinstance(self.remedy, Remedy):
            raise InvalidGuard(f"a remedy must have name, keeps_images and mend, not {self.remedy!r}")

    @property
    def published(self) -> bool:
        return self.released is not None

    def run(self, chat: Chat, traits: Mapping[str, ModelTraits]) -> Loop:
        """The guard's loop for a chat, on an engine with these models (by name).

        Raises `InvalidGuard` if a model that the guard names is not there, or its head has no text template.
        """
        return guarded(chat, self.bind(traits))

    def bind(self, traits: Mapping[str, ModelTraits]) -> Guard:
        """The guard with what it leaves to its models filled in; raises as `run` does."""
        for part in (self.detector, self.remedy):
            model = getattr(part, "model", None)
            if model is not None and model not in traits:
                raise InvalidGuard(
                    f"guard {self.name!r} needs a model {model!r}; this engine has {', '.join(sorted(traits))}"
                )
        detector, remedy = self.detector, self.remedy
        if isinstance(detector, HarmHead) and detector.template is None:
            detector = replace(detector, template=traits[detector.model].template)
            if detector.template is None:
                raise InvalidGuard(
                    f"the head of {detector.model!r} names no text template; give the guard one of "
                    f"{', '.join(prompts.DETECTOR_TEMPLATES)}"
                )
        if isinstance(remedy, Detoxify) and remedy.chat_template is None:
            remedy = replace(remedy, chat_template=traits[remedy.model].chat_only)
        return replace(self, detector=detector, remedy=remedy)

    @classmethod
    def off(cls) -> Guard:
        """No guard: the answer goes out as it is."""
        return cls(name="off")

    @classmethod
    def protector(
        cls,
        *,
        published: bool = False,
        threshold: float | None = None,
        detector: str = "detector",
        detoxifier: str | None = "detoxifier",
        template: str | None = None,
        max_rounds: int | None = None,
        chat_template: bool | None = None,
        timeout: float | None = None,
        refusal: str = prompts.REFUSAL,
    ) -> Guard:
        """MLLM-Protector: a harm head judges, a detoxifier rewrites, up to `max_rounds` (3) times.

        detector, detoxifier: names of models; without a detoxifier the refusal takes its place. threshold: None
        takes the head's own. template: see `HarmHead`. chat_template: see `Detoxify`. timeout: seconds a pass.
        published: the released MM-SafetyBench script. It reads the response alone, against 0.5, rewrites once
        without the question and returns that unchecked. The detoxifier decodes greedily up to 1024 tokens, its
        prompt included; where a checkpoint's generation configuration says otherwise, replace `sampling`.
        """
        if not published:
            head = HarmHead(detector, template, threshold, timeout)
            remedy: Remedy = Refuse(refusal)
            if detoxifier is not None:
                remedy = Detoxify(detoxifier, chat_template=chat_template, timeout=timeout)
            rounds = 3 if max_rounds is None else max_rounds
            return cls(head, remedy, rounds, True, refusal, "protector")
        _fixed(template=template, max_rounds=max_rounds, chat_template=chat_template)
        head = HarmHead(detector, "response", PUBLISHED_THRESHOLD if threshold is None else threshold, timeout)
        remedy = Refuse(refusal)
        if detoxifier is not None:
            sampling = SamplingParams(temperature=0.0, max_tokens=None, max_length=1024)
            remedy = Detoxify(detoxifier, False, False, sampling, timeout)
        script = Released(
            prompts.llava_v1,
            SamplingParams(temperature=0.0, max_tokens=1024),
            prompts.published_text,
            "published: one rewrite, not judged again",
        )
        return cls(head, remedy, 1, False, refusal, "protector", script)

    @classmethod
    def ecso(
        cls,
        *,
        published: bool = False,
        threshold: float = 0.5,
        mode: JudgeMode | None = None,
        max_rounds: int | None = None,
        timeout: float | None = None,
        refusal: str = prompts.REFUSAL,
    ) -> Guard:
        """ECSO: the MLLM judges its own answer, then answers from a caption, `max_rounds` (1) times at most.

        mode, threshold: see `SelfJudge`; the default mode is `probability`. timeout: seconds a pass.
        published: the released MM-SafetyBench script. It judges by text and fails open, and its second answer
        is not judged.
        """
        if not published:
            judge = SelfJudge(mode=mode or "probability", threshold=threshold, timeout=timeout)
            rounds = 1 if max_rounds is None else max_rounds
            return cls(judge, EyesClosed(timeout=timeout), rounds, True, refusal, "ecso")
        _fixed(mode=mode, max_rounds=max_rounds)
        later = SamplingParams(temperature=0.0, max_tokens=1024)
        judge = SelfJudge(mode="published", threshold=threshold, sampling=later, timeout=timeout)
        remedy = EyesClosed(sampling=later, caption_sampling=later, timeout=timeout, published=True)
        script = Released(
            prompts.vicuna_v1,
            SamplingParams(temperature=0.0, max_tokens=2048),
            str.strip,
            "published: the second answer is not judged",
        )
        return cls(judge, remedy, 1, False, refusal, "ecso", script)


def guarded(chat: Chat, guard: Guard) -> Loop:
    """The loop. Yields passes and returns a `Decision`, whose k-th verdict is about the k-th pass that ran with
    the label `answer`, `rewrite` or `eyes_closed`.

    A `PassError` at the first answer goes up to the caller, and so does `Aborted` at any pass; every other
    failure ends in a refusal.
    """
    answer = yield from _first_answer(chat, guard)
    if guard.detector is None:
        return Decision(answer, Outcome.UNGUARDED)
    judged: list[Judged] = []
    for round in range(guard.max_rounds + 1):
        if round and not guard.recheck:
            return Decision(answer, Outcome.MENDED, tuple(judged))
        verdict = yield from _judge(guard, guard.detector, chat, answer, mended=round > 0)
        judged.append(Judged(answer.text, verdict))
        if verdict.harmless:
            return Decision(answer, Outcome.MENDED if round else Outcome.CLEAN, tuple(judged))
        if verdict.error is not None or round == guard.max_rounds:
            break
        try:
            answer = yield from _mend(guard, chat, answer)
        except Aborted:
            raise
        except Exception as error:
            return _refused(guard.refusal, judged, f"{guard.remedy.name}: {_reason(error)}")
        if answer.finish_reason == FinishReason.REFUSED:
            return _refused(answer.text, judged, verdict.reason)
    return _refused(guard.refusal, judged, verdict.reason)


def _first_answer(chat: Chat, guard: Guard) -> Generator[Pass, Any, Answer]:
    script = guard.released
    if script is None:
        return (yield Generate("mllm", chat, release="live" if guard.detector is None else "hold"))
    prompt = script.conversation((Untrusted(chat.query),), chat.images)
    answer = yield Generate("mllm", prompt, sampling=script.sampling)
    return answer._replace(text=script.tidy(answer.text))


def _judge(guard: Guard, detector: Detector, chat: Chat, answer: Answer, mended: bool) -> Judging:
    """The detector's verdict, or a harmful one that says why there is none."""
    try:
        if mended and not guard.remedy.keeps_images:
            chat = chat.without_images()
        verdict = yield from detector.judge(chat, answer)
        if not _sound(verdict):
            return Verdict.failed(detector.name, NONSENSE)
        if guard.released is not None:
            detail = f"{verdict.detail}; {guard.released.note}" if verdict.detail else guard.released.note
            verdict = replace(verdict, detail=detail)
        return verdict
    except Aborted:
        raise
    except Exception as error:
        return Verdict.failed(detector.name, _reason(error))


def _sound(verdict: Any) -> bool:
    """Whether a detector's result is a verdict: one that failed, or a score in [0, 1] against a number."""
    if not isinstance(verdict, Verdict):
        return False
    if verdict.error is not None:
        return True
    # NaN fails the comparison
    return 0.0 <= verdict.score <= 1.0 and isinstance(verdict.threshold, int | float)


def _mend(guard: Guard, chat: Chat, answer: Answer) -> Mending:
    """The remedy's answer. Raises `PassError` if it is none, or has no text and the guard is not published."""
    mended = yield from guard.remedy.mend(chat, answer)
    if not isinstance(mended, Answer) or not isinstance(mended.text, str):
        raise PassError(NONSENSE)
    if not mended.text.strip() and not guard.published:
        raise PassError("empty")
    return mended


def _refused(text: str, judged: list[Judged], reason: str) -> Decision:
    answer = Answer(text, finish_reason=FinishReason.REFUSED)
    return Decision(answer, Outcome.REFUSED, tuple(judged), reason)


def _reason(error: Exception) -> str:
    if isinstance(error, PassTimeout):
        return "timeout"
    if isinstance(error, TooLong):
        return "too_long"
    return (str(error) or type(error).__name__)[:_MAX_REASON]


def _fixed(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise InvalidGuard(f"published=True fixes {name} as released; leave it out")
