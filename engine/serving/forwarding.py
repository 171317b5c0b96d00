"""A request as it goes from the server in front to the replica that answers it, and the reply on its way back.

Both are plain values that any transport between processes can carry.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from starlette.types import ASGIApp

from ..errors import EngineStopped

PASSED = frozenset({b"accept", b"authorization", b"content-length", b"content-type", b"traceparent"})
Headers: TypeAlias = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class Asked:
    """An HTTP request whose body is there. headers: those that an answer hangs on."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes


class Head(NamedTuple):
    """How a reply begins."""

    status: int
    headers: Headers

    @property
    def streams(self) -> bool:
        """Whether the reply is server-sent events, each a piece of its body."""
        return any(name.lower() == b"content-type" and b"event-stream" in value for name, value in self.headers)


async def answered(app: ASGIApp, asked: Asked) -> AsyncIterator[Head | bytes]:
    """The application's reply: its head, then its body as it comes. Closing it tells the application that its client
    is gone. Raises `EngineStopped` where the reply has no end."""
    messages: asyncio.Queue[Any] = asyncio.Queue(1)
    gone, read = asyncio.Event(), False

    async def receive() -> Any:
        nonlocal read
        if not read:
            read = True
            return {"type": "http.request", "body": asked.body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(_scope(asked), receive, messages.put)
        finally:
            if not gone.is_set():
                await messages.put(None)

    task = asyncio.create_task(run())
    ended = False
    try:
        while (message := await messages.get()) is not None:
            if message["type"] == "http.response.start":
                yield Head(
                    message["status"], tuple((bytes(name), bytes(value)) for name, value in message["headers"])
                )
                continue
            if message.get("body"):
                yield message["body"]
            ended = not message.get("more_body", False)
        if not ended:
            raise EngineStopped("the reply was cut")
    finally:
        gone.set()
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):  # what it raises was told, or nobody is there to be told
            await task


def _scope(asked: Asked) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "scheme": "http",
        "method": asked.method,
        "path": asked.path,
        "raw_path": asked.path.encode(),
        "query_string": asked.query,
        "root_path": "",
        "headers": list(asked.headers),
        "client": None,
        "server": None,
        "state": {},
    }
