"""LoRA folders: merged at load as `peft` merges them, with every tensor used, or refused."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from stockade.engine.errors import CheckpointMismatch, CheckpointMissing, UnknownArchitecture, UnsafeCheckpoint
from stockade.engine.models.checkpoint import open_checkpoint

SHAPE = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ATTENTION = ["q_proj", "v_proj"]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VARIANTS = {
    "attention": LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, task_type="CAUSAL_LM"),
    "every linear": LoraConfig(r=3, lora_alpha=7, target_modules=LINEARS, task_type="CAUSAL_LM"),
    "rank-stabilized": LoraConfig(
        r=4, lora_alpha=8, target_modules=ATTENTION, use_rslora=True, task_type="CAUSAL_LM"
    ),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=LINEARS,
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 5},
        alpha_pattern={"^model.layers.0.self_attn.v_proj": 3, "down_proj": 16},
        task_type="CAUSAL_LM",
    ),
    "with the head": LoraConfig(r=4, target_modules=ATTENTION, modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
}


def random_lora(model):
    """Give B (zeros at first) and saved heads something to do."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.1)
    return model


def saved(tmp_path, lora, model_class=LlamaForCausalLM):
    """A base folder, an adapter folder for it, and the parameters after peft's own merge."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "base")
    base = model_class.from_pretrained(
        tmp_path / "base", **({"num_labels": 1} if model_class is LlamaForSequenceClassification else {})
    )
    model = random_lora(get_peft_model(base, copy.deepcopy(lora)))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", dict(model.merge_and_unload().named_parameters())


def agree(checkpoint, merged):
    tensors = dict(checkpoint.tensors())
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == checkpoint.shapes
    assert tensors.keys() == merged.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, merged[name].data, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merged_language_model_is_what_peft_makes_of_it(variant, tmp_path):
    adapter, merged = saved(tmp_path, VARIANTS[variant])
    before = dict(open_checkpoint(tmp_path / "base").tensors())
    assert any(not torch.equal(before[name], merged[name]) for name in before)
    agree(open_checkpoint(adapter), merged)  # the base by the adapter's own configuration


def test_a_classifier_brings_its_head_and_its_one_label(tmp_path):
    lora = LoraConfig(r=4, target_modules=ATTENTION, task_type="SEQ_CLS")
    adapter, merged = saved(tmp_path, lora, LlamaForSequenceClassification)
    opened = open_checkpoint(adapter, base=tmp_path / "base")
    agree(opened, merged)
    assert opened.shapes["score.weight"] == (1, 16)
    assert opened.config.num_labels == 1
    assert opened.config.architectures == ["LlamaForSequenceClassification"]
    assert opened.tokenizer_path == tmp_path / "base"


def rewritten(adapter, change):
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(change(tensors), adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("spelling", ["score.modules_to_save.weight", "score.modules_to_save.default.weight"])
def test_older_spellings_of_a_saved_head_are_understood(spelling, tmp_path):
    lora = LoraConfig(r=4, target_modules=ATTENTION, task_type="SEQ_CLS")
    adapter, merged = saved(tmp_path, lora, LlamaForSequenceClassification)
    rewritten(
        adapter,
        lambda tensors: {
            name.replace("score.weight", spelling).replace("lora_A.weight", "lora_A.default.weight"): tensor
            for name, tensor in tensors.items()
        },
    )
    agree(open_checkpoint(adapter), merged)


def test_a_pickled_adapter_is_read_as_tensors_only(tmp_path):
    adapter, merged = saved(tmp_path, VARIANTS["attention"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    agree(open_checkpoint(adapter), merged)
    torch.save({"weights": UnsafeCheckpoint}, adapter / "adapter_model.bin")
    with pytest.raises(UnsafeCheckpoint):
        open_checkpoint(adapter)


def test_a_bf16_base_is_merged_in_fp32_and_rounded_once(tmp_path):
    adapter, merged = saved(tmp_path, VARIANTS["every linear"])
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base16")
    before = dict(open_checkpoint(tmp_path / "base").tensors())
    for name, tensor in open_checkpoint(adapter, base=tmp_path / "base16").tensors():
        change = merged[name].data - before[name]
        assert (
            torch.equal(tensor, (before[name].bfloat16().float() + change).bfloat16())
            or (tensor.float() - before[name].bfloat16().float() - change).abs().max() < 2**-9 * tensor.abs().max()
        )


def drop_one(tensors):
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    return tensors


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


TENSORS = {
    "half a pair": (drop_one, CheckpointMismatch, "other half"),
    "no such layer": (renamed("layers.1", "layers.7"), CheckpointMismatch, "layers.7"),
    "no prefix": (renamed("base_model.model.model.", "model."), CheckpointMismatch, "base_model.model."),
    "an embedding": (renamed("lora_A.weight", "lora_embedding_A"), UnknownArchitecture, "lora_embedding_A"),
    "magnitudes": (renamed("lora_A.weight", "lora_magnitude_vector"), UnknownArchitecture, "magnitude"),
    "no pair at all": (
        lambda tensors: {"base_model.model.lm_head.weight": torch.ones(48, 16)},
        CheckpointMismatch,
        "no LoRA",
    ),
    "another rank": (
        lambda tensors: {n: t[:2] if "_A" in n else t[:, :2] for n, t in tensors.items()},
        CheckpointMismatch,
        "rank 2",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_without_a_place_are_refused(case, tmp_path):
    change, error, words = TENSORS[case]
    adapter, _ = saved(tmp_path, VARIANTS["attention"])
    rewritten(adapter, lambda tensors: {n: t.contiguous() for n, t in change(tensors).items()})
    with pytest.raises(error, match=words):
        open_checkpoint(adapter)


@pytest.mark.parametrize(
    ("setting", "error", "words"),
    [
        ({"peft_type": "IA3"}, UnknownArchitecture, "IA3"),
        ({"task_type": "TOKEN_CLS"}, UnknownArchitecture, "TOKEN_CLS"),
        ({"use_dora": True}, UnknownArchitecture, "use_dora"),
        ({"fan_in_fan_out": True}, UnknownArchitecture, "fan_in_fan_out"),
        ({"alora_invocation_tokens": [1]}, UnknownArchitecture, "alora"),
        ({"a_setting_of_tomorrow": 1}, UnknownArchitecture, "tomorrow"),
        ({"bias": "all"}, UnknownArchitecture, "bias"),
        ({"init_lora_weights": "pissa"}, UnknownArchitecture, "pissa"),
        ({"alpha_pattern": {"(a+)+$": 2}}, UnknownArchitecture, "alpha_pattern"),
        ({"alpha_pattern": [1]}, CheckpointMismatch, "alpha_pattern"),
        ({"lora_alpha": float("nan")}, CheckpointMismatch, "lora_alpha"),
        ({"task_type": "SEQ_CLS"}, CheckpointMismatch, "head"),
        ({"base_model_name_or_path": "some/hub-name"}, CheckpointMissing, "some/hub-name"),
    ],
)
def test_settings_beyond_plain_lora_are_refused_by_name(setting, error, words, tmp_path):
    adapter, _ = saved(tmp_path, VARIANTS["attention"])
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | setting))
    with pytest.raises(error, match=words):
        open_checkpoint(adapter)


def test_an_adapter_is_no_base_and_an_adapter_without_weights_is_none(tmp_path):
    adapter, _ = saved(tmp_path, VARIANTS["attention"])
    with pytest.raises(CheckpointMismatch, match="itself an adapter"):
        open_checkpoint(adapter, base=adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointMissing, match="adapter_model"):
        open_checkpoint(adapter)
