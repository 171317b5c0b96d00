"""What the fallback refuses, and what it needs to know before it runs a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Llama4ForConditionalGeneration,
)

from stockade.engine.engine import Engine
from stockade.engine.errors import CheckpointMismatch, ImagesNotSupported, PromptTooLong, UnknownArchitecture
from stockade.engine.models import fallback
from stockade.engine.models.loader import load_models
from stockade.engine.models.sources import Attached
from stockade.engine.sampling import SamplingParams
from tests.conftest import BASE, llama4_config, save_tokenizer

SHORT = SamplingParams(max_tokens=5, ignore_eos=True)
MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
# What each architecture has that pages, or the fallback, have not; with how small ones are made.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gpt2": ({}, "positions are learned"),
    "opt": ({"ffn_dim": 96, "word_embed_proj_dim": 64}, "positions are learned"),
    "falcon": ({}, "an attention of its own"),
    "stablelm": ({}, "StableLmAttention is not handed what its layer is called with"),
    "diffllama": ({}, "layer 0 attends 2 times"),
    "gpt_oss": ({"num_local_experts": 4, "head_dim": 16}, "GptOssAttention wants s_aux"),
    "deepseek_v3": ({**MLA, "first_k_dense_replace": 9}, "16, 16 and 12 numbers a head"),
    "mamba": ({}, "layers of linear_attention"),
    "falcon_h1": (
        {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
        "layers of hybrid",
    ),
    "olmo2": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rotary scaling 'dynamic'",
    ),
}


def save(model: Any, folder: Path) -> Path:
    model.eval().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("kind", REFUSED)
def test_architectures_that_pages_cannot_run(kind: str, tmp_path: Path) -> None:
    settings, reason = REFUSED[kind]
    folder = save(
        AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**BASE, "num_hidden_layers": 2, **settings})),
        tmp_path,
    )
    with pytest.raises(UnknownArchitecture, match=reason):
        load_models(folder, dtype=torch.float32)


def test_the_refusal_says_what_the_engine_itself_runs(tmp_path: Path) -> None:
    folder = save(AutoModelForCausalLM.from_config(CONFIG_MAPPING["gpt2"](**BASE)), tmp_path)
    with pytest.raises(
        UnknownArchitecture, match=r"unknown architecture 'gpt2'; known: llama, mistral, qwen2.*fallback"
    ):
        load_models(folder, dtype=torch.float32)


def test_what_neither_runs_is_said_once(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    folder = changed(checkpoint("llama-gqa"), tmp_path / "changed", rope_parameters=dynamic)
    with pytest.raises(
        UnknownArchitecture, match=r"^rotary scaling 'dynamic' [^;]*; known: [^;]*; nor does the fall"
    ):
        load_models(folder, dtype=torch.float32)


def test_a_model_that_runs_differently_on_pages_is_refused(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if its windows did not reach the attention, which only the trial run can tell."""
    real = fallback._attention
    monkeypatch.setattr(fallback, "_attention", lambda *args, sliding_window=None, **rest: real(*args, **rest))
    load_models(checkpoint("olmo2"), dtype=torch.float32)
    for kind in ("starcoder2", "cohere2"):
        with pytest.raises(UnknownArchitecture, match="away from those of its own forward pass"):
            load_models(checkpoint(kind), dtype=torch.float32)


# --- Llama 4 attends as pages do up to a length, and is run up to there ---


@pytest.mark.parametrize(
    ("text", "context"),
    [
        ({"attention_chunk_size": 50, "floor_scale": 999}, 50),
        ({"attention_chunk_size": 999, "floor_scale": 51, "attn_scale": 9.0}, 50),
        ({"attention_chunk_size": None, "floor_scale": 51}, 50),  # as Llama Guard 4 says that there are no chunks
        ({"attention_chunk_size": None, "attn_temperature_tuning": False, "floor_scale": 9}, 2048),
    ],
)
def test_llama4_runs_up_to_where_it_attends_otherwise(text: dict[str, Any], context: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = save(Llama4ForConditionalGeneration(llama4_config(**text)), tmp_path)
    engine = Engine(folder, dtype=torch.float32, kv_bytes=8 << 20)
    assert engine.models["mllm"].context == context
    config = llama4_config(**text).get_text_config()
    config.attention_chunk_size = config.attention_chunk_size or 2048  # without one it has no mask
    reference = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    # together they have more rows than any of them may have tokens
    prompts = [[*range(start, start + 45)] for start in (10, 80, 150)]
    for prompt, reply in zip(prompts, engine.generate(prompts, SHORT), strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + reply.token_ids])).logits[0]
        assert reply.token_ids == logits[44:-1].argmax(-1).tolist()
    if context == 50:
        (reply,) = engine.generate([prompts[0]], SamplingParams(max_tokens=50, ignore_eos=True))
        assert len(reply.token_ids) == 5
        with pytest.raises(PromptTooLong, match="50 tokens; mllm takes at most 49 and must have room to answer"):
            engine.generate([list(range(50))], SHORT)


def test_llama4_without_its_eyes(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    engine = Engine(checkpoint("llama4"), dtype=torch.float32, kv_bytes=8 << 20)
    picture = {"type": "image", "image": Image.new("RGB", (9, 9))}
    with pytest.raises(ImagesNotSupported, match="mllm reads text only"):
        engine.chat([[{"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]}]])
    folder = changed(checkpoint("llama4"), tmp_path / "changed", quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnknownArchitecture, match="its configuration has a quantization_config"):
        load_models(folder, dtype=torch.float32)
    folder = shutil.copytree(checkpoint("llama4"), tmp_path / "more")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "language_model.surprise": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"has unknown tensors: language_model\.surprise"):
        load_models(folder, dtype=torch.float32)


def changed(folder: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return target


def rename(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.surprise.weight"] = weights.pop("model.layers.0.mlp.down_proj.weight")


def cut(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.1.self_attn.o_proj.weight"] = torch.zeros(64, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, "lacks model.layers.0.mlp.down_proj.weight"),
        (cut, r"has wrong shapes: .*model.layers.1.self_attn.o_proj.*32"),
    ],
)
def test_weights_that_are_not_what_the_configuration_says(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint("olmo2"), tmp_path / "changed")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatch, match=message):
        load_models(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"fusion_config": {"fuse_qkv": True}},
        {"transformers_weights": "elsewhere.safetensors"},
    ],
)
def test_a_configuration_makes_transformers_run_nothing_else(
    config: dict[str, Any], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UnknownArchitecture, match=f"its configuration has a {next(iter(config))}"):
        load_models(changed(checkpoint("olmo2"), tmp_path / "changed", **config), dtype=torch.float32)


def test_an_attention_kernel_that_a_configuration_names_is_not_fetched(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    names = {"_attn_implementation": "someone/kernel", "attn_implementation": "someone/kernel"}
    folder = changed(checkpoint("olmo2"), tmp_path / "changed", **names)
    (want,) = Engine(checkpoint("olmo2"), dtype=torch.float32, kv_bytes=8 << 20).generate([[5, 6, 7]], SHORT)
    (got,) = Engine(folder, dtype=torch.float32, kv_bytes=8 << 20).generate([[5, 6, 7]], SHORT)
    assert got.token_ids == want.token_ids


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama-gqa", {"hidden_act": "gelu"}),
        ("gemma2", {"hidden_activation": "gelu"}),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4}}),
    ],
)
def test_variants_that_the_engines_own_decoder_lacks_run_on_the_fallback(
    family: str, config: dict[str, Any], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = changed(checkpoint(family), tmp_path / "changed", **config)
    engine = Engine(folder, dtype=torch.float32, kv_bytes=8 << 20)
    assert isinstance(engine.models["mllm"].backbone.decoder, fallback.FallbackDecoder)
    (reply,) = engine.generate([list(range(10, 60))], SHORT)
    # eager, because older releases drop the soft cap elsewhere
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        logits = model(torch.tensor([[*range(10, 60), *reply.token_ids]])).logits[0]
    assert reply.token_ids == logits[49:-1].argmax(-1).tolist()


def test_classifiers_and_encoders_are_refused(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    config = CONFIG_MAPPING["mixtral"](**BASE, num_local_experts=2, num_labels=1)
    classifier = save(AutoModelForSequenceClassification.from_config(config), tmp_path / "classifier")
    with pytest.raises(UnknownArchitecture, match="it is a sequence classifier"):
        load_models(checkpoint("olmo2"), classifier, dtype=torch.float32)
    small = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 384}
    folder = save(AutoModel.from_config(CONFIG_MAPPING["t5"](**small)), tmp_path / "t5")
    with pytest.raises(UnknownArchitecture, match="an encoder with a decoder"):
        load_models(folder, dtype=torch.float32)


def test_adapters_are_merged_and_never_attached(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    base = checkpoint("olmo2")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path)
    (reply,) = Engine((tmp_path, base), dtype=torch.float32, kv_bytes=8 << 20).generate([[5, 6, 7]], SHORT)
    with torch.inference_mode():
        logits = adapted(torch.tensor([[5, 6, 7, *reply.token_ids]])).logits[0]
    assert reply.token_ids == logits[2:-1].argmax(-1).tolist()
    with pytest.raises(UnknownArchitecture, match=r"merged adapters only, \(adapter, base\)"):
        load_models(base, detoxifier=Attached(tmp_path), dtype=torch.float32)


@pytest.mark.parametrize("kind", ["mixtral", "cohere2"])
def test_bf16_stays_close_to_fp32(kind: str, checkpoint: Callable[[str], Path]) -> None:
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(checkpoint(kind), dtype=dtype, kv_bytes=16 << 20, tokens_per_page=16)
        engine.submit_prompt(list(range(10, 60)), SHORT)
        result = engine.runner.run(engine.lanes[0], engine.scheduler.schedule(engine.lanes[0]))
        assert result.logits is not None and result.logits.dtype == dtype
        logits.append(result.logits[0].float())
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.1


def test_equal_weights_run_differently_share_no_pages(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Weights do not say how wide a window is."""
    folder = changed(checkpoint("starcoder2"), tmp_path / "changed", sliding_window=7)
    found = [
        load_models(item, dtype=torch.float32).models["mllm"].backbone for item in (checkpoint("starcoder2"), folder)
    ]
    assert found[0].content_hash == found[1].content_hash and found[0].cache_key != found[1].cache_key
