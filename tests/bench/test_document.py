"""Every measurement's document says what was measured, where, and how quiet it was; a broken one is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter, sleep

import pytest

from stockade.bench.document import BadDocument, Document, Load, Session, read_document
from stockade.bench.neighbors import Clocks, clocks, others
from stockade.doctor import cores


def measured(session: Session | None = None, **what: object) -> Document:
    session = session or Session.begin()
    return session.document("latency", {"model": "tiny"}, [{"ms": 1.5}], seed=3, **what)


def test_a_document_survives_its_file(tmp_path: Path) -> None:
    document = measured(units={"one": [1.0]}, more={"goals": {"ttft": 1.0}})
    file = tmp_path / "run.json"
    document.write(file)
    assert read_document(file) == document == read_document(file, "latency")
    written = json.loads(file.read_text())
    assert written["kind"] == "latency" and written["goals"] == {"ttft": 1.0} and written["command"]
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    file.write_text("a table\n" + document.to_json() + "\n")  # as a command prints it
    assert read_document(file) == document


@pytest.mark.parametrize("text", ["", "nothing", "[1]", "{}", '{"format": 99}', '{"format": 1, "kind": "latency"}'])
def test_what_is_no_document_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(text)
    with pytest.raises(BadDocument, match=r"run\.json"):
        read_document(file)


def test_a_document_of_another_kind_is_refused(tmp_path: Path) -> None:
    measured().write(tmp_path / "run.json")
    with pytest.raises(BadDocument, match="bench throughput"):
        read_document(tmp_path / "run.json", "throughput")


def test_a_figure_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    document = measured()
    document.rows[0]["ms"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        document.write(tmp_path / "run.json")
    assert not list(tmp_path.glob("*.json"))


def test_quiet_is_known_and_at_most_a_tenth_of_the_cores() -> None:
    bound = 0.1 * cores()
    assert Load(0.0, bound, 0.0).quiet and not Load(0.0, bound, 0.0).warnings
    for load in (Load(2 * bound, 0.0, 0.0), Load(0.0, 2 * bound, 0.0), Load(0.0, 0.0, 2 * bound)):
        assert not load.quiet and len(load.warnings) == 1
    assert not Load(0.0, None, 0.0).quiet and "does not tell" in Load(0.0, None, 0.0).warnings[0]


def test_a_resumed_document_keeps_the_worst_of_both_parts() -> None:
    first = measured()
    first.load_before, first.load_during, first.load_after, first.quiet = 0.5, 0.0, 0.0, False
    first.took_s, first.started, first.warnings = 100.0, "2020-01-01T00:00:00+00:00", ["others"]
    both = measured(Session.begin(first))
    assert not both.quiet and both.took_s >= 100.0 and both.started == first.started and "others" in both.warnings
    assert both.load_before is None or both.load_before >= 0.5


def test_others_are_what_is_neither_idle_nor_own() -> None:
    began, ended = Clocks(10.0, 100.0, 50.0), Clocks(20.0, 118.0, 55.0)
    assert others(began, ended) == pytest.approx(1.3)  # 18 s of work in 10 s, 5 of them own
    assert others(began, ended._replace(own=90.0)) == 0.0
    assert others(None, ended) is None and others(began, began) is None


needs_proc = pytest.mark.skipif(clocks() is None, reason="this system does not tell how busy it is")


@needs_proc
def test_own_work_counts_as_own_and_so_does_that_of_children() -> None:
    burn = "import time; until = time.process_time() + 0.2\nwhile time.process_time() < until: pass"
    began = clocks()
    assert began is not None
    until = perf_counter() + 0.1
    while perf_counter() < until:
        pass
    with subprocess.Popen([sys.executable, "-c", burn + "\ninput()"], stdin=subprocess.PIPE) as child:
        for _ in range(500):
            sleep(0.02)
            running = clocks()
            assert running is not None
            if running.own - began.own >= 0.25:
                break
        assert running.own - began.own >= 0.25
        child.communicate(b"\n")
    ended = clocks()
    assert ended is not None and ended.own >= running.own


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert clocks(tmp_path) is None
    (tmp_path / "stat").write_text("cpu0 nonsense")
    assert clocks(tmp_path) is None
    (tmp_path / "stat").write_text(f"cpu{min(os.sched_getaffinity(0)) + 4096} 1 1 1 1 1 1 1 1")  # not one of ours
    assert clocks(tmp_path) is None
