"""What the server costs: throughput against the bare engine, idle streams, and how fast /health is under load.

Clients run in a process of their own, and the model's threads leave them a core, with and without the server: only
the server's work counts as the server's.
"""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from random import Random
from time import perf_counter
from typing import Any

import torch
from rich.console import Group, RenderableType

from ..console import plain_table
from ..doctor import cores
from ..engine.engine import Engine
from ..engine.guards import Guard
from ..engine.sampling import SamplingParams
from ..engine.serving.policy import Policy
from .estimates import Estimate
from .http_client import request_bytes
from .http_load import CHAT, load
from .report import Spread, WrongPath
from .serving import NAME, Served, served
from .units import Unit
from .workload import Sources, question

BARE = "bare engine"
WAYS = {"whole replies": False, "streamed as cleared": True}  # of the server: whether it streams
HARMLESS = Guard.protector(threshold=0.0)  # reads every answer and lets it out


@dataclass(frozen=True)
class ServeConfig:
    """at_once: requests under way; `requests` of them a run, `pairs` runs of the server and of the bare engine each.
    idle: streams that nobody reads."""

    requests: int = 64
    at_once: int = 16
    pairs: int = 5
    prompt_tokens: int = 64
    answer_tokens: int = 64
    idle: int = 200
    seed: int = 0


class ServePlan:
    """A piece of work is one run of the bare engine and of the server in each way; the last one are idle streams."""

    kind = "serve"
    limit = None

    def __init__(self, sources: Sources, config: ServeConfig, dtype: torch.dtype | None = None) -> None:
        self.config, self.seed = config, config.seed
        self._engine = sources.engine(dtype)
        self._model = self._engine.models["mllm"]
        own = str(self._model.backbone.decoder.dtype).removeprefix("torch.")
        self.settings = {"model": sources.name, "dtype": own, **asdict(config)}
        self._policy = Policy({"protector": HARMLESS}, "protector", loosest="window")

    def warm_up(self) -> None:
        self._pair(-1, self.config.at_once)

    def units(self, done: dict[str, Any]) -> Iterator[Unit]:
        for pair in range(self.config.pairs):
            yield f"pair {pair}", partial(self._pair, pair, self.config.requests)
        yield "idle", self._idle

    def _pair(self, pair: int, count: int) -> dict[str, Any]:
        """Seconds of the bare engine and of the server in each way, in an order drawn anew, and those of every answer
        of /health. Raises `WrongPath` when a reply is not the clean, whole one that it was meant to be."""
        config, random = self.config, Random(f"{self.seed} {pair}")
        tokenizer = self._model.codec.tokenizer
        texts = [question(tokenizer, config.prompt_tokens, random) for _ in range(count)]
        seconds: dict[str, float] = {}
        health: list[float] = []
        with _one_core_left(), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as clients:
            for name in random.sample([BARE, *WAYS], len(WAYS) + 1):
                self._engine.pool.clear_cache()
                if name == BARE:
                    seconds[name] = _bare(self._engine, texts, config)
                    continue
                with served(self._engine, self._policy, max_requests=2 * config.at_once) as server:
                    bodies = [_body(text, config, WAYS[name]) for text in texts]
                    found = clients.submit(load, server.port, bodies, config.at_once).result()
                if found.failures:
                    raise WrongPath(f"{len(found.failures)} of {count} replies are wrong: {found.failures[0]}")
                seconds[name] = found.seconds
                health += found.health
        return {"seconds": seconds, "health": health}

    def _idle(self) -> int:
        with _one_core_left(), served(self._engine, self._policy, max_requests=self.config.idle) as server:
            return _steps_while_idle(self._engine, server, self.config)

    def rows(self, done: dict[str, Any]) -> list[dict[str, Any]]:
        """lost_percent: of the bare engine's throughput, pair by pair."""
        pairs = [found["seconds"] for name, found in done.items() if name.startswith("pair")]
        tokens = self.config.requests * self.config.answer_tokens
        rows = []
        for way in (BARE, *WAYS) if pairs else ():
            rate = Spread.of(tokens / took[way] for took in pairs).to_dict()
            lost = Estimate.of(100 * (1 - took[BARE] / took[way]) for took in pairs)
            rows.append({"way": way, "n": len(pairs), "tokens_per_s": rate, "lost_percent": lost.to_dict()})
        return rows

    def more(self, done: dict[str, Any]) -> dict[str, Any]:
        """health: of /health under load, milliseconds. idle_steps: in a second, with streams that nobody reads."""
        health = sorted(took for name, found in done.items() if name.startswith("pair") for took in found["health"])
        more: dict[str, Any] = {}
        if health:
            at = {"p50": len(health) // 2, "p99": int(len(health) * 0.99)}
            more["health_ms"] = {name: round(1000 * health[index], 2) for name, index in at.items()}
        return more | ({"idle_steps": done["idle"]} if "idle" in done else {})

    def table(self, done: dict[str, Any]) -> RenderableType:
        config, more, settings = self.config, self.more(done), self.settings
        title = f"{settings['model']} {settings['dtype']}: {config.at_once} requests at once"
        headings = ["", "tokens/s", "lost % (95 % interval)"]
        table = plain_table(
            f"{title}, {config.answer_tokens} tokens an answer, n = {config.pairs}", headings, right=headings[1:]
        )
        for row in self.rows(done):
            lost = "" if row["way"] == BARE else str(Estimate(**row["lost_percent"]))
            table.add_row(row["way"], f"{row['tokens_per_s']['median']:,.1f}", lost)
        health = more.get("health_ms")
        lines = [f"/health under load: {health['p50']:,.1f} ms, p99 {health['p99']:,.1f} ms"] if health else []
        if "idle_steps" in more:
            lines.append(f"steps in a second with {config.idle} streams that nobody reads: {more['idle_steps']}")
        return Group(table, *lines)


@contextmanager
def _one_core_left() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, cores() - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _bare(engine: Engine, texts: list[str], config: ServeConfig) -> float:
    """Seconds of the engine alone, with as many requests under way as the clients keep."""
    sampling = SamplingParams(temperature=0.0, max_tokens=config.answer_tokens, ignore_eos=True)
    waiting, began = list(reversed(texts)), perf_counter()
    while waiting or engine.has_work:
        while waiting and len(engine.driver.requests) < config.at_once:
            engine.submit(waiting.pop(), guard=HARMLESS, sampling=sampling)
        engine.step()
    return perf_counter() - began


def _body(text: str, config: ServeConfig, stream: bool) -> dict[str, Any]:
    return {
        "model": NAME,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": config.answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
        "guard": {"release": "window" if stream else "verdict"},
    }


def _steps_while_idle(engine: Engine, server: Served, config: ServeConfig) -> int:
    """Steps in a second while every stream is open and decoded, and nobody reads."""
    asked = request_bytes(CHAT, {**_body("Hi", config, True), "max_tokens": 4})
    with ExitStack() as streams:
        for _ in range(config.idle):
            streams.enter_context(socket.create_connection(("127.0.0.1", server.port))).sendall(asked)
        ends = time.monotonic() + 60
        while server.server.server_state.total_requests < config.idle:
            if time.monotonic() > ends:
                raise WrongPath("not all of the streams were answered")
            time.sleep(0.02)
        before = engine.steps
        time.sleep(1.0)
        return engine.steps - before
