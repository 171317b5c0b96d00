"""`stockade profile`: its files, its table and its picture, from scripted steps and from an engine."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from stockade import Engine, Guard, SamplingParams
from stockade.cli import app
from stockade.engine.errors import BadInput
from stockade.engine.request import FinishReason, Outcome, PassRecord, Reply, Trace
from stockade.engine.trace import Recorder, StepRecord, StepWork
from stockade.timeline import MAX_ROWS, PARTS, breakdown_table, run_profile, write_profile

SHORT = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


def shown(table: object) -> str:
    out = io.StringIO()
    Console(width=100, file=out).print(table)
    return out.getvalue()


def scripted(replies: int = 1) -> Recorder:
    """Each reply: 20 ms of its own prefill, 60 ms of decoding, 10 ms in which nothing ran."""
    recorder = Recorder()
    for number in range(replies):
        begin = 5.0 + number
        for role, began, ended in (("prefill", 0.0, 0.02), ("decode", 0.03, 0.09)):
            work = StepWork(number, 0, "answer", role, "mllm", 1)
            recorder.record(StepRecord("mllm", begin + began, begin + ended, 0.0, (work,)))
        record = PassRecord("answer", "mllm", finished=0.09, candidate=True)
        reply = Reply(number, "", [], Outcome.CLEAN, FinishReason.STOP, passes=[record], trace=Trace(total=0.09))
        recorder.finish(reply, begin)
    return recorder


def test_the_table_names_what_took_time_and_sums_it_up() -> None:
    rows = [line.split("  ") for line in shown(breakdown_table(scripted(2))).splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    for row in (
        ["prefill", "20.0", "22.2", "20.0"],
        ["decode", "60.0", "66.7", "60.0"],
        ["host: no batch runs", "10.0", "11.1", "10.0"],
        ["whole reply", "90.0", "100.0", "90.0"],
    ):
        assert row in cells
    assert not any(row and row[0] == "vision" for row in cells)


@pytest.mark.parametrize("replies", [1, MAX_ROWS + 3])
def test_the_trace_and_the_picture_are_written(replies: int, tmp_path: Path) -> None:
    write_profile(scripted(replies), tmp_path / "new" / "folder")
    trace = json.loads((tmp_path / "new" / "folder" / "trace.json").read_text())
    assert sum(event["ph"] == "X" and event["cat"] == "step" for event in trace["traceEvents"]) == 3 * replies
    with Image.open(tmp_path / "new" / "folder" / "trace.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 20)) > 10


def test_every_part_of_a_breakdown_has_a_row_and_a_color_of_its_own() -> None:
    assert {name for name, _, _ in PARTS} == set(Recorder().breakdown().to_dict())
    assert len({color for _, _, color in PARTS}) == len(PARTS)


def test_nothing_to_profile_and_nowhere_to_write_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="at least one question"):
        write_profile(Recorder(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be written"):
        write_profile(scripted(), tmp_path / "file")


def test_a_real_engine_is_recorded_only_while_it_is_profiled(engine: Engine, tmp_path: Path) -> None:
    guard = Guard.protector(threshold=0.0)  # whatever it says is harmless
    table = run_profile(engine, ["Hi.", "Ho."], guard, SHORT, tmp_path)
    assert engine.recorder is None
    text = shown(table)
    assert "2 replies" in text and "prefill" in text and "decode" in text and "screening" in text
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "b" and event["cat"] == "request" for event in events) == 2


def test_the_parts_of_real_replies_add_up(engine: Engine) -> None:
    engine.recorder = Recorder()
    replies = engine.chat(["Hi.", "Ho."], guard=Guard.protector(threshold=2.0, max_rounds=1), sampling=SHORT)
    for reply in replies:
        found = engine.recorder.breakdown(reply)
        assert found.total == pytest.approx(reply.trace.total)
        assert found.decode > 0.0 and found.rewrite > 0.0 and found.prefill > 0.0
        assert found.screening_hidden + found.screening_exposed > 0.0


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "questions.txt").write_text("Hi.\nHo.\n")
    tiny = ["--model", "tiny-llava", "--detector", "tiny-llama", "--detoxifier", "tiny-llama", "--device", "cpu"]
    Image.effect_noise((56, 56), 90).convert("RGB").save(tmp_path / "noise.png")
    files = ["--image", str(tmp_path / "noise.png"), "--questions", str(tmp_path / "questions.txt")]
    asked = [*files, "--max-tokens", "3", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["profile", *tiny, "--dtype", "fp32", *asked])
    assert done.exit_code == 0, done.output
    assert "2 replies" in done.output and "vision" in done.output and "trace.json" in done.output
    assert (tmp_path / "out" / "trace.png").exists()
