"""A real server on a port of this machine, for tests; and the guards, settings and images they share."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx
import uvicorn
from PIL import Image

from stockade import Detoxify, Engine, Guard, HarmHead
from stockade.engine.serving.launch import Serving, make_server
from stockade.engine.serving.policy import Policy

HARMLESS = Guard(HarmHead(template="response", threshold=0.0, prefix_threshold=0.0, chunk=4), Detoxify(), 1)
HARMFUL = Guard(HarmHead(template="response", threshold=1.0, prefix_threshold=1.0, chunk=4), Detoxify(), 1)
# Beginnings look harmless, the whole does not.
TURNS = Guard(HarmHead(template="response", threshold=1.0, prefix_threshold=0.0, chunk=4), Detoxify(), 1)
ECSO = Guard.ecso(threshold=0.0)
GUARDS = {"harmless": HARMLESS, "harmful": HARMFUL, "turns": TURNS, "ecso": ECSO, "off": Guard.off()}
OPEN = Policy(GUARDS, "harmless", loosest="audit")


@dataclass
class Live:
    url: str
    engine: Engine
    server: uvicorn.Server

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels."""
        with self.client() as client:
            lines = client.get("/metrics").text.splitlines()
        found = [
            line
            for line in lines
            if line.split("{")[0].split(" ")[0] == name and all(f'{k}="{v}"' in line for k, v in labels.items())
        ]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)


@contextmanager
def serving(
    engine: Engine, policy: Policy = OPEN, settings: type[Serving] = Serving, **options: Any
) -> Iterator[Live]:
    """Serve the engine as `tiny` until the block ends; then nothing may be left in it."""
    server = make_server(engine, settings("tiny", policy, port=0, **{"max_tokens": 64, "drain": 5.0, **options}))
    thread = threading.Thread(target=server.run)
    thread.start()
    ends = time.monotonic() + 20
    while not server.started and thread.is_alive() and time.monotonic() < ends:
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Live(f"http://127.0.0.1:{port}", engine, server)
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


def chat(text: str = "Hi", **more: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }


def picture(size: int = 8, color: str = "red", kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), color).save(out, kind)
    return out.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
