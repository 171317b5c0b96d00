"""`stockade bench capacity` and `report`: what is made of results that were measured before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .document import BadDocument
from .options import (
    JsonOption,
    MinutesOption,
    QuickOption,
    ResumeOption,
    RoundsOption,
    SeedOption,
    WithinOption,
    enough,
    measure_plan,
    progress,
)

if TYPE_CHECKING:
    from .cost_fit import Costs
    from .guard_programs import Sizes
    from .replica import Limits
    from .traffic import Sizes as Requests

ROOFLINE = "roofline"


def capacity(
    costs: Annotated[
        str,
        typer.Option(
            help="JSON of `bench throughput` on the machine that is planned with; or `roofline`: LLaVA-1.5-7B on an "
            "H200 by bytes and operations, not measured."
        ),
    ],
    rate: Annotated[float | None, typer.Option(help="Requests a second in all. (default: the trace's)")] = None,
    harmful: Annotated[float, typer.Option(min=0.0, max=1.0, help="The part of all answers that are mended.")] = 0.0,
    guards: Annotated[str, typer.Option(help="Names with commas between.")] = "ecso,probe",
    placement: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a detector with weights of its own; repeatable: same, stream, own, cpu. (default: same)"
        ),
    ] = None,
    objective: Annotated[str, typer.Option(help="As ttft=1s,itl=100ms,e2e=10s.")] = "e2e=10s",
    target: Annotated[float, typer.Option(min=0.01, max=1.0, help="The part of all requests that it is for.")] = 0.95,
    price: Annotated[float, typer.Option(min=0.0, help="Of a device (or machine) and hour.")] = 1.0,
    burst: Annotated[int, typer.Option(min=1, help="Requests that come at the same moment.")] = 1,
    trace: Annotated[
        Path | None, typer.Option(help="CSV or JSON lines: arrival, prompt_tokens, images, answer_tokens[, harmful].")
    ] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Of a question. (default: as measured)")] = None,
    answer_tokens: Annotated[int | None, typer.Option(min=2, help="Of an answer. (default: as measured)")] = None,
    images: Annotated[int | None, typer.Option(min=0, help="Of a question. (default: as measured)")] = None,
    onnx: Annotated[Path | None, typer.Option(help="JSON of `bench onnx`, for the placement cpu.")] = None,
    cores: Annotated[int, typer.Option(min=1, help="Detectors at once beside a replica, in the placement cpu.")] = 4,
    requests: Annotated[int, typer.Option(min=50, help="Simulated at least.")] = 800,
    validate: Annotated[
        bool, typer.Option("--validate", help="Instead: predict the measured run itself, and compare.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write a page (HTML), too, with the measured run.")] = None,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """How many replicas hold an objective under each guard, and at what price: simulated from measured step costs."""
    from .capacity import Plan, Traffic, placement_named, run_capacity
    from .capacity_check import compare, table
    from .capacity_report import CapacityReport
    from .cost_fit import FittedCosts, outside_costs
    from .document import Session, read_document
    from .objective import Objective
    from .page import page
    from .report import show
    from .traffic import read_trace

    session = Session.begin()
    if validate:
        compared = compare(read_document(Path(costs), "throughput"))
        rows = [{**one._asdict(), "errors": list(one.errors)} for one in compared]
        document = session.document("capacity-check", {"costs": costs}, rows)
        document.warnings.clear()  # nothing was timed
        show(table(compared), document, json)
        return
    found_costs, limits, sizes, known = _costs(costs)
    traffic = Traffic(
        rate,
        burst,
        () if trace is None else tuple(read_trace(trace)),
        prompt_tokens or known.prompt_tokens,
        answer_tokens or known.answer_tokens,
        known.images if images is None else images,
        harmful,
    )
    plan = Plan(found_costs, limits, sizes, traffic, Objective.parse(objective), target, requests, seed)
    outside = None if onnx is None else outside_costs(onnx)
    placements = [placement_named(name, outside, cores) for name in placement or ("same",)]
    with progress(Console(stderr=True, highlight=False)) as told:
        found, refused = run_capacity(plan, [name.strip() for name in guards.split(",")], placements, told)
    report = CapacityReport(plan, found, refused, price)
    more = report.more()
    if isinstance(found_costs, FittedCosts):
        more["fit"] = found_costs.to_dict()
    document = session.document("capacity", report.settings(), report.rows(), seed=seed, more=more)
    document.warnings.clear()  # nothing was timed
    show(report.table(), document, json)
    if out is not None:
        shown = {"capacity": document}
        if costs != ROOFLINE:
            shown["throughput"] = read_document(Path(costs))
        with _matplotlib():
            out.write_text(page(shown), encoding="utf-8")


def _costs(source: str) -> tuple[Costs, Limits, Sizes, Requests]:
    """Costs, the engine's limits, sizes of prompts and of requests, from a file or from paper."""
    from .capacity_check import read_run
    from .document import read_document
    from .guard_programs import Sizes
    from .roofline import h200
    from .roofline_costs import gpu_limits, roofline_costs
    from .roofline_report import setup_of
    from .traffic import Sizes as Requests

    if source == ROOFLINE:
        paper = roofline_costs(setup_of("llava-1.5-7b", "open-llama-3b"), h200())
        return paper, gpu_limits(paper), Sizes(image=576), Requests(64, 1, 128)
    measured = read_run(read_document(Path(source), "throughput"))
    return measured.costs, measured.limits, measured.sizes, measured.requests


@contextmanager
def _matplotlib() -> Iterator[None]:
    from ..engine.errors import MissingExtra

    try:
        yield
    except ImportError as error:
        raise MissingExtra(f"pictures need matplotlib: pip install 'stockade[bench]' ({error})") from None


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="With the JSON of runs, one a file.")],
    out: Annotated[Path | None, typer.Option(help="The page. (default: DIR/report.html)")] = None,
    against: Annotated[Path | None, typer.Option(help="Another folder, measured before: says what changed.")] = None,
    pngs: Annotated[Path | None, typer.Option("--png", help="A folder for the pictures as files.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown, too.")] = False,
    readme: Annotated[
        Path | None,
        typer.Option(help="Make what stands between `bench` markers in it anew, and the bench-*.png that it shows."),
    ] = None,
) -> None:
    """A page with tables and pictures of all runs in a folder; what changed against another; the README's tables."""
    from .compare import compare, comparison_table
    from .page import page, read_folder
    from .pictures import pictures
    from .readme import write_readme
    from .result_tables import tables

    console = Console(stderr=True, highlight=False)
    documents = read_folder(folder)
    comparisons = []
    if against is not None:
        before = read_folder(against)
        comparisons = [compare(before[name], documents[name]) for name in documents if name in before]
        if not comparisons:
            raise BadDocument(f"{against} and {folder} have no file of the same name to compare")
        for comparison in comparisons:
            Console(highlight=False).print(comparison_table(comparison))
    with _matplotlib():
        if readme is not None:
            written = write_readme(readme, documents)
            console.print(f"Written: {readme} and {len(written)} pictures")
        if readme is None or out is not None:
            target = out or folder / "report.html"
            target.write_text(page(documents, comparisons), encoding="utf-8")
            console.print(f"Written: {target}")
        if pngs is not None:
            pngs.mkdir(parents=True, exist_ok=True)
            for name, document in documents.items():
                for picture in pictures(document):
                    (pngs / f"{name}-{picture.name}.png").write_bytes(picture.png())
    if markdown:
        for document in documents.values():
            for table in tables(document):
                print(f"### {table.title}\n\n{table.markdown()}\n")


def peers(
    model: Annotated[str, typer.Option(help="smol, a llama's folder or a named shape (tiny-llama).")] = "smol",
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME, NAME=PYTHON (the interpreter that has its package) or url=http://HOST:PORT; repeatable. "
            "Names: stockade, transformers, llama.cpp, openvino, vllm. (default: stockade, transformers)"
        ),
    ] = None,
    gguf: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="The weights as GGUF. (default: made from the model)"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    threads: Annotated[int | None, typer.Option(min=1, help="Of each peer. (default: one a core)")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a question.")] = 64,
    answer_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 64,
    rounds: RoundsOption = 6,
    within: WithinOption = 2.5,
    minutes: MinutesOption = 10,
    seed: SeedOption = 0,
    quick: QuickOption = False,
    json: JsonOption = None,
    resume: ResumeOption = False,
) -> None:
    """The same weights and prompts through other engines, each in its own environment, in turn."""
    from contextlib import ExitStack

    from ..doctor import cores
    from ..engine.errors import BadInput
    from .beside_peers import PeersConfig, PeersPlan
    from .peer_process import PeerSpec

    if dtype not in ("bf16", "fp32"):
        raise BadInput(f"dtype is bf16 or fp32, not {dtype}")
    specs = tuple(PeerSpec.parse(text) for text in peer or ("stockade", "transformers"))
    until = enough(rounds, within, minutes, quick)
    if quick:
        answer_tokens = min(answer_tokens, 8)
    config = PeersConfig(specs, until, prompt_tokens, answer_tokens, dtype, threads or cores(), gguf, seed)
    with ExitStack() as stack:
        measure_plan("peers", lambda weights: PeersPlan(weights, config, stack), model, None, None, json, resume)
