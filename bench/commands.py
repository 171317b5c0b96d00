"""`stockade bench …`: one small function a measurement. What takes seconds to import is imported where it is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..engine.errors import BadInput
from .load_commands import kernels, latency, throughput
from .options import (
    DetectorOption,
    DetoxifierOption,
    DtypeOption,
    JsonOption,
    MinutesOption,
    ModelOption,
    PromptOption,
    QuickOption,
    ResumeOption,
    RoundsOption,
    SeedOption,
    WithinOption,
    dtype_named,
    enough,
    measure_plan,
    progress,
)
from .result_commands import capacity, peers, report
from .safety.command import safety

if TYPE_CHECKING:
    from .document import Session

app = typer.Typer(
    help="Measure. Prints a table for people and, as its last line, one JSON document.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for _command in (latency, throughput, kernels, capacity, report, peers, safety):
    app.command()(_command)


@app.command()
def overhead(
    model: Annotated[
        str,
        typer.Option(help="smol-llava (SmolLM2 with eyes), a bundle, a checkpoint folder or a named shape."),
    ] = "smol-llava",
    detector: DetectorOption = None,
    detoxifier: DetoxifierOption = None,
    dtype: DtypeOption = None,
    variant: Annotated[list[str] | None, typer.Option(help="A guard; repeatable. (default: five of them)")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measured runs of each guard on the harmless path.")] = 9,
    harmful_repeats: Annotated[int, typer.Option(min=1, help="The same on the harmful path.")] = 3,
    published_repeats: Annotated[int, typer.Option(min=1, help="Measured runs of each published pipeline.")] = 3,
    prompt_tokens: PromptOption = 64,
    answer_tokens: Annotated[int, typer.Option(min=3, help="Tokens of an answer and of a rewrite.")] = 128,
    caption_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a caption.")] = 64,
    concurrent: Annotated[int, typer.Option(min=1, help="Requests at once, for the throughput.")] = 8,
    saturation_pairs: Annotated[int, typer.Option(min=1, help="Pairs of runs for the throughput.")] = 20,
    harmful: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The part of harmful answers in mixed traffic.")
    ] = 0.05,
    mixed_pairs: Annotated[int, typer.Option(min=0, help="Pairs of runs on mixed traffic.")] = 10,
    seed: SeedOption = 0,
    quick: QuickOption = False,
    json: JsonOption = None,
    resume: ResumeOption = False,
) -> None:
    """What a guard costs: unguarded, this engine's guards, and the published pipelines on `transformers`."""
    from .overhead import OverheadPlan
    from .overhead_report import OverheadConfig
    from .published import Lengths

    if quick:
        repeats, saturation_pairs, concurrent = 1, 1, min(concurrent, 4)
        mixed_pairs = min(mixed_pairs, 1)
        answer_tokens, caption_tokens = min(answer_tokens, 8), min(caption_tokens, 8)
    config = OverheadConfig(
        variants=tuple(dict.fromkeys(variant or OverheadConfig.variants)),
        repeats=repeats,
        harmful_repeats=min(harmful_repeats, repeats),
        published_repeats=min(published_repeats, repeats),
        prompt_tokens=prompt_tokens,
        lengths=Lengths(answer=answer_tokens, judge=2, caption=caption_tokens, mended=answer_tokens),
        concurrent=concurrent,
        saturation_pairs=saturation_pairs,
        harmful=harmful,
        mixed_pairs=mixed_pairs,
        saturation_tokens=min(answer_tokens, OverheadConfig.saturation_tokens),
        rewrites=1 if quick else OverheadConfig.rewrites,
        seed=seed,
    )
    measure_plan(
        "overhead",
        lambda weights: OverheadPlan(weights, config, dtype_named(dtype)),
        *(model, detector, detoxifier, json, resume),
    )


@app.command()
def decode(
    model: ModelOption = "smol",
    dtype: DtypeOption = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Prompts at once; repeatable. (default: 1, 16)")
    ] = None,
    prompt_tokens: PromptOption = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded after each prompt.")] = 128,
    prefill: Annotated[int, typer.Option(min=1, help="Tokens of the prompt whose reading is timed.")] = 640,
    rounds: RoundsOption = 6,
    within: WithinOption = 2.5,
    minutes: MinutesOption = 10,
    seed: SeedOption = 0,
    quick: QuickOption = False,
    json: JsonOption = None,
    resume: ResumeOption = False,
) -> None:
    """Tokens per second against `transformers`, and what the machine's memory would allow."""
    from .decode import DecodeConfig, DecodePlan

    batches = tuple(batch or (1, 16))
    if quick:
        new_tokens, batches = min(new_tokens, 8), tuple(min(rows, 4) for rows in batches)
    until = enough(rounds, within, minutes, quick)
    config = DecodeConfig(tuple(dict.fromkeys(batches)), prompt_tokens, new_tokens, prefill, enough=until, seed=seed)
    measure_plan(
        "decode", lambda weights: DecodePlan(weights, config, dtype_named(dtype)), model, None, None, json, resume
    )


@app.command()
def roofline(
    model: ModelOption = "smol",
    detector: Annotated[
        str | None, typer.Option(help="A folder, a bundle or a named shape. (default: as large as the model)")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    prompt_tokens: PromptOption = 64,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 128,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens that a detector reads at a time.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 1,
    memory_efficiency: Annotated[float, typer.Option(help="Of the bandwidth, the part that is reached.")] = 1.0,
    compute_efficiency: Annotated[float, typer.Option(help="Of the FLOP/s, the part that is reached.")] = 1.0,
    measured: Annotated[
        Path | None, typer.Option(help="JSON of `bench overhead` for the same model and lengths, to compare with.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """What guards must cost by bytes and operations: predicted for this machine's cores, and for LLaVA on an H200."""
    from dataclasses import replace

    from .report import begin, emit
    from .roofline import h200, predict, this_cpu
    from .roofline_report import RooflineReport, read_measured, setup_of

    known, torch_dtype = None if measured is None else read_measured(measured), dtype_named(dtype)
    assert torch_dtype is not None
    session = begin(Console(stderr=True, highlight=False), json)
    lengths: dict[str, Any] = {"question": prompt_tokens, "answer": answer_tokens, "chunk": chunk, "batch": batch}
    reached: dict[str, Any] = {"memory_efficiency": memory_efficiency, "compute_efficiency": compute_efficiency}
    here = setup_of(model, detector, torch_dtype.itemsize)
    there = setup_of("llava-1.5-7b", "open-llama-3b")
    predictions = {
        f"{model} {dtype} on this machine": predict(
            replace(here, **lengths), replace(this_cpu(torch_dtype), **reached)
        ),
        "llava-1.5-7b bf16 on an H200": predict(replace(there, **lengths), replace(h200(), **reached)),
    }
    report = RooflineReport(predictions, known or {})
    emit(report.table(), report.to_dict(), session, json)


@app.command()
def training(
    model: ModelOption = "smol",
    dtype: DtypeOption = None,
    answers: Annotated[int, typer.Option(min=1, help="Random ones that both sides train on in each round.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Answers a step.")] = 8,
    longest: Annotated[int, typer.Option(min=16, help="Tokens of the longest answer.")] = 256,
    layers: Annotated[int | None, typer.Option(min=1, help="Of the model. (default: all)")] = None,
    rounds: RoundsOption = 3,
    within: WithinOption = 2.5,
    minutes: MinutesOption = 10,
    seed: SeedOption = 0,
    quick: QuickOption = False,
    json: JsonOption = None,
    resume: ResumeOption = False,
) -> None:
    """Tokens per second of a detector's training step on the CPU, beside a plain PyTorch loop of the same model."""
    from .training import TrainingConfig, TrainingPlan

    if quick:
        answers, longest = min(answers, 2 * batch), min(longest, 64)
    config = TrainingConfig(answers, batch, 16, longest, layers, enough(rounds, within, minutes, quick), seed)
    measure_plan(
        "training", lambda weights: TrainingPlan(weights, config, dtype_named(dtype)), model, None, None, json, resume
    )


@app.command()
def onnx(
    model: Annotated[str, typer.Option(help="smol, or a named shape (tiny-llama).")] = "smol",
    data: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder with the data sets: real answers, thresholds."),
    ] = None,
    rounds: RoundsOption = 6,
    within: WithinOption = 2.5,
    minutes: MinutesOption = 10,
    answers: Annotated[int, typer.Option(min=1, help="Of GPTFuzz's evaluation answers, at most.")] = 500,
    seed: SeedOption = 0,
    quick: QuickOption = False,
    json: JsonOption = None,
    resume: ResumeOption = False,
) -> None:
    """The exported detector of smol on ONNX Runtime, beside the engine's and `transformers`."""
    from contextlib import ExitStack

    from .onnx import OnnxConfig, OnnxPlan

    until = enough(rounds, within, minutes, quick)
    config = OnnxConfig(enough=until, answers=answers, data=data, seed=seed)
    if quick:
        config = OnnxConfig((16,), (1, 2), until, 1, min(answers, 8), 8, 24, data, 2, seed, ("fp32",))
    with ExitStack() as stack:
        measure_plan("onnx", lambda weights: OnnxPlan(weights, config, stack), model, None, None, json, resume)


@app.command()
def serve(
    model: ModelOption = "smol",
    detector: DetectorOption = None,
    detoxifier: DetoxifierOption = None,
    dtype: DtypeOption = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of a run.")] = 64,
    at_once: Annotated[int, typer.Option(min=1, help="Requests under way.")] = 16,
    pairs: Annotated[int, typer.Option(min=1, help="Runs of the server and of the bare engine.")] = 5,
    prompt_tokens: PromptOption = 64,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 64,
    idle: Annotated[int, typer.Option(min=1, help="Streams that nobody reads.")] = 200,
    soak: Annotated[
        int | None, typer.Option(min=8, help="Instead: so many mixed requests with faults, on tiny random models.")
    ] = None,
    on_ray: Annotated[
        bool,
        typer.Option("--ray", help="With --soak: two replicas on Ray Serve, which are killed now and then."),
    ] = False,
    seed: SeedOption = 0,
    quick: QuickOption = False,
    json: JsonOption = None,
    resume: ResumeOption = False,
) -> None:
    """What the server costs over the bare engine, and how it holds under load. --soak: whether it leaks anything."""
    if soak is not None:
        _soak(soak, seed, json, on_ray)
        return
    from .serve import ServeConfig, ServePlan

    if quick:
        requests, at_once, pairs, answer_tokens, idle = 4, min(at_once, 4), 1, min(answer_tokens, 8), min(idle, 20)
    config = ServeConfig(requests, at_once, pairs, prompt_tokens, answer_tokens, idle, seed)
    measure_plan(
        "serve",
        lambda weights: ServePlan(weights, config, dtype_named(dtype)),
        *(model, detector, detoxifier, json, resume),
    )


def _soak(requests: int, seed: int, json: Path | None, on_ray: bool) -> None:
    """Exits with 1 where the soak has complaints."""
    from tempfile import TemporaryDirectory

    from .report import begin, emit
    from .soak import SoakConfig, run_soak

    console = Console(stderr=True, highlight=False)
    session: Session = begin(console, json)
    with TemporaryDirectory() as folder, progress(console) as told:
        config = SoakConfig(requests, seed=seed)
        if on_ray:
            try:
                from .soak_ray import run_ray_soak
            except ImportError as error:
                raise BadInput(f"--ray needs {error.name}: pip install 'stockade[ray]'") from None
            report: Any = run_ray_soak(config, told, Path(folder))
        else:
            report = run_soak(config, told, Path(folder))
    emit(report.table(), report.to_dict(), session, json)
    if report.complaints:
        raise typer.Exit(1)
