"""The soak of `soak.py` against replicas on Ray Serve, whose fault is that they are killed.

Their batches run elsewhere, so that nobody here can look up who read a text: what replies say of it has to do.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from rich.table import Table

from ..console import plain_table
from ..engine.engine import Engine
from ..engine.guards import HarmHead, SelfJudge
from ..engine.models.loader import load_models
from ..engine.named import EngineNames
from ..engine.serving.audit import read_key, verify
from ..engine.serving.launch import Serving
from ..engine.serving.ray_app import APP, Scale, deploy, running
from .serving import NAME
from .soak import Clients, SoakConfig, quantile, soak_policy

MODELS = ("tiny-llava", "tiny-llama", "tiny-llama")


@dataclass
class RaySoakReport:
    """kills: of replicas. logs: audit logs that were found whole."""

    config: SoakConfig
    replicas: int
    seconds: float
    endings: Counter[str]
    complaints: list[str]
    kills: int
    logs: int

    def table(self) -> Table:
        title = f"Soak: {self.config.requests:,} requests to {self.replicas} replicas in {self.seconds:.0f} s"
        table = plain_table(title, ["", ""], right=[""])
        for ending, count in sorted(self.endings.items()):
            table.add_row(ending, f"{count:,}")
        table.add_section()
        table.add_row("injected: replicas killed", f"{self.kills:,}")
        table.add_row("audit logs, all in place", f"{self.logs:,}")
        table.add_row("complaints", f"{len(self.complaints):,}")
        for complaint in self.complaints[:20]:
            table.add_row("", complaint)
        return table

    def to_dict(self) -> dict[str, Any]:
        return {
            "benchmark": "soak on ray",
            "requests": self.config.requests,
            "replicas": self.replicas,
            "seconds": round(self.seconds, 1),
            "endings": dict(self.endings),
            "complaints": self.complaints,
            "kills": self.kills,
            "audit_logs": self.logs,
        }


def run_ray_soak(
    config: SoakConfig, told: Callable[[str, int, int], None], folder: Path, replicas: int = 2, every: int = 40
) -> RaySoakReport:
    """every: requests after which one of the replicas is killed. folder: for the audit logs."""
    engine = Engine(models=load_models(*MODELS, device="cpu"))
    threshold = quantile(engine, HarmHead(template="response", threshold=0.0), 0.15)
    judged = quantile(engine, SelfJudge(threshold=0.0, min_mass=1e-9), 0.15)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serving = Serving(
        NAME,
        soak_policy(threshold, judged),
        port=port,
        max_requests=config.at_once,
        max_tokens=96,
        audit=folder / "audit.jsonl",
    )
    clients, kills, pick = Clients(config, told), 0, random.Random(config.seed)

    async def kill(load: asyncio.Task[None]) -> None:
        nonlocal kills
        while not load.done():
            if sum(clients.endings.values()) >= (kills + 1) * every:
                alive = _replicas()
                if len(alive) == replicas:
                    ray.kill(ray.get_actor(pick.choice(alive), namespace="serve"))
                    kills += 1
            await asyncio.sleep(0.1)

    async def run() -> None:
        load = asyncio.create_task(clients.run(port))
        await asyncio.gather(load, kill(load))

    with running(serving):
        deploy(EngineNames(*MODELS, device="cpu", dtype="fp32"), serving, Scale(replicas, cpus=0.4))
        began = time.perf_counter()
        asyncio.run(run())
        seconds = time.perf_counter() - began
    logs = sorted(folder.glob("audit.*.jsonl"))
    for log in logs:
        with open(log, "rb") as lines:
            verify(lines, read_key(serving.key_file))
    return RaySoakReport(config, replicas, seconds, clients.endings, clients.complaints, kills, len(logs))


def _replicas() -> list[str]:
    """Names of the engines' processes."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(one["name"] for one in named if one["name"].startswith(f"SERVE_REPLICA::{APP}#engine#"))
