"""Tiny random checkpoints, written by `transformers`, one folder a family."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Without a GPU Triton kernels run in Triton's interpreter. Triton looks that up when a kernel is defined, its own
# included: hence before anything here imports it, as transformers does.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Cohere2Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4Config,
    GPTNeoXConfig,
    GraniteConfig,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    Starcoder2Config,
)

from stockade.engine.engine import Engine
from stockade.engine.models.shapes import byte_tokenizer, image_processor_for, named_config

VOCAB = 384
IMAGE_TOKEN = 383
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "initializer_range": 0.2,
}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama-gqa": lambda: LlamaConfig(**BASE),
    "llama-mha-tied": lambda: LlamaConfig(**{**BASE, "num_key_value_heads": 4}, tie_word_embeddings=True),
    "llama-biases": lambda: LlamaConfig(**BASE, attention_bias=True, mlp_bias=True),
    # wider, so smaller weights: else attention is all but an argmax, and fp32 itself errs by 1e-4
    "llama-dim100": lambda: LlamaConfig(
        **{**BASE, "hidden_size": 200, "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.11},
        head_dim=100,
    ),
    "llama3-rope": lambda: LlamaConfig(
        **BASE,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama-linear-rope": lambda: LlamaConfig(
        **BASE, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "llama-yarn": lambda: LlamaConfig(
        **BASE,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ),
    "mistral-window": lambda: MistralConfig(**BASE, sliding_window=24),
    "mistral-head-dim": lambda: MistralConfig(**BASE, head_dim=32, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**BASE),
    "qwen2-tied": lambda: Qwen2Config(**BASE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**BASE, head_dim=24),
    "qwen3-window": lambda: Qwen3Config(
        **BASE, head_dim=16, use_sliding_window=True, sliding_window=20, max_window_layers=1
    ),
    "gemma2": lambda: Gemma2Config(
        **BASE, head_dim=24, query_pre_attn_scalar=20, sliding_window=20, attn_logit_softcapping=3.0
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **BASE,
        head_dim=24,
        query_pre_attn_scalar=20,
        sliding_window=20,
        sliding_window_pattern=2,
        final_logit_softcapping=5.0,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "phi3": lambda: Phi3Config(**BASE, sliding_window=30),
    "granite": lambda: GraniteConfig(
        **BASE,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.1,
        logits_scaling=8.0,
        tie_word_embeddings=True,
    ),
}


# Architectures that the engine's own decoder does not have.
ROOMY = {**BASE, "max_position_embeddings": 2048}
LLAMA4 = {
    **ROOMY,
    "head_dim": 16,
    "intermediate_size_mlp": 80,
    "floor_scale": 400,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
    },
}
OTHER_FAMILIES: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralConfig(**ROOMY, num_local_experts=4, num_experts_per_tok=2, sliding_window=20),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **ROOMY, head_dim=24, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[1]
    ),
    "olmo2": lambda: Olmo2Config(**ROOMY),
    "starcoder2": lambda: Starcoder2Config(**ROOMY, sliding_window=24),
    "gpt_neox": lambda: GPTNeoXConfig(**ROOMY),
    "cohere2": lambda: Cohere2Config(
        **ROOMY, sliding_window=20, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "glm4": lambda: Glm4Config(**ROOMY, head_dim=16),
    "smollm3": lambda: SmolLM3Config(**ROOMY, no_rope_layers=[1, 0, 1]),
    "exaone4": lambda: Exaone4Config(
        **ROOMY, sliding_window=20, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "llama4_text": lambda: Llama4TextConfig(
        **LLAMA4, num_local_experts=2, interleave_moe_layer_step=2, no_rope_layers=[1, 0, 1]
    ),
    "llama4": lambda: llama4_config(attention_chunk_size=512),
}


def llama4_config(**text: Any) -> Llama4Config:
    """As that of Llama Guard 4: experts nowhere."""
    eyes = {
        **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
        **{"image_size": 28, "patch_size": 14, "vision_output_dim": 32},
        **{"projector_input_dim": 32, "projector_output_dim": 32},
    }
    dense = {"moe_layers": [], "num_local_experts": 0, "num_experts_per_tok": 0, "no_rope_layer_interval": 2}
    return Llama4Config(text_config={**LLAMA4, **dense, **text}, vision_config=eyes)


def save_tokenizer(folder: Path, image_token: int | None = None) -> None:
    byte_tokenizer(VOCAB, image_token).save_pretrained(folder)


def scatter_norms(model: torch.nn.Module) -> None:
    """Fresh models have norms of ones and biases of zeros, which would hide their misplacement."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoint(family) -> folder of a tiny random language model in fp32; "llava" and "classifier" too."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            torch.manual_seed(len(family))
            if family == "llava":
                model, image_token = tiny_llava(folder), IMAGE_TOKEN
            elif family == "llama4":
                model, image_token = Llama4ForConditionalGeneration(OTHER_FAMILIES[family]()), None
            elif family.startswith("classifier"):
                kind = family.removeprefix("classifier-") if "-" in family else "llama-gqa"
                config = FAMILIES[kind]()
                config.num_labels = 1
                model, image_token = AutoModelForSequenceClassification.from_config(config), None
            else:
                model, image_token = AutoModelForCausalLM.from_config({**FAMILIES, **OTHER_FAMILIES}[family]()), None
            scatter_norms(model)
            model.eval().save_pretrained(folder)
            save_tokenizer(folder, image_token)
            made[family] = folder
        return made[family]

    return make


def tiny_llava(folder: Path) -> LlavaForConditionalGeneration:
    eyes = named_config("tiny-llava")
    assert eyes is not None
    config = LlavaConfig(
        text_config=LlamaConfig(**BASE),
        vision_config=eyes.vision_config,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    image_processor_for(56).save_pretrained(folder)
    return LlavaForConditionalGeneration(config)


@pytest.fixture
def engine(checkpoint: Callable[[str], Path]) -> Engine:
    """A fresh fp32 engine on the CPU with a model, a detector and a detoxifier of tiny random weights."""
    return Engine(
        checkpoint("llama-gqa"),
        checkpoint("classifier"),
        checkpoint("llama-mha-tied"),
        device="cpu",
        dtype=torch.float32,
        kv_bytes=32 << 20,
        tokens_per_page=16,
    )
