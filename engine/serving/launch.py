"""`stockade serve`: an engine, the operator's settings and an HTTP server, put together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..async_engine import AsyncEngine
from ..engine import Engine
from ..errors import BadInput
from .audit import AuditLog, read_key
from .limits import Doors, KeyLimits, read_keys
from .openai_server import Door, create_app
from .policy import Policy
from .remote_images import RemoteImages
from .service import Service, Settings
from .spans import Spans

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADER_SECONDS = 10.0
CONNECTIONS = 2000  # at once; more are told to come again


@dataclass(frozen=True)
class Serving:
    """What `stockade serve` is told on its command line; see there."""

    model: str
    policy: Policy
    host: str = "127.0.0.1"
    port: int = 8000
    keys: Path | None = None
    per_minute: float | None = None
    concurrent: int | None = None
    max_requests: int = 256
    deadline: float = 120.0
    max_tokens: int = 1024
    audit: Path | None = None
    audit_key: Path | None = None
    audit_texts: bool = False
    image_origins: Sequence[str] = ()
    origins: Sequence[str] = ()
    reveal: bool = False
    traces: bool = False
    drain: float = 30.0

    def door(self) -> Door:
        """Raises `BadInput` for keys or limits that are none."""
        keys = None if self.keys is None else read_keys(self.keys)
        doors = Doors(keys, KeyLimits(self.per_minute, self.concurrent))
        return Door(doors, origins=self.origins, drain=self.drain)

    def settings(self) -> Settings:
        images = RemoteImages(frozenset(self.image_origins)) if self.image_origins else None
        return Settings(self.model, self.policy, self.deadline, self.max_tokens, self.reveal, images)

    def audit_log(self) -> AuditLog | None:
        """Raises `BadInput` and `AuditBroken` where it cannot be gone on with."""
        if self.audit is None:
            return None
        return AuditLog(self.audit, read_key(self.key_file, create=True), self.audit_texts)

    def of_replica(self, name: str) -> Serving:
        """The settings of one replica behind a server in front, which keeps the limits: an audit log of its own."""
        inner = replace(self, per_minute=None, concurrent=None, origins=())
        if self.audit is None:
            return inner
        log = self.audit.with_name(f"{self.audit.stem}.{name}{self.audit.suffix}")
        return replace(inner, audit=log, audit_key=self.key_file)

    @property
    def key_file(self) -> Path:
        """Of the audit log: beside it where no other is named."""
        assert self.audit is not None
        return self.audit_key or self.audit.with_name(self.audit.name + ".key")


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that does not wait for ever for the end of a request's headers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._headers_late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._headers_late is None:
            self._headers_late = self.loop.call_later(HEADER_SECONDS, self._late)

    def _late(self) -> None:
        self._headers_late = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()

    def _stop_waiting(self) -> None:
        if self._headers_late is not None:
            self._headers_late.cancel()
            self._headers_late = None


def serve(engine: Engine, serving: Serving, tell: Callable[[str], None]) -> None:
    """Serve until a signal ends it. Raises `BadInput`, `InvalidGuard`, `AuditBroken` before it takes requests."""
    server = make_server(engine, serving)
    tell(f"stockade serves {serving.model} under {serving.policy.default} at http://{serving.host}:{serving.port}")
    if serving.keys is None and serving.host not in LOOPBACK:
        tell("warning: whoever reaches this address may use it; --keys FILE asks for API keys")
    server.run()


def make_server(engine: Engine, serving: Serving) -> uvicorn.Server:
    """A server that is not running yet, with its own stepping thread."""
    door = serving.door()
    service = make_service(engine, serving)
    log = logging.getLogger("uvicorn.error")
    config = uvicorn.Config(
        create_app(service, door, log),
        serving.host,
        serving.port,
        http=PatientProtocol,
        ws="none",
        access_log=False,  # paths and queries are texts of clients
        server_header=False,
        log_level="warning",
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(serving.drain),
    )
    return uvicorn.Server(config)


def make_service(engine: Engine, serving: Serving) -> Service:
    """The service with its own stepping thread. Raises as `serve`."""
    settings = serving.settings()
    spans = traced() if serving.traces else None
    audit = serving.audit_log()
    stepped = AsyncEngine(engine, max_requests=serving.max_requests)
    try:
        return Service(stepped, settings, audit, spans=spans)
    except BaseException:
        stepped.close()
        raise


def traced() -> Spans:
    """Spans that go where OpenTelemetry's own environment variables say. Raises `BadInput` without its packages."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise BadInput("traces need OpenTelemetry: pip install 'stockade[otel]'") from None
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Spans(provider)
