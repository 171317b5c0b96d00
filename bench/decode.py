"""Decoding and prefill against `transformers`: the same weights and prompts, interleaved in one run, no guard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any, NamedTuple

import torch
from rich.table import Table

from ..engine.engine import Engine
from ..engine.sampling import SamplingParams
from .published import Speaker
from .report import Spread, WrongPath
from .workload import Sources

SIDES = ("stockade", "transformers")
BUFFER_BYTES = 512 << 20  # far more than any cache


@dataclass(frozen=True)
class DecodeConfig:
    """batches: prompts at once, one measurement each. prefill: tokens of the prompt whose reading is timed."""

    batches: tuple[int, ...] = (1, 16)
    prompt_tokens: int = 64
    new_tokens: int = 128
    prefill: int = 640
    repeats: int = 3
    seed: int = 0


class Workload(NamedTuple):
    """rows prompts of `prompt` tokens, `new` tokens each; `counted` of all of them are what a rate counts."""

    name: str
    rows: int
    prompt: int
    new: int
    counted: int


@dataclass(frozen=True)
class DecodeReport:
    """rates: tokens/s by workload, then by side. weight_bytes: read in one step. bandwidth: bytes/s, measured."""

    config: DecodeConfig
    model: str
    dtype: str
    rates: dict[str, dict[str, Spread]]
    weight_bytes: int
    bandwidth: float

    @property
    def ceiling(self) -> float:
        """Tokens/s of one sequence if a step cost nothing but reading the weights once."""
        return self.bandwidth / self.weight_bytes

    def to_dict(self) -> dict[str, Any]:
        return {
            "benchmark": "decode",
            "model": self.model,
            "dtype": self.dtype,
            "config": asdict(self.config),
            "workloads": {
                name: {
                    "tokens_per_second": {side: rate.to_dict() for side, rate in sides.items()},
                    "ratio": round(_ratio(sides), 3),
                }
                for name, sides in self.rates.items()
            },
            "memory": {
                "weight_bytes": self.weight_bytes,
                "bytes_per_second": round(self.bandwidth),
                "tokens_per_second_at_batch_1": round(self.ceiling, 2),
            },
        }

    def table(self) -> Table:
        config = self.config
        table = Table(
            title=f"{self.model} {self.dtype}: {config.prompt_tokens} tokens in, {config.new_tokens} out, "
            f"n = {config.repeats}, tokens/s: median (p10-p90)",
            caption=f"memory: {self.bandwidth / 1e9:.1f} GB/s, {self.weight_bytes / 1e6:,.0f} MB of weights a step: "
            f"at most {self.ceiling:.1f} tokens/s at batch 1",
        )
        table.add_column("workload")
        for heading in (*SIDES, "ratio"):
            table.add_column(heading, justify="right")
        for name, sides in self.rates.items():
            table.add_row(name, *(str(sides[side]) for side in SIDES), f"{_ratio(sides):.2f}")
        return table


def run_decode(
    sources: Sources,
    config: DecodeConfig,
    dtype: torch.dtype | None = None,
    told: Callable[[str, int, int], None] | None = None,
) -> DecodeReport:
    """Measure. Rates count new tokens over the whole time, the prompt's reading included; prefill counts the
    prompt's tokens over the time to its first new token. Raises `WrongPath` if a side stopped short."""
    engine = sources.engine(dtype)
    own = engine.models["mllm"].backbone.decoder.dtype
    speaker = Speaker(sources.folder, own, engine.device, ignore_eos=True)
    works = [
        Workload(f"batch {rows}", rows, config.prompt_tokens, config.new_tokens, rows * config.new_tokens)
        for rows in config.batches
    ]
    works.append(Workload(f"prefill {config.prefill}", 1, config.prefill, 1, config.prefill))
    rates: dict[str, dict[str, list[float]]] = {work.name: {side: [] for side in SIDES} for work in works}
    generator = torch.Generator().manual_seed(config.seed)
    vocab = engine.models["mllm"].codec.vocab_size
    special = engine.models["mllm"].codec.special_ids
    ordinary = torch.tensor([token for token in range(vocab) if token not in special])
    for repeat in range(-1, config.repeats):  # the first one warms up
        for work in works:
            picked = torch.randint(len(ordinary), (work.rows, work.prompt), generator=generator)
            prompts = ordinary[picked]
            for side in SIDES[:: 1 if repeat % 2 else -1]:
                seconds = (
                    _engine_seconds(engine, prompts, work) if side == SIDES[0] else _seconds(speaker, prompts, work)
                )
                if repeat >= 0:
                    rates[work.name][side].append(work.counted / seconds)
        if told:
            told("decode", repeat + 2, config.repeats + 1)
    return DecodeReport(
        config,
        sources.name,
        str(own).removeprefix("torch."),
        {name: {side: Spread.of(values) for side, values in sides.items()} for name, sides in rates.items()},
        weight_bytes(speaker.model),
        read_bandwidth(engine.device),
    )


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of weights that one step of a `transformers` language model reads: all but eyes and embedding rows.

    An embedding that is the output head too is read in full.
    """
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    left_out = {
        id(parameter) for name, parameter in model.named_parameters() if "vision" in name or "projector" in name
    }
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    if embedding is not head:
        left_out.add(id(embedding))
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in left_out)


def read_bandwidth(device: torch.device, repeats: int = 7) -> float:
    """Bytes/s at which a buffer far larger than the caches is read or copied, whichever is faster; the best run."""
    count = BUFFER_BYTES // 4
    source, target = torch.ones(count, device=device), torch.empty(count, device=device)
    ways: list[tuple[Callable[[], object], int]] = [
        (lambda: float(source.sum()), BUFFER_BYTES),
        (lambda: float(target.copy_(source)[0]), 2 * BUFFER_BYTES),
    ]
    best = 0.0
    for _ in range(repeats):
        for way, moved in ways:
            began = perf_counter()
            way()
            best = max(best, moved / (perf_counter() - began))
    return best


def _engine_seconds(engine: Engine, prompts: torch.Tensor, work: Workload) -> float:
    engine.pool.clear_cache()
    ids = prompts.tolist()
    sampling = SamplingParams(max_tokens=work.new, ignore_eos=True)
    began = perf_counter()
    replies = engine.generate(ids, sampling)
    seconds = perf_counter() - began
    if any(len(reply.token_ids) != work.new or reply.passes[0].cached_tokens for reply in replies):
        raise WrongPath(f"{work.name}: the engine did not decode {work.new} tokens from scratch for each prompt")
    return seconds


@torch.inference_mode()
def _seconds(speaker: Speaker, prompts: torch.Tensor, work: Workload) -> float:
    ids = prompts.to(speaker.model.device)
    began = perf_counter()
    out = speaker.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=work.new, do_sample=False, use_cache=True
    )
    out = out.cpu()
    seconds = perf_counter() - began
    if out.shape[1] != work.prompt + work.new:
        raise WrongPath(f"{work.name}: transformers did not decode {work.new} tokens for each prompt")
    return seconds


def _ratio(sides: dict[str, Spread]) -> float:
    return sides[SIDES[0]].median / sides[SIDES[1]].median
