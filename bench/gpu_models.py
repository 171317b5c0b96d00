"""Whole models of random weights on a GPU: decode steps, beside `transformers`, beside a detector that reads along.

What a step takes is the time from its beginning to the next one's, so that nothing the host does between is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from statistics import mean
from time import perf_counter

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from ..engine.engine import Engine
from ..engine.guards import Guard
from ..engine.guards.heads import HarmHead
from ..engine.models.eight_bits import missing_for
from ..engine.models.shapes import named_config
from ..engine.sampling import SamplingParams
from ..engine.trace import Recorder
from .gpu_parts import Figure, Sizes
from .gpu_timing import synchronize
from .report import Spread, WrongPath
from .workload import WORDS

TARGETS = {1: 3.8, 8: 4.9, 64: 13.5}  # ms of a decode step, by batch
SPEEDUPS = {1: 5.0, 64: 2.5}  # against `transformers`, by batch


def decode_steps(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """Steps that do nothing but decode, at a context that is about as long in all of them."""
    for batch, figure in _steps(sizes, device):
        yield replace(figure, target=TARGETS.get(batch))


def eight_bit_steps(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """The same steps with weights of 8 bits, and with pages of fp8, where the device has them."""
    kinds: list[tuple[str, str | None, str | None]] = [("int8 weights", "int8", None)]
    if missing_for("fp8", device) is None:
        kinds += [("fp8 weights", "fp8", None), ("fp8 pages", None, "fp8"), ("fp8 weights and pages", "fp8", "fp8")]
    elif device.type == "cpu":
        kinds.append(("fp8 pages", None, "fp8"))
    for name, weights, kv_dtype in kinds:
        for _, figure in _steps(sizes, device, weights, kv_dtype):
            yield replace(figure, part="8 bits", what=f"{name}, {figure.what}")


def _steps(
    sizes: Sizes, device: torch.device, weights: str | None = None, kv_dtype: str | None = None
) -> Iterator[tuple[int, Figure]]:
    engine = Engine(
        sizes.model,
        device=device,
        dtype=torch.bfloat16,
        weights=weights,
        kv_dtype=kv_dtype,
        kv_bytes=sizes.kv_bytes,
    )
    for batch in sizes.batches:
        took: list[float] = []
        for round in range(2):  # the first warms up: compiles, captures
            prompts = _prompts(engine, batch, sizes.context - sizes.steps // 2, round)
            took = _decoding(engine, prompts, sizes.steps, batch)
        spread = Spread.of(took)
        yield batch, Figure("decode steps", f"batch {batch}", spread.median * 1e3, "ms", samples=_in_ms(took))


def beside_transformers(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """New tokens a second of one text model here and in `transformers`, greedy, in turn in one run."""
    engine = Engine(sizes.text_model, device=device, dtype=torch.bfloat16, kv_bytes=sizes.kv_bytes)
    config = named_config(sizes.text_model)
    with torch.device(device):
        theirs = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    theirs.generation_config.eos_token_id = None
    for batch in sizes.beside:
        ratios, rates = [], []
        for round in range(sizes.rounds + 1):
            prompts = _prompts(engine, batch, sizes.prompt, round)
            own = _seconds_here(engine, prompts, sizes.new)
            other = _seconds_there(theirs, prompts, sizes.new, device)
            if round:  # the first warms up
                ratios.append(other / own)
                rates.append(batch * sizes.new / own)
        part, what = "beside transformers", f"batch {batch}"
        yield Figure(part, what, Spread.of(rates).median, "tokens/s")
        yield Figure(
            part, f"{what}, transformers' time", Spread.of(ratios).median, "x", SPEEDUPS.get(batch), at_most=False
        )


def beside_detection(sizes: Sizes, device: torch.device) -> Iterator[Figure]:
    """Decode steps of answers that nobody reads, and of such that a detector of its own weights reads along."""
    engine = Engine(sizes.model, sizes.detector, device=device, dtype=torch.bfloat16, kv_bytes=sizes.kv_bytes)
    # whatever random weights say of random text is harmless
    guard = Guard(detector=HarmHead("detector", threshold=-1.0, prefix_threshold=-1.0))
    took: dict[str, list[float]] = {}
    for round in range(2):  # the first warms up
        for name, some in (("alone", None), ("with a detector", guard)):
            took[name] = _answering(engine, some, sizes, f"{round} {name}")
    alone, beside = took["alone"], took["with a detector"]
    part = f"{sizes.answers} answers of {sizes.answer} tokens"
    for name, steps in took.items():
        yield Figure("detection", f"{part}, {name}", mean(steps) * 1e3, "ms", samples=_in_ms(steps))
        yield Figure("detection", f"{part}, {name}, p99", float(np.percentile(steps, 99)) * 1e3, "ms")
    slower = 100 * (mean(beside) / mean(alone) - 1)
    yield Figure("detection", f"{part}, decode is slower by", slower, "%", 8.0)


def _prompts(engine: Engine, count: int, tokens: int, seed: int) -> list[list[int]]:
    """Of ordinary tokens, other ones every time."""
    codec = engine.models["mllm"].codec
    ordinary = [token for token in range(codec.vocab_size) if token not in codec.special_ids]
    generator = torch.Generator().manual_seed(1000 * seed + count)
    picked = torch.randint(len(ordinary), (count, tokens), generator=generator)
    return [[ordinary[index] for index in row] for row in picked.tolist()]


def _decoding(engine: Engine, prompts: list[list[int]], steps: int, batch: int) -> list[float]:
    engine.pool.clear_cache()
    engine.recorder = Recorder()
    engine.generate(prompts, SamplingParams(max_tokens=steps + 1, ignore_eos=True))
    return _periods(engine.recorder, batch)


def _answering(engine: Engine, guard: Guard | None, sizes: Sizes, what: str) -> list[float]:
    engine.pool.clear_cache()
    engine.recorder = Recorder()
    chats = [f"{what} {number} {' '.join(WORDS)}" for number in range(sizes.answers)]
    sampling = SamplingParams(max_tokens=sizes.answer, ignore_eos=True)
    replies = engine.chat(chats, guard=guard, sampling=sampling)
    if any(len(reply.passes[0].token_ids) != sizes.answer for reply in replies):
        raise WrongPath(f"answers of {[len(reply.passes[0].token_ids) for reply in replies]} tokens")
    return _periods(engine.recorder, sizes.answers)


def _periods(recorder: Recorder, batch: int) -> list[float]:
    """Seconds from step to step, of those between two that decode the whole batch."""
    lane = [step for step in recorder.steps if "mllm" in step.lane]
    full = [len(step.works) == batch and all(work.role == "decode" for work in step.works) for step in lane]
    took = [
        after.began - before.began
        for (before, after), (first, second) in zip(pairwise(lane), pairwise(full), strict=True)
        if first and second
    ]
    if not took:
        raise WrongPath(f"no two steps in a row decoded {batch} texts and nothing else")
    return took


def _seconds_here(engine: Engine, prompts: list[list[int]], new: int) -> float:
    engine.pool.clear_cache()
    engine.recorder = None
    synchronize(engine.device)
    began = perf_counter()
    replies = engine.generate(prompts, SamplingParams(max_tokens=new, ignore_eos=True))
    seconds = perf_counter() - began
    if any(len(reply.token_ids) != new for reply in replies):
        raise WrongPath(f"the engine did not decode {new} tokens for each prompt")
    return seconds


@torch.inference_mode()
def _seconds_there(model: torch.nn.Module, prompts: list[list[int]], new: int, device: torch.device) -> float:
    ids = torch.tensor(prompts, device=device)
    synchronize(device)
    began = perf_counter()
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
    )
    synchronize(device)
    seconds = perf_counter() - began
    if out.shape[1] != ids.shape[1] + new:
        raise WrongPath(f"transformers did not decode {new} tokens for each prompt")
    return seconds


def _in_ms(seconds: list[float]) -> tuple[float, ...]:
    return tuple(round(1e3 * one, 4) for one in seconds)
