"""Everything that is to be known of the CUDA path, in one command, in less than ten minutes on one GPU.

`python -m stockade.bench.gpu --out DIR` tests the kernels on the device, measures them and whole models of random
weights, and writes a document, a table and pictures. `--tiny` does the same in seconds without a GPU, to show that it
works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from .document import Document, Session
from .gpu_kernels import decode_attention, fusions, pooled_head, prefill_attention
from .gpu_models import beside_detection, beside_transformers, decode_steps
from .gpu_parts import TINY, Figure, Measure, Sizes
from .report import WrongPath

ROOT = Path(__file__).parents[1]
WHOLE = 570.0  # seconds of everything


class Part(NamedTuple):
    """measure: gives the figures; limit: seconds after which it has failed."""

    measure: Measure
    limit: float


class Outcome(NamedTuple):
    """figures: of a part; failed: why there are none."""

    figures: list[Figure]
    failed: str | None = None


def kernel_tests(sizes: Sizes, device: torch.device) -> list[Figure]:
    """How many tests pass, and fail, in a process of their own. Raises `WrongPath` where one fails or none ran."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *sizes.tests]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=sizes.tests_seconds, env=environment()
        )
    except subprocess.TimeoutExpired:
        raise WrongPath(f"the tests were not done after {sizes.tests_seconds} s") from None
    found = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    if done.returncode or not found.get("passed"):
        raise WrongPath(f"{found or 'no tests ran'}: {' / '.join((done.stdout + done.stderr).splitlines()[-12:])}")
    return [Figure("tests", what, count, "") for what, count in found.items()]


PARTS = {
    "tests": Part(kernel_tests, 230.0),
    "fusions": Part(fusions, 60.0),
    "decode attention": Part(decode_attention, 60.0),
    "prefill attention": Part(prefill_attention, 60.0),
    "pooled head": Part(pooled_head, 40.0),
    "decode steps": Part(decode_steps, 120.0),
    "beside transformers": Part(beside_transformers, 120.0),
    "detection": Part(beside_detection, 120.0),
}


def environment() -> dict[str, str]:
    """Of a process that runs a part: kernels compiled on a GPU, and interpreted without one."""
    known = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return known if torch.cuda.is_available() else {**known, "TRITON_INTERPRET": "1"}


def measure_here(name: str, sizes: Sizes) -> Outcome:
    """A part in this process; whatever is wrong with it is said, and goes no further."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        with torch.inference_mode():
            figures = PARTS[name].measure(sizes, device)
    except Exception as error:
        traceback.print_exc()
        return Outcome([], f"{type(error).__name__}: {error}")
    # nothing is aimed at in tiny sizes
    return Outcome([replace(figure, target=None) for figure in figures] if sizes is TINY else figures)


def measure_apart(name: str, sizes: Sizes, limit: float) -> Outcome:
    """A part in a process of its own: if it dies, or breaks the device for its process, no other one fails."""
    if limit < 10.0:
        return Outcome([], "no time was left")
    with TemporaryDirectory(prefix="stockade-gpu-") as folder:
        file = Path(folder) / "part.json"
        command = [sys.executable, "-m", "stockade.bench.gpu", "--here", "--part", name, "--out", folder]
        try:
            done = subprocess.run(
                command + (["--tiny"] if sizes is TINY else []), timeout=limit, env=environment(), stdout=sys.stderr
            )
        except subprocess.TimeoutExpired:
            return Outcome([], f"not done after {limit:.0f} s")
        if not file.is_file():
            return Outcome([], f"its process ended with {done.returncode}")
        known = json.loads(file.read_text(encoding="utf-8"))
    return Outcome([Figure.of_dict(one) for one in known["figures"]], known["failed"])


def measure(names: Sequence[str], sizes: Sizes, here: bool) -> dict[str, Outcome]:
    """Each part on its own, in turn, until the time for all is over."""
    began = monotonic()
    outcomes = {}
    for name in names:
        left = WHOLE - (monotonic() - began)
        print(f"{name} …", file=sys.stderr, flush=True)
        if here:
            outcomes[name] = measure_here(name, sizes)
        else:
            outcomes[name] = measure_apart(name, sizes, min(PARTS[name].limit, left))
    return outcomes


def document_of(session: Session, outcomes: dict[str, Outcome], sizes: Sizes) -> Document:
    failed = {name: outcome.failed for name, outcome in outcomes.items() if outcome.failed}
    rows = [figure.to_dict() for outcome in outcomes.values() for figure in outcome.figures]
    more = {"failed": failed, "triton": version("triton"), "cuda": torch.version.cuda}
    return session.document("gpu", asdict(sizes), rows, complete=not failed, more=more)


def table_of(document: Document) -> Table:
    table = Table(title=f"{document.machine['accelerator'] or document.machine['processor']}, {document.commit}")
    for heading in ("part", "what"):
        table.add_column(heading)
    for heading in ("value", "unit", "target", "met"):
        table.add_column(heading, justify="right")
    last = None
    for row in document.rows:
        aim = "" if row["target"] is None else f"{'≤' if row['at_most'] else '≥'} {row['target']:g}"
        met = {None: "", True: "yes", False: "no"}[row["met"]]
        part = row["part"] if row["part"] != last else ""
        table.add_row(part, row["what"], f"{row['value']:,.4g}", row["unit"], aim, met)
        last = row["part"]
    for name, why in document.more["failed"].items():
        table.add_row(name, f"failed: {why}", "", "", "", "no")
    return table


def draw(document: Document, folder: Path) -> list[Path]:
    """How near the aims are, and how long the steps took; pictures of what there are figures of."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    files = []
    aimed = [row for row in document.rows if row["target"]]
    if aimed:
        figure, axes = plt.subplots(figsize=(8, 0.4 * len(aimed) + 1.2), layout="constrained")
        parts = [row["target"] / row["value"] if row["at_most"] else row["value"] / row["target"] for row in aimed]
        parts = [min(max(part, 0.0), 4.0) for part in parts]  # a slowdown of nothing is no bar without end
        colors = ["#4c8c4a" if row["met"] else "#b5533c" for row in aimed]
        axes.barh([f"{row['part']}: {row['what']}" for row in aimed][::-1], parts[::-1], color=colors[::-1])
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlabel("of what is aimed at; 1 or more is met")
        files.append(_saved(figure, folder / "aims.png"))
    sampled = [row for row in document.rows if row["samples"]]
    if sampled:
        figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
        for row in sampled:
            steps = sorted(row["samples"])
            share = [100 * (index + 1) / len(steps) for index in range(len(steps))]
            axes.step(steps, share, where="post", label=f"{row['part']}: {row['what']}")
        axes.set_xscale("log")
        axes.set_xlabel("ms a decode step")
        axes.set_ylabel("% of steps take at most this")
        axes.legend(fontsize="small")
        files.append(_saved(figure, folder / "steps.png"))
    return files


def _saved(figure: Any, file: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(file, dpi=120)
    plt.close(figure)
    return file


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where a part failed. A missed aim is no failure."""
    parser = argparse.ArgumentParser(prog="python -m stockade.bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where document, table and pictures go")
    parser.add_argument("--tiny", action="store_true", help="seconds of work, without a GPU too; it means nothing")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only this part; may be repeated")
    parser.add_argument("--here", action="store_true", help="all parts in this process")
    asked = parser.parse_args(arguments)
    if not asked.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU; --tiny shows that everything runs, without one")
    sizes = TINY if asked.tiny else Sizes()
    names = asked.part or list(PARTS)
    session = Session.begin()
    outcomes = measure(names, sizes, asked.here)
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.here and len(names) == 1:
        outcome = outcomes[names[0]]
        known = {"figures": [figure.to_dict() for figure in outcome.figures], "failed": outcome.failed}
        (asked.out / "part.json").write_text(json.dumps(known), encoding="utf-8")
    document = document_of(session, outcomes, sizes)
    document.write(asked.out / "gpu.json")
    with (asked.out / "gpu.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=140, highlight=False).print(table_of(document))
    Console(highlight=False, width=140).print(table_of(document))
    draw(document, asked.out)
    return 0 if document.complete else 1


if __name__ == "__main__":
    sys.exit(main())
