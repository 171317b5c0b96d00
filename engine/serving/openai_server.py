"""The server: OpenAI's endpoints, and a few of its own, as a FastAPI application made by a function."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from ... import __version__
from ..errors import Aborted
from . import protocol as wire
from .exchange import Exchange
from .forms import ChatForm, TextForm
from .gate import Bodies, Gate
from .limits import Doors, Tenant
from .service import Service

PAGE = Path(__file__).parent / "page.html"
# The page is one file, brings all it needs, and talks to nobody but its own server.
PAGE_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data: blob:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": wire.ErrorBody}, "5XX": {"model": wire.ErrorBody}}
STREAM = {"text/event-stream": {"schema": {"type": "string"}}}
TEXT = {"text/plain": {"schema": {"type": "string"}}}


@dataclass(frozen=True)
class Door:
    """How clients are let in. max_body: bytes of one, max_bodies: of all that are being read or answered.
    body_seconds, send_seconds: see `Gate`. origins: web pages of other servers that may ask this one. drain: seconds
    that requests under way have when the server stops.
    """

    doors: Doors = field(default_factory=Doors)
    max_body: int = 20 << 20
    max_bodies: int = 512 << 20
    body_seconds: float = 30.0
    send_seconds: float = 30.0
    origins: Sequence[str] = ()
    drain: float = 30.0


class EventStream(Response):
    """Server-sent events of one exchange, which ends when its client is gone."""

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = self._exchange.events()
        async with _watched(receive, self._exchange):
            try:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            finally:
                await events.aclose()  # type: ignore[attr-defined]


def cross_origin(origins: Sequence[str]) -> dict[str, Any]:
    """What web pages of these servers may do here."""
    return {
        "allow_origins": list(origins),
        "allow_methods": ["GET", "POST"],
        "allow_headers": ["authorization", "content-type"],
    }


def create_app(service: Service, door: Door | None = None, log: logging.Logger | None = None) -> FastAPI:
    """An application that serves one engine; it drains the engine when it is shut down."""
    door = door or Door()
    page = PAGE.read_text(encoding="utf-8")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.engine.drain(door.drain)
        if service.audit is not None:
            service.audit.close()

    app = FastAPI(
        title="stockade",
        version=__version__,
        description="Chat completions in which no harmful answer gets out. Every reply carries its guard's report.",
        lifespan=lifespan,
        redoc_url=None,
        responses=ERRORS,
    )
    app.add_middleware(
        Gate,
        doors=door.doors,
        metrics=service.metrics,
        log=log or logging.getLogger("stockade.serving"),
        bodies=Bodies(door.max_body, door.max_bodies),
        body_seconds=door.body_seconds,
        send_seconds=door.send_seconds,
    )
    if door.origins:
        app.add_middleware(CORSMiddleware, **cross_origin(door.origins))
    # The gate tells of every error, in one place.
    app.add_exception_handler(HTTPException, _raise)
    app.add_exception_handler(RequestValidationError, _raise)
    # For the description only: the gate has asked for the key by then.
    keyed = [Depends(HTTPBearer(auto_error=False))] if door.doors.locked else []
    _add_answers(app, service, keyed)
    _add_facts(app, service, keyed)

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY, "Referrer-Policy": "no-referrer"})

    return app


def _add_answers(app: FastAPI, service: Service, keyed: list[Any]) -> None:
    """What needs the engine."""

    @app.post(
        "/v1/chat/completions",
        dependencies=keyed,
        response_model=None,
        responses={200: {"model": wire.ChatCompletion, "content": STREAM}},
    )
    async def chat_completions(body: wire.ChatRequest, request: Request) -> Response:
        """Answer a chat under a guard; `stream` is guarded as any other."""
        form = ChatForm()
        return await _answered(
            body, request, lambda: service.chat(body, _tenant(request), form, request.headers.get("traceparent"))
        )

    @app.post(
        "/v1/completions",
        dependencies=keyed,
        response_model=None,
        responses={200: {"model": wire.Completion, "content": STREAM}},
    )
    async def completions(body: wire.CompletionRequest, request: Request) -> Response:
        """Continue a raw prompt under a guard."""
        form = TextForm()
        return await _answered(
            body, request, lambda: service.complete(body, _tenant(request), form, request.headers.get("traceparent"))
        )

    @app.post("/v1/moderations", dependencies=keyed)
    async def moderations(body: wire.ModerationRequest, request: Request) -> wire.Moderation:
        """What the harm detector says of texts."""
        return await service.moderate(body, _tenant(request))

    @app.post("/tokenize", dependencies=keyed)
    async def tokenize(body: wire.TokenizeText | wire.TokenizeChat) -> wire.Tokenized:
        """The tokens of a text or a chat."""
        return await service.tokenize(body)


def _add_facts(app: FastAPI, service: Service, keyed: list[Any]) -> None:
    """What can be told at once."""
    card = wire.ModelCard(id=service.settings.model, created=service.created, max_model_len=service.context)

    @app.get("/v1/models", dependencies=keyed)
    async def models() -> wire.ModelList:
        return wire.ModelList(data=[card])

    @app.get("/v1/models/{name:path}", dependencies=keyed)
    async def model(name: str) -> wire.ModelCard:
        service.check_model(name)
        return card

    @app.get("/offer")
    async def offer() -> wire.Offer:
        """The guards that a client may choose from."""
        return service.offer()

    @app.get("/health")
    async def health() -> JSONResponse:
        """Alive: where this is not 200, only a new process helps."""
        alive = service.engine.alive
        return JSONResponse(wire.Health(status="alive" if alive else "dead").model_dump(), 200 if alive else 503)

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """Whether a request would be answered now."""
        found = service.ready
        return JSONResponse(wire.Health(status="ready" if found else "not ready").model_dump(), 200 if found else 503)

    @app.get("/version")
    async def version() -> wire.Version:
        return wire.Version(version=__version__)

    @app.get("/metrics", dependencies=keyed, response_model=None, responses={200: {"content": TEXT}})
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _answered(body: wire.Sampled, request: Request, begin: Callable[[], Awaitable[Exchange]]) -> Response:
    exchange = await begin()
    if body.stream:
        return EventStream(exchange)
    async with _watched(request.receive, exchange):
        try:
            return Response(await exchange.whole(), media_type="application/json")
        except Aborted:
            return Response(status_code=499)  # which nobody reads


@asynccontextmanager
async def _watched(receive: Receive, exchange: Exchange) -> AsyncIterator[None]:
    """Abort the exchange when its client is gone."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        exchange.abort()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task
        exchange.abort()


def _tenant(request: Request) -> Tenant:
    tenant = request.state.tenant
    assert isinstance(tenant, Tenant)
    return tenant


async def _raise(_: Request, error: Exception) -> NoReturn:
    raise error
