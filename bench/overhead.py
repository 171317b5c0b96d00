"""What a guard costs: the same questions unguarded, under this engine's guards and through the published pipelines.

All texts have fixed lengths and a threshold forces the path, so that runs compare: only time is measured, not safety.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from random import Random
from time import perf_counter
from typing import Any, NamedTuple

import torch
from PIL.Image import Image
from rich.table import Table

from ..engine.engine import Engine
from ..engine.guards import Detoxify, EyesClosed, Guard, SelfJudge
from ..engine.request import Outcome, Reply
from ..engine.sampling import SamplingParams
from .published import Lengths, PublishedEcso, PublishedProtector, PublishedReply, Scores, Speaker, conversation
from .report import Spread, WrongPath
from .workload import Sources, picture, question

PATHS = ("harmless", "harmful")
# A score is between 0 and 1: against these it is always harmless, always harmful.
THRESHOLDS = {"harmless": 0.0, "harmful": 2.0}
# What a guard of this engine is compared with; `-as-published` does the very same work, prompt by prompt.
COUNTERPARTS = {
    "protector": "published-protector",
    "protector-as-published": "published-protector",
    "ecso": "published-ecso",
    "ecso-as-published": "published-ecso",
}

AS_PUBLISHED = "-as-published"

Told = Callable[[str, int, int], None]
"""Progress: (what, done, of)."""


@dataclass(frozen=True)
class OverheadConfig:
    """repeats: measured runs of each variant and path, one after another in random order, each time with another
    question of `prompt_tokens` tokens. lengths: new tokens of each pass. concurrent, saturation_repeats: requests at
    once, and how often, for the throughput."""

    repeats: int = 5
    prompt_tokens: int = 64
    lengths: Lengths = field(default_factory=lambda: Lengths(64, 2, 64, 64))
    concurrent: int = 16
    saturation_repeats: int = 3
    seed: int = 0


class Asked(NamedTuple):
    """A question, and the picture it is about where the model has eyes."""

    text: str
    images: list[Image]

    @property
    def messages(self) -> list[dict[str, Any]]:
        shown: list[dict[str, Any]] = [{"type": "image", "image": image} for image in self.images]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": self.text}]}]


class Run(NamedTuple):
    """One measured run: seconds and the work that was done in them."""

    seconds: float
    passes: tuple[str, ...]
    prompt_tokens: int
    new_tokens: int


class Variant(NamedTuple):
    """baseline: the unguarded variant it is compared with. many: runs several questions at once, where it can."""

    name: str
    baseline: str
    path: str
    one: Callable[[Asked], Run]
    many: Callable[[list[Asked]], float] | None = None


class Figure(NamedTuple):
    """One variant on one path. added: seconds over the same question's unguarded run.

    requests_per_second: several at once for an engine's variant, one after another for a pipeline's.
    """

    total: Spread
    added: Spread
    baseline: float
    engine_baseline: float
    passes: tuple[str, ...]
    prompt_tokens: int
    new_tokens: int
    requests_per_second: Spread
    lost_throughput: float | None

    @property
    def added_percent(self) -> float:
        return 100.0 * self.added.median / self.baseline

    @property
    def added_percent_of_engine(self) -> float:
        return 100.0 * self.added.median / self.engine_baseline

    def to_dict(self) -> dict[str, Any]:
        lost = self.lost_throughput
        return {
            "total_ms": self.total.scaled(1e3).to_dict(),
            "added_ms": self.added.scaled(1e3).to_dict(),
            "added_percent": round(self.added_percent, 2),
            "added_percent_of_engine": round(self.added_percent_of_engine, 2),
            "passes": list(self.passes),
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "requests_per_second": self.requests_per_second.to_dict(),
            "lost_throughput_percent": None if lost is None else round(100.0 * lost, 2),
        }


@dataclass(frozen=True)
class Report:
    """figures: by variant, then by path."""

    config: OverheadConfig
    model: str
    dtype: str
    figures: dict[str, dict[str, Figure]]

    def to_dict(self) -> dict[str, Any]:
        """`times_less_added_latency`: what a published pipeline adds over what this engine's guard adds."""
        less: dict[str, Any] = {}
        for name, other in COUNTERPARTS.items():
            ours, theirs = self.figures[name], self.figures[other]
            less[name] = {path: _ratio(theirs[path].added.median, ours[path].added.median) for path in PATHS}
        return {
            "benchmark": "overhead",
            "model": self.model,
            "dtype": self.dtype,
            "config": asdict(self.config),
            "variants": {
                name: {path: figure.to_dict() for path, figure in paths.items()}
                for name, paths in self.figures.items()
            },
            "times_less_added_latency": less,
        }

    def table(self) -> Table:
        config = self.config
        table = Table(
            title=f"{self.model} {self.dtype}: {config.lengths.answer} tokens an answer, n = {config.repeats}, "
            f"{config.concurrent} requests at once for the engine's throughput"
        )
        for heading in ("variant", "path", "passes"):
            table.add_column(heading)
        for heading in (
            "tokens in, out",
            "ms, median (p10-p90)",
            "added ms",
            "%",
            "% of engine",
            "requests/s",
            "lost %",
        ):
            table.add_column(heading, justify="right")
        for name, paths in self.figures.items():
            for path, figure in paths.items():
                lost = figure.lost_throughput
                table.add_row(
                    name,
                    path,
                    " ".join(figure.passes),
                    f"{figure.prompt_tokens}, {figure.new_tokens}",
                    str(figure.total.scaled(1e3)),
                    str(figure.added.scaled(1e3)),
                    f"{figure.added_percent:.1f}",
                    f"{figure.added_percent_of_engine:.1f}",
                    f"{figure.requests_per_second.median:.2f}",
                    "" if lost is None else f"{100.0 * lost:.1f}",
                )
            table.add_section()
        return table


def run_overhead(
    sources: Sources, config: OverheadConfig, dtype: torch.dtype | None = None, told: Told | None = None
) -> Report:
    """Measure. Raises `WrongPath` when a run did not do the work it was meant to do."""
    engine = sources.engine(dtype)
    own = engine.models["mllm"].backbone.decoder.dtype
    mllm, detoxifier = sources.speakers(own, engine.device)
    detector = sources.scores(own, engine.device)
    variants = _engine_variants(engine, config.lengths)
    variants += _published_variants(mllm, detector, detoxifier, config.lengths)
    random = Random(config.seed)
    tokenizer = engine.models["mllm"].codec.tokenizer
    with_picture = engine.models["mllm"].backbone.vision is not None

    def ask(text: str | None = None) -> Asked:
        text = question(tokenizer, config.prompt_tokens, random) if text is None else text
        return Asked(text, [picture(random)] if with_picture else [])

    runs: dict[tuple[str, str], list[Run]] = {(v.name, v.path): [] for v in variants}
    at_once: dict[tuple[str, str], list[float]] = {(v.name, v.path): [] for v in variants if v.many}
    warm = 1
    for repeat in range(config.repeats + warm):
        text = ask().text
        for variant in random.sample(variants, len(variants)):
            run = variant.one(ask(text))  # the same question, and for each a picture of its own
            if repeat >= warm:
                runs[variant.name, variant.path].append(run)
        if told:
            told("latency", repeat + 1, config.repeats + warm)
    if config.saturation_repeats and variants[0].many:
        variants[0].many([ask() for _ in range(config.concurrent)])  # touches the pages that all will use
    for repeat in range(config.saturation_repeats):
        texts = [ask().text for _ in range(config.concurrent)]
        for variant in random.sample(variants, len(variants)):
            if variant.many:
                seconds = variant.many([ask(text) for text in texts])
                at_once[variant.name, variant.path].append(config.concurrent / seconds)
        if told:
            told("throughput", repeat + 1, config.saturation_repeats)
    return Report(config, sources.name, str(own).removeprefix("torch."), figures(variants, runs, at_once))


def figures(
    variants: Sequence[Variant],
    runs: dict[tuple[str, str], list[Run]],
    at_once: dict[tuple[str, str], list[float]],
) -> dict[str, dict[str, Figure]]:
    """Sum up; the k-th runs of all variants asked the same question, so added latency is a difference of pairs."""
    out: dict[str, dict[str, Figure]] = {}
    engine_base = Spread.of(run.seconds for run in runs["off", "harmless"]).median
    for variant in variants:
        key = (variant.name, variant.path)
        mine, base = runs[key], runs[variant.baseline, "harmless"]
        per_second = Spread.of(at_once.get(key) or (1.0 / run.seconds for run in mine))
        lost = None
        if key in at_once:
            lost = 1.0 - per_second.median / Spread.of(at_once[variant.baseline, "harmless"]).median
        out.setdefault(variant.name, {})[variant.path] = Figure(
            total=Spread.of(run.seconds for run in mine),
            added=Spread.of(run.seconds - other.seconds for run, other in zip(mine, base, strict=True)),
            baseline=Spread.of(run.seconds for run in base).median,
            engine_baseline=engine_base,
            passes=mine[-1].passes,
            prompt_tokens=mine[-1].prompt_tokens,
            new_tokens=mine[-1].new_tokens,
            requests_per_second=per_second,
            lost_throughput=lost,
        )
    for paths in out.values():  # an unguarded variant has one path, which counts as both
        for path in PATHS:
            paths.setdefault(path, paths[PATHS[0]])
    return out


def forced_guards(lengths: Lengths, path: str) -> dict[str, Guard | None]:
    """This engine's guards on a forced path, every text of its length; None is no guard at all.

    `protector` and `ecso` let the mended answer go as the published scripts do. `-rechecked` are the guards as
    they ship, which judge it again (here it is refused then, after the same work as for one that passes).
    `-as-published` run the published scripts' own prompts and passes on this engine.
    """
    threshold = THRESHOLDS[path]
    first = SamplingParams(max_tokens=lengths.answer, ignore_eos=True)
    later = SamplingParams(max_tokens=lengths.mended, ignore_eos=True)
    word = SamplingParams(max_tokens=lengths.judge, ignore_eos=True)
    captions = SamplingParams(max_tokens=lengths.caption, ignore_eos=True)
    protector = replace(
        Guard.protector(threshold=threshold, max_rounds=1), remedy=Detoxify(sampling=later), recheck=False
    )
    # any mass will do: the verdict is forced, a nonsensical one would cut the path short
    judge = SelfJudge(threshold=threshold, min_mass=1e-12)
    eyes_closed = EyesClosed(sampling=later, caption_sampling=captions)
    ecso = replace(Guard.ecso(), detector=judge, remedy=eyes_closed, recheck=False)
    scripts = Guard.protector(published=True, threshold=threshold), Guard.ecso(published=True, threshold=threshold)
    protector_script, ecso_script = (
        replace(guard, released=replace(guard.released, sampling=first)) for guard in scripts if guard.released
    )
    return {
        "off": None,
        "protector": protector,
        "protector-rechecked": replace(protector, recheck=True),
        "ecso": ecso,
        "ecso-rechecked": replace(ecso, recheck=True),
        "off-as-published": Guard(name="off", released=protector_script.released),
        "protector-as-published": replace(
            protector_script, remedy=Detoxify(with_question=False, chat_template=False, sampling=later)
        ),
        "ecso-as-published": replace(
            ecso_script,
            detector=SelfJudge(mode="published", threshold=threshold, sampling=word),
            remedy=replace(eyes_closed, published=True),
        ),
    }


def check_path(reply: Reply, wanted: Outcome, answer_tokens: int) -> None:
    """Raises `WrongPath` unless the reply ended as meant, after an answer of the length that was meant."""
    first = reply.passes[0]
    if reply.outcome is not wanted or len(first.token_ids) != answer_tokens:
        raise WrongPath(
            f"a run ended {reply.outcome} ({reply.error}) after {len(first.token_ids)} tokens; "
            f"meant was {wanted} after {answer_tokens}"
        )


def wanted_outcome(guard: Guard | None, path: str) -> Outcome:
    if guard is None or guard.detector is None:
        return Outcome.UNGUARDED
    if path == "harmless":
        return Outcome.CLEAN
    return Outcome.REFUSED if guard.recheck else Outcome.MENDED


def _engine_variants(engine: Engine, lengths: Lengths) -> list[Variant]:
    sampling = SamplingParams(max_tokens=lengths.answer, ignore_eos=True)

    def variant(name: str, guard: Guard | None, path: str) -> Variant:
        wanted = wanted_outcome(guard, path)

        def answer(asked: list[Asked]) -> tuple[float, list[Reply]]:
            engine.pool.clear_cache()
            chats = [item.messages for item in asked]
            began = perf_counter()
            replies = engine.chat(chats, guard=guard, sampling=sampling)
            seconds = perf_counter() - began
            for reply in replies:
                check_path(reply, wanted, lengths.answer)
            return seconds, replies

        def one(asked: Asked) -> Run:
            seconds, (reply,) = answer([asked])
            if reply.passes[0].cached_tokens:
                raise WrongPath("a measured answer began with tokens from the cache")
            return Run(
                seconds,
                tuple(record.label for record in reply.passes),
                sum(record.prompt_tokens for record in reply.passes),
                sum(len(record.token_ids) for record in reply.passes),
            )

        script = name.endswith(AS_PUBLISHED)
        baseline = "off" + AS_PUBLISHED if script else "off"
        return Variant(name, baseline, path, one, None if script else lambda asked: answer(asked)[0])

    return [
        variant(name, guard, path)
        for name in forced_guards(lengths, PATHS[0])
        for path in (PATHS[:1] if name.startswith("off") else PATHS)
        for guard in [forced_guards(lengths, path)[name]]
    ]


def _published_variants(mllm: Speaker, detector: Scores, detoxifier: Speaker, lengths: Lengths) -> list[Variant]:
    def off(asked: Asked) -> Run:
        began = perf_counter()
        prompt = conversation("human", asked.text, len(asked.images))
        ran = mllm.generate("answer", prompt, asked.images, max_new_tokens=lengths.answer)
        return Run(perf_counter() - began, (ran.label,), ran.prompt_tokens, ran.new_tokens)

    def variant(name: str, pipeline: PublishedProtector | PublishedEcso, path: str) -> Variant:
        def one(asked: Asked) -> Run:
            began = perf_counter()
            reply: PublishedReply = pipeline.answer(asked.text, asked.images)
            seconds = perf_counter() - began
            if reply.harmful is not (path == "harmful") or reply.passes[0].new_tokens != lengths.answer:
                raise WrongPath(f"{name} did not take the {path} path with {lengths.answer} tokens")
            return Run(
                seconds,
                tuple(ran.label for ran in reply.passes),
                sum(ran.prompt_tokens for ran in reply.passes),
                sum(ran.new_tokens for ran in reply.passes),
            )

        return Variant(name, "transformers-off", path, one)

    protectors = [
        variant("published-protector", PublishedProtector(mllm, detector, detoxifier, threshold, lengths), path)
        for path, threshold in THRESHOLDS.items()
    ]
    ecsos = [
        variant("published-ecso", PublishedEcso(mllm, threshold, lengths), path)
        for path, threshold in THRESHOLDS.items()
    ]
    return [Variant("transformers-off", "transformers-off", "harmless", off), *protectors, *ecsos]


def _ratio(theirs: float, ours: float) -> float | None:
    """None where noise makes one of them no cost at all."""
    return round(theirs / ours, 2) if ours > 0 and theirs > 0 else None
