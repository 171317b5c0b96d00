"""A server in this process for measurements: an engine on a port of this machine, and the guards that it offers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from ..engine.engine import Engine
from ..engine.errors import StockadeError
from ..engine.serving.launch import Serving, make_server
from ..engine.serving.policy import Policy

NAME = "measured"


class NotServed(StockadeError):
    """The server did not come up, or did not end."""


@dataclass
class Served:
    port: int
    server: uvicorn.Server


@contextmanager
def served(engine: Engine, policy: Policy, **options: Any) -> Iterator[Served]:
    """The engine under the model name `measured` until the block ends; afterwards the engine is the caller's again.

    Raises `NotServed`.
    """
    server = make_server(engine, Serving(NAME, policy, port=0, **options))
    thread = threading.Thread(target=server.run, name="server")
    thread.start()
    ends = time.monotonic() + 30
    while not server.started and thread.is_alive() and time.monotonic() < ends:
        time.sleep(0.005)
    try:
        if not server.started:
            raise NotServed("the server did not start")
        yield Served(server.servers[0].sockets[0].getsockname()[1], server)
    finally:
        server.should_exit = True
        thread.join(60)
    if thread.is_alive():
        raise NotServed("the server did not end")
