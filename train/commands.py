"""`stockade train detector` and its like, one small function a command. Slow imports are made in there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..engine.errors import BadInput
from .eyes_command import eyes

if TYPE_CHECKING:
    import torch

    from .recipe import Recipe

train_app = typer.Typer()
train_app.command()(eyes)
data_app = typer.Typer(help="Make data to train on.", no_args_is_help=True)

BaseArgument = Annotated[str, typer.Argument(metavar="BASE", help="A checkpoint folder, a GGUF file or a bundle.")]
OutOption = Annotated[
    Path, typer.Option("--out", help="A new folder; the same command goes on with an interrupted run.")
]
AdapterOption = Annotated[
    str, typer.Option("--adapter", help="lora, alora (activated: on the MLLM's own weights) or full (all weights).")
]
RateOption = Annotated[float, typer.Option("--rate", help="Learning rate.")]
EpochsOption = Annotated[int, typer.Option("--epochs", min=1)]
BatchOption = Annotated[int, typer.Option("--batch", min=1, help="Examples a step.")]
LengthOption = Annotated[int, typer.Option("--max-tokens", min=8, help="Of a training example.")]
WarmupOption = Annotated[float, typer.Option("--warmup", help="Share of the steps in which the rate rises.")]
DecayOption = Annotated[float, typer.Option("--weight-decay")]
RankOption = Annotated[int, typer.Option("--rank", min=1, help="Of the LoRA.")]
AlphaOption = Annotated[int, typer.Option("--alpha", min=1, help="Of the LoRA.")]
DropoutOption = Annotated[float, typer.Option("--dropout", help="Of the LoRA.")]
FirstLayerOption = Annotated[
    int,
    typer.Option(
        "--first-layer", min=0, help="The first with a LoRA, from 0; layers below are read once, not trained."
    ),
]
TargetOption = Annotated[
    list[str] | None,
    typer.Option("--target", help="A linear map that gets a LoRA; repeatable. (default: q_proj, v_proj)"),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Of weights, order, dropout and splits.")]
SkipOption = Annotated[bool, typer.Option("--skip-bad", help="Leave out rows of the wrong form, and count them.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu or cuda. (default: cuda if there is one)")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="bf16 or fp32, of frozen weights; adapters are fp32.")]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="Texts of each kind at most.")]


@train_app.command()
def detector(
    base: BaseArgument,
    data: Annotated[Path, typer.Option("--data", exists=True, file_okay=False, help="Folder with the data sets.")],
    out: OutOption,
    start: Annotated[
        Path | None,
        typer.Option("--start", exists=True, file_okay=False, help="A detector of the same form, to go on from."),
    ] = None,
    adapter: AdapterOption = "lora",
    template: Annotated[str, typer.Option("--template", help="response or question_answer.")] = "response",
    layer: Annotated[int | None, typer.Option("--layer", min=1, help="Of the head. (default: the last)")] = None,
    pooling: Annotated[str, typer.Option("--pooling", help="last or mean.")] = "last",
    pairwise: Annotated[bool, typer.Option("--pairwise", help="The released script's loss of pairs.")] = False,
    beginnings: Annotated[
        float, typer.Option("--beginnings", min=0, help="Weight of the loss of the lowest score of any beginning.")
    ] = 0.0,
    false_positives: Annotated[
        float, typer.Option("--false-positives", help="Share of helpful answers that the threshold flags.")
    ] = 0.01,
    finish: Annotated[
        bool, typer.Option("--finish", help="Go on with the validation part's questions, and as many known answers.")
    ] = False,
    invocation: Annotated[
        str | None, typer.Option("--invocation", help="Text from which on an activated adapter applies.")
    ] = None,
    rate: RateOption = 2e-5,
    head_rate: Annotated[float | None, typer.Option("--head-rate", help="Of the head. (default: --rate)")] = None,
    epochs: EpochsOption = 4,
    batch: BatchOption = 4,
    max_tokens: LengthOption = 512,
    warmup: WarmupOption = 0.0,
    weight_decay: DecayOption = 0.0,
    rank: RankOption = 32,
    alpha: AlphaOption = 32,
    dropout: DropoutOption = 0.1,
    target: TargetOption = None,
    first_layer: FirstLayerOption = 0,
    seed: SeedOption = 0,
    limit: LimitOption = None,
    measured: Annotated[
        int | None, typer.Option("--measured", min=1, help="Answers of each set and kind that measure, at most.")
    ] = None,
    skip_bad: SkipOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = "fp32",
) -> None:
    """Train a harm detector: one logit on a language model.

    The defaults are the published recipe's.
    """
    from typing import get_args

    from rich.markdown import Markdown

    from .card import Pooling
    from .detector import Form, train_detector

    for value in get_args(Pooling):
        if value == pooling:
            how: Pooling = value
            break
    else:
        raise BadInput(f"pooling must be one of {', '.join(get_args(Pooling))}, not {pooling!r}")
    form = Form(template, layer, how, pairwise, beginnings, false_positives, finish)
    if invocation is not None:
        form = replace(form, invocation=invocation)
    recipe = recipe_of(
        *(adapter, rate, epochs, batch, max_tokens, warmup, weight_decay, rank, alpha, dropout, target, seed),
        head_rate,
        first_layer,
    )
    console = Console(highlight=False)
    with telling(console) as told:
        card = train_detector(
            base,
            data,
            out,
            start=start,
            form=form,
            recipe=recipe,
            limit=limit,
            measured=measured,
            skip_bad=skip_bad,
            device=torch_device(device),
            dtype=torch_dtype(dtype),
            progress=told,
        )
    console.print(Markdown(card.to_markdown()))
    console.print(f"Written: {out}")


@train_app.command()
def detoxifier(
    base: BaseArgument,
    data: Annotated[
        list[Path], typer.Option("--data", exists=True, dir_okay=False, help="A file of triples; may be given again.")
    ],
    out: OutOption,
    adapter: Annotated[str, typer.Option("--adapter", help="lora, or alora (activated).")] = "lora",
    invocation: Annotated[
        str | None, typer.Option("--invocation", help="Text from which on an activated adapter applies.")
    ] = None,
    rate: RateOption = 2e-5,
    epochs: EpochsOption = 4,
    batch: BatchOption = 4,
    max_tokens: LengthOption = 512,
    warmup: WarmupOption = 0.0,
    weight_decay: DecayOption = 0.001,
    rank: RankOption = 128,
    alpha: AlphaOption = 32,
    dropout: DropoutOption = 0.1,
    target: TargetOption = None,
    seed: SeedOption = 0,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Triples at most.")] = None,
    skip_bad: SkipOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = "fp32",
) -> None:
    """Train a detoxifier: a language model that rewrites harmful answers.

    A triple is a question, a harmful and a harmless answer; see `stockade data
    detoxifier`. The defaults are the published recipe's.
    """
    from rich.markdown import Markdown

    from .detoxifier import INVOCATION, train_detoxifier

    recipe = recipe_of(
        adapter, rate, epochs, batch, max_tokens, warmup, weight_decay, rank, alpha, dropout, target, seed
    )
    console = Console(highlight=False)
    with telling(console) as told:
        card = train_detoxifier(
            base,
            data,
            out,
            recipe=recipe,
            invocation=INVOCATION if invocation is None else invocation,
            limit=limit,
            skip_bad=skip_bad,
            device=torch_device(device),
            dtype=torch_dtype(dtype),
            progress=told,
        )
    console.print(Markdown(card.to_markdown()))
    console.print(f"Written: {out}")


@train_app.command()
def mllm(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A LLaVA checkpoint's folder.")],
    data: Annotated[
        list[Path],
        typer.Option("--data", exists=True, dir_okay=False, help="Pairs in LLaVA's format; may be given again."),
    ],
    out: OutOption,
    image_root: Annotated[
        Path | None, typer.Option("--image-root", exists=True, file_okay=False, help="Images must lie in here.")
    ] = None,
    mix: Annotated[
        list[Path] | None,
        typer.Option("--mix", exists=True, dir_okay=False, help="Utility data in the same format; repeatable."),
    ] = None,
    share: Annotated[float, typer.Option("--share", help="Of utility data in all that is trained.")] = 0.5,
    rate: RateOption = 2e-5,
    epochs: EpochsOption = 1,
    batch: BatchOption = 4,
    max_tokens: LengthOption = 1024,
    warmup: WarmupOption = 0.03,
    weight_decay: DecayOption = 0.0,
    rank: RankOption = 128,
    alpha: AlphaOption = 256,
    dropout: DropoutOption = 0.05,
    target: TargetOption = None,
    seed: SeedOption = 0,
    skip_bad: SkipOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = "fp32",
) -> None:
    """Fine-tune a multimodal model: a LoRA on its language model, and its projector.

    `stockade data ecso` makes such pairs.
    """
    from rich.markdown import Markdown

    from .mllm import train_mllm

    recipe = recipe_of(
        "lora", rate, epochs, batch, max_tokens, warmup, weight_decay, rank, alpha, dropout, target, seed
    )
    console = Console(highlight=False)
    with telling(console) as told:
        card = train_mllm(
            base,
            data,
            out,
            utility=mix or (),
            share=share,
            images=image_root,
            recipe=recipe,
            skip_bad=skip_bad,
            device=torch_device(device),
            dtype=torch_dtype(dtype),
            progress=told,
        )
    console.print(Markdown(card.to_markdown()))
    console.print(f"Written: {out}")


@data_app.command("detoxifier")
def detoxifier_data(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", exists=True, help="A data directory, or rows of question and harmful.")
    ],
    out: Annotated[Path, typer.Option("--out", help="JSON lines; what is in it already is not made again.")],
    model: Annotated[str, typer.Option("--model", help="Of the engine, or the endpoint's name for it.")] = "smol",
    detector: Annotated[
        str | None, typer.Option("--detector", help="What it finds harmful is not taught. (default: the model's own)")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", help="OpenAI-compatible, http…/v1; its key in OPENAI_API_KEY.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Of an answer.")] = 256,
    paired: Annotated[
        bool,
        typer.Option("--paired", help="Ask no model: take the sets' own harmless answers to the same questions."),
    ] = False,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Harmful answers at most.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the split; only what trains is taken.")] = 0,
    skip_bad: SkipOption = False,
) -> None:
    """Write (question, harmful, harmless) triples: a model rewrites harmful answers.

    The exit code is 1 when some are missing: run it again.
    """
    import os

    from ..engine.sampling import SamplingParams
    from .detoxifier_data import make_triples, paired_triples, read_harmful, write_triples
    from .rows import Bad, Skipped, refuse
    from .teachers import EndpointTeacher, EngineTeacher, Teacher

    skipped = Skipped()
    bad: Bad = skipped if skip_bad else refuse
    console = Console(highlight=False)
    if paired:
        if not source.is_dir():
            raise BadInput("--paired takes a data directory")
        made = write_triples(paired_triples(source, seed=seed, bad=bad)[:limit], out)
        console.print(f"{out}: {made.triples} triples; {skipped.count} bad rows left out")
        return
    harmful = read_harmful(source, seed=seed, bad=bad)[:limit]
    teacher: Teacher
    if endpoint is not None:
        teacher = EndpointTeacher(endpoint, model, os.environ.get("OPENAI_API_KEY"), max_tokens)
    else:
        with console.status(f"loading {model} …"):
            from ..engine.named import EngineNames

            engine = EngineNames(model, detector).engine()
        teacher = EngineTeacher(engine, SamplingParams(temperature=0.0, max_tokens=max_tokens))
    with telling(console) as told:
        made = make_triples(harmful, teacher, out, progress=told)
    console.print(
        f"{out}: {made.triples} triples; {made.failed} without an answer; {skipped.count} bad rows left out"
    )
    if made.failed:
        raise typer.Exit(1)


@data_app.command()
def ecso(
    queries: Annotated[
        Path, typer.Argument(metavar="QUERIES", exists=True, dir_okay=False, help="Rows of query, and image.")
    ],
    out: Annotated[Path, typer.Option("--out", help="A .json file; a .jsonl file beside it keeps what is done.")],
    model: Annotated[str, typer.Option("--model", help="A model with eyes, if there are images.")] = "smol",
    image_root: Annotated[
        Path | None, typer.Option("--image-root", exists=True, file_okay=False, help="Images must lie in here.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Of an answer.")] = 512,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Queries at most.")] = None,
    skip_bad: SkipOption = False,
    device: DeviceOption = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="bf16 or fp32. (default: bf16 if it is fast)")] = None,
) -> None:
    """Answer unsafe queries under ECSO, and write LLaVA-format pairs to train on."""
    from ..engine.named import EngineNames
    from ..engine.sampling import SamplingParams
    from .ecso_data import make_pairs, read_queries
    from .rows import Skipped, refuse

    skipped = Skipped()
    asked = read_queries(queries, skipped if skip_bad else refuse)[:limit]
    console = Console(highlight=False)
    with console.status(f"loading {model} …"):
        engine = EngineNames(model, device=device, dtype=dtype).engine()
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    with telling(console) as told:
        pairs = make_pairs(engine, asked, image_root, out, sampling=sampling, progress=told)
    console.print(
        f"{out}: {pairs.clean} answers that the model found harmless, {pairs.mended} with eyes closed; "
        f"{pairs.refused} refused, {skipped.count} bad rows left out"
    )


# What the commands share.


def recipe_of(
    adapter: str,
    rate: float,
    epochs: int,
    batch: int,
    max_tokens: int,
    warmup: float,
    weight_decay: float,
    rank: int,
    alpha: int,
    dropout: float,
    target: list[str] | None,
    seed: int,
    head_rate: float | None = None,
    first_layer: int = 0,
) -> Recipe:
    """Raises `BadInput` for values out of range."""
    from .recipe import TARGETS, Recipe

    return Recipe(
        rate=rate,
        head_rate=rate if head_rate is None else head_rate,
        epochs=epochs,
        batch=batch,
        warmup=warmup,
        weight_decay=weight_decay,
        max_tokens=max_tokens,
        adapter=adapter,  # type: ignore[arg-type]  # the recipe checks it
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=tuple(target or TARGETS),
        first_layer=first_layer,
        seed=seed,
    )


@contextmanager
def telling(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the time left for each thing that is told of: (what is under way, how much is done, of how much)."""
    from rich.progress import Progress

    tasks: dict[str, Any] = {}
    with Progress(*Progress.get_default_columns(), console=console) as progress:

        def told(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=of)
            progress.update(tasks[what], completed=done, total=of)

        yield told


def torch_device(name: str | None) -> torch.device:
    """Raises `BadInput` for one that is not there."""
    import torch

    from ..engine.named import device_named

    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name is None else device_named(name))


def torch_dtype(name: str) -> torch.dtype:
    """Raises `BadInput` for another name than bf16 and fp32."""
    import torch

    from ..engine.named import DTYPES

    if name not in DTYPES:
        raise BadInput(f"unknown dtype {name!r}; there are {', '.join(DTYPES)}")
    return getattr(torch, DTYPES[name])
