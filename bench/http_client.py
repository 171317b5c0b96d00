"""A small HTTP client for load: one connection a request, server-sent events, and leaving in the middle."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any


@dataclass
class Exchanged:
    """What came back. status: 0 where nothing did. left: the client went away itself. first: seconds until the first
    piece of text, where it was a stream."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: Any = None
    events: list[Any] = field(default_factory=list)
    left: bool = False
    whole: bool = False
    seconds: float = 0.0
    first: float | None = None


async def exchange(
    port: int,
    path: str,
    body: Any = None,
    *,
    leave_after: float | None = None,
    leave_at_event: int | None = None,
    pause: float = 0.0,
) -> Exchanged:
    """POST the body as JSON (GET without one) to this machine. leave_after, leave_at_event: seconds, or events of a
    stream, after which the client is gone. pause: seconds that it does not read after each event."""
    out, began = Exchanged(), perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request_bytes(path, body))
        async with asyncio.timeout(leave_after):
            await _read(reader, out, began, leave_at_event, pause)
    except TimeoutError:
        out.left = True
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()
    out.seconds = perf_counter() - began
    return out


def request_bytes(path: str, body: Any) -> bytes:
    """A request as it goes over the wire; bytes are sent as they are."""
    content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    if content:
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    return head.encode() + b"\r\n" + content


async def _read(
    reader: asyncio.StreamReader, out: Exchanged, began: float, leave_at_event: int | None, pause: float
) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    out.status = int(head[0].split()[1])
    out.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    if out.headers.get("transfer-encoding") != "chunked":
        data = await reader.read()
        out.whole = len(data) == int(out.headers.get("content-length", -1))
        out.body = json.loads(data) if "json" in out.headers.get("content-type", "") else data
        return
    waiting = b""
    while True:
        size = int(await reader.readuntil(b"\r\n"), 16)
        waiting += (await reader.readexactly(size + 2))[:-2]
        if size == 0:
            out.whole = True
            return
        *ready, waiting = waiting.split(b"\n\n")
        for event in ready:
            if not event.startswith(b"data: "):
                continue
            if out.first is None and b'"content":"' in event and b'"content":""' not in event:
                out.first = perf_counter() - began
            out.events.append("[DONE]" if event == b"data: [DONE]" else json.loads(event[6:]))
            if leave_at_event is not None and len(out.events) > leave_at_event:
                out.left = True
                return
            if pause:
                await asyncio.sleep(pause)
