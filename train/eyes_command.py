"""`stockade train eyes`: train eyes for a language model, or measure those of a model that has them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..engine.errors import BadInput


def eyes(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="A language model's folder or a bundle; what has eyes, to measure.")
    ] = "smol",
    out: Annotated[
        Path | None, typer.Option("--out", help="A new folder; the same command goes on with an interrupted run.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", exists=True, dir_okay=False, help="Texts to draw words of; may be given again."),
    ] = None,
    fonts: Annotated[
        list[Path] | None,
        typer.Option(
            "--fonts", exists=True, file_okay=False, help="Folder of fonts; repeatable. (default: matplotlib's)"
        ),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pictures a step on letters.")] = 32,
    rate: Annotated[float, typer.Option("--rate", help="Learning rate.")] = 2e-3,
    reading: Annotated[
        int, typer.Option("--reading", min=1, help="Steps through the language model, at first.")
    ] = 200,
    letters: Annotated[int, typer.Option("--letters", min=1, help="Steps of the eyes, on letters.")] = 3000,
    lists: Annotated[float, typer.Option("--lists", help="Share of pictures in FigStep's style.")] = 0.25,
    seed: Annotated[int, typer.Option("--seed", help="Of weights and pictures.")] = 0,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda. (default: cuda if there is one)")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--evaluate", help="Measure BASE on new pictures; nothing is trained.")
    ] = False,
    count: Annotated[int, typer.Option("--count", min=0, help="With --evaluate: new pictures of each kind.")] = 50,
    pictures: Annotated[
        Path | None,
        typer.Option(
            "--pictures", exists=True, dir_okay=False, help="With --evaluate: a CSV of image and text, too."
        ),
    ] = None,
) -> None:
    """Teach a language model to read images: a vision tower and projector, as LLaVA has.

    The language model stays as it is. --text files are .jsonl (response or text) or
    plain; a tenth of them is held out, and --evaluate draws its words from that.
    """
    from rich.markdown import Markdown

    from .commands import telling, torch_device
    from .eyes import Course, train_eyes
    from .eyes_texts import read_texts
    from .pictures import default_fonts, usable_fonts

    console = Console(highlight=False)
    texts = read_texts(text or ())
    files = usable_fonts(fonts) if fonts else default_fonts()
    if measure:
        from .eyes import painter_of
        from .eyes_quality import evaluate, read_pictures, to_markdown

        own = read_pictures(pictures) if pictures is not None else ()
        from ..engine.named import EngineNames

        engine = EngineNames(base, device=device).engine()
        painter = painter_of(engine.models["mllm"].codec.tokenizer, texts, files, lists, held_out=True)
        with telling(console) as told:
            scores = evaluate(engine, painter, count, own=own, seed=seed, progress=told)
        console.print(Markdown(to_markdown(scores)))
        return
    if out is None:
        raise BadInput("--out says where the eyes go; with --evaluate none is needed")
    if pictures is not None:
        raise BadInput("--pictures goes with --evaluate")
    course = Course(reading, letters, batch, rate, lists, seed)
    with telling(console) as told:
        card = train_eyes(
            base, out, texts=texts, fonts=files, course=course, device=torch_device(device), progress=told
        )
    console.print(Markdown(card.to_markdown()))
    console.print(f"Written: {out}")
