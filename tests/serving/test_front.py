"""The server in front of replicas: what they say arrives, and one that dies is replaced where nothing has left yet.

The replicas are whole servers in this process; `test_ray.py` has them in others.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn

from stockade.engine.errors import ReplicaLost
from stockade.engine.models.loader import ModelSet
from stockade.engine.serving import front
from stockade.engine.serving.affinity import ranked
from stockade.engine.serving.forwarding import Asked, Head, answered
from stockade.engine.serving.front import front_app
from stockade.engine.serving.launch import Serving, make_service
from stockade.engine.serving.limits import Doors, KeyLimits
from stockade.engine.serving.openai_server import Door, create_app
from stockade.engine.serving.service import Service
from tests.engine.screened import engine_of
from tests.serving.live import OPEN, chat

EVENTS = Head(200, ((b"content-type", b"text/event-stream"),))
JSON = ((b"content-type", b"application/json"),)


@dataclass
class Here:
    """Servers in this process. dies: how many pieces of its next reply each has left; asked: who was asked."""

    services: dict[str, Service]
    apps: dict[str, Any]
    dies: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    async def answer(self, asked: Asked, key: str) -> AsyncIterator[Head | bytes]:
        dead = {name for name in self.apps if self.dies.get(name) == -1}
        order = ranked(key, dict.fromkeys(self.apps, 0), 1)
        name = next((name for name in order if name not in dead), order[0])
        self.asked.append(name)
        self.bodies.append(asked.body)
        left = self.dies.get(name)
        reply = answered(self.apps[name], asked)
        try:
            if left is not None and left <= 0:
                self.dies[name] = -1
                raise ReplicaLost("it has died")
            async for message in reply:
                yield message
                left = None if left is None else left - 1
                if left == 0:
                    self.dies[name] = -1
                    raise ReplicaLost("it has died")
        finally:
            await reply.aclose()  # type: ignore[attr-defined]

    async def metrics(self) -> list[tuple[str, str]]:
        return [(name, service.metrics.text().decode()) for name, service in self.services.items()]


@contextmanager
def fronted(replicas: Any, door: Door | None = None, deadline: float = 60.0) -> Iterator[httpx.Client]:
    """A client of a server in front of these."""
    config = uvicorn.Config(front_app(replicas, door or Door(), deadline), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        ends = time.monotonic() + 20
        while not server.started and time.monotonic() < ends:
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def services(models: ModelSet) -> Iterator[dict[str, Service]]:
    serving = Serving("tiny", OPEN, max_tokens=64)
    made = {name: make_service(engine_of(models, 200), serving) for name in ("one", "two")}
    yield made
    for service in made.values():
        service.engine.close()


@pytest.fixture
def here(services: dict[str, Service]) -> Here:
    return Here(services, {name: create_app(service) for name, service in services.items()})


def shown(lines: list[Any]) -> str:
    return "".join(c["delta"]["content"] or "" for line in lines for c in line.get("choices", ()))


def streamed(client: httpx.Client, body: dict[str, Any]) -> tuple[int, list[Any]]:
    with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    return response.status_code, [json.loads(line) for line in lines if line != "[DONE]"]


def home(here: Here, client: httpx.Client, body: dict[str, Any]) -> tuple[str, str]:
    """(who answers this, what it says)."""
    said = client.post("/v1/chat/completions", json=body)
    assert said.status_code == 200, said.text
    return here.asked[-1], said.json()["choices"][0]["message"]["content"]


def test_what_a_replica_says_arrives(here: Here) -> None:
    with fronted(here) as client:
        assert client.get("/health").json() == {"status": "alive"}
        assert client.get("/ready").json() == {"status": "ready"}
        assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
        assert client.get("/").headers["content-security-policy"].startswith("default-src 'none'")
        assert client.get("/nowhere").json()["error"]["code"] == "http_404"
        assert client.post("/v1/moderations", json={"input": "text"}).json()["results"][0]["flagged"] in (True, False)
        assert client.post("/tokenize", json={"prompt": 1}).json()["error"]["code"] == "invalid_value"
        whole = home(here, client, chat("Hello"))[1]
        status, chunks = streamed(client, chat("Hello", guard={"release": "window"}))
        assert status == 200 and shown(chunks) == whole and chunks[-1]["guard"]["outcome"] == "clean"


def test_the_same_beginning_goes_to_the_same_replica(here: Here) -> None:
    with fronted(here) as client:
        body = chat("Hello", max_tokens=2)
        homes = set()
        for _ in range(3):  # a conversation
            homes.add(home(here, client, body)[0])
            body["messages"] += [{"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]
        assert len(homes) == 1
        assert {home(here, client, chat(str(number), max_tokens=2))[0] for number in range(16)} == {"one", "two"}
        text = client.get("/metrics").text
    for name in ("one", "two"):
        assert (
            f'stockade_requests_total{{endpoint="chat",outcome="clean",policy="harmless",replica="{name}"}}' in text
        )
    assert text.count("# TYPE stockade_requests_total counter") == 1


@pytest.mark.parametrize(("stream", "pieces"), [(False, 0), (False, 1), (True, 0), (True, 1), (True, 2)])
def test_a_death_before_anything_has_left_is_not_seen(here: Here, stream: bool, pieces: int) -> None:
    """pieces: the head, and of a stream the event that says that an answer begins."""
    with fronted(here) as client:
        body = chat("Hello", timeout=30)
        name, text = home(here, client, body)
        here.dies[name] = pieces
        if stream:
            status, chunks = streamed(client, body)
            assert status == 200 and shown(chunks) == text and len({chunk["id"] for chunk in chunks}) == 1
        else:
            assert home(here, client, body)[1] == text
        assert here.asked[-2] == name != here.asked[-1]
        assert 29 < json.loads(here.bodies[-1])["timeout"] < 30
        assert 'stockade_replica_losses_total{then="asked again"} 1.0' in client.get("/metrics").text


def test_a_death_in_the_middle_of_a_text_is_told(here: Here) -> None:
    with fronted(here) as client:
        body = chat("Hello", guard={"release": "window"}, max_tokens=48)
        name, text = home(here, client, body)
        here.dies[name] = 4
        count = len(here.asked)
        status, chunks = streamed(client, body)
        assert status == 200 and chunks[-1]["error"]["code"] == "replica_lost" and len(here.asked) == count + 1
        assert shown(chunks) and text.startswith(shown(chunks))


def test_where_both_die_the_client_is_told(here: Here) -> None:
    with fronted(here) as client:
        here.dies = {"one": 0, "two": 1}
        for stream in (False, True):
            said = client.post("/v1/chat/completions", json=chat("Hello", stream=stream))
            assert (said.status_code, said.json()["error"]["code"]) == (503, "replica_lost")
            assert said.headers["retry-after"] == "1"


@dataclass
class Scripted:
    """Replies as they are written down; an exception is raised."""

    replies: list[list[Any]]

    async def answer(self, asked: Asked, key: str) -> AsyncIterator[Head | bytes]:
        for message in self.replies.pop(0):
            if isinstance(message, Exception):
                raise message
            if isinstance(message, float):
                await asyncio.sleep(message)
                continue
            yield message

    async def metrics(self) -> list[tuple[str, str]]:
        return []


def test_a_stream_kept_alive_is_begun_anew_or_told_why_not() -> None:
    lost, alive = ReplicaLost("it has died"), b": on its way\n\n"
    again = [EVENTS, b'data: {"id": 2}\n\n', b'data: {"text": "x"}\n\n']
    refused = [Head(429, JSON), b'{"error": {"code": "overloaded"}}']
    first = [EVENTS, b'data: {"id": 1}\n\n', alive, lost]
    with fronted(Scripted([first, again, first, refused])) as client:
        body = chat(stream=True)
        said = client.post("/v1/chat/completions", json=body)
        assert said.status_code == 200 and said.text == ': on its way\n\ndata: {"id": 2}\n\ndata: {"text": "x"}\n\n'
        said = client.post("/v1/chat/completions", json=body)
        assert said.status_code == 200 and said.text.endswith('data: {"error": {"code": "overloaded"}}\n\n')


def test_a_replica_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "LATE", 0.1)
    monkeypatch.setattr(front, "FACTS", 0.1)
    with fronted(Scripted([[30.0], [30.0], [EVENTS, b": x\n\n", 30.0]])) as client:
        said = client.post("/v1/chat/completions", json=chat(timeout=0.1))
        assert (said.status_code, said.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert client.get("/ready").status_code == 503
        said = client.post("/v1/chat/completions", json=chat(timeout=0.1, stream=True))
        assert said.status_code == 200 and '"deadline_exceeded"' in said.text


def test_a_client_that_leaves_ends_its_request(here: Here) -> None:
    with fronted(here) as client:
        body = chat("Hello", max_tokens=64, stream=True, guard={"release": "window"})
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
        ends = time.monotonic() + 10
        while any(service.engine.under_way for service in here.services.values()):
            assert time.monotonic() < ends
            time.sleep(0.01)


def test_keys_and_limits_hold_for_all_replicas_together(here: Here) -> None:
    doors = Doors({"ann": "k" * 20}, KeyLimits(per_minute=2))
    with fronted(here, Door(doors, max_body=2000)) as client:
        assert client.get("/v1/models").status_code == 401
        ann = {"authorization": "Bearer " + "k" * 20}
        asked = [client.post("/tokenize", json={"prompt": str(number)}, headers=ann) for number in range(4)]
        assert [one.status_code for one in asked] == [200, 200, 429, 429]
        said = client.post("/tokenize", content=b"x" * 3000, headers=ann)
        assert said.status_code == 413
        text = client.get("/metrics", headers=ann).text
    assert 'stockade_front_refused_requests_total{code="rate_limited",status="429"} 2.0' in text
