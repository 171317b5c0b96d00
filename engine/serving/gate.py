"""What stands before every request: keys and limits, the body's size, slow clients, and errors that nobody caught.

An ASGI middleware; what the requests ask for is not its business.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import Overloaded, RequestTooLarge, SlowClient, StockadeError
from .http_errors import failure
from .limits import Doors

# Whoever asks for these needs no key: they tell nothing of anybody's requests.
OPEN = frozenset({"/", "/health", "/ready", "/version", "/docs", "/openapi.json", "/offer"})


class Refused(HTTPException):
    """A body that is not read to its end. (FastAPI passes HTTP exceptions on while it reads a body, no others.)"""

    def __init__(self, error: StockadeError) -> None:
        super().__init__(400, str(error))
        self.error = error


class Counts(Protocol):
    """Who is told of requests that end in an error."""

    def refused(self, status: int, code: str) -> None: ...


@dataclass
class Bodies:
    """Bytes of requests: at most of one, at most of all together, and how many are held now."""

    most: int
    most_in_all: int
    held: int = 0

    def add(self, size: int, more: int) -> None:
        """A request that has sent `size` bytes, `more` of them just now. Raises `RequestTooLarge`, `Overloaded`."""
        self.held += more
        if size > self.most:
            raise RequestTooLarge(f"the body has more than {self.most} bytes, which is the limit")
        if self.held > self.most_in_all:
            raise Overloaded("the bodies of all requests are more than are held at once; come again later")


@dataclass(frozen=True)
class Gate:
    """body_seconds: within which a body must be there. send_seconds: within which a client must take what it is sent,
    piece by piece."""

    app: ASGIApp
    doors: Doors
    metrics: Counts
    log: logging.Logger
    bodies: Bodies
    body_seconds: float
    send_seconds: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value for name, value in scope["headers"] if name in (b"authorization", b"content-length")}
        started, held = False, [0]

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            try:
                async with asyncio.timeout(self.send_seconds):
                    await send(message)
            except TimeoutError:
                raise SlowClient("the client does not read") from None

        try:
            tenant = None
            if scope["path"] not in OPEN and scope["method"] != "OPTIONS":
                tenant = self.doors.tenant(headers.get(b"authorization", b"").decode("latin-1"))
            self._check_length(headers.get(b"content-length"))
            scope.setdefault("state", {})["tenant"] = tenant
            counted = tenant is not None and scope["method"] == "POST"
            with tenant.request() if tenant is not None and counted else nullcontext():
                await self.app(scope, self._limited(receive, held), sending)
        except Exception as error:
            told = failure(error.error if isinstance(error, Refused) else error)
            if told.status == 500:  # the others are no surprise
                self.log.error("%s in %s", type(error).__name__, _place(error))
            self.metrics.refused(told.status, told.code)
            if not started:  # else the server sees that the reply has no end, and cuts the connection
                await told.response()(scope, receive, send)
        finally:
            self.bodies.held -= held[0]

    def _check_length(self, length: bytes | None) -> None:
        if length is not None and length.isdigit():
            self.bodies.add(int(length[:20]), 0)

    def _limited(self, receive: Receive, held: list[int]) -> Callable[[], Awaitable[Message]]:
        """`receive` that counts the body's bytes, also into `held`, and seconds until all of it is there."""
        loop = asyncio.get_running_loop()
        ends, size, whole = loop.time() + self.body_seconds, 0, False

        async def receiving() -> Any:
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                async with asyncio.timeout_at(ends):
                    message = await receive()
            except TimeoutError:
                raise Refused(SlowClient(f"the body took more than {self.body_seconds:g} seconds")) from None
            more = len(message.get("body", b""))
            size += more
            held[0] = size
            try:
                self.bodies.add(size, more)
            except StockadeError as error:
                raise Refused(error) from None
            whole = not message.get("more_body", False)
            return message

        return receiving


def _place(error: BaseException) -> str:
    """Where an exception was raised; its message may hold a text and is not told."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return "?"
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
