"""Checkpoints that measurements write for themselves: SmolLM2 with eyes, classifiers, adapters. They know nothing.

What is random in them costs what the real thing costs; their scores, and what their eyes see, mean nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    PreTrainedTokenizerFast,
)

from ..engine.models.shapes import byte_tokenizer, image_processor_for, named_config

SMOL_LLAVA = "smol-llava"
RANK = 16
LINEARS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
# SmolLM2 never learned this token, so it can stand for an image.
_UNUSED = "<gh_stars>"
_CHAT_ML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def save_smol_llava(text: Path, folder: Path) -> Path:
    """LLaVA on the weights of the language model in `text` (SmolLM2): 576 tokens an image, as LLaVA-1.5 has.

    The tower has the shape of CLIP's base model (12 layers of 768, as the SigLIP of SmolVLM-256M) for 336 pixels in
    patches of 14; it and the projector are random.
    """
    language = AutoModelForCausalLM.from_pretrained(text, dtype=torch.bfloat16)
    tokenizer = _with_image_token(text)
    vision = CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=336,
        patch_size=14,
        projection_dim=512,
    )
    config = LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        text_config=language.config,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    whole = _random(AutoModelForImageTextToText, config)
    whole.model.language_model.load_state_dict(language.model.state_dict())
    whole.tie_weights()
    whole.generation_config = language.generation_config
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor_for(vision.image_size).save_pretrained(folder)
    return folder


def save_classifier(text: Path, folder: Path) -> Path:
    """A sequence classifier with one random logit on all layers of the language model in `text`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(text, num_labels=1, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(text).save_pretrained(folder)
    return folder


def save_shape(name: str, folder: Path, classifier: bool = False) -> Path:
    """A named shape with random weights, as a language model (with eyes where the shape has them) or a classifier."""
    config = named_config(name)
    assert config is not None
    image_token, vocab = None, config.get_text_config().vocab_size
    auto: Any = AutoModelForCausalLM
    if classifier:
        config.num_labels, config.pad_token_id = 1, 2
        auto = AutoModelForSequenceClassification
    elif config.model_type == "llava":
        image_token = config.image_token_id
        auto = AutoModelForImageTextToText
        image_processor_for(config.vision_config.image_size).save_pretrained(folder)
    _random(auto, config).save_pretrained(folder)
    byte_tokenizer(vocab, image_token).save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, *, task: str, invocation: list[int] | None = None, seed: int = 0) -> Path:
    """A random LoRA on all linear maps of the language model in `base`, of rank 16, as PEFT saves it.

    task: CAUSAL_LM, or SEQ_CLS with a head of one label. invocation: token ids of an activated LoRA. The updates
    are small, so that what an adapted model writes stays text.
    """
    text = AutoConfig.from_pretrained(base).get_text_config()
    hidden, ffn = text.hidden_size, text.intermediate_size
    width = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    queries, keys = width * text.num_attention_heads, width * text.num_key_value_heads
    shapes = {
        **{
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
        },
        **{"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)},
    }
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(text.num_hidden_layers):
        for block, maps in LINEARS.items():
            for name in maps:
                out, into = shapes[name]
                module = f"base_model.model.model.layers.{layer}.{block}.{name}"
                tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, into, generator=random) * into**-0.5
                tensors[f"{module}.lora_B.weight"] = torch.randn(out, RANK, generator=random) * 1e-3
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task,
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": [name for maps in LINEARS.values() for name in maps],
        "bias": "none",
        "base_model_name_or_path": str(base),
    }
    if invocation is not None:
        config["alora_invocation_tokens"] = invocation
    if task == "SEQ_CLS":
        config["modules_to_save"] = ["score"]
        tensors["base_model.model.score.weight"] = torch.randn(1, hidden, generator=random) * hidden**-0.5
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def _random(auto: Any, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(config, dtype=torch.bfloat16)


def _with_image_token(folder: Path) -> PreTrainedTokenizerFast:
    """The folder's tokenizer with `<image>` in place of a token that is not used, and a chat template with images."""
    known = AutoTokenizer.from_pretrained(folder)
    tokenizer = type(known.backend_tokenizer).from_str(known.backend_tokenizer.to_str().replace(_UNUSED, "<image>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_CHAT_ML,
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": getattr(known, f"{name}_token") for name in ("bos", "eos", "unk", "pad")},
    )
