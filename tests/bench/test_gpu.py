"""The measurement on a GPU, in tiny sizes on the CPU: every part runs, and one that fails is the only one to fail."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stockade.bench import gpu
from stockade.bench.document import Document, Session, read_document
from stockade.bench.gpu import (
    PART_FILE,
    PARTS,
    TESTS,
    Outcome,
    Part,
    document_of,
    draw,
    main,
    measure_apart,
    table_of,
)
from stockade.bench.gpu_parts import TINY, Figure, Sizes
from stockade.bench.gpu_timing import seconds

CPU = torch.device("cpu")


def only(*names: str) -> list[str]:
    return [word for name in names for word in ("--part", name)]


def test_every_part_runs_in_tiny_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--tiny", "--here", "--out", str(tmp_path / "new"), *only(*PARTS)]) == 0
    document = read_document(tmp_path / "new" / "gpu.json", "gpu")
    assert {row["part"] for row in document.rows} == set(PARTS)
    assert all(row["value"] == row["value"] and row["target"] is None for row in document.rows)
    assert document.complete and document.more["failed"] == {} and document.settings["model"] == "tiny-llava"
    assert "decode steps" in (tmp_path / "new" / "gpu.txt").read_text(encoding="utf-8")
    assert (tmp_path / "new" / "steps.png").stat().st_size > 1000


def test_a_part_that_fails_is_reported_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
        yield Figure("broken", "before", 1.0, "us")
        raise RuntimeError("no such instruction")

    written = []
    write = Document.write

    def noted(document: Document, file: Path) -> None:
        written.append((len(document.rows), document.complete))
        write(document, file)

    monkeypatch.setattr(Document, "write", noted)
    monkeypatch.setattr(gpu, "PARTS", {"broken": Part(broken, 9.0), "pooled head": PARTS["pooled head"]})
    assert main(["--tiny", "--here", "--out", str(tmp_path), *only("pooled head", "broken")]) == 1
    document = read_document(tmp_path / "gpu.json", "gpu")
    assert document.more["failed"] == {"broken": "RuntimeError: no such instruction"} and not document.complete
    # what it found before is told, and a document written after every part, in case the next one is the end
    assert [row["what"] for row in document.rows][2:] == ["before"] and written == [(2, False), (3, False)]


def test_a_part_notes_every_figure_for_whoever_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
        yield Figure("slow", "first", 1.0, "us")
        seen.append(json.loads((tmp_path / PART_FILE).read_text(encoding="utf-8")))
        yield Figure("slow", "second", 2.0, "us")

    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(gpu, "PARTS", {"slow": Part(slow, 9.0)})
    assert main(["--tiny", "--here", "--part", "slow", "--out", str(tmp_path)]) == 0
    assert [figure["what"] for figure in seen[0]["figures"]] == ["first"] and seen[0]["failed"]
    known = json.loads((tmp_path / PART_FILE).read_text(encoding="utf-8"))
    assert len(known["figures"]) == 2 and known["failed"] is None


@pytest.mark.parametrize("kind", ["passed", "failed", "slow"])
def test_tests_are_the_last_part_and_say_how_far_they_came(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {
        "passed": ["tests/a.py::one PASSED", "[gw0] PASSED tests/a.py::two", "== 2 passed in 3.0s =="],
        "failed": ["tests/a.py::one FAILED", "FAILED tests/a.py::one", "== 1 failed, 1 passed in 3.0s =="],
        "slow": ["tests/a.py::one PASSED", "tests/a.py::two PASSED", "tests/a.py::three "],
    }[kind]

    def process(command: list[str], timeout: float, stdout: Any, **options: Any) -> Any:
        assert command[2] == "pytest" and Path(options["cwd"]).joinpath("tests/pytest.ini").is_file()
        stdout.write("\n".join(lines))
        if kind == "slow":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, int(kind == "failed"))

    monkeypatch.setattr(subprocess, "run", process)
    monkeypatch.setattr(gpu, "PARTS", {})
    outcome = dict(gpu.measure([TESTS], TINY, here=False))[TESTS]
    found = {figure.what: figure.value for figure in outcome.figures}
    assert found == ({"passed": 1, "failed": 1} if kind == "failed" else {"passed": 2})
    assert (outcome.failed is None) == (kind == "passed")
    assert kind != "slow" or str(outcome.failed).startswith("not done after")


def test_pictures_need_matplotlib_and_nothing_else_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    document = document_of(
        Session.begin(), {"all": Outcome([Figure("decode steps", "batch 1", 3.5, "ms", 3.8)])}, TINY
    )
    assert draw(document, tmp_path) == []


@pytest.mark.parametrize("kind", ["figures", "died", "slow"])
def test_a_part_in_a_process_of_its_own(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = Figure("pooled head", "4 x 8", 3.0, "us", 10.0, samples=(1.0, 2.0))

    def process(command: list[str], timeout: float, **options: object) -> subprocess.CompletedProcess[str]:
        assert command[-1] == "--tiny" and timeout == 60.0
        if kind == "slow":
            raise subprocess.TimeoutExpired(command, timeout)
        if kind == "figures":
            known = {"figures": [figure.to_dict()], "failed": None}
            Path(command[command.index("--out") + 1], "part.json").write_text(json.dumps(known), encoding="utf-8")
        return subprocess.CompletedProcess(command, 0 if kind == "figures" else -11)

    monkeypatch.setattr(subprocess, "run", process)
    outcome = measure_apart("pooled head", TINY, 60.0)
    if kind == "figures":
        assert outcome == Outcome([figure])
    else:
        assert outcome == Outcome([], "its process ended with -11" if kind == "died" else "not done after 60 s")
    assert measure_apart("pooled head", TINY, 3.0).failed == "no time was left"


def test_aims_are_met_or_not_in_table_and_picture(tmp_path: Path) -> None:
    figures = [
        Figure("decode steps", "batch 1", 3.5, "ms", 3.8),
        Figure("fusions", "gate", 60.0, "%", 75.0, at_most=False),
        Figure("detection", "slower by", -1.0, "%", 8.0),
        Figure("fusions", "copy", 4300.0, "GB/s"),
    ]
    assert [figure.met for figure in figures] == [True, False, True, None]
    outcomes = {"all": Outcome(figures), "tests": Outcome([], "2 failed")}
    document = document_of(Session.begin(), outcomes, replace(Sizes(), rows=7))
    assert not document.complete and document.settings["rows"] == 7
    assert table_of(document).row_count == 5
    assert [file.name for file in draw(document, tmp_path)] == ["aims.png"]


def test_without_a_gpu_only_tiny_sizes_are_measured(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_seconds_are_of_one_call() -> None:
    calls: list[int] = []
    spread = seconds([lambda: calls.append(0), lambda: calls.append(1)], CPU, 5)
    assert spread.n == 5 and spread.median < 1.0
    assert calls[1:] == [0, 1] * 5  # after the first, which warms up
