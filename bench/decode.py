"""Decoding and prefill against `transformers`: the same weights and prompts, interleaved in one run, no guard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from rich.console import RenderableType
from rich.table import Table

from ..engine.engine import Engine
from ..engine.sampling import SamplingParams
from .published import Speaker
from .report import Spread, WrongPath
from .units import Unit
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


class DecodePlan:
    """A piece of work is one round of all workloads on both sides; the last one is the machine's memory."""

    kind = "decode"

    def __init__(self, sources: Sources, config: DecodeConfig, dtype: torch.dtype | None = None) -> None:
        self.config, self.seed = config, config.seed
        self._engine = sources.engine(dtype)
        model = self._engine.models["mllm"]
        own = model.backbone.decoder.dtype
        self._speaker = Speaker(sources.folder, own, self._engine.device, ignore_eos=True)
        self._ordinary = torch.tensor(
            [token for token in range(model.codec.vocab_size) if token not in model.codec.special_ids]
        )
        self.settings = {"model": sources.name, "dtype": str(own).removeprefix("torch."), **asdict(config)}
        self._works = [
            Workload(f"batch {rows}", rows, config.prompt_tokens, config.new_tokens, rows * config.new_tokens)
            for rows in config.batches
        ]
        self._works.append(Workload(f"prefill {config.prefill}", 1, config.prefill, 1, config.prefill))

    def warm_up(self) -> None:
        self._round(-1)

    def units(self, done: dict[str, Any]) -> Iterator[Unit]:
        for repeat in range(self.config.repeats):
            yield f"round {repeat}", partial(self._round, repeat)
        yield "memory", partial(read_bandwidth, self._engine.device)

    def _round(self, repeat: int) -> dict[str, dict[str, float]]:
        """Tokens/s by workload, then by side. Raises `WrongPath` if a side stopped short."""
        generator = torch.Generator().manual_seed(self.seed * 1000 + repeat + 1)
        rates: dict[str, dict[str, float]] = {}
        for work in self._works:
            picked = torch.randint(len(self._ordinary), (work.rows, work.prompt), generator=generator)
            prompts, found = self._ordinary[picked], {}
            for side in SIDES[:: 1 if repeat % 2 else -1]:
                engine = side == SIDES[0]
                seconds = (
                    _engine_seconds(self._engine, prompts, work) if engine else _seconds(self._speaker, prompts, work)
                )
                found[side] = work.counted / seconds
            rates[work.name] = found
        return rates

    def rows(self, done: dict[str, Any]) -> list[dict[str, Any]]:
        """Rates count new tokens over the whole time, the prompt's reading included; those of a prefill count the
        prompt's tokens over the time to its first new token. ratio: of the rounds' own ratios."""
        rounds = [found for name, found in done.items() if name.startswith("round")]
        rows = []
        for work in self._works if rounds else ():
            sides = [found[work.name] for found in rounds]
            rates = {side: Spread.of(found[side] for found in sides).to_dict() for side in SIDES}
            ratio = Spread.of(found[SIDES[0]] / found[SIDES[1]] for found in sides).to_dict()
            rows.append({"workload": work.name, "n": len(sides), "tokens_per_s": rates, "ratio": ratio})
        return rows

    def more(self, done: dict[str, Any]) -> dict[str, Any]:
        """weight_bytes: read in one step. The bound is what a step allows that costs nothing but reading them."""
        if "memory" not in done:
            return {}
        weights, bandwidth = weight_bytes(self._speaker.model), done["memory"]
        bound = round(bandwidth / weights, 2)
        return {
            "memory": {
                "weight_bytes": weights,
                "bytes_per_second": round(bandwidth),
                "tokens_per_second_at_batch_1": bound,
            }
        }

    def table(self, done: dict[str, Any]) -> RenderableType:
        config, memory = self.config, self.more(done).get("memory")
        table = Table(
            title=f"{self.settings['model']} {self.settings['dtype']}: {config.prompt_tokens} tokens in, "
            f"{config.new_tokens} out, tokens/s: median (p10-p90)",
            caption=memory
            and f"memory: {memory['bytes_per_second'] / 1e9:.1f} GB/s, {memory['weight_bytes'] / 1e6:,.0f} MB of "
            f"weights a step: at most {memory['tokens_per_second_at_batch_1']:.1f} tokens/s at batch 1",
        )
        table.add_column("workload")
        for heading in ("n", *SIDES, "ratio"):
            table.add_column(heading, justify="right")
        for row in self.rows(done):
            rates = (str(Spread(**row["tokens_per_s"][side])) for side in SIDES)
            table.add_row(row["workload"], str(row["n"]), *rates, f"{row['ratio']['median']:.2f}")
        return table


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
