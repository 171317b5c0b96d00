"""Clients that load a server, in a process of their own: this module imports nothing heavy."""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import Any, NamedTuple

from .http_client import exchange

CHAT = "/v1/chat/completions"
HEALTH_EVERY = 0.1  # seconds; often enough to load the server itself would be no measurement


class Load(NamedTuple):
    """What the clients saw. health: seconds of each GET /health meanwhile."""

    seconds: float
    health: list[float]
    failures: list[str]


def load(port: int, bodies: list[Any], at_once: int) -> Load:
    """Send chats, so many at once, and ask for /health meanwhile. Every reply has to be clean and whole."""
    return asyncio.run(_send_all(port, bodies, at_once))


async def _send_all(port: int, bodies: list[Any], at_once: int) -> Load:
    health: list[float] = []
    failures: list[str] = []

    async def ask_health() -> None:
        while True:
            health.append((await exchange(port, "/health")).seconds)
            await asyncio.sleep(HEALTH_EVERY)

    waiting = iter(bodies)

    async def client() -> None:
        for body in waiting:
            got = await exchange(port, CHAT, body)
            last = got.events[-2] if len(got.events) > 1 else got.body
            if got.status != 200 or not got.whole or last["guard"]["outcome"] != "clean":
                failures.append(f"status {got.status}: {str(last)[:200]}")

    asking = asyncio.create_task(ask_health())
    began = perf_counter()
    await asyncio.gather(*(client() for _ in range(at_once)))
    took = perf_counter() - began
    asking.cancel()
    return Load(took, health, failures)
