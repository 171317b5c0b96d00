"""Everything that is to be known of the CUDA path, in one command, in less than ten minutes on one GPU.

`python -m stockade.bench.gpu --out DIR` measures the kernels and whole models of random weights, then tests both on
the device in the time that is left, and writes a document, a table and pictures: the first two again after every
part, and what a part found before it failed is in them. `--tiny` does the same in seconds without a GPU, to show that
it works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from time import monotonic
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from ..doctor import cores
from .document import Document, Session
from .gpu_kernels import decode_attention, fusions, pooled_head, prefill_attention
from .gpu_models import beside_detection, beside_transformers, decode_steps, eight_bit_steps
from .gpu_parts import TINY, Figure, Measure, Sizes

ROOT = Path(__file__).parents[1]
WHOLE = 570.0  # seconds of everything
LEAST = 10.0  # of a part
PART_FILE = "part.json"


class Part(NamedTuple):
    """measure: gives the figures; limit: seconds after which it has failed."""

    measure: Measure
    limit: float


class Outcome(NamedTuple):
    """figures: of a part; failed: why there are none, or no more."""

    figures: list[Figure]
    failed: str | None = None


PARTS = {
    "fusions": Part(fusions, 60.0),
    "decode attention": Part(decode_attention, 60.0),
    "prefill attention": Part(prefill_attention, 60.0),
    "pooled head": Part(pooled_head, 40.0),
    "decode steps": Part(decode_steps, 150.0),  # the first to compile what models need
    "8 bits": Part(eight_bit_steps, 120.0),
    "beside transformers": Part(beside_transformers, 120.0),
    "detection": Part(beside_detection, 120.0),
}
TESTS = "tests"  # the last part


def run_tests(sizes: Sizes, limit: float) -> Outcome:
    """How many tests pass, and fail, in processes of their own, in at most `limit` seconds."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *sizes.tests]
    # not the options of the tests' own file, whose plugins may be missing here
    command += ["--override-ini", "addopts=--import-mode=importlib", "--continue-on-collection-errors"]
    if find_spec("xdist") is not None and sizes is not TINY:  # most of the time kernels are compiled
        command += ["-n", str(min(8, max(1, cores() // 2)))]
    with TemporaryFile("w+", encoding="utf-8") as told:
        try:
            done = subprocess.run(command, cwd=ROOT, stdout=told, stderr=told, timeout=limit, env=environment())
            code: int | None = done.returncode
        except subprocess.TimeoutExpired:
            code = None
        told.seek(0)
        text = told.read()
    if code is None:
        counts = Counter(re.findall(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", text))
        found = {what.lower(): count for what, count in counts.items()}
    else:
        found = {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|skipped|error)", text)}
    figures = [Figure(TESTS, what, count, "") for what, count in found.items()]
    if code is None:
        return Outcome(figures, f"not done after {limit:.0f} s")
    if code or not found.get("passed"):
        return Outcome(figures, f"pytest ended with {code}: {' / '.join(text.splitlines()[-12:])}")
    return Outcome(figures)


def environment() -> dict[str, str]:
    """Of a process that runs a part: kernels compiled on a GPU, and interpreted without one; it finds this package
    where it is started in another folder, too."""
    known = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT.parent)] if ROOT.name == "stockade" else []
    paths += [os.path.abspath(path) for path in known.get("PYTHONPATH", "").split(os.pathsep) if path]
    known["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return known if torch.cuda.is_available() else {**known, "TRITON_INTERPRET": "1"}


def measure_here(name: str, sizes: Sizes, file: Path | None = None) -> Outcome:
    """A part in this process; whatever is wrong with it is said, and goes no further. file: told of every figure as
    soon as there is one."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    outcome = Outcome([])
    try:
        with torch.inference_mode():
            for figure in PARTS[name].measure(sizes, device):
                # nothing is aimed at in tiny sizes
                outcome.figures.append(replace(figure, target=None) if sizes is TINY else figure)
                _note(outcome._replace(failed="its process ended early"), file)
    except Exception as error:
        traceback.print_exc()
        outcome = outcome._replace(failed=f"{type(error).__name__}: {error}")
    _note(outcome, file)
    return outcome


def _note(outcome: Outcome, file: Path | None) -> None:
    if file is not None:
        known = {"figures": [figure.to_dict() for figure in outcome.figures], "failed": outcome.failed}
        part = file.with_suffix(".part")
        part.write_text(json.dumps(known), encoding="utf-8")
        os.replace(part, file)


def measure_apart(name: str, sizes: Sizes, limit: float) -> Outcome:
    """A part in a process of its own: if it dies, or breaks the device for its process, no other one fails."""
    if limit < LEAST:
        return Outcome([], "no time was left")
    with TemporaryDirectory(prefix="stockade-gpu-") as folder:
        file = Path(folder) / PART_FILE
        command = [sys.executable, "-m", "stockade.bench.gpu", "--here", "--part", name, "--out", folder]
        failed = None
        try:
            done = subprocess.run(
                command + (["--tiny"] if sizes is TINY else []), timeout=limit, env=environment(), stdout=sys.stderr
            )
        except subprocess.TimeoutExpired:
            failed = f"not done after {limit:.0f} s"
        if not file.is_file():
            return Outcome([], failed or f"its process ended with {done.returncode}")
        known = json.loads(file.read_text(encoding="utf-8"))
    return Outcome([Figure.of_dict(one) for one in known["figures"]], failed or known["failed"])


def measure(names: Sequence[str], sizes: Sizes, here: bool) -> Iterator[tuple[str, Outcome]]:
    """Each part on its own, in turn, until the time for all is over."""
    began = monotonic()
    for name in names:
        left = WHOLE - (monotonic() - began)
        print(f"{name} …", file=sys.stderr, flush=True)
        if name == TESTS:
            yield name, run_tests(sizes, left) if left >= LEAST else Outcome([], "no time was left")
        elif here:
            yield name, measure_here(name, sizes)
        else:
            yield name, measure_apart(name, sizes, min(PARTS[name].limit, left))


def document_of(session: Session, outcomes: dict[str, Outcome], sizes: Sizes, names: Sequence[str] = ()) -> Document:
    """names: parts that are still to come."""
    failed = {name: outcome.failed for name, outcome in outcomes.items() if outcome.failed}
    rows = [figure.to_dict() for outcome in outcomes.values() for figure in outcome.figures]
    more = {"failed": failed, "triton": _version("triton"), "cuda": torch.version.cuda}
    return session.document("gpu", asdict(sizes), rows, complete=not failed and not names, more=more)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
    """How near the aims are, and how long the steps took; pictures of what there are figures of. None without
    matplotlib, which an extra brings."""
    if find_spec("matplotlib") is None:
        print("no pictures: matplotlib is not installed", file=sys.stderr)
        return []
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
    parser.add_argument("--part", action="append", choices=[*PARTS, TESTS], help="only this part; may be repeated")
    parser.add_argument("--here", action="store_true", help="all parts in this process")
    asked = parser.parse_args(arguments)
    if not asked.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU; --tiny shows that everything runs, without one")
    sizes = TINY if asked.tiny else Sizes()
    names = asked.part or [*PARTS, TESTS]
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.here and len(names) == 1 and names[0] in PARTS:
        return 1 if measure_here(names[0], sizes, asked.out / PART_FILE).failed else 0
    session = Session.begin()
    outcomes: dict[str, Outcome] = {}
    for name, outcome in measure(names, sizes, asked.here):
        outcomes[name] = outcome
        document = document_of(session, outcomes, sizes, names[len(outcomes) :])
        document.write(asked.out / "gpu.json")
        with (asked.out / "gpu.txt").open("w", encoding="utf-8") as file:
            Console(file=file, width=140, highlight=False).print(table_of(document))
    Console(highlight=False, width=140).print(table_of(document))
    draw(document, asked.out)
    return 0 if document.complete else 1


if __name__ == "__main__":
    sys.exit(main())
