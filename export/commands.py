"""`stockade export …`: one small function a command. What takes seconds to import is imported where it is used."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..engine.errors import MissingExtra

if TYPE_CHECKING:
    from .source import DetectorSource

app = typer.Typer(
    help="Write a detector for other servers to run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def detector(
    model: Annotated[
        str,
        typer.Argument(
            help="What --detector takes: a classifier's folder, smol, a named shape; ADAPTER,BASE merges an adapter, "
            "HEAD,MODEL is a head file on a model."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder, which is made anew.")],
    precision: Annotated[str, typer.Option("--precision", help="fp32, fp16, bf16, int8 or int4.")] = "fp32",
    with_past: Annotated[bool, typer.Option("--with-past", help="To read texts while they grow.")] = False,
    opset: Annotated[int | None, typer.Option("--opset", help="Of ONNX. (default: the lowest that works)")] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            exists=True,
            file_okay=False,
            help="Folder with the data sets of `stockade train`: int8 and int4 then get thresholds of their own.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Texts of each kind to calibrate on.")] = 150,
) -> None:
    """Export a detector as an ONNX folder: graph, weights, tokenizer, detector.json."""
    from rich.progress import Progress

    _require_onnx()

    from .calibration import validation_texts
    from .exporter import export_detector
    from .graph import OPSETS
    from .precision import PRECISIONS

    chosen = next((known for known in PRECISIONS if known == precision), None)
    if chosen is None:
        raise typer.BadParameter(f"precision is one of {', '.join(PRECISIONS)}, not {precision}")
    console = Console(highlight=False)
    quantized = chosen in ("int8", "int4")
    with Progress(console=console) as progress:
        tasks = {}

        def told(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=of)
            progress.update(tasks[what], completed=done, total=of)

        folder = export_detector(
            _source(model),
            out,
            precision=chosen,
            with_past=with_past,
            opset=OPSETS[0] if opset is None else opset,
            calibration=validation_texts(calibrate, limit) if quantized and calibrate is not None else (),
            progress=told,
        )
    size = sum(entry["bytes"] for entry in folder.files.values())
    console.print(f"Written: {folder.path}, {size / 1e6:,.0f} MB; harmful is a score below {folder.threshold:.4g}")
    if quantized and folder.calibration is None:
        console.print(f"The threshold is that of fp32; --calibrate DATA finds the one for {chosen}.", style="yellow")


@app.command()
def serving(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `stockade export detector` wrote.")],
    out: Annotated[Path, typer.Option("--out", help="The folder, which is made anew.")],
    target: Annotated[str, typer.Option("--target", help="triton or kserve.")] = "triton",
) -> None:
    """Make a model repository for Triton Inference Server of an exported detector: tokens in, and text in."""
    _require_onnx()

    from .serving import TARGETS, export_serving

    chosen = next((known for known in TARGETS if known == target), None)
    if chosen is None:
        raise typer.BadParameter(f"target is one of {', '.join(TARGETS)}, not {target}")
    repository = export_serving(folder, out, chosen)
    Console(highlight=False).print(f"Written: {out}; serve it with tritonserver --model-repository {repository}")


def _require_onnx() -> None:
    """Raises `MissingExtra`."""
    if importlib.util.find_spec("onnx") is None:
        raise MissingExtra("export needs the packages of an extra: pip install 'stockade[onnx]'")


def _source(text: str) -> DetectorSource:
    left, comma, right = text.partition(",")
    return (left, right) if comma and not Path(text).exists() else text
