"""What a guard costs: the same questions unguarded, under this engine and through the published pipelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch

from ..engine.driver import PATIENT
from ..engine.engine import Engine
from .estimates import Estimate
from .overhead_report import Key, OverheadConfig, OverheadReport, figures
from .rewrites import RewriteConfig, run_rewrites
from .variants import (
    PATHS,
    TRANSFORMERS,
    Run,
    Variant,
    bench_engine,
    detector_alone,
    engine_variants,
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
    engine = bench_engine(sources, dtype)
    model = engine.models["mllm"]
    questions = Questions(
        model.codec.tokenizer, config.prompt_tokens, model.backbone.vision is not None, Random(config.seed)
    )
    variants = engine_variants(engine, config.lengths, config.variants)
    variants.append(detector_alone(engine, lambda: questions.text(config.lengths.answer)))
    own = model.backbone.decoder.dtype
    mllm, detoxifier = sources.speakers(own, engine.device)
    variants += published_variants(mllm, sources.scores(own, engine.device), detoxifier, config.lengths)
    runs = _latencies(config, variants, questions, told)
    exposed = _exposed_tokens(engine, variants, questions)
    blind = replace(questions, eyes=False)
    lost = _saturation(engine, config, blind, told)
    step = _probe_step(engine, config, blind, told) if "probe" in config.variants else None
    rewrites = run_rewrites(engine, RewriteConfig(config.lengths.mended, repeats=config.rewrites, seed=config.seed))
    engine.check_integrity()
    return OverheadReport(
        config=config,
        model=sources.name,
        dtype=str(own).removeprefix("torch."),
        figures=figures(variants, runs, lost),
        rewrites=rewrites,
        exposed_tokens=exposed,
        probe_step=step,
        chunk=PATIENT * engine.scheduler.lane(engine.models["detector"].backbone).free_rows,
    )


def _latencies(
    config: OverheadConfig, variants: Sequence[Variant], questions: Questions, told: Told | None
) -> dict[Key, dict[int, Run]]:
    """Every variant's runs by repeat: the same repeat is the same question, with a picture of its own for each."""
    runs: dict[Key, dict[int, Run]] = {(v.name, v.path): {} for v in variants}
    random = questions.random
    for repeat in range(-1, config.repeats):  # the first one warms up
        text = questions.text()
        blocks: dict[tuple[bool, str], list[Variant]] = {}
        for variant in variants:
            if _is_due(config, variant, repeat):
                blocks.setdefault((variant.published, variant.path), []).append(variant)
        # what is compared with each other runs close together
        for block in random.sample(sorted(blocks), len(blocks)):
            for variant in random.sample(blocks[block], len(blocks[block])):
                run = variant.one(questions.ask(text))
                if repeat >= 0:
                    runs[variant.name, variant.path][repeat] = run
        if told:
            told("latency", repeat + 2, config.repeats + 1)
    return runs


def _is_due(config: OverheadConfig, variant: Variant, repeat: int) -> bool:
    """Whether a variant runs in this repeat: the rarer ones are spread evenly, and never without their baseline."""
    if repeat < 0:  # a pipeline takes as long as all guards together, and needs little warming
        return not variant.published or variant.name == TRANSFORMERS
    rare = config.harmful_repeats if variant.path == PATHS[1] else config.repeats
    times = config.published_repeats if variant.published else rare
    return (repeat + 1) * times // config.repeats > repeat * times // config.repeats


def _exposed_tokens(engine: Engine, variants: Sequence[Variant], questions: Questions) -> int | None:
    """Tokens that the separate detector computes after an answer's last decode step; None where it is not there."""
    name = "protector-separate"
    variant = next((item for item in variants if (item.name, item.path) == (name, PATHS[0])), None)
    if variant is None:
        return None
    variant.one(questions.ask(questions.text()))
    recorder = engine.recorder  # a variant's run leaves its own
    assert recorder is not None
    decoded = max(step.began for step in recorder.steps if any(work.label == "answer" for work in step.works))
    late = (work for step in recorder.steps if step.began > decoded for work in step.works)
    return sum(work.tokens for work in late if work.label == "screen")


def _saturation(
    engine: Engine, config: OverheadConfig, questions: Questions, told: Told | None
) -> dict[str, Estimate]:
    """Lost throughput of each guard on the harmless path: 1 - requests per second with it / without it, in pairs."""
    lengths = replace(config.lengths, answer=config.saturation_tokens)
    variants = [v for v in engine_variants(engine, lengths, config.variants) if v.many and v.path == PATHS[0]]
    lost: dict[str, list[float]] = {}
    for pair in range(-1, config.saturation_pairs):  # the first one touches the pages that all will use
        texts = [questions.text() for _ in range(config.concurrent)]
        due = [v for v in variants if v.name in ("off", *SATURATED) or pair < FEW_PAIRS]
        seconds = {}
        for variant in questions.random.sample(due, len(due)):
            assert variant.many is not None
            seconds[variant.name] = variant.many([questions.ask(text) for text in texts])
        for name, took in seconds.items():
            if pair >= 0 and name != "off":
                lost.setdefault(name, []).append(1.0 - seconds["off"] / took)
        if told:
            told("throughput", pair + 2, config.saturation_pairs + 1)
    return {name: Estimate.of(values) for name, values in lost.items()}


def _probe_step(engine: Engine, config: OverheadConfig, questions: Questions, told: Told | None) -> Estimate:
    """Seconds that a probe adds to a decode step: pairs of short answers, so that little else changes in between."""
    lengths = replace(config.lengths, answer=config.step_tokens)
    variants = [v for v in engine_variants(engine, lengths, ("probe",)) if v.path == PATHS[0]]
    added = []
    for pair in range(-1, config.step_pairs):
        asked = questions.ask(questions.text())
        steps = {
            variant.name: variant.one(asked).step for variant in questions.random.sample(variants, len(variants))
        }
        if pair >= 0:
            added.append(steps["probe"] - steps["off"])
        if told:
            told("steps", pair + 2, config.step_pairs + 1)
    return Estimate.of(added)
