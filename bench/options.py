"""Options that the commands of `stockade bench` share, and what turns them into a measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    import torch

ModelOption = Annotated[str, typer.Option(help="A bundle (smol), a checkpoint folder or a named shape (tiny-llava).")]
DetectorOption = Annotated[str | None, typer.Option(help="A classifier's folder, a named shape, or a head file.")]
DetoxifierOption = Annotated[str | None, typer.Option(help="A language model's folder or a named shape.")]
DtypeOption = Annotated[str | None, typer.Option(help="bf16 or fp32. (default: bf16 if it is fast)")]
RepeatsOption = Annotated[int, typer.Option(min=1, help="Measured repetitions.")]
QuickOption = Annotated[bool, typer.Option("--quick", help="Few and short: shows that it works, measures little.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the JSON document here, too.")]
PromptOption = Annotated[int, typer.Option(min=1, help="Tokens of a question.")]
SeedOption = Annotated[int, typer.Option(help="Of the questions and of the order in which variants run.")]

Told = Callable[[str, int, int], None]


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
