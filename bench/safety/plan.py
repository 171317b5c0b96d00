"""The measurement: every question with and without its image, under every guard, in pieces that may be gone on
with."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType

from ...engine.engine import Engine, GuardLike
from ...engine.errors import BadInput
from ...engine.sampling import SamplingParams
from ...train.data import Example, Kind, Part
from ...train.rows import Bad, DataMissing, refuse
from ..units import Unit
from .asked import Keep, answer_cases
from .cases import Case, fingerprint, sample
from .cases import Kind as CaseKind
from .detoxified import detoxified
from .figures import Figures
from .judges import Judge, trained_on
from .labeled import detector_quality, judge_accuracy, labeled_answers, self_judge_accuracy, unseen
from .sets import READERS
from .typography import Typography, figstep
from .utility import UTILITY_READERS, check_answers

OFF = "off"
SELF_JUDGE = "the model itself"


@dataclass(frozen=True)
class SafetyConfig:
    """guards: by name; `off` is always measured. sets: of the data folder; none: all that are there. limit: of cases
    a set and scenario. labeled: answers of each kind that detectors and judges are measured on. max_tokens: of an
    answer. at_once: requests under way. chunk: cases a piece of work."""

    guards: tuple[str, ...] = (OFF, "protector", "ecso")
    sets: tuple[str, ...] = ()
    limit: int | None = None
    labeled: int | None = 150
    max_tokens: int = 96
    at_once: int = 32
    chunk: int = 128
    seed: int = 0


def read_cases(data: Path, config: SafetyConfig, bad: Bad = refuse) -> list[Case]:
    """All cases of the sets under `data`. Raises `BadInput` for a set that is none, `DataMissing` where one or all
    are not there, `DataInvalid` for bad rows (unless `bad` takes note of them)."""
    readers = READERS | UTILITY_READERS
    if unknown := [name for name in config.sets if name not in readers]:
        raise BadInput(f"unknown sets {', '.join(unknown)}; there are {', '.join(readers)}")
    there = tuple(name for name in readers if (data / name).is_dir())
    if missing := [name for name in config.sets if name not in there]:
        raise DataMissing(
            f"{data} has no folder {', '.join(missing)}; of the sets it has {', '.join(there) or 'none'}"
        )
    names = config.sets or there
    cases = [case for name in names for case in readers[name](data / name, bad)]
    if not cases:
        raise DataMissing(f"{data} holds none of the folders {', '.join(readers)}, or nothing in them")
    check_answers(cases)
    return sample(cases, config.limit, config.seed)


class SafetyPlan:
    """A piece of work is some cases of a set under one guard, with or without their images. The guards take turns, so
    that what disturbs the machine disturbs all of them.

    detectors: by name, what makes an engine with it; loaded when its turn has come, and let go then.
    """

    kind = "safety"
    limit = None

    def __init__(
        self,
        engine: Engine,
        guards: dict[str, GuardLike],
        cases: Sequence[Case],
        judges: Sequence[Judge],
        config: SafetyConfig,
        settings: dict[str, Any],
        *,
        data: Path,
        detectors: dict[str, Callable[[], Engine]] | None = None,
        bad: Bad = refuse,
        keep: Keep | None = None,
    ) -> None:
        """guards: those of the config but `off`. settings: what else decides the result, the model and its dtype
        among it."""
        self.config, self.seed = config, config.seed
        self._engine, self._judges, self._bad, self._keep = engine, judges, bad, keep
        self._guards: dict[str, GuardLike | None] = {OFF: None, **guards}
        self._cases = list(cases)
        self._labeled = {
            part: labeled_answers(data, config.labeled, config.seed, unseen(part)) if config.labeled != 0 else []
            for part in (Part.TRAIN, Part.TEST)
        }
        # neither the default judge nor what `train detoxifier` makes of these sets has seen the validation part
        given = labeled_answers(data, config.labeled, config.seed, (Part.VALIDATION,)) if config.labeled != 0 else []
        self._harmful = [one for one in given if one.kind is Kind.HARMFUL]
        self._detectors = detectors or {}
        self.sees = engine.models["mllm"].backbone.vision is not None
        self.settings = {
            **settings,
            **asdict(config),
            "judges": [judge.name for judge in judges],
            "detectors": list(self._detectors),
            "images": self.sees,
            "rendered": sum(case.kind is CaseKind.ATTACK and isinstance(case.image, Typography) for case in cases),
            "cases": fingerprint(cases),
        }
        self._sampling = SamplingParams(temperature=0.0, max_tokens=config.max_tokens, seed=config.seed)
        self._figures = Figures(self._cases, list(self._guards), [judge.name for judge in judges])

    @property
    def work(self) -> str:
        """What there is to do, in words."""
        answers = len(self._guards) * sum(len(numbers) for _, _, numbers in self._chunks())
        return f"{answers} answers, {sum(1 for _ in self.units({}))} pieces of work in all"

    def warm_up(self) -> None:
        short = SamplingParams(temperature=0.0, max_tokens=2, seed=self.seed)
        page = Case("", "", "", CaseKind.ORDINARY, "Hello.", "Hello.", figstep("Hello."))
        chats = [page.messages(with_image) for with_image in ((False, True) if self.sees else (False,))]
        for guard in self._guards.values():
            self._engine.chat(chats, guard=guard, sampling=short)

    def units(self, done: dict[str, Any]) -> Iterator[Unit]:
        for name, with_image, numbers in self._chunks():
            for guard in self._guards:
                yield f"{name}/{guard}", partial(self._answer, numbers, with_image, guard)
        if any(self._labeled.values()):
            yield from self._judge_units()
        if self._harmful and "detoxifier" in self._engine.models:
            yield "detoxified/given answers", self._detoxified

    def _chunks(self) -> Iterator[tuple[str, bool, list[int]]]:
        """(name, whether the image is there, cases by number)."""
        for case_set in dict.fromkeys(case.set for case in self._cases):
            its = [number for number, case in enumerate(self._cases) if case.set == case_set]
            for at in range(0, len(its), self.config.chunk):
                numbers = its[at : at + self.config.chunk]
                yield f"{case_set}/{at}/without image", False, numbers
                shown = [number for number in numbers if self._cases[number].image is not None]
                if self.sees and shown:
                    yield f"{case_set}/{at}/with image", True, shown

    def _judge_units(self) -> Iterator[Unit]:
        examples: list[Example] = self._labeled[Part.TRAIN]
        for judge in self._judges:
            yield f"judge/{judge.name}/without image", partial(judge_accuracy, judge, self._labeled[judge.trained_on])
        for with_image in (False, True) if self.sees else (False,):
            what = "with image" if with_image else "without image"
            yield f"judge/{SELF_JUDGE}/{what}", partial(self_judge_accuracy, self._engine, examples, with_image)
        for name, make in self._detectors.items():
            yield f"detector/{name}", partial(_quality, make, self._labeled[trained_on(name)])

    def _detoxified(self) -> dict[str, Any]:
        return detoxified(self._engine, self._harmful, self._sampling, self._judges)

    def _answer(self, numbers: Sequence[int], with_image: bool, guard: str) -> dict[str, Any]:
        found = answer_cases(
            self._engine,
            [self._cases[number] for number in numbers],
            with_image,
            self._guards[guard],
            guard,
            self._sampling,
            self._judges,
            self.config.at_once,
            self._bad,
            self._keep,
        )
        return {
            "guard": guard,
            "with_image": with_image,
            "numbers": list(numbers),
            "seconds": round(found.seconds, 6),
            "results": [None if one is None else list(one) for one in found.results],
        }

    def rows(self, done: dict[str, Any]) -> list[dict[str, Any]]:
        return self._figures.rows(done)

    def more(self, done: dict[str, Any]) -> dict[str, Any]:
        return self._figures.more(done)

    def table(self, done: dict[str, Any]) -> RenderableType:
        from .shown import console_tables

        return Group(*console_tables(self.settings, self.rows(done), self.more(done)))


def _quality(make: Callable[[], Engine], examples: Sequence[Example]) -> dict[str, Any]:
    engine = make()
    try:
        head = engine.traits["detector"]
        return {"template": head.template, **detector_quality(engine, examples)}
    finally:
        del engine
        gc.collect()
