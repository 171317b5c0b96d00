"""Many guarded requests at once against the same ones after another, and what a reply spends outside its models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from random import Random
from time import perf_counter
from typing import Any, NamedTuple

import torch
from rich.table import Table

from ..engine.engine import Engine
from ..engine.errors import BadInput
from ..engine.guards import Guard
from ..engine.sampling import SamplingParams
from .published import Lengths
from .report import Spread
from .variants import PATHS, check_path, forced_guards, wanted_outcome
from .workload import Asked, Sources, picture, question


@dataclass(frozen=True)
class ConcurrencyConfig:
    """requests: how many at once, and how many after another. guards: names of
    `variants.forced_guards`. lengths: new tokens of each pass."""

    requests: int = 32
    guards: tuple[str, ...] = ("off", "protector", "ecso")
    repeats: int = 3
    prompt_tokens: int = 64
    lengths: Lengths = field(default_factory=lambda: Lengths(32, 2, 32, 32))
    seed: int = 0


class Measured(NamedTuple):
    """Seconds of one run of all requests; of them in forward passes, in the guards' loops and preparing passes."""

    seconds: float
    forward: float
    loops: float


class Figure(NamedTuple):
    """ratio: at once over one after another. loops, outside: shares of the replies' time, one after another.

    `loops` is the guards' own work: their programs, encoding prompts, making sequences. `outside` is everything
    that is not a forward pass, the sampler and the scheduler included.
    """

    at_once: Spread
    after_another: Spread
    ratio: Spread
    loops: Spread
    outside: Spread

    def to_dict(self) -> dict[str, Any]:
        return {
            "at_once_s": self.at_once.to_dict(),
            "one_after_another_s": self.after_another.to_dict(),
            "ratio": self.ratio.to_dict(),
            "guard_loop_percent": self.loops.scaled(100.0).to_dict(),
            "outside_forward_percent": self.outside.scaled(100.0).to_dict(),
        }


@dataclass(frozen=True)
class ConcurrencyReport:
    """figures: by guard, then by path; `off` has one path."""

    config: ConcurrencyConfig
    model: str
    dtype: str
    figures: dict[str, dict[str, Figure]]

    def to_dict(self) -> dict[str, Any]:
        return {
            "benchmark": "concurrency",
            "model": self.model,
            "dtype": self.dtype,
            "config": asdict(self.config),
            "guards": {
                name: {path: figure.to_dict() for path, figure in paths.items()}
                for name, paths in self.figures.items()
            },
        }

    def table(self) -> Table:
        config = self.config
        table = Table(
            title=f"{self.model} {self.dtype}: {config.requests} requests, {config.lengths.answer} tokens an answer, "
            f"n = {config.repeats}, medians"
        )
        table.add_column("guard")
        table.add_column("path")
        for heading in ("at once s", "one by one s", "ratio", "guard's loop %", "outside forward %"):
            table.add_column(heading, justify="right")
        for name, paths in self.figures.items():
            for path, figure in paths.items():
                table.add_row(
                    name,
                    path,
                    f"{figure.at_once.median:.2f}",
                    f"{figure.after_another.median:.2f}",
                    f"{figure.ratio.median:.3f}",
                    f"{100.0 * figure.loops.median:.2f}",
                    f"{100.0 * figure.outside.median:.2f}",
                )
        return table


def run_concurrency(
    sources: Sources,
    config: ConcurrencyConfig,
    dtype: torch.dtype | None = None,
    told: Callable[[str, int, int], None] | None = None,
) -> ConcurrencyReport:
    """Measure. Raises `WrongPath` when a reply did not take the path it was forced on."""
    engine = sources.engine(dtype)
    model = engine.models["mllm"]
    random = Random(config.seed)
    eyes = model.backbone.vision is not None
    cases: list[tuple[str, str, Guard | None]] = []
    for name in config.guards:
        known = {path: forced_guards(config.lengths, path) for path in PATHS}
        if name not in known[PATHS[0]]:
            raise BadInput(f"no guard {name!r} to measure; there are {', '.join(known[PATHS[0]])}")
        paths = PATHS[:1] if name.startswith("off") else PATHS
        cases += [(name, path, known[path][name]) for path in paths]
    runs: dict[tuple[str, str], list[tuple[Measured, Measured]]] = {case[:2]: [] for case in cases}
    for repeat in range(-1, config.repeats):  # the first one warms up, with few requests
        count = config.requests if repeat >= 0 else 2
        texts = [question(model.codec.tokenizer, config.prompt_tokens, random) for _ in range(count)]
        for name, path, guard in random.sample(cases, len(cases)):
            sides = {}
            for together in random.sample((True, False), 2):
                asked = [Asked(text, [picture(random)] if eyes else []) for text in texts]
                sides[together] = _measure(engine, asked, guard, path, config.lengths.answer, together)
            if repeat >= 0:
                runs[name, path].append((sides[True], sides[False]))
        if told:
            told("requests", repeat + 2, config.repeats + 1)
    figures: dict[str, dict[str, Figure]] = {}
    for (name, path), pairs in runs.items():
        figures.setdefault(name, {})[path] = Figure(
            at_once=Spread.of(once.seconds for once, _ in pairs),
            after_another=Spread.of(serial.seconds for _, serial in pairs),
            ratio=Spread.of(once.seconds / serial.seconds for once, serial in pairs),
            loops=Spread.of(serial.loops / serial.seconds for _, serial in pairs),
            outside=Spread.of(1.0 - serial.forward / serial.seconds for _, serial in pairs),
        )
    dtype_name = str(model.backbone.decoder.dtype).removeprefix("torch.")
    return ConcurrencyReport(config, sources.name, dtype_name, figures)


def _measure(
    engine: Engine, asked: list[Asked], guard: Guard | None, path: str, answer_tokens: int, together: bool
) -> Measured:
    sampling = SamplingParams(max_tokens=answer_tokens, ignore_eos=True)
    chats = [item.messages for item in asked]
    engine.pool.clear_cache()
    forward = engine.runner.seconds
    began = perf_counter()
    if together:
        replies = engine.chat(chats, guard=guard, sampling=sampling)
    else:
        replies = [engine.chat([chat], guard=guard, sampling=sampling)[0] for chat in chats]
    seconds = perf_counter() - began
    for reply in replies:
        check_path(reply, wanted_outcome(guard, path), answer_tokens)
    loops = sum(reply.trace.overhead for reply in replies)
    return Measured(seconds, engine.runner.seconds - forward, loops)
