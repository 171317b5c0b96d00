"""The command `stockade`: one small function a command. What takes seconds to import is imported where it is used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from . import __version__
from .bench.commands import app as bench_app
from .engine.errors import BadInput, InvalidGuard, StockadeError
from .engine.named import GUARDS, EngineNames, guard_named, release_named, source_named
from .export.commands import app as export_app
from .train.commands import data_app
from .train.commands import train_app as training_app

if TYPE_CHECKING:
    from rich.progress import Progress

    from .engine.engine import Engine

ModelOption = Annotated[
    str,
    typer.Option("--model", help="Checkpoint folder, GGUF file, bundle or named shape; see `stockade models`."),
]
DetectorOption = Annotated[
    str | None,
    typer.Option(
        "--detector",
        help="Like --model (a guard model: with its name as --guard), or a head file; harm=LABEL:CLASSIFIER says "
        "which label is harm, chat:CLASSIFIER that it reads chats, ADAPTER,BASE merges an adapter, attach:ADAPTER "
        "uses the model's weights, onnx:FOLDER runs an exported one beside the engine.",
    ),
]
DetoxifierOption = Annotated[
    str | None, typer.Option("--detoxifier", help="Like --model; ADAPTER,BASE and attach:ADAPTER too.")
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu or cuda. (default: cuda if there is one)")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="bf16 or fp32. (default: bf16 if it is fast)")]
WeightsOption = Annotated[
    str | None,
    typer.Option("--weights", help="int8 or fp8 (CUDA): the layers' weights in 8 bits. (default: in --dtype)"),
]
KvDtypeOption = Annotated[
    str | None, typer.Option("--kv-dtype", help="fp8: keys and values in half the bytes. (default: as --dtype)")
]
GuardOption = Annotated[str, typer.Option("--guard", help=f"{', '.join(GUARDS)}.")]
ThresholdOption = Annotated[
    float | None, typer.Option("--threshold", help="Harmful is a score below it. (default: the guard's own)")
]
PublishedOption = Annotated[
    bool, typer.Option("--published", help="The guard exactly as its released script, defects included.")
]
ReleaseOption = Annotated[
    str,
    typer.Option(
        "--release",
        help="What is shown when: verdict (all, once it is cleared), window (what the detector has cleared so far), "
        "audit (all at once; verdicts are noted).",
    ),
]
MaxTokensOption = Annotated[int, typer.Option("--max-tokens", min=1, help="Tokens of an answer at most.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")]

app = typer.Typer(
    name="stockade",
    help="Answers from a multimodal language model, with a guard in the engine that lets no harmful answer out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
train_app = typer.Typer(help="Train the parts of a guard.", no_args_is_help=True)
audit_app = typer.Typer(help="Check what a server has written down.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
app.add_typer(export_app, name="export")
app.add_typer(train_app, name="train")
train_app.add_typer(training_app)
app.add_typer(data_app, name="data")
app.add_typer(audit_app, name="audit")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 done with complaints, 2 refused or failed, 130 interrupted."""
    from .console import error_console, printable

    try:
        app(arguments)
    except (StockadeError, OSError) as error:
        message = Text.assemble(("error: ", "bold red"), printable(str(error)), f"  [{type(error).__name__}]")
        error_console().print(message, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        print(f"stockade {__version__}")
        raise typer.Exit()


@app.command()
def demo(
    questions: Annotated[
        Path | None, typer.Option("--questions", help="Your own: one a line, or a CSV file with a column `prompt`.")
    ] = None,
    model: ModelOption = "smol",
    guard: Annotated[
        list[str] | None, typer.Option("--guard", help="A guard to show; may be given again. (default: all)")
    ] = None,
    detector: DetectorOption = None,
    detoxifier: DetoxifierOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    weights: WeightsOption = None,
    kv_dtype: KvDtypeOption = None,
    max_tokens: MaxTokensOption = 96,
    out: Annotated[Path, typer.Option("--out", help="Folder for the picture.")] = Path("out"),
) -> None:
    """Answer ordinary and harmful-looking questions without and with guards; show what each guard did and cost."""
    from .bench.demo import Results, answer_all, demo_questions, draw, read_questions
    from .console import costs_table, introduction, outcomes_table, question_panel

    own = None if questions is None else read_questions(questions)
    names = list(dict.fromkeys(["off", *(guard or ("protector", "ecso"))]))
    for name in names:
        if name not in GUARDS:
            raise InvalidGuard(f"unknown guard {name!r}; there are {', '.join(GUARDS)}")
    console = Console(highlight=False)
    guards = {name: guard_named(name) for name in names}
    engine = _engine(console, model, detector, detoxifier, device, dtype, weights, kv_dtype)
    asked = demo_questions(images=engine.models["mllm"].backbone.vision is not None) if own is None else own
    console.print(introduction(model, len(asked), names))
    results = Results()
    with console.status("answering …") as status:
        for number, item in enumerate(answer_all(engine, asked, guards, max_tokens), 1):
            results.answered.append(item)
            title = f"{number} of {len(asked)}" + (f", {item.question.kind}" if item.question.kind else "")
            console.print(question_panel(title, item.question.title, item.replies))
            status.update(f"answering … {number} of {len(asked)} done")
    console.print(outcomes_table(results), costs_table(results, "off", str(engine.device)))
    picture = out / "demo.png"
    try:
        draw(results, picture, f"{model} on {engine.device}: where the time of each reply went")
        console.print(Text.assemble("Picture: ", (str(picture), "bold")))
    except ImportError:
        console.print("No picture: matplotlib is not installed (pip install 'stockade[demo]').")


@app.command()
def profile(
    model: ModelOption = "smol",
    guard: GuardOption = "protector",
    questions: Annotated[
        Path | None, typer.Option("--questions", help="One a line, or a CSV file with a column `prompt`.")
    ] = None,
    image: Annotated[Path | None, typer.Option("--image", help="Put before every question.")] = None,
    threshold: ThresholdOption = None,
    detector: DetectorOption = None,
    detoxifier: DetoxifierOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    weights: WeightsOption = None,
    kv_dtype: KvDtypeOption = None,
    max_tokens: MaxTokensOption = 64,
    out: Annotated[Path, typer.Option("--out", help="Folder for trace.json and trace.png.")] = Path("out"),
) -> None:
    """Answer questions, all at once; write a trace and a picture of what ran when, and show where the time went."""
    from .bench.demo import demo_questions, read_questions
    from .timeline import run_profile

    texts = [item.text for item in (demo_questions() if questions is None else read_questions(questions))]
    console = Console(highlight=False)
    chosen = guard_named(guard, threshold)
    engine = _engine(console, model, detector, detoxifier, device, dtype, weights, kv_dtype)

    from .engine.sampling import SamplingParams

    shown = [] if image is None else [{"type": "image", "image": str(image)}]
    chats = [[{"role": "user", "content": [*shown, {"type": "text", "text": text}]}] for text in texts]
    with console.status(f"answering {len(chats)} questions …"):
        table = run_profile(engine, chats, chosen, SamplingParams(temperature=0.0, max_tokens=max_tokens), out)
    console.print(table)
    written = [str(file) for file in (out / "trace.json", out / "trace.png") if file.exists()]
    console.print(f"Written: {', '.join(written)} (the trace opens in ui.perfetto.dev or chrome://tracing)")
    if len(written) == 1:
        console.print("No picture: matplotlib is not installed (pip install 'stockade[demo]').")


@app.command()
def chat(
    model: ModelOption = "smol",
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="For the first question; may be given again.")
    ] = None,
    guard: GuardOption = "protector",
    threshold: ThresholdOption = None,
    published: PublishedOption = False,
    release: ReleaseOption = "verdict",
    detector: DetectorOption = None,
    detoxifier: DetoxifierOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    weights: WeightsOption = None,
    kv_dtype: KvDtypeOption = None,
    temperature: TemperatureOption = 0.0,
    max_tokens: MaxTokensOption = 256,
) -> None:
    """Talk with a model under a guard. Questions may come from a pipe, one a line."""
    console = Console(highlight=False)
    chosen, mode = guard_named(guard, threshold, published), release_named(release)
    engine = _engine(console, model, detector, detoxifier, device, dtype, weights, kv_dtype)

    from .engine.sampling import SamplingParams
    from .talk import Talk

    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    talk = Talk(engine, console, chosen, sampling, mode)
    for path in image or ():
        talk.add_image(str(path))
    talk.run(guard_named)


@app.command()
def generate(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A file, or - for stdin.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A file that is made anew, or - for stdout.")],
    model: ModelOption = "smol",
    guard: GuardOption = "protector",
    threshold: ThresholdOption = None,
    published: PublishedOption = False,
    image_root: Annotated[
        Path | None,
        typer.Option("--image-root", exists=True, file_okay=False, help="Images named by a path must lie in here."),
    ] = None,
    detector: DetectorOption = None,
    detoxifier: DetoxifierOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    weights: WeightsOption = None,
    kv_dtype: KvDtypeOption = None,
    temperature: TemperatureOption = 0.0,
    max_tokens: MaxTokensOption = 256,
    ahead: Annotated[int, typer.Option("--ahead", min=1, help="Requests under way at a time.")] = 64,
) -> None:
    """Answer the requests of a JSON-lines file.

    A line is {"prompt": "…"} or {"messages": […]}, with "id" and "sampling" if
    wanted. A line comes out for each, in their order: id, text, outcome,
    finish_reason, verdicts, usage, trace, reason, error. A wrong line becomes
    {"id": …, "error": {"type": …, "message": …}}; the exit code is then 1.
    """
    console = Console(stderr=True, highlight=False)
    if str(source) != "-":
        if not source.exists() or source.is_dir():
            raise BadInput(f"{source} is not a file")
        if target.exists() and target.samefile(source):
            raise BadInput("IN and OUT are the same file")
    chosen = guard_named(guard, threshold, published)
    engine = _engine(console, model, detector, detoxifier, device, dtype, weights, kv_dtype)

    import json

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .engine.sampling import SamplingParams
    from .jsonl import answer_lines, count_lines, read_lines, reading, writing

    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    failed = 0
    with reading(source) as lines, writing(target) as out, Progress(*columns, console=console) as progress:
        task = progress.add_task("answering", total=count_lines(source) if source.is_file() else None)
        records = answer_lines(
            engine, read_lines(lines), guard=chosen, sampling=sampling, ahead=ahead, image_root=image_root
        )
        for record in records:
            out.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            out.flush()
            failed += record["error"] is not None
            progress.advance(task)
    if failed:
        console.print(f"{failed} of the lines failed; their `error` says why", style="yellow")
        raise typer.Exit(1)


@app.command()
def serve(
    model: ModelOption = "smol",
    guard: GuardOption = "protector",
    allow: Annotated[
        list[str] | None, typer.Option("--allow", help="A further guard that clients may ask for; repeatable.")
    ] = None,
    threshold: ThresholdOption = None,
    loosen: Annotated[bool, typer.Option("--allow-lower-threshold", help="Clients may also lower it.")] = False,
    release: ReleaseOption = "verdict",
    allow_release: Annotated[
        str | None, typer.Option("--allow-release", help="The loosest that clients may ask for. (default: --release)")
    ] = None,
    host: Annotated[str, typer.Option("--host")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 8000,
    keys: Annotated[
        Path | None, typer.Option("--keys", help="File with `NAME KEY` a line; without it nobody needs a key.")
    ] = None,
    per_minute: Annotated[float | None, typer.Option("--per-minute", help="Requests of a key a minute.")] = None,
    concurrent: Annotated[
        int | None, typer.Option("--concurrent", min=1, help="Requests of a key under way at once.")
    ] = None,
    max_requests: Annotated[int, typer.Option("--max-requests", min=1, help="Under way at once; else 429.")] = 256,
    deadline: Annotated[float, typer.Option("--deadline", min=0.1, help="Seconds of a request at most.")] = 120.0,
    max_tokens: MaxTokensOption = 1024,
    audit: Annotated[Path | None, typer.Option("--audit", help="File that every decision is written to.")] = None,
    audit_key: Annotated[
        Path | None, typer.Option("--audit-key", help="Its key; made where there is none. (default: AUDIT.key)")
    ] = None,
    audit_texts: Annotated[
        bool, typer.Option("--audit-texts", help="Write the texts, too, not only hashes.")
    ] = False,
    image_origin: Annotated[
        list[str] | None,
        typer.Option("--image-origin", help="https://host that images may be fetched from; repeatable."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option("--cors-origin", help="Origin whose web pages may ask; repeatable.")
    ] = None,
    reveal: Annotated[
        bool, typer.Option("--reveal", help="Replies tell the texts that the guard withheld. For demonstrations.")
    ] = False,
    traces: Annotated[
        bool, typer.Option("--traces", help="Send OpenTelemetry spans where OTEL_EXPORTER_OTLP_ENDPOINT says.")
    ] = False,
    on_ray: Annotated[
        bool, typer.Option("--ray", help="Replicas of the server, on Ray Serve; SIGHUP replaces all, one by one.")
    ] = False,
    replicas: Annotated[int, typer.Option("--replicas", min=1, help="Of the server, under --ray.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option("--max-replicas", help="As many where queues grow. (default: --replicas)")
    ] = None,
    detector_replicas: Annotated[
        int, typer.Option("--detector-replicas", min=0, help="Of an onnx:FOLDER detector, in processes of their own.")
    ] = 0,
    detector: DetectorOption = None,
    detoxifier: DetoxifierOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    weights: WeightsOption = None,
    kv_dtype: KvDtypeOption = None,
) -> None:
    """Serve OpenAI's API, a web page and metrics; every reply goes through the guard.

    A client may ask for a guard with {"guard": {"policy": …, "release": …,
    "threshold": …}} in the body: a tighter one always, a looser one only as far
    as the options allow.
    """
    try:
        from .engine.serving.launch import Serving
        from .engine.serving.launch import serve as run
    except ImportError as error:
        raise BadInput(f"serving needs {error.name}: pip install 'stockade[serve]'") from None
    from .engine.serving.policy import Policy

    guards = {name: guard_named(name, threshold if name == guard else None) for name in [guard, *(allow or ())]}
    loosest = None if allow_release is None else release_named(allow_release)
    serving = Serving(
        model=Path(model).name,
        policy=Policy(guards, guard, release_named(release), loosest, loosen),
        host=host,
        port=port,
        keys=keys,
        per_minute=per_minute,
        concurrent=concurrent,
        max_requests=max_requests,
        deadline=deadline,
        max_tokens=max_tokens,
        audit=audit,
        audit_key=audit_key,
        audit_texts=audit_texts,
        image_origins=tuple(image_origin or ()),
        origins=tuple(cors_origin or ()),
        reveal=reveal,
        traces=traces,
    )
    console = Console(stderr=True, highlight=False)
    if on_ray:
        from .doctor import cores

        try:
            from .engine.serving.ray_app import Scale, serve_on_ray
        except ImportError as error:
            raise BadInput(f"--ray needs {error.name}: pip install 'stockade[ray]'") from None
        scale = Scale.sharing(cores(), replicas, max_replicas, detector_replicas)
        serve_on_ray(
            EngineNames(model, detector, detoxifier, device, dtype, weights, kv_dtype), serving, scale, console.print
        )
        return
    if replicas > 1 or max_replicas is not None or detector_replicas:
        raise BadInput("replicas run on Ray Serve: add --ray")
    engine = _engine(console, model, detector, detoxifier, device, dtype, weights, kv_dtype)
    run(engine, serving, console.print)


@app.command()
def models(
    source: Annotated[
        str | None, typer.Argument(metavar="[SOURCE]", help="A checkpoint, as --model takes it, that is not loaded.")
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The table as a document has it.")] = False,
) -> None:
    """Show which models run, and how; of one checkpoint whether it will, without loading its weights.

    The exit code is 1 when that one would be refused.
    """
    from .console import plain_table, printable
    from .engine.guards.templates import TEMPLATES
    from .engine.models.shapes import NAMED_SHAPES
    from .engine.models.sources import BUNDLES, Attached
    from .engine.models.support import EXACT, Way, guard_rows, markdown, outlook, rows

    console = Console(highlight=False)
    if source is not None:
        checkpoint = source_named(source)
        if isinstance(checkpoint, Attached):
            raise BadInput(
                "name a checkpoint, or ADAPTER,BASE; what is attached depends on the model it is attached to"
            )
        way, reason = outlook(checkpoint)
        style = "red" if way is Way.REFUSED else "green"
        console.print(Text.assemble((f"{way}: ", f"bold {style}"), printable(reason)), soft_wrap=True)
        if way is Way.REFUSED:
            raise typer.Exit(1)
        return
    lines = [*rows(), *guard_rows({name: prompt.model for name, prompt in TEMPLATES.items()})]
    if as_markdown:
        print(markdown(lines))
        return
    table = plain_table("What --model takes", ["kind", "model", "model_type", "runs on", ""])
    for row in lines:
        table.add_row(row.kind, row.name, ", ".join(row.types), row.way, row.note)
    console.print(table)
    table = plain_table("And", ["", "names", "checked by"])
    table.add_row("detectors", "*ForSequenceClassification, PEFT adapters, head files", EXACT)
    table.add_row("bundles", ", ".join(BUNDLES), "the real weights against transformers")
    table.add_row("named shapes, random weights", ", ".join(NAMED_SHAPES), "for benchmarks and tests")
    table.add_row("formats", "safetensors, one file or sharded; .bin that holds tensors only; GGUF", "tests of each")
    console.print(table)


@app.command()
def doctor() -> None:
    """Show what this machine has, what will be used, what is missing and how to get it.

    The exit code is 1 when something that is needed is missing.
    """
    from .console import facts_table
    from .doctor import examine

    console = Console(highlight=False)
    with console.status("looking …"):
        found = examine()
    console.print(facts_table("This machine", found.machine))
    console.print(facts_table("What will be used", found.used))
    console.print(facts_table("Packages", found.packages))
    console.print("All that is needed is there." if found.healthy else "Something that is needed is missing.")
    if not found.healthy:
        raise typer.Exit(1)


@audit_app.command()
def verify(
    logs: Annotated[list[Path], typer.Argument(metavar="LOG...", exists=True, dir_okay=False)],
    key: Annotated[Path | None, typer.Option("--key", help="Their key file. (default: LOG.key)")] = None,
    last: Annotated[str | None, typer.Option("--last", help="The chain value that the last line must have.")] = None,
) -> None:
    """Check that no line of a server's audit log is missing or altered. Every replica writes a log of its own."""
    from .engine.serving.audit import read_key
    from .engine.serving.audit import verify as check

    if last is not None and len(logs) > 1:
        raise BadInput("--last is the value of one log")
    for log in logs:
        with open(log, "rb") as lines:
            found = check(lines, read_key(key or log.with_name(log.name + ".key")), last)
        end = "closed" if found.closed else "not closed: its server runs, was killed, or lines are missing at the end"
        print(f"{log}: " * (len(logs) > 1) + f"{found.lines} lines, {found.decisions} decisions, all in place; {end}")
        print(f"last: {found.last}")


@train_app.command()
def probe(
    data: Annotated[Path, typer.Option("--data", exists=True, file_okay=False, help="Folder with the data sets.")],
    out: Annotated[Path, typer.Option("--out", help="The head's file, *.safetensors; its card comes beside it.")],
    model: ModelOption = "smol",
    template: Annotated[
        str, typer.Option("--template", help="response: a detector; context: a probe of the model's answers.")
    ] = "response",
    layer: Annotated[
        list[int] | None, typer.Option("--layer", min=1, help="A layer to try; may be given again.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the split into parts.")] = 0,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Texts of each kind at most.")] = None,
    judge: Annotated[
        bool,
        typer.Option(
            "--judge", help="A judge of other detectors: train on what tests them, test on what trains them."
        ),
    ] = False,
) -> None:
    """Fit a detector's head on a frozen model's hidden states."""
    from rich.markdown import Markdown
    from rich.progress import Progress

    from .train.probe import fit_probe

    console = Console(highlight=False)
    with Progress(console=console) as progress:
        told = _told(progress)
        card = fit_probe(
            data,
            out,
            model=model,
            template=template,
            layers=layer,
            seed=seed,
            limit=limit,
            judge=judge,
            progress=told,
        )
    console.print(Markdown(card.to_markdown()))
    console.print(f"Written: {out}")


@train_app.command()
def cascade(
    data: Annotated[Path, typer.Option("--data", exists=True, file_okay=False, help="Folder with the data sets.")],
    model: ModelOption = "smol",
    budget: Annotated[float, typer.Option("--budget", help="Share of harmless answers that may be flagged.")] = 0.05,
    asked: Annotated[float, typer.Option("--asked", help="Share of them that the detector may read.")] = 0.2,
    seed: Annotated[int, typer.Option("--seed", help="Of the split into parts and halves.")] = 0,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Texts of each kind at most.")] = None,
) -> None:
    """Calibrate a cascade of a bundle's probe and detector, and measure it beside each alone."""
    from rich.markdown import Markdown
    from rich.progress import Progress

    from .train.cascade import measure_cascade

    console = Console(highlight=False)
    with Progress(console=console) as progress:
        report = measure_cascade(
            data, model=model, budget=budget, asked=asked, seed=seed, limit=limit, progress=_told(progress)
        )
    console.print(Markdown(report.to_markdown()))


# What the commands share.


def _told(progress: Progress) -> Callable[[str, int, int], None]:
    """Shows what is told of (what is under way, how much is done, how much there is), a bar each."""
    tasks: dict[str, Any] = {}

    def told(what: str, done: int, of: int) -> None:
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=of)
        progress.update(tasks[what], completed=done, total=of)

    return told


def _engine(
    console: Console,
    model: str,
    detector: str | None,
    detoxifier: str | None,
    device: str | None,
    dtype: str | None,
    weights: str | None,
    kv_dtype: str | None,
) -> Engine:
    """Load an engine, and say so where somebody is looking. Raises `BadInput` and what `Engine` raises."""
    with console.status(f"loading {model} …"):
        return EngineNames(model, detector, detoxifier, device, dtype, weights, kv_dtype).engine()
