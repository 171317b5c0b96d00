"""Options that the commands of `stockade bench` share, and what turns them into a measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..engine.errors import BadInput, StockadeError

if TYPE_CHECKING:
    import torch

    from .paired import Enough
    from .units import Plan
    from .workload import Sources

ModelOption = Annotated[str, typer.Option(help="A bundle (smol), a checkpoint folder or a named shape (tiny-llava).")]
DetectorOption = Annotated[str | None, typer.Option(help="A classifier's folder, a named shape, or a head file.")]
DetoxifierOption = Annotated[str | None, typer.Option(help="A language model's folder or a named shape.")]
DtypeOption = Annotated[str | None, typer.Option(help="bf16 or fp32. (default: bf16 if it is fast)")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Measured at least, of each workload.")]
WithinOption = Annotated[
    float, typer.Option(min=0.01, help="Percent: rounds go on until every ratio's 95 % interval is as close as that.")
]
MinutesOption = Annotated[float, typer.Option(min=0.01, help="At most, more or less; also where that is not close.")]
QuickOption = Annotated[bool, typer.Option("--quick", help="Few and short: shows that it works, measures little.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the JSON document here, too.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with what stands in the file of --json.")]
PromptOption = Annotated[int, typer.Option(min=1, help="Tokens of a question.")]
SeedOption = Annotated[int, typer.Option(help="Of the questions and of the order in which variants run.")]

Told = Callable[[str, int, int], None]


def enough(rounds: int, within: float, minutes: float, quick: bool) -> Enough:
    """When rounds may end, from the options."""
    from .paired import Enough

    return Enough(1, 1e9, 1.0) if quick else Enough(rounds, within / 100.0, 60.0 * minutes)


@contextmanager
def progress(console: Console) -> Iterator[Told]:
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as bar:
        tasks: dict[str, Any] = {}

        def told(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=of)
            bar.update(tasks[what], completed=done, total=of)

        yield told


def dtype_named(name: str | None) -> torch.dtype | None:
    import torch

    known = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if name is not None and name not in known:
        raise typer.BadParameter(f"dtype is one of {', '.join(known)}, not {name}")
    return None if name is None else known[name]


def measure_plan(
    kind: str,
    make: Callable[[Sources], Plan],
    model: str,
    detector: str | None,
    detoxifier: str | None,
    file: Path | None,
    resume: bool,
) -> None:
    """Measure a plan that needs checkpoints and show it. Raises and exits as `run_plan` does."""
    from transformers.utils import logging

    from .workload import sources

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with sources(model, detector, detoxifier) as weights:
        run_plan(kind, lambda: make(weights), file, resume)


def run_plan(kind: str, make: Callable[[], Plan], file: Path | None, resume: bool) -> None:
    """Measure a plan and show it; exits with 130 where that was interrupted.

    Raises `BadInput` for --resume without a file, `BadDocument` for a file that is another measurement's, and what
    a piece of the work raises, after all that was measured before was written down.
    """
    from .document import Session, check_file, read_document
    from .report import show, warn
    from .units import resumed, run_units, unbroken

    if resume and file is None:
        raise BadInput("--resume goes on with the document in the file of --json FILE")
    check_file(file)
    console = Console(stderr=True, highlight=False)
    earlier = read_document(file, kind) if resume and file is not None and file.exists() else None
    session = Session.begin(earlier)
    warn(console, session.warnings)
    with progress(console) as told:
        plan = make()
        if plan.limit is not None:
            console.print(f"at most about {plan.limit / 60:.2g} minutes, and what loading and warming up take")
        done = {} if earlier is None else resumed(plan, earlier)
        failed: StockadeError | None = None
        try:
            complete = run_units(plan, done, told)
        except StockadeError as error:
            if not done:
                raise
            complete, failed = False, error
    with unbroken():
        rows, more = plan.rows(done), plan.more(done)
        document = session.document(
            kind, plan.settings, rows, seed=plan.seed, complete=complete, units=done, more=more
        )
        show(plan.table(done), document, file)
    if failed is not None:
        raise failed
    if not complete:
        console.print("interrupted; the same command with --json FILE --resume goes on", style="bold yellow")
        raise typer.Exit(130)
