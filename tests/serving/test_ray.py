"""`stockade serve --ray` on this machine: two engines and an exported detector apart from them, killed and replaced
under load. Skipped without the extra `ray`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from typer.testing import CliRunner

pytest.importorskip("ray", reason="the extra ray is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

from pydantic import ValidationError

from stockade.cli import app
from stockade.engine.errors import BadInput, InvalidGuard
from stockade.engine.serving import ray_app
from stockade.engine.serving.ray_app import AppArgs, Scale
from stockade.export.exporter import export_detector
from tests.serving.live import chat

pytestmark = pytest.mark.slow
STARTING = 400.0  # seconds; its processes import torch, all at once
CHAT = "/v1/chat/completions"


@dataclass
class Cluster:
    url: str
    process: subprocess.Popen[str]
    audit: Path
    said: list[str]
    killed: int = 0  # engines

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=90)

    def samples(self, name: str) -> dict[str, float]:
        """A metric's values, by what stands in its braces."""
        with self.client() as client:
            lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name + "{")]
        return {line[len(name) + 1 : line.rindex("}")]: float(line.rsplit(" ", 1)[1]) for line in lines}

    def answers(self) -> Counter[str]:
        """Requests that each replica has answered."""
        found: Counter[str] = Counter()
        for labels, value in self.samples("stockade_requests_total").items():
            found[labels.split('replica="')[1].rstrip('"')] += int(value)
        return found

    def wait(self, what: Callable[[], Any], seconds: float = STARTING) -> Any:
        ends = time.monotonic() + seconds
        while True:
            with suppress(httpx.TransportError):
                if value := what():
                    return value
            assert time.monotonic() < ends and self.process.poll() is None, "".join(self.said)
            time.sleep(0.2)

    def workers(self, deployment: str) -> list[int]:
        """Processes of a deployment's replicas that this server started."""
        return [
            number
            for number in _descendants(self.process.pid)
            if f"ServeReplica:stockade:{deployment}" in _command(number)
        ]


def _command(number: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{number}/cmdline").read_text(encoding="utf-8", errors="replace")
    return ""


def _descendants(number: int) -> list[int]:
    with suppress(OSError):
        children = Path(f"/proc/{number}/task/{number}/children").read_text(encoding="ascii").split()
        threads = [path.name for path in Path(f"/proc/{number}/task").iterdir()]
        for thread in threads:
            children += Path(f"/proc/{number}/task/{thread}/children").read_text(encoding="ascii").split()
        found = sorted({int(child) for child in children})
        return found + [inner for child in found for inner in _descendants(child)]
    return []


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("ray")
    export_detector("tiny-llama", folder / "detector", with_past=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--ray", "--replicas", "2", "--detector-replicas", "1", "--port", str(port), "--host", "127.0.0.1",
        "--model", "tiny-llama", "--detoxifier", "tiny-llama", "--detector", f"onnx:{folder / 'detector'}",
        "--device", "cpu", "--dtype", "fp32", "--threshold", "0", "--allow-release", "window",
        "--audit", str(folder / "audit.jsonl"),
    ]  # fmt: skip
    command = [sys.executable, "-m", "stockade", "serve", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        found = Cluster(f"http://127.0.0.1:{port}", process, folder / "audit.jsonl", [])
        assert process.stderr is not None
        reading = threading.Thread(target=lambda: found.said.extend(process.stderr), daemon=True)  # type: ignore[arg-type]
        reading.start()
        try:
            with found.client() as client:
                found.wait(lambda: client.get("/ready").status_code == 200)
            found.wait(lambda: len(found.answers()) >= 0 and "2 replicas" in "".join(found.said))
            yield found
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, "".join(found.said)
        finally:
            process.kill()


@dataclass
class Sent:
    """One request's end. text: what was shown. error: its code, where there is no reply."""

    body: dict[str, Any]
    status: int
    text: str
    error: str | None
    guard: dict[str, Any] | None


def send(client: httpx.Client, body: dict[str, Any]) -> Sent:
    if not body["stream"]:
        said = client.post(CHAT, json=body).json()
        if "error" in said:
            return Sent(body, 0, "", said["error"]["code"], None)
        return Sent(body, 200, said["choices"][0]["message"]["content"], None, said["guard"])
    with client.stream("POST", CHAT, json=body) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    text = "".join(c["delta"]["content"] or "" for event in events for c in event.get("choices", ()))
    error = next((event["error"]["code"] for event in events if "error" in event), None)
    guard = next((event["guard"] for event in events if event.get("guard")), None)
    assert (lines[-1] == "[DONE]") == (error is None), lines[-2:]
    return Sent(body, response.status_code, text, error, guard)


@contextmanager
def load(cluster: Cluster, at_once: int = 6) -> Iterator[list[Sent]]:
    """Clients that ask one thing after another until the block ends, whole and streamed."""
    ended, sent, failed = threading.Event(), [], []

    def ask(number: int) -> None:
        turn = 0
        try:
            with cluster.client() as client:
                while not ended.is_set():
                    turn += 1
                    release = "window" if turn % 3 == 0 else "verdict"
                    body = chat(f"question {number} {turn % 5}", model="tiny-llama", max_tokens=48)
                    sent.append(send(client, {**body, "stream": turn % 2 == 0, "guard": {"release": release}}))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(at_once)]
    for thread in threads:
        thread.start()
    try:
        yield sent
    finally:
        ended.set()
        for thread in threads:
            thread.join(120)
    assert not failed, failed


def check(sent: list[Sent], closed: bool = False) -> None:
    """Every request has its end; every text is the one that its question always gets, and was screened.

    closed: where a detector was away, a guard may have failed closed.
    """
    texts: dict[str, str] = {}
    for one in sent:
        question = one.body["messages"][0]["content"]
        if one.error is None:
            assert one.guard is not None and one.guard["unscreened_characters"] == 0, one
            if closed and one.guard["outcome"] == "refused":
                assert one.guard["reason"] in ("timeout", "failed"), one
                continue
            assert one.guard["outcome"] == "clean" and one.guard["verdicts"], one
            assert texts.setdefault(question, one.text) == one.text
    for one in sent:
        if one.error is not None:  # only where some of it had left
            assert one.error == "replica_lost" and one.text, one
            assert texts.get(one.body["messages"][0]["content"], one.text).startswith(one.text)


def test_configurations_that_make_no_server_are_refused_before_anything_is_started(tmp_path: Path) -> None:
    with pytest.raises(InvalidGuard, match="unknown guard"):
        ray_app.app(AppArgs(guard="nobody"))
    with pytest.raises(BadInput, match="onnx:FOLDER"):
        ray_app.app(AppArgs(detector_replicas=1))
    with pytest.raises(ValidationError):
        AppArgs.model_validate({"replica": 3})
    for wrong in ({"replicas": 0}, {"replicas": 3, "max_replicas": 2}, {"cpus": 0}, {"queue": 0}):
        with pytest.raises(BadInput):
            ray_app.app(AppArgs(**wrong))
    empty = tmp_path / "keys"
    empty.write_text("")
    with pytest.raises(BadInput, match="no keys"):
        ray_app.app(AppArgs(keys=empty))
    assert Scale.sharing(2, 2, None, 0) == Scale(2, cpus=1, detector_cpus=1)
    assert Scale.sharing(2, 2, 3, 1).cpus == 0.4
    with pytest.raises(BadInput, match="too many"):
        Scale.sharing(2, 500, None, 0)


def test_equal_beginnings_go_to_one_replica_and_others_to_all(cluster: Cluster) -> None:
    with cluster.client() as client:
        before = cluster.answers()
        for turn in range(5):
            assert send(client, chat("the same", model="tiny-llama", stream=turn % 2 == 1)).error is None
        same = cluster.answers() - before
        assert list(same.values()) == [5]
        for number in range(16):
            send(client, chat(f"another {number}", model="tiny-llama", stream=False, max_tokens=2))
        assert len(cluster.answers() - before - same) == 2


@pytest.mark.parametrize("deployment", ["detector", "engine"])
def test_a_replica_that_is_killed_under_load_loses_nothing(deployment: str, cluster: Cluster) -> None:
    before = len(cluster.workers(deployment))
    for _ in range(4):  # until one dies while it answers
        with load(cluster) as sent:
            cluster.wait(lambda sent=sent: len(sent) > 12)
            os.kill(cluster.workers(deployment)[0], signal.SIGKILL)
            cluster.killed += deployment == "engine"
            at = len(sent)
            cluster.wait(lambda sent=sent, at=at: len(sent) > at + 24)
        check(sent, closed=deployment == "detector")
        cluster.wait(lambda: len(cluster.workers(deployment)) == before)
        if deployment == "detector" or cluster.samples("stockade_replica_losses_total"):
            return
    raise AssertionError("no replica died while it answered")


def test_a_rolling_restart_loses_nothing(cluster: Cluster) -> None:
    cluster.wait(lambda: len(cluster.samples("stockade_ready")) == 2)
    before = set(cluster.samples("stockade_ready"))
    with load(cluster, 3) as sent:
        cluster.process.send_signal(signal.SIGHUP)
        cluster.wait(lambda: "replaced" in "".join(cluster.said))
        cluster.wait(lambda: not before & set(cluster.samples("stockade_ready")))
    check(sent)
    assert sent and all(one.error is None for one in sent)
    logs = sorted(cluster.audit.parent.glob("audit.*.jsonl"))
    done = CliRunner().invoke(app, ["audit", "verify", *map(str, logs), "--key", f"{cluster.audit}.key"])
    assert done.exit_code == 0, done.output
    assert done.output.count("all in place") == len(logs) == 4 + cluster.killed
    assert done.output.count("; closed") == 2
