"""`stockade serve` as an operator starts and ends it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import pytest
from typer.testing import CliRunner

from stockade.cli import app
from stockade.engine.errors import BadInput, InvalidGuard
from tests.serving.live import chat

TINY = ["--model", "tiny-llama", "--detector", "tiny-llama", "--detoxifier", "tiny-llama", "--device", "cpu"]


def test_the_command_serves_until_a_signal_ends_it_and_closes_its_log(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "audit.jsonl"
    options = ["--port", str(port), "--audit", str(log), "--allow", "off", "--max-tokens", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "stockade", "serve", *TINY, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                ends = time.monotonic() + 90
                while time.monotonic() < ends and server.poll() is None:
                    try:
                        if client.get("/ready").status_code == 200:
                            break
                    except httpx.TransportError:
                        time.sleep(0.1)
                said = client.post("/v1/chat/completions", json=chat(model="tiny-llama"))
                assert said.status_code == 200 and said.json()["guard"]["verdicts"]
            server.send_signal(signal.SIGTERM)
            assert server.stderr is not None
            output = server.stderr.read()
            assert server.wait(30) in (0, -signal.SIGTERM)
        finally:
            server.kill()
    assert f"http://127.0.0.1:{port}" in output and "Traceback" not in output
    done = CliRunner().invoke(app, ["audit", "verify", str(log)])
    assert "1 decisions, all in place; closed" in done.stdout


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (["--guard", "nobody"], InvalidGuard, "unknown guard"),
        (["--allow", "nobody"], InvalidGuard, "unknown guard"),
        (["--guard", "off", "--threshold", "0.5"], InvalidGuard, "no threshold"),
        (["--release", "window", "--allow-release", "verdict"], InvalidGuard, "tighter"),
        (["--release", "never"], BadInput, "release must be"),
        (["--replicas", "2"], BadInput, "add --ray"),
        (["--detector-replicas", "1"], BadInput, "add --ray"),
    ],
)
def test_settings_that_make_no_server_are_refused_before_anything_is_loaded(
    options: list[str], error: type[Exception], says: str
) -> None:
    done = CliRunner().invoke(app, ["serve", "--model", "no-such-folder", *options])
    assert isinstance(done.exception, error) and says in str(done.exception)


def test_a_wrong_key_file_or_audit_key_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("")
    for options in (["--keys", str(empty)], ["--audit", str(tmp_path / "log"), "--audit-key", str(empty)]):
        done = CliRunner().invoke(app, ["serve", *TINY, *options])
        assert isinstance(done.exception, BadInput) and str(empty) in str(done.exception)
