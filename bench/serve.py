"""What the server costs: throughput against the bare engine, idle streams, and how fast /health is under load.

Clients run in a process of their own, and the model's threads leave them a core, with and without the server: only
the server's work counts as the server's.
"""

from __future__ import annotations

import multiprocessing
import socket
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from random import Random
from time import perf_counter
from typing import Any

import torch
from rich.table import Table

from ..console import plain_table
from ..doctor import cores
from ..engine.engine import Engine
from ..engine.guards import Guard
from ..engine.sampling import SamplingParams
from ..engine.serving.policy import Policy
from .http_client import request_bytes
from .http_load import CHAT, load
from .report import Spread, WrongPath
from .serving import NAME, Served, served
from .workload import Sources, question

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


@dataclass(frozen=True)
class ServeReport:
    """overhead: percent of the bare engine's throughput that is lost, pair by pair. health: milliseconds."""

    config: ServeConfig
    model: str
    dtype: str
    bare: Spread
    overhead: dict[str, Spread]
    health: dict[str, float]
    idle_steps: int

    def table(self) -> Table:
        config = self.config
        title = (
            f"{self.model} {self.dtype}: {config.at_once} requests at once, {config.answer_tokens} tokens an answer"
        )
        table = plain_table(f"{title}, n = {config.pairs}", ["", "median (10 %-90 %)"], right=["median (10 %-90 %)"])
        table.add_row("bare engine, tokens/s", str(self.bare))
        for name, spread in self.overhead.items():
            table.add_row(f"lost by the server, {name}, %", str(spread))
        for name, value in self.health.items():
            table.add_row(f"/health under load, {name}, ms", f"{value:,.1f}")
        table.add_row(f"steps in a second with {config.idle} streams that nobody reads", str(self.idle_steps))
        return table

    def to_dict(self) -> dict[str, Any]:
        return {
            "benchmark": "serve",
            "model": self.model,
            "dtype": self.dtype,
            "config": asdict(self.config),
            "bare_tokens_per_s": self.bare.to_dict(),
            "overhead_percent": {name: spread.to_dict() for name, spread in self.overhead.items()},
            "health_ms": self.health,
            "idle_steps": self.idle_steps,
        }


def run_serve(
    sources: Sources,
    config: ServeConfig,
    dtype: torch.dtype | None = None,
    told: Callable[[str, int, int], None] | None = None,
) -> ServeReport:
    """Measure. Raises `WrongPath` when a reply is not the clean, whole one that it was meant to be."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, cores() - 1))
    try:
        return _run(sources.engine(dtype), sources.name, config, told or (lambda *_: None))
    finally:
        torch.set_num_threads(threads)


def _run(
    engine: Engine, name_of_model: str, config: ServeConfig, told: Callable[[str, int, int], None]
) -> ServeReport:
    model, random = engine.models["mllm"], Random(config.seed)
    kinds = {"whole replies": False, "streamed as cleared": True}
    seconds: dict[str, list[float]] = {name: [] for name in ("bare", *kinds)}
    health: list[float] = []
    policy = Policy({"protector": HARMLESS}, "protector", loosest="window")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as clients:
        for pair in range(-1, config.pairs):  # the first one warms up
            count = config.requests if pair >= 0 else config.at_once
            texts = [question(model.codec.tokenizer, config.prompt_tokens, random) for _ in range(count)]
            for name in random.sample(list(seconds), len(seconds)):
                engine.pool.clear_cache()
                if name == "bare":
                    took = _bare(engine, texts, config)
                else:
                    with served(engine, policy, max_requests=2 * config.at_once) as server:
                        bodies = [_body(text, config, kinds[name]) for text in texts]
                        found = clients.submit(load, server.port, bodies, config.at_once).result()
                    if found.failures:
                        raise WrongPath(f"{len(found.failures)} of {count} replies are wrong: {found.failures[0]}")
                    took = found.seconds
                    health += found.health if pair >= 0 else []
                if pair >= 0:
                    seconds[name].append(took)
            told("serving", pair + 2, config.pairs + 1)
        with served(engine, policy, max_requests=config.idle) as server:
            idle_steps = _steps_while_idle(engine, server, config)
    tokens = config.requests * config.answer_tokens
    bare = seconds.pop("bare")
    ordered = sorted(health)
    return ServeReport(
        config,
        name_of_model,
        str(model.backbone.decoder.dtype).removeprefix("torch."),
        Spread.of([tokens / took for took in bare]),
        {
            name: Spread.of([100 * (1 - one / other) for one, other in zip(bare, took, strict=True)])
            for name, took in seconds.items()
        },
        {
            "median": round(1000 * ordered[len(ordered) // 2], 2),
            "p99": round(1000 * ordered[int(len(ordered) * 0.99)], 2),
        },
        idle_steps,
    )


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
