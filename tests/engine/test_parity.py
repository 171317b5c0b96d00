"""The engine against `transformers`, in fp32 on the CPU: the same logits and the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from stockade.engine.engine import Engine
from stockade.engine.sampling import SamplingParams
from tests.conftest import FAMILIES

GREEDY = SamplingParams(max_tokens=64, ignore_eos=True)


def prompts(count: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 380, (n,), generator=generator).tolist() for n in (1, 9, 33, 70, 130)[:count]]


def reference_tokens(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    model.generation_config.eos_token_id = None  # type: ignore[union-attr, assignment]
    out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=2)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_logits_are_those_of_transformers(family: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine = Engine(folder, device="cpu", dtype=torch.float32, kv_bytes=16 << 20, tokens_per_page=16)
    with torch.inference_mode():
        for prompt in prompts():
            want = model(torch.tensor([prompt])).logits[0, -1]
            assert torch.allclose(last_logits(engine, prompt), want, atol=1e-4, rtol=0)
    replies = engine.generate(prompts(), GREEDY)
    for prompt, reply in zip(prompts(), replies, strict=True):
        assert reply.token_ids == reference_tokens(model, prompt, 64)
    engine.check_integrity()
    assert engine.pool.owned_pages == 0


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "phi3", "granite"])
def test_chunks_and_hits_change_no_token(family: str, checkpoint: Callable[[str], Path]) -> None:
    folder, many = checkpoint(family), prompts()[1:4]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    want = [reference_tokens(model, prompt, 16) for prompt in many]
    engine = Engine(
        folder, device="cpu", dtype=torch.float32, kv_bytes=16 << 20, tokens_per_page=16, max_batch_tokens=13
    )
    for _ in range(2):
        replies = engine.generate(many, SamplingParams(max_tokens=16, ignore_eos=True))
        assert [reply.token_ids for reply in replies] == want
    assert [reply.passes[0].cached_tokens for reply in replies] == [len(prompt) - 1 for prompt in many]
    engine.check_integrity()


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "phi3", "granite"])
def test_bf16_errs_no_more_than_transformers_in_bf16(family: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(family)
    exact, theirs = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval() for dtype in (torch.float64, torch.bfloat16)
    )
    engine = Engine(folder, device="cpu", dtype=torch.bfloat16, kv_bytes=16 << 20, tokens_per_page=16)
    # of all prompts together: of a single one, which rounding is luckier depends on the processor
    their_errors, our_errors = [], []
    with torch.inference_mode():
        for prompt in prompts():
            want = exact(torch.tensor([prompt])).logits[0, -1]
            their_errors.append(theirs(torch.tensor([prompt])).logits[0, -1] - want)
            our_errors.append(last_logits(engine, prompt) - want)
    assert torch.cat(our_errors).norm() < 1.25 * torch.cat(their_errors).norm()


def last_logits(engine: Engine, prompt: list[int]) -> torch.Tensor:
    # of whom more than a token is asked, the logits are on the host
    engine.submit_prompt(prompt, SamplingParams(max_tokens=1, logprobs=0))
    works = engine.scheduler.schedule(engine.lanes[0])
    result = engine.runner.run(engine.lanes[0], works)
    assert result.logits is not None
    for work in works:
        engine.scheduler.advance(work)
    engine.driver.deliver(engine.lanes[0], result)
    return result.logits[0]
