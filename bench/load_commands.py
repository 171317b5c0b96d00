"""`stockade bench latency`, `throughput` and `kernels`: measurements in pieces, which may be gone on with later."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar, cast

import typer

from ..engine.errors import BadInput
from .options import (
    DetectorOption,
    DetoxifierOption,
    DtypeOption,
    JsonOption,
    ResumeOption,
    SeedOption,
    dtype_named,
    measure_plan,
    run_plan,
)

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..engine.passes import ReleaseMode
    from .units import Plan
    from .workload import Sources


Value = TypeVar("Value")


class Profile(StrEnum):
    """How much is measured."""

    CI = "ci"  # seconds, on a tiny model: shows that it works, measures nothing
    NORMAL = "normal"
    NIGHTLY = "nightly"  # as much as fits into a night


ProfileOption = Annotated[Profile, typer.Option(help="How much is measured where options do not say otherwise.")]
ModelOption = Annotated[
    str | None,
    typer.Option(help="smol-llava, smol, a checkpoint folder or a named shape. (default: smol; tiny-llava in ci)"),
]
GuardsOption = Annotated[
    list[str] | None,
    typer.Option("--guard", help="Repeatable: off, protector-separate, protector-adapter, probe, ecso …"),
]


def latency(
    model: ModelOption = None,
    detector: DetectorOption = None,
    detoxifier: DetoxifierOption = None,
    dtype: DtypeOption = None,
    guard: GuardsOption = None,
    release: Annotated[
        list[str] | None, typer.Option(help="When text may leave; repeatable: verdict, window, audit.")
    ] = None,
    prompt_tokens: Annotated[list[int] | None, typer.Option(min=1, help="Of a question; repeatable.")] = None,
    images: Annotated[list[int] | None, typer.Option(min=0, help="Of a question; repeatable.")] = None,
    answer_tokens: Annotated[list[int] | None, typer.Option(min=2, help="Of an answer; repeatable.")] = None,
    harmful: Annotated[
        bool | None, typer.Option("--harmful/--no-harmful", help="The path of harmful answers, too.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Requests of every combination.")] = None,
    profile: ProfileOption = Profile.NORMAL,
    seed: SeedOption = 0,
    json: JsonOption = None,
    resume: ResumeOption = False,
) -> None:
    """Time to the first text, between tokens and to the whole reply, by sizes, guard and release."""
    from .latency import LatencyConfig, LatencyPlan

    base = {
        Profile.CI: LatencyConfig(prompt_tokens=(16,), answer_tokens=(8,), repeats=2),
        Profile.NORMAL: LatencyConfig(),
        Profile.NIGHTLY: LatencyConfig(
            prompt_tokens=(64, 512),
            answer_tokens=(64, 256),
            guards=(*LatencyConfig.guards, "protector-separate", "ecso-continued"),
            releases=("verdict", "window"),
            harmful=True,
            repeats=100,
        ),
    }[profile]
    config = replace(
        base,
        prompt_tokens=_either(prompt_tokens, base.prompt_tokens),
        images=_either(images, base.images),
        answer_tokens=_either(answer_tokens, base.answer_tokens),
        guards=_either(guard, base.guards),
        releases=_either(release, base.releases),
        harmful=base.harmful if harmful is None else harmful,
        repeats=repeats or base.repeats,
        seed=seed,
    )

    def plan(weights: Sources) -> Plan:
        engine, found = _engine(weights, dtype)
        return LatencyPlan(engine, config, weights.name, found)

    measure_plan("latency", plan, model or _default_model(profile), detector, detoxifier, json, resume)


def throughput(
    model: ModelOption = None,
    detector: DetectorOption = None,
    detoxifier: DetoxifierOption = None,
    dtype: DtypeOption = None,
    guard: GuardsOption = None,
    at_once: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Requests under way; repeatable. (default: doubled until the knee is behind)"),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(help="Requests a second; repeatable. (default: parts of the best; 0 measures none)"),
    ] = None,
    burst: Annotated[int, typer.Option(min=1, help="Requests that come at the same moment.")] = 1,
    trace: Annotated[
        Path | None,
        typer.Option(help="CSV or JSON lines: arrival, prompt_tokens, images, answer_tokens, and if wanted harmful."),
    ] = None,
    speed: Annotated[float, typer.Option(help="How much faster than the trace says.")] = 1.0,
    objective: Annotated[
        str | None, typer.Option(help="Of a request's latency, as ttft=1s,itl=100ms,e2e=10s.")
    ] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Of a question.")] = None,
    images: Annotated[int, typer.Option(min=0, help="Of a question.")] = 0,
    answer_tokens: Annotated[int | None, typer.Option(min=2, help="Of an answer.")] = None,
    harmful: Annotated[float, typer.Option(min=0.0, max=1.0, help="The part of all answers that are.")] = 0.0,
    shared_tokens: Annotated[int, typer.Option(min=0, help="Of a text that all requests begin with.")] = 0,
    release: Annotated[str, typer.Option(help="When text may leave: verdict, window, audit.")] = "verdict",
    requests: Annotated[int | None, typer.Option(min=1, help="At which a load has had enough.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="For everything but a trace: rounds of all loads in turn.")
    ] = None,
    profile: ProfileOption = Profile.NORMAL,
    seed: SeedOption = 0,
    json: JsonOption = None,
    resume: ResumeOption = False,
) -> None:
    """Requests and tokens a second by load: closed loops up to the knee, open loops or a trace; what meets an
    objective; queues, pages, prefix hits."""
    from .asking import check_names
    from .objective import Objective
    from .throughput import ThroughputConfig, ThroughputPlan
    from .traffic import Sizes, read_trace

    check_names((), (release,))
    base = {
        Profile.CI: ThroughputConfig(sizes=Sizes(16, 0, 8), most_at_once=4, requests=4),
        Profile.NORMAL: ThroughputConfig(),
        Profile.NIGHTLY: ThroughputConfig(
            guards=(*ThroughputConfig.guards, "protector-separate", "ecso-continued"),
            requests=1000,
            seconds=4 * 3600,
        ),
    }[profile]
    items = () if trace is None else tuple(read_trace(trace))
    config = replace(
        base,
        guards=_either(guard, base.guards),
        sizes=Sizes(
            prompt_tokens or base.sizes.prompt_tokens, images, answer_tokens or base.sizes.answer_tokens, harmful
        ),
        at_once=tuple(at_once or ()),
        rates=None if rate == [0] else tuple(rate or ()),
        burst=burst,
        trace=items,
        speed=speed,
        requests=requests or base.requests,
        seconds=60.0 * minutes if minutes else base.seconds,
        release=cast("ReleaseMode", release),
        shared_tokens=shared_tokens,
        objective=Objective() if objective is None else Objective.parse(objective),
        seed=seed,
    )

    def plan(weights: Sources) -> Plan:
        engine, found = _engine(weights, dtype)
        return ThroughputPlan(engine, config, weights.name, found)

    measure_plan("throughput", plan, model or _default_model(profile), detector, detoxifier, json, resume)


def kernels(
    model: Annotated[
        str, typer.Option(help="Whose shapes: smol, a named shape (llava-1.5-7b), a checkpoint folder.")
    ] = "smol",
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32. (default: bf16)")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. (default: cuda if there is one)")] = None,
    operation: Annotated[list[str] | None, typer.Option(help="One of the table's first column; repeatable.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Samples of every way.")] = None,
    profile: ProfileOption = Profile.NORMAL,
    seed: SeedOption = 0,
    json: JsonOption = None,
    resume: ResumeOption = False,
) -> None:
    """Every operation's bandwidth and FLOP/s against what this machine can do, and its reference beside it."""
    import torch

    from .kernel_cases import KernelSizes
    from .kernels import KernelsConfig, KernelsPlan
    from .roofline_report import setup_of

    base = {
        Profile.CI: KernelsConfig(KernelSizes((1, 4), (64,), 16, 0), repeats=2, sample=1e-5, ceiling_repeats=1),
        Profile.NORMAL: KernelsConfig(),
        Profile.NIGHTLY: KernelsConfig(KernelSizes((1, 4, 16, 64), (256, 1024, 4096)), repeats=50),
    }[profile]
    known = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if device not in (None, *known):
        raise BadInput(f"a device here is {' or '.join(known)}, not {device}")
    where = torch.device(device or known[-1])
    found = dtype_named(dtype) or torch.bfloat16
    config = replace(base, operations=tuple(operation or ()), repeats=repeats or base.repeats, seed=seed)
    shape = setup_of(model, None, found.itemsize).model
    run_plan("kernels", lambda: KernelsPlan(shape, config, model, where, found), json, resume)


def _either(given: list[Value] | None, otherwise: tuple[Value, ...]) -> tuple[Value, ...]:
    return tuple(dict.fromkeys(given)) if given else otherwise


def _default_model(profile: Profile) -> str:
    return "tiny-llava" if profile is Profile.CI else "smol"


def _engine(weights: Sources, dtype: str | None) -> tuple[Engine, str]:
    """An engine with the models of every guard, and its dtype."""
    from ..engine.engine import Engine
    from .variants import bench_models

    engine = Engine(models=bench_models(weights, dtype_named(dtype)))
    return engine, str(engine.models["mllm"].backbone.decoder.dtype).removeprefix("torch.")
