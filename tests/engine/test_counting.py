"""Sequences that count, by a model that can only do it through its cache: whatever is corrupted there shows.

The weights are made by hand. Queries and keys are constants, so that rotary positions alone decide who looks where:
each token looks back exactly `REACH` tokens, across pages, and the next token is the one it sees there, plus one.
"""

from __future__ import annotations

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stockade.engine.engine import Engine
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.models.shapes import byte_tokenizer
from stockade.engine.sampling import SamplingParams

REACH = 37
VOCAB, WIDTH = 384, 64
LOW = 4  # numbers are the tokens from here on; those below are special
NUMBERS = VOCAB - LOW


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory) -> ModelSet:
    folder = tmp_path_factory.mktemp("counter")
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=512,
        attention_bias=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    half = WIDTH // 2
    turned = REACH / 10000 ** (torch.arange(half) / half)
    codes = torch.nn.functional.normalize(
        torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0)), dim=1
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
        attention = model.model.layers[0].self_attn
        attention.k_proj.bias[:half] = 20.0
        attention.q_proj.bias[:] = 20.0 * torch.cat((turned.cos(), -turned.sin()))
        attention.v_proj.weight[:] = torch.eye(WIDTH)
        attention.o_proj.weight[:] = 10.0 * torch.eye(WIDTH)
        model.model.embed_tokens.weight[:] = codes
        for number in range(NUMBERS):
            model.lm_head.weight[LOW + (number + 1) % NUMBERS] = codes[LOW + number]
    model.save_pretrained(folder)
    byte_tokenizer(VOCAB).save_pretrained(folder)
    return load_models(folder, dtype=torch.float32)


def counted(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(LOW + (tokens[-1 - REACH] - LOW + 1) % NUMBERS)
    return tokens[len(prompt) :]


def params(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, ignore_eos=True)


def test_the_model_counts(counter: ModelSet) -> None:
    prompt = list(range(LOW, LOW + REACH + 1))
    reply = Engine(models=counter, kv_bytes=1 << 20, tokens_per_page=16).generate([prompt], params(400))[0]
    assert reply.token_ids == counted(prompt, 400)
    assert reply.token_ids[: REACH + 1] == list(range(LOW + 1, LOW + REACH + 2))


@pytest.mark.parametrize("pages", [30, 70, 1000], ids=["very tight", "tight", "roomy"])
def test_many_sequences_with_shared_beginnings_preemptions_and_aborts_all_count(
    counter: ModelSet, pages: int
) -> None:
    choose = random.Random(pages)
    size = counter.models["mllm"].layout(16).page_bytes
    engine = Engine(models=counter, kv_bytes=pages * size, tokens_per_page=16, max_batch_tokens=50, max_sequences=24)
    texts = [[choose.randrange(LOW, VOCAB) for _ in range(120)] for _ in range(4)]
    expected = {}
    aborted = replies = 0
    for step in range(700):
        if len(engine.driver.requests) < 24 and step < 450:
            known = choose.choice(texts)
            prompt = [
                *known[: choose.randrange(0, len(known))],
                *(choose.randrange(LOW, VOCAB) for _ in range(choose.randrange(0, 30))),
            ]
            prompt += [choose.randrange(LOW, VOCAB) for _ in range(REACH + 1 - len(prompt))]
            count = choose.randrange(1, 90)
            request = engine.submit_prompt(prompt, params(count))
            expected[request.id] = (prompt, count)
        for reply in engine.step():
            prompt, count = expected[reply.id]
            assert reply.token_ids == counted(prompt, count)
            replies += 1
            if choose.random() < 0.3:  # later ones go on from here
                texts[choose.randrange(4)] = [*prompt, *reply.token_ids]
        engine.check_integrity()
        if engine.driver.requests and choose.random() < 0.05:
            engine.abort(choose.choice(list(engine.driver.requests)))
            aborted += 1
        if step % 97 == 0:
            engine.pool.clear_cache()
    while engine.has_work:
        for reply in engine.step():
            prompt, count = expected[reply.id]
            assert reply.token_ids == counted(prompt, count)
            replies += 1
    engine.check_integrity()
    assert engine.pool.owned_pages == 0
    assert replies + aborted == len(expected) and replies > 40 and aborted > 5
    assert (engine.scheduler.preemptions > 0) == (pages < 1000)
    assert (engine.pool.evictions > 100) or pages == 1000
