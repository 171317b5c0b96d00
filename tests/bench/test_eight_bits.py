"""What is said of int8 weights is what the engine's own steps choose."""

from __future__ import annotations

import torch

from stockade.bench.eight_bits import FORCED, next_tokens
from stockade.engine.engine import Engine
from stockade.engine.sampling import SamplingParams


def test_the_likeliest_tokens_are_those_that_the_engine_takes() -> None:
    engine = Engine("tiny-llama", device="cpu", dtype=torch.float32, kv_bytes=1 << 20, weights="int8")
    ids = [5 + number % 200 for number in range(FORCED + 6)]
    found = next_tokens(engine.models["mllm"], ids)
    greedy = SamplingParams(max_tokens=1, ignore_eos=True)
    prompts = [ids[:-3], ids]
    assert len(found) == FORCED
    assert [reply.token_ids for reply in engine.generate(prompts, greedy)] == [[int(found[-4])], [int(found[-1])]]
