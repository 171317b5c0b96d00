"""The server in front of replicas: lets clients in, picks who answers, and asks once more where a replica dies.

Each replica is a whole server of its own, guard, audit log and metrics included; no text is made or judged here.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Protocol

from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry, Counter, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import DeadlineExceeded, EngineStopped, ReplicaLost, Unavailable
from .affinity import affinity_key
from .forwarding import PASSED, Asked, Head
from .gate import Bodies, Gate
from .http_errors import failure
from .openai_server import Door, cross_origin

LATE = 15.0  # seconds past a request's deadline until its replica is no longer waited for
FACTS = 10.0  # seconds that a replica has for what needs no model
TIMED = frozenset({"/v1/chat/completions", "/v1/completions"})  # their bodies may name seconds


class Replicas(Protocol):
    """Those who answer, wherever they run."""

    def answer(self, asked: Asked, key: str) -> AsyncIterator[Head | bytes]:
        """One of them answers: its head, then its body as it comes. key: equal ones go to the same, if it can be.
        Raises `ReplicaLost` where it dies, `StockadeError` where it fails."""

    async def metrics(self) -> list[tuple[str, str]]:
        """Name and metrics of each, in Prometheus' text format."""


class FrontMetrics:
    """What happens before a replica is asked, or to it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._refused = Counter(
            "stockade_front_refused_requests",
            "Requests answered with an error in front of the replicas",
            ("status", "code"),
            registry=self.registry,
        )
        self.lost = Counter(
            "stockade_replica_losses",
            "Requests whose replica died: asked again, or told of it",
            ("then",),
            registry=self.registry,
        )

    def refused(self, status: int, code: str) -> None:
        self._refused.labels(str(status), code).inc()

    def text(self, replicas: list[tuple[str, str]]) -> bytes:
        """With those of the replicas, each labeled with its name."""
        families: dict[str, Metric] = {}
        for name, text in replicas:
            for found in text_string_to_metric_families(text):
                family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
                family.samples += [
                    sample._replace(labels={**sample.labels, "replica": name}) for sample in found.samples
                ]
        return generate_latest(self.registry) + generate_latest(_Families(families))


@dataclass(frozen=True)
class _Families:
    families: dict[str, Metric]

    def collect(self) -> list[Metric]:
        return list(self.families.values())


def front_app(replicas: Replicas, door: Door, deadline: float, log: logging.Logger | None = None) -> ASGIApp:
    """The server in front. deadline: seconds of a request at most, as the replicas have it."""
    metrics = FrontMetrics()
    app: ASGIApp = Gate(
        _Front(replicas, metrics, deadline),
        door.doors,
        metrics,
        log or logging.getLogger("stockade.serving"),
        Bodies(door.max_body, door.max_bodies),
        door.body_seconds,
        door.send_seconds,
    )
    return CORSMiddleware(app, **cross_origin(door.origins)) if door.origins else app


@dataclass(frozen=True)
class _Front:
    replicas: Replicas
    metrics: FrontMetrics
    deadline: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        what = (scope["method"], scope["path"])
        if what == ("GET", "/health"):
            await JSONResponse({"status": "alive"})(scope, receive, send)
            return
        if what == ("GET", "/metrics"):
            text = self.metrics.text(await self.replicas.metrics())
            await Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")(scope, receive, send)
            return
        tenant = scope["state"]["tenant"]
        headers = tuple((name, value) for name, value in scope["headers"] if name in PASSED)
        asked = Asked(*what, scope.get("query_string", b""), headers, await _body(receive))
        key = affinity_key("" if tenant is None else tenant.name, asked.body)
        forwarding = asyncio.create_task(self._forward(asked, key, _Outgoing(send)))
        leaving = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({forwarding, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if forwarding.done():
                forwarding.result()
        finally:
            for task in (forwarding, leaving):
                task.cancel()
            await asyncio.gather(forwarding, leaving, return_exceptions=True)

    async def _forward(self, asked: Asked, key: str, out: _Outgoing) -> None:
        """Let a replica answer, and another one where that dies before anything of the answer has left."""
        began = monotonic()
        ends = asyncio.get_running_loop().time() + self._patience(asked)
        for attempt in (1, 2):
            try:
                async with asyncio.timeout_at(ends):
                    async with aclosing(self.replicas.answer(asked, key)) as reply:  # type: ignore[type-var]
                        async for message in reply:
                            await out.take(message)
                await out.finish()
                return
            except TimeoutError:
                error: Unavailable = DeadlineExceeded("the request's time is over, and no replica has answered")
                if asked.method == "GET":
                    error = EngineStopped("no replica answers")
            except ReplicaLost as lost:
                if attempt == 1 and not out.told:
                    self.metrics.lost.labels("asked again").inc()
                    out.forget()
                    asked = self._again(asked, monotonic() - began)
                    continue
                self.metrics.lost.labels("told").inc()
                error = lost
            except Unavailable as stopped:
                error = stopped
            await out.fail(error)
            return

    def _patience(self, asked: Asked) -> float:
        return FACTS if asked.method == "GET" else self._seconds(asked) + LATE

    def _seconds(self, asked: Asked) -> float:
        """That a request has, as the replicas reckon."""
        wanted = _fields(asked).get("timeout") if asked.path in TIMED else None
        return min(wanted, self.deadline) if isinstance(wanted, int | float) and wanted > 0 else self.deadline

    def _again(self, asked: Asked, took: float) -> Asked:
        """The same, with the seconds that are left of it."""
        fields = _fields(asked)
        if not fields or asked.path not in TIMED:
            return asked
        left = max(0.001, self._seconds(asked) - took)
        body = json.dumps({**fields, "timeout": left}).encode()
        headers = tuple((name, value) for name, value in asked.headers if name != b"content-length")
        return replace(asked, body=body, headers=headers)


class _Outgoing:
    """A reply on its way to the client. told: whether anything of it has left that another replica would say anew.

    The first event of a stream says only that an answer begins, with a name that another replica would not give it:
    it waits for the second. Comments, which keep a connection alive, do not.
    """

    def __init__(self, send: Send) -> None:
        self.told = False
        self._send = send
        self._begun = False
        self._head: Head | None = None
        self._held: list[bytes] = []

    async def take(self, message: Head | bytes) -> None:
        if isinstance(message, Head):
            self._head = message
        elif self._head is None or not self._head.streams:
            self._held.append(message)  # it leaves whole
        elif message.startswith(b":"):
            await self._begin()
            await self._body(message)
        elif self.told or self._held:
            await self._release()
            await self._body(message)
        else:
            self._held.append(message)

    def forget(self) -> None:
        """Begin anew."""
        self._head, self._held = None, []

    async def finish(self) -> None:
        if self._head is None:
            raise EngineStopped("the replica gave no reply")
        if self._begun and not self._head.streams:  # an error, after comments of a stream
            self._held = [b"data: " + b"".join(self._held) + b"\n\n"]
        await self._release()
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: Unavailable) -> None:
        """Tell of it in the stream. Raises it where nothing has begun."""
        if not self._begun:
            raise error
        await self._body(b"data: " + failure(error).body.model_dump_json().encode() + b"\n\n")
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _begin(self) -> None:
        if not self._begun:
            assert self._head is not None
            self._begun = True
            start = {"type": "http.response.start", "status": self._head.status, "headers": list(self._head.headers)}
            await self._send(start)

    async def _release(self) -> None:
        held, self._held, self.told = self._held, [], True
        await self._begin()
        for piece in held:
            await self._body(piece)

    async def _body(self, piece: bytes) -> None:
        await self._send({"type": "http.response.body", "body": piece, "more_body": True})


def _fields(asked: Asked) -> dict[str, Any]:
    """A JSON object in the body; empty where there is none."""
    try:
        fields = json.loads(asked.body)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


async def _body(receive: Receive) -> bytes:
    """Raises what the gate does of a body that is too large or late."""
    pieces: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b""
        pieces.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(pieces)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        what = (await receive())["type"]
        await send({"type": f"{what}.complete"})
        if what == "lifespan.shutdown":
            return
