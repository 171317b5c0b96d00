"""What a guard costs: the same questions unguarded, under this engine and through the published pipelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch

from ..engine.answers import PATIENT
from ..engine.engine import Engine
from .estimates import Estimate
from .overhead_report import Key, OverheadConfig, OverheadReport, figures
from .rewrites import RewriteConfig, run_rewrites
from .side_by_side import Run, Variant, together
from .variants import (
    AS_PUBLISHED,
    PATHS,
    TRANSFORMERS,
    bench_models,
    detector_alone,
    engine_variants,
    is_published,
    published_variants,
)
from .workload import Asked, Sources, picture, question

# Guards that share the backbone's batch lose little: that takes many pairs to see. Of the others a few will do.
SATURATED = ("protector-adapter", "probe")
FEW_PAIRS = 3

Told = Callable[[str, int, int], None]
"""Progress: (what, done, of)."""


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


def run_overhead(
    sources: Sources, config: OverheadConfig, dtype: torch.dtype | None = None, told: Told | None = None
) -> OverheadReport:
    """Measure. Raises `WrongPath` when a run did not do the work it was meant to do, and `BadInput` for the name of a
    variant that is none."""
    models = bench_models(sources, dtype)
    model = models.models["mllm"]
    questions = Questions(
        model.codec.tokenizer, config.prompt_tokens, model.backbone.vision is not None, Random(config.seed)
    )
    variants = engine_variants(config.lengths, config.variants)
    variants.append(detector_alone(lambda: questions.text(config.lengths.answer)))
    engines = [Engine(models=models) for variant in variants if variant.path == PATHS[0]]
    own = model.backbone.decoder.dtype
    mllm, detoxifier = sources.speakers(own, models.device)
    variants += published_variants(mllm, sources.scores(own, models.device), detoxifier, config.lengths)
    runs = measured_latencies(config, variants, engines, questions, told)
    lost = _saturation(config, engines, replace(questions, eyes=False), told)
    engine = engines[0]
    rewrites = run_rewrites(engine, RewriteConfig(config.lengths.mended, repeats=config.rewrites, seed=config.seed))
    return OverheadReport(
        config=config,
        model=sources.name,
        dtype=str(own).removeprefix("torch."),
        figures=figures(variants, runs, lost),
        rewrites=rewrites,
        chunk=PATIENT * engine.scheduler.lane(engine.models["detector"].backbone).free_rows,
    )


def measured_latencies(
    config: OverheadConfig,
    variants: Sequence[Variant],
    engines: Sequence[Engine],
    questions: Questions,
    told: Told | None = None,
) -> dict[Key, dict[int, Run]]:
    """Every variant's runs by repeat: the same repeat is the same question, with a picture of its own for each.

    Which engine runs which guard is drawn anew every time: where the pages of one happen to lie in memory makes a
    step of it 1 % faster or slower than another's.
    """
    runs: dict[Key, dict[int, Run]] = {(v.name, v.path): {} for v in variants}
    random = questions.random
    for repeat in range(-1, config.repeats):  # the first one warms up
        text = questions.text()
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
            for key, run in together(begun, random).items():
                if repeat >= 0:
                    runs[key][repeat] = run
        if told:
            told("latency", repeat + 2, config.repeats + 1)
    return runs


def _is_due(config: OverheadConfig, variant: Variant, repeat: int) -> bool:
    """Whether a variant runs in this repeat: the rarer ones are spread evenly, and never without their baseline."""
    if repeat < 0:  # a pipeline takes as long as all guards together, and needs little warming
        return not is_published(variant) or variant.name == TRANSFORMERS
    rare = config.harmful_repeats if variant.path == PATHS[1] else config.repeats
    times = config.published_repeats if is_published(variant) else rare
    return (repeat + 1) * times // config.repeats > repeat * times // config.repeats


def _saturation(
    config: OverheadConfig, engines: list[Engine], questions: Questions, told: Told | None
) -> dict[str, Estimate]:
    """Lost throughput of each guard on the harmless path: 1 - requests per second with it / without it, in pairs."""
    lengths = replace(config.lengths, answer=config.saturation_tokens)
    names = tuple(name for name in config.variants if not name.endswith(AS_PUBLISHED))
    variants = [v for v in engine_variants(lengths, names) if v.path == PATHS[0]]
    lost: dict[str, list[float]] = {}
    for pair in range(-1, config.saturation_pairs):  # the first one touches the pages that all will use
        texts = [questions.text() for _ in range(config.concurrent)]
        due = [v for v in variants if v.name in ("off", *SATURATED) or pair < FEW_PAIRS]
        drawn = questions.random.sample(engines, len(engines))
        begun = {
            v.name: v.begin(engine, [questions.ask(text) for text in texts])
            for v, engine in zip(due, drawn, strict=False)
        }
        runs = together(begun, questions.random)
        for name, run in runs.items():
            if pair >= 0 and name != "off":
                added = run.steady - runs["off"].steady
                lost.setdefault(name, []).append(added / (runs["off"].seconds + added))
        if told:
            told("throughput", pair + 2, config.saturation_pairs + 1)
    return {name: Estimate.of(values) for name, values in lost.items()}
