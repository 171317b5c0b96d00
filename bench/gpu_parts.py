"""What a measurement on a GPU is about, and what comes of it: sizes and figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sizes:
    """Of all parts. rows: tokens of the fusions. contexts: of decode attention. buffer: bytes that are copied to tell
    the bandwidth. pooled: sequences at the head, of `pooled_width`. batches, context, steps: of decode steps.
    beside: batches decoded beside `transformers`. answers, answer: those that a detector reads along, and their
    tokens. tests: what pytest is given."""

    rows: int = 4096
    hidden: int = 4096
    ffn: int = 11008
    heads: int = 32
    head_dim: int = 128
    sequences: int = 16
    contexts: tuple[int, ...] = (2048, 32768)
    prefill: int = 8192
    pooled: int = 64
    pooled_width: int = 3200
    buffer: int = 1 << 30
    repeats: int = 20
    model: str = "llava-1.5-7b"
    text_model: str = "vicuna-7b"
    detector: str = "open-llama-3b"
    batches: tuple[int, ...] = (1, 8, 64)
    context: int = 1024
    steps: int = 64
    beside: tuple[int, ...] = (1, 64)
    prompt: int = 64
    new: int = 64
    rounds: int = 3
    answers: int = 8
    answer: int = 256
    kv_bytes: int = 48 << 30
    tests: tuple[str, ...] = (
        *("tests/kernels/triton", "tests/engine/test_kernels_in_engine.py"),
        "--ignore=tests/kernels/triton/test_compiled.py",  # for other GPUs than this one
    )


TINY = Sizes(
    rows=2,
    hidden=64,
    ffn=96,
    heads=2,
    head_dim=64,
    sequences=2,
    contexts=(64, 100),
    prefill=96,
    pooled=2,
    pooled_width=64,
    buffer=1 << 20,
    repeats=1,
    model="tiny-llava",
    text_model="tiny-llama",
    detector="tiny-llama",
    batches=(1, 2),
    context=40,
    steps=4,
    beside=(1, 2),
    prompt=8,
    new=4,
    rounds=1,
    answers=2,
    answer=24,
    kv_bytes=32 << 20,
    tests=("tests/kernels/test_rms_norm.py",),
)


@dataclass(frozen=True)
class Figure:
    """One number. target: what is aimed at; at_most: whether less is better. samples: what a distribution is drawn
    from."""

    part: str
    what: str
    value: float
    unit: str
    target: float | None = None
    at_most: bool = True
    samples: tuple[float, ...] = ()

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "samples": list(self.samples), "met": self.met}

    @classmethod
    def of_dict(cls, known: dict[str, Any]) -> Figure:
        fields = {name: known[name] for name in cls.__dataclass_fields__}
        return cls(**{**fields, "samples": tuple(known["samples"])})


Measure = Callable[[Sizes, torch.device], Iterator[Figure]]
