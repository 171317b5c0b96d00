"""What a guard is: a detector, a remedy, how often to try; and both published systems as guards. The loop has its own
file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..chat import Chat
from ..errors import InvalidGuard
from ..passes import Loop, ModelTraits, ReleaseMode
from ..sampling import SamplingParams
from . import prompts
from .detectors import Detector, bound
from .heads import HarmHead, Probe
from .loop import guarded
from .remedies import Detoxify, EyesClosed, Refuse, Remedy
from .self_judge import JudgeMode, SelfJudge

MAX_ROUNDS = 100
PUBLISHED_THRESHOLD = 0.5


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
    released script, with its defects. speculate: what a remedy needs is begun before the verdict, where there is
    room: a harmless answer wastes it, a harmful one has it at once.

    Raises `InvalidGuard` for values that make no guard.
    """

    detector: Detector | None = None
    remedy: Remedy = field(default_factory=Refuse)
    max_rounds: int = 1
    recheck: bool = True
    refusal: str = prompts.REFUSAL
    name: str = "guard"
    released: Released | None = None
    speculate: bool = False

    def __post_init__(self) -> None:
        rounds = self.max_rounds
        if isinstance(rounds, bool) or not isinstance(rounds, int) or not 0 <= rounds <= MAX_ROUNDS:
            raise InvalidGuard(f"max_rounds must be a whole number from 0 to {MAX_ROUNDS}, not {rounds!r}")
        for name in ("recheck", "speculate"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidGuard(f"{name} must be true or false, not {getattr(self, name)!r}")
        if self.released is not None and self.speculate:
            raise InvalidGuard("a released script does one thing after the other: speculate must be false")
        if not isinstance(self.refusal, str) or not self.refusal.strip():
            raise InvalidGuard("refusal must be a text that is not empty")
        if self.detector is not None and not isinstance(self.detector, Detector):
            raise InvalidGuard(f"detector must be None or have name, incremental and judge, not {self.detector!r}")
        if not isinstance(self.remedy, Remedy):
            raise InvalidGuard(f"a remedy must have name, keeps_images and mend, not {self.remedy!r}")

    @property
    def published(self) -> bool:
        return self.released is not None

    def run(self, chat: Chat, traits: Mapping[str, ModelTraits], release: ReleaseMode = "verdict") -> Loop:
        """The guard's loop for a chat, on an engine with these models (by name).

        Raises `InvalidGuard` if a model that the guard names is not there or does not fit, or if the guard cannot
        release its text so.
        """
        return guarded(chat, self.bind(traits), release)

    def bind(self, traits: Mapping[str, ModelTraits]) -> Guard:
        """The guard with what it leaves to its models filled in; raises as `run` does."""
        return replace(self, detector=bound(self.detector, traits), remedy=bound(self.remedy, traits))

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
        screen: bool = True,
        stop_below: float | None = None,
        patience: int = 2,
        speculate: bool = True,
    ) -> Guard:
        """MLLM-Protector: a harm head judges, a detoxifier rewrites, up to `max_rounds` (3) times.

        detector, detoxifier: names of models; without a detoxifier the refusal takes its place. threshold: None
        takes the head's own. template: see `HarmHead`. chat_template: see `Detoxify`. timeout: seconds a pass.
        screen, stop_below, patience: see `HarmHead`. speculate: begin the rewrite's prompt beside the answer once a
        beginning of it is harmful.
        published: the released MM-SafetyBench script. It reads the response alone, against 0.5, rewrites once
        without the question and returns that unchecked. The detoxifier decodes greedily up to 1024 tokens, its
        prompt included; where a checkpoint's generation configuration says otherwise, replace `sampling`. Nothing
        runs beside anything there.
        """
        if not published:
            head = HarmHead(
                detector,
                template,
                threshold=threshold,
                screen=screen,
                stop_below=stop_below,
                patience=patience,
                timeout=timeout,
            )
            remedy: Remedy = Refuse(refusal)
            if detoxifier is not None:
                remedy = Detoxify(detoxifier, chat_template=chat_template, timeout=timeout)
            rounds = 3 if max_rounds is None else max_rounds
            return cls(head, remedy, rounds, True, refusal, "protector", speculate=speculate)
        _fixed(template=template, max_rounds=max_rounds, chat_template=chat_template, stop_below=stop_below)
        head = HarmHead(
            detector,
            "response",
            threshold=PUBLISHED_THRESHOLD if threshold is None else threshold,
            screen=False,
            continues=False,
            timeout=timeout,
        )
        remedy = Refuse(refusal)
        if detoxifier is not None:
            sampling = SamplingParams(temperature=0.0, max_tokens=None, max_length=1024)
            remedy = Detoxify(detoxifier, False, False, sampling, timeout, draft_tokens=None)
        script = Released(
            prompts.llava_v1,
            SamplingParams(temperature=0.0, max_tokens=1024),
            prompts.published_text,
            "published: one rewrite, not judged again",
        )
        return cls(head, remedy, 1, False, refusal, "protector", script)

    @classmethod
    def probe(
        cls,
        *,
        threshold: float | None = None,
        probe: str = "probe",
        fallback: str | None = "detector",
        detoxifier: str | None = "detoxifier",
        max_rounds: int = 3,
        timeout: float | None = None,
        refusal: str = prompts.REFUSAL,
        stop_below: float | None = None,
        patience: int = 2,
        speculate: bool = True,
    ) -> Guard:
        """A probe judges the MLLM's own answers, for next to nothing; a detoxifier rewrites.

        probe, fallback, detoxifier: names of models. fallback: the harm head that judges rewrites, which the probe
        has no hidden states of, at its own threshold; None: they are refused. The rest is as in `protector`.
        """
        judge = None if fallback is None else HarmHead(fallback, timeout=timeout)
        head = Probe(probe, judge, threshold=threshold, stop_below=stop_below, patience=patience, timeout=timeout)
        remedy: Remedy = Refuse(refusal)
        if detoxifier is not None:
            remedy = Detoxify(detoxifier, timeout=timeout)
        return cls(head, remedy, max_rounds, True, refusal, "probe", speculate=speculate)

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
        speculate: bool = False,
    ) -> Guard:
        """ECSO: the MLLM judges its own answer, then answers from a caption, `max_rounds` (1) times at most.

        mode, threshold: see `SelfJudge`; the default mode is `probability`. timeout: seconds a pass. speculate:
        begin the caption before the verdict.
        published: the released MM-SafetyBench script. It judges by text and fails open, and its second answer
        is not judged.
        """
        if not published:
            judge = SelfJudge(mode=mode or "probability", threshold=threshold, timeout=timeout)
            rounds = 1 if max_rounds is None else max_rounds
            return cls(judge, EyesClosed(timeout=timeout), rounds, True, refusal, "ecso", speculate=speculate)
        _fixed(mode=mode, max_rounds=max_rounds, speculate=speculate or None)
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


def _fixed(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise InvalidGuard(f"published=True fixes {name} as released; leave it out")
