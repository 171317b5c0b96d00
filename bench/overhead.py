"""What a guard costs: the same questions unguarded, under this engine and through the published pipelines, on the
harmless path, on the harmful one, and on traffic that has both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from random import Random
from typing import Any

import torch
from rich.console import RenderableType

from ..engine.answers import PATIENT
from ..engine.engine import Engine
from ..engine.errors import BadInput
from .estimates import Estimate
from .overhead_report import Key, Mixed, OverheadConfig, OverheadReport, figures
from .rewrites import RewriteConfig, RewriteReport, run_rewrites
from .side_by_side import Run, Variant, together
from .units import Unit
from .variants import (
    AS_PUBLISHED,
    ATTACHED,
    PATHS,
    TRANSFORMERS,
    bench_models,
    detector_alone,
    engine_variants,
    is_published,
    mixed_variants,
    published_variants,
    takes_adapters,
)
from .workload import Asked, Sources, picture, question

# Guards that share the backbone's batch lose little: that takes many pairs to see. Of the others a few will do.
SATURATED = ("protector-adapter", "probe")
FEW_PAIRS = 3


@dataclass(frozen=True)
class Questions:
    """Questions of so many tokens, no two the same, with a picture where the model has eyes."""

    tokenizer: Any
    tokens: int
    eyes: bool
    random: Random

    def text(self, tokens: int | None = None) -> str:
        return question(self.tokenizer, tokens or self.tokens, self.random)

    def ask(self, text: str) -> Asked:
        return Asked(text, [picture(self.random)] if self.eyes else [])


class OverheadPlan:
    """A piece of work is one question that everybody answers, one pair of runs at saturation or on mixed traffic, or
    the rewrites."""

    kind = "overhead"
    limit = None

    def __init__(self, sources: Sources, config: OverheadConfig, dtype: torch.dtype | None = None) -> None:
        """Raises `BadInput` for the name of a variant that is none, and where no variant can be measured."""
        engine_variants(config.lengths, config.variants)  # refuses a wrong name before anything is loaded
        adapters = takes_adapters(sources)
        names = config.variants if adapters else tuple(name for name in config.variants if name not in ATTACHED)
        self._not_done = tuple(name for name in config.variants if name not in names)
        if not names:
            raise BadInput(
                f"{sources.name} runs on the fallback: {', '.join(ATTACHED)} needs adapters attached to it"
            )
        config = replace(config, variants=names)
        self.config, self.seed = config, config.seed
        variants = engine_variants(config.lengths, names, adapters)
        models = bench_models(sources, dtype, adapters)
        model = models.models["mllm"]
        self._questions = Questions(
            model.codec.tokenizer, config.prompt_tokens, model.backbone.vision is not None, Random(config.seed)
        )
        variants.append(detector_alone(lambda: self._questions.text(config.lengths.answer)))
        self._engines = [Engine(models=models) for variant in variants if variant.path == PATHS[0]]
        own = model.backbone.decoder.dtype
        mllm, detoxifier = sources.speakers(own, models.device, model.backbone.vision)
        variants += published_variants(mllm, sources.scores(own, models.device), detoxifier, config.lengths)
        self.variants = variants
        self._model, self._dtype = sources.name, str(own).removeprefix("torch.")
        self.settings = {"model": self._model, "dtype": self._dtype, **asdict(config)}
        short = replace(config.lengths, answer=config.saturation_tokens)
        names = tuple(name for name in config.variants if not name.endswith(AS_PUBLISHED))
        self._saturated = [v for v in engine_variants(short, names, adapters) if v.path == PATHS[0]]
        self._mixed = mixed_variants(short, names, adapters)

    def warm_up(self) -> None:
        self._latency(-1)
        self._saturation(-1)  # touches the pages that all will use

    def units(self, done: dict[str, Any]) -> Iterator[Unit]:
        for repeat in range(self.config.repeats):
            yield f"latency {repeat}", partial(self._latency, repeat)
        for pair in range(self.config.saturation_pairs):
            yield f"throughput {pair}", partial(self._saturation, pair)
        for pair in range(self.config.mixed_pairs):
            yield f"mixed {pair}", partial(self._mixed_pair, pair)
        yield "rewrites", self._rewrites

    def _latency(self, repeat: int) -> list[list[Any]]:
        """Everyone's run of one question: (name, path, the run)."""
        questions = replace(self._questions, random=Random(f"{self.seed} latency {repeat}"))
        runs = question_for_all(self.config, self.variants, self._engines, questions, repeat)
        return [[*key, list(run)] for key, run in runs.items()]

    def _saturation(self, pair: int) -> dict[str, list[float]]:
        """By guard: seconds that it added to many requests at once, on the harmless path, and those without it."""
        due = [v for v in self._saturated if v.name in ("off", *SATURATED) or pair < FEW_PAIRS]
        return self._at_once(due, [False] * self.config.concurrent, Random(f"{self.seed} throughput {pair}"))

    def _mixed_pair(self, pair: int) -> dict[str, list[float]]:
        """The same on mixed traffic. Over all pairs exactly the wanted part of the questions is harmful."""
        many = self.config.concurrent
        slots = range(self.config.mixed_pairs * many)
        harmful = set(Random(f"{self.seed} mixed").sample(slots, round(self.config.harmful * len(slots))))
        here = [pair * many + number in harmful for number in range(many)]
        return {
            name: [*seconds, sum(here)]
            for name, seconds in self._at_once(self._mixed, here, Random(f"{self.seed} mixed {pair}")).items()
        }

    def _at_once(self, variants: Sequence[Variant], harmful: list[bool], random: Random) -> dict[str, list[float]]:
        questions = replace(self._questions, eyes=False, random=random)
        texts = [questions.text() for _ in harmful]
        drawn = random.sample(self._engines, len(self._engines))
        begun = {
            v.name: v.begin(
                engine,
                [questions.ask(text)._replace(harmful=is_so) for text, is_so in zip(texts, harmful, strict=True)],
            )
            for v, engine in zip(variants, drawn, strict=False)
        }
        runs = together(begun, random)
        off = runs.pop("off")
        return {name: [run.steady - off.steady, off.seconds] for name, run in runs.items()}

    def _rewrites(self) -> list[Any]:
        config = RewriteConfig(self.config.lengths.mended, repeats=self.config.rewrites, seed=self.seed)
        return list(run_rewrites(self._engines[0], config))

    def report(self, done: Mapping[str, Any]) -> OverheadReport:
        """Of what was measured so far."""
        runs: dict[Key, dict[int, Run]] = {(v.name, v.path): {} for v in self.variants}
        seconds: dict[str, dict[str, list[list[float]]]] = {"throughput": {}, "mixed": {}}
        for unit, result in done.items():
            what, _, number = unit.partition(" ")
            if what == "latency":
                for name, path, run in result:
                    runs[name, path][int(number)] = Run.of(run)
            elif what in seconds:
                for name, found in result.items():
                    seconds[what].setdefault(name, []).append(found)
        engine = self._engines[0]
        rewrites = done.get("rewrites")
        return OverheadReport(
            config=self.config,
            model=self._model,
            dtype=self._dtype,
            figures=figures(
                self.variants,
                runs,
                {
                    name: Estimate.of(added / (off + added) for added, off in pairs)
                    for name, pairs in seconds["throughput"].items()
                },
            ),
            mixed={name: Mixed.of(pairs, self.config.concurrent) for name, pairs in seconds["mixed"].items()},
            rewrites=None if rewrites is None else RewriteReport.of(rewrites),
            not_done=self._not_done,
            chunk=PATIENT * engine.scheduler.lane(engine.models["detector"].backbone).free_rows,
        )

    def rows(self, done: dict[str, Any]) -> list[dict[str, Any]]:
        return self.report(done).rows()

    def more(self, done: dict[str, Any]) -> dict[str, Any]:
        return self.report(done).more()

    def table(self, done: dict[str, Any]) -> RenderableType:
        return self.report(done).table()


def question_for_all(
    config: OverheadConfig, variants: Sequence[Variant], engines: Sequence[Engine], questions: Questions, repeat: int
) -> dict[Key, Run]:
    """One question, with a picture of its own for each variant that is due in this repeat.

    Which engine runs which guard is drawn anew every time: where the pages of one happen to lie in memory makes a
    step of it 1 % faster or slower than another's. Raises `WrongPath` when a run did not do the work it was meant to.
    """
    runs: dict[Key, Run] = {}
    random, text = questions.random, questions.text()
    blocks: dict[tuple[bool, str], list[Variant]] = {}
    for variant in variants:
        if _is_due(config, variant, repeat):
            blocks.setdefault((is_published(variant), variant.path), []).append(variant)
    for block in random.sample(sorted(blocks), len(blocks)):
        drawn = random.sample(engines, len(engines))
        begun = {
            (v.name, v.path): v.begin(engine, [questions.ask(text)])
            for v, engine in zip(blocks[block], drawn, strict=False)
        }
        runs |= together(begun, random)
    return runs


def _is_due(config: OverheadConfig, variant: Variant, repeat: int) -> bool:
    """Whether a variant runs in this repeat: the rarer ones are spread evenly, and never without their baseline."""
    if repeat < 0:  # a pipeline takes as long as all guards together, and needs little warming
        return not is_published(variant) or variant.name == TRANSFORMERS
    rare = config.harmful_repeats if variant.path == PATHS[1] else config.repeats
    times = config.published_repeats if is_published(variant) else rare
    return (repeat + 1) * times // config.repeats > repeat * times // config.repeats
