"""Adapters attached to a loaded backbone: `peft`'s own logits and scores, each token by its own adapter."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlavaForConditionalGeneration,
)

from stockade.engine.errors import CheckpointError, CheckpointMismatch, CheckpointMissing, UnknownArchitecture
from stockade.engine.models.heads import Head, HeadSpec, save_head
from stockade.engine.models.loader import load_models
from stockade.engine.models.model import Backbone, Model
from stockade.engine.models.sources import Attached
from stockade.kernels.lora import ActiveAdapters
from stockade.kernels.paged_attention import attention_reference
from tests.conftest import IMAGE_TOKEN, VOCAB

Checkpoints = Callable[[str], Path]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INVOCATION = [301, 302, 303]
VARIANTS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "every linear": {"target_modules": LINEARS},
    "rank-stabilized": {"target_modules": ["k_proj", "o_proj", "up_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": LINEARS,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 3, "down_proj": 16},
    },
    "some layers": {"target_modules": ["o_proj", "down_proj"], "layers_to_transform": [1]},
}
TEXT = [5, 6, 301, 302, 303, 9, 10, 301, 302, 303, 44, 45, 301, 302]


def save_lora(
    base: Path,
    folder: Path,
    model_class: Any = AutoModelForCausalLM,
    task: str = "CAUSAL_LM",
    seed: int = 0,
    **settings: Any,
) -> PeftModel:
    """Write an adapter of random weights into `folder`; returns it on its base, as `peft` runs it."""
    labels = {"num_labels": 1} if task == "SEQ_CLS" else {}
    whole = model_class.from_pretrained(base, dtype=torch.float32, **labels)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, **copy.deepcopy(settings)}
    model = get_peft_model(whole, LoraConfig(task_type=task, **settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def states(
    backbone: Backbone,
    sequences: Sequence[Sequence[int]],
    adapters: Sequence[Sequence[int]],
    depth: int | None = None,
) -> list[Tensor]:
    """Un-normed output of `depth` layers, [tokens, hidden] a sequence, all sequences in one ragged batch."""
    decoder = backbone.decoder
    lengths = [len(sequence) for sequence in sequences]
    index = torch.tensor([row for sequence in adapters for row in sequence])
    active = ActiveAdapters.of(index, [adapter.updates for adapter in backbone.adapters], decoder.device)
    heads, scale = decoder.config.heads, decoder.config.head_dim**-0.5

    def attend(layer: int, qkv: Tensor) -> Tensor:
        outs = []
        for rows in qkv.split(lengths):
            keys, values = rows[:, heads:].transpose(0, 1).chunk(2)
            outs.append(attention_reference(rows[:, :heads], keys, values, scale))
        return torch.cat(outs).to(qkv.dtype)

    x = decoder.embed(torch.tensor([token for sequence in sequences for token in sequence]))
    angles = decoder.angles(torch.cat([torch.arange(length) for length in lengths]))
    for layer in range(decoder.depth if depth is None else depth):
        x = decoder.block(layer, x, angles, attend, active)
    return list(x.split(lengths))


def logits(model: Model, tokens: Sequence[int], adapters: Sequence[int]) -> Tensor:
    return model.backbone.decoder.logits(states(model.backbone, [tokens], [adapters])[0])


@torch.inference_mode()
def peft_logits(model: PeftModel, tokens: Sequence[int], **more: Any) -> Tensor:
    return model(input_ids=torch.tensor([tokens]), **more).logits[0]


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama-gqa", "qwen2"])
def test_logits_are_those_of_peft(family: str, variant: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = checkpoint(family)
    reference = save_lora(base, tmp_path / "lora", **VARIANTS[variant])
    models = load_models(base, None, Attached(tmp_path / "lora"), dtype=torch.float32).models
    mllm, adapted = models["mllm"], models["detoxifier"]
    assert adapted.backbone is mllm.backbone and (mllm.adapter, adapted.adapter) == (None, 0)
    assert mllm.invocation == adapted.invocation == ()
    wanted = peft_logits(reference, TEXT)
    close(logits(adapted, TEXT, [0] * len(TEXT)), wanted)
    with reference.disable_adapter():
        plain = peft_logits(reference, TEXT)
    assert (wanted - plain).abs().max() > 0.1  # the adapter does something
    close(logits(adapted, TEXT, [-1] * len(TEXT)), plain)


@pytest.mark.parametrize("family", ["llama-gqa", "qwen2"])
def test_an_activated_adapter_applies_from_the_last_invocation_on(
    family: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    base = checkpoint(family)
    reference = save_lora(base, tmp_path / "alora", alora_invocation_tokens=INVOCATION)
    model = load_models(base, None, Attached(tmp_path / "alora"), dtype=torch.float32).models["detoxifier"]
    assert model.invocation == tuple(INVOCATION)
    first = 7  # where the last whole occurrence of the invocation begins in TEXT
    active = [-1] * first + [0] * (len(TEXT) - first)
    found = logits(model, TEXT, active)
    close(found, peft_logits(reference, TEXT))
    base_rows = logits(model, TEXT, [-1] * len(TEXT))
    assert torch.equal(found[:first], base_rows[:first])  # so the base's keys and values serve for them
    assert (found[first:] - base_rows[first:]).abs().amax(1).min() > 1e-2


def test_without_its_invocation_peft_runs_the_base(checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = checkpoint("llama-gqa")
    reference = save_lora(base, tmp_path / "alora", alora_invocation_tokens=INVOCATION)
    model = load_models(base, None, Attached(tmp_path / "alora"), dtype=torch.float32).models["detoxifier"]
    tokens = [5, 6, 301, 302, 9, 303]
    close(logits(model, tokens, [-1] * 6), peft_logits(reference, tokens))


def test_many_adapters_share_a_batch_and_rows_without_one_keep_their_bits(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    base = checkpoint("qwen2")
    folders = [tmp_path / name for name in ("plain", "activated", "wide")]
    references = [
        save_lora(base, folders[0], seed=1),
        save_lora(base, folders[1], seed=2, r=2, alora_invocation_tokens=INVOCATION),
        save_lora(base, folders[2], seed=3, r=16, target_modules=["v_proj", "gate_proj"]),
    ]
    models = load_models(base, None, Attached(folders[0]), dtype=torch.float32).models
    backbone = models["mllm"].backbone
    for folder in folders[1:]:  # an engine has two names for adapters; a backbone takes any number
        other = load_models(base, None, Attached(folder), dtype=torch.float32).models["detoxifier"].backbone
        backbone.attach(other.adapters[0])
    sequences = [[7, 8, 9], TEXT, [11, 12], TEXT, [20, 21, 22, 23], TEXT]
    rows = [[-1] * 3, [0] * 14, [2] * 2, [-1] * 7 + [1] * 7, [-1] * 4, [0] * 14]
    found = [backbone.decoder.logits(x) for x in states(backbone, sequences, rows)]
    plain = [backbone.decoder.logits(x) for x in states(backbone, sequences, [[-1] * len(s) for s in sequences])]
    for place, index in ((1, 0), (2, 2), (3, 1), (5, 0)):
        close(found[place], peft_logits(references[index], sequences[place]))
    assert torch.equal(found[0], plain[0]) and torch.equal(found[4], plain[4])
    assert torch.equal(found[3][:7], plain[3][:7])


@torch.inference_mode()
def test_a_classifiers_adapter_scores_as_in_peft(checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = checkpoint("llama-gqa")
    reference = save_lora(base, tmp_path / "lora", AutoModelForSequenceClassification, "SEQ_CLS")
    model = load_models(base, Attached(tmp_path / "lora"), dtype=torch.float32).models["detector"]
    assert model.head is not None
    assert model.head.spec == HeadSpec(layer=3, pooling="last", norm=True)
    (x,) = states(model.backbone, [TEXT], [[0] * len(TEXT)])
    close(model.head.score(x[-1:]), peft_logits(reference, TEXT).sigmoid())


@torch.inference_mode()
def test_an_activated_classifier_scores_as_peft_does_when_told_where_it_begins(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """`peft` looks for the invocation in language models only; a classifier's it wants from the caller."""
    base = checkpoint("llama-gqa")
    with pytest.warns(UserWarning, match="CAUSAL_LM"):
        reference = save_lora(
            base,
            tmp_path / "alora",
            AutoModelForSequenceClassification,
            "SEQ_CLS",
            alora_invocation_tokens=INVOCATION,
        )
    model = load_models(base, Attached(tmp_path / "alora"), dtype=torch.float32).models["detector"]
    assert model.head is not None and model.invocation == tuple(INVOCATION)
    tokens = [*TEXT, *INVOCATION]
    (x,) = states(model.backbone, [tokens], [[-1] * len(TEXT) + [0] * 3])
    close(model.head.score(x[-1:]), peft_logits(reference, tokens, alora_offsets=[3]).sigmoid())


@pytest.mark.parametrize("pooling", ["last", "mean"])
@torch.inference_mode()
def test_a_head_file_beside_an_adapter_reads_the_adapted_layers(
    pooling: Any, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    base = checkpoint("llama-gqa")
    reference = save_lora(base, tmp_path / "lora")
    content = load_models(base, dtype=torch.float32).models["mllm"].backbone.content_hash
    spec = HeadSpec(2, pooling, threshold=0.3, backbone_hash=content)
    weight = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 0.1
    save_head(Head(spec, weight, torch.tensor([0.2])), tmp_path / "lora" / "head.safetensors")
    model = load_models(base, Attached(tmp_path / "lora"), dtype=torch.float32).models["detector"]
    assert model.head is not None and model.head.spec == spec and (model.depth, model.adapter) == (2, 0)
    (x,) = states(model.backbone, [TEXT], [[0] * len(TEXT)], depth=2)
    wanted = reference(input_ids=torch.tensor([TEXT]), output_hidden_states=True).hidden_states[2][0]
    close(x, wanted)
    pooled = wanted[-1] if pooling == "last" else wanted.mean(0)
    found = x[-1:] if pooling == "last" else x.mean(0, keepdim=True)
    close(model.head.score(found), (pooled @ weight + 0.2).sigmoid()[None])


def test_an_adapter_of_llava_changes_its_language_model(checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = checkpoint("llava")
    only_text = r".*language_model.*\.(?:q|v|down)_proj"
    reference = save_lora(base, tmp_path / "lora", LlavaForConditionalGeneration, target_modules=only_text)
    models = load_models(base, None, Attached(tmp_path / "lora"), dtype=torch.float32).models
    model = models["detoxifier"]
    assert model.image_token_id == IMAGE_TOKEN and model.max_images == models["mllm"].max_images > 0
    close(logits(model, TEXT, [0] * len(TEXT)), peft_logits(reference, TEXT))
    save_lora(base, tmp_path / "eyes", LlavaForConditionalGeneration, target_modules=["q_proj"])
    with pytest.raises(CheckpointMismatch, match=r"vision_tower.*decoder layers only"):
        load_models(base, None, Attached(tmp_path / "eyes"), dtype=torch.float32)


def test_equal_adapters_are_attached_once_and_known_by_content(checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = checkpoint("llama-gqa")
    save_lora(base, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    rewrite_config(tmp_path / "b", base_model_name_or_path="another/name", alora_invocation_tokens=None)
    head = Head(HeadSpec(3, "mean"), torch.ones(64))
    save_head(head, tmp_path / "b" / "head.safetensors")
    models = load_models(base, Attached(tmp_path / "b"), Attached(tmp_path / "a"), dtype=torch.float32).models
    backbone = models["mllm"].backbone
    assert models["detector"].adapter == models["detoxifier"].adapter == 0 and len(backbone.adapters) == 1
    scaled = shutil.copytree(tmp_path / "a", tmp_path / "scaled")
    rewrite_config(scaled, lora_alpha=9)
    invoked = shutil.copytree(tmp_path / "b", tmp_path / "invoked")
    rewrite_config(invoked, alora_invocation_tokens=INVOCATION)
    models = load_models(base, Attached(invoked), Attached(scaled), dtype=torch.float32).models
    found = {name: models["mllm"].backbone.adapters[models[name].adapter or 0] for name in ("detector", "detoxifier")}
    assert found["detector"].content_hash == backbone.adapters[0].content_hash != found["detoxifier"].content_hash
    models = load_models(base, Attached(invoked), Attached(tmp_path / "a"), dtype=torch.float32).models
    assert models["detector"].adapter != models["detoxifier"].adapter  # the same updates, applied to other tokens
    assert models["detector"].invocation == tuple(INVOCATION) and models["detoxifier"].invocation == ()


def test_under_bf16_weights_an_adapter_costs_no_precision(checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = checkpoint("llama-gqa")
    reference = save_lora(base, tmp_path / "lora")
    model = load_models(base, None, Attached(tmp_path / "lora"), dtype=torch.bfloat16).models["detoxifier"]
    tokens = torch.randint(3, 300, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = peft_logits(reference, tokens)
    theirs = (peft_logits(reference.bfloat16(), tokens) - wanted).norm()
    # about 0.9 over many adapters; one of them may be off by a fifth either way, with and without its adapter
    assert (logits(model, tokens, [0] * len(tokens)) - wanted).norm() <= 1.25 * theirs


def rewrite_config(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def rewrite_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file)


def add(name: str, *shape: int) -> Callable[[Path], None]:
    return lambda folder: rewrite_tensors(folder, lambda old: old | {f"base_model.model.{name}": torch.ones(shape)})


def narrowed(folder: Path) -> None:
    rewrite_tensors(
        folder, lambda old: {n: t[:, :32] if n.endswith("q_proj.lora_A.weight") else t for n, t in old.items()}
    )


def add_pair(module: str, out: int, width: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        add(f"{module}.lora_A.weight", 4, width)(folder)
        add(f"{module}.lora_B.weight", out, 4)(folder)

    return change


def setting(**settings: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite_config(folder, **settings)


def head_for(width: int, layer: int, **spec: Any) -> Callable[[Path], None]:
    return lambda folder: save_head(
        Head(HeadSpec(layer, "mean", **spec), torch.ones(width)), folder / "head.safetensors"
    )


DETOXIFIERS: dict[str, tuple[Callable[[Path], None], type[CheckpointError], str]] = {
    "another base": (narrowed, CheckpointMismatch, r"is \(64, 32\), the base has \(64, 64\)"),
    "a deeper base": (add_pair("model.layers.3.mlp.up_proj", 96, 64), CheckpointMismatch, "base's 3 decoder layers"),
    "the output matrix": (add_pair("lm_head", VOCAB, 64), CheckpointMismatch, "lm_head.weight.*decoder layers only"),
    "a layer's other name": (
        add_pair("model.layers.01.mlp.up_proj", 96, 64),
        CheckpointMismatch,
        "layers.01.*decoder layers only",
    ),
    "a saved matrix": (add("lm_head.weight", VOCAB, 64), CheckpointMismatch, "'lm_head.weight' as a whole"),
    "DoRA": (setting(use_dora=True), UnknownArchitecture, "use_dora"),
    "magnitudes": (add("model.layers.0.mlp.up_proj.lora_magnitude_vector", 96), UnknownArchitecture, "magnitude"),
    "an embedding": (add("model.embed_tokens.lora_embedding_A", 4, VOCAB), UnknownArchitecture, "embedding"),
    "no invocation": (setting(alora_invocation_tokens=[]), CheckpointMismatch, "list of token ids"),
    "a text for an invocation": (setting(alora_invocation_tokens="<guard>"), CheckpointMismatch, "list of token ids"),
    "an unknown invocation": (
        setting(alora_invocation_tokens=[5, VOCAB]),
        CheckpointMismatch,
        f"token {VOCAB}; .* {VOCAB}",
    ),
    "a classifier": (setting(task_type="SEQ_CLS"), CheckpointMismatch, "has to be a language model"),
}
DETECTORS: dict[str, tuple[Callable[[Path], None], type[CheckpointError], str]] = {
    "no head": (lambda folder: None, CheckpointMismatch, "neither score.weight nor head.safetensors"),
    "a head of another width": (head_for(32, 2), CheckpointMismatch, "32 features"),
    "a head too high": (head_for(64, 4), CheckpointMismatch, "after layer 4"),
    "a head of other weights": (
        head_for(64, 2, backbone_hash="other"),
        CheckpointMismatch,
        "fitted on other weights",
    ),
    "two labels": (add("score.weight", 2, 64), CheckpointMismatch, "one label"),
    "a bias of a head": (add("score.bias", 1), CheckpointMismatch, "'score.bias' as a whole"),
}


@pytest.mark.parametrize("case", DETOXIFIERS)
def test_a_detoxifier_that_cannot_be_attached(case: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    change, error, words = DETOXIFIERS[case]
    save_lora(checkpoint("llama-gqa"), tmp_path / "lora")
    change(tmp_path / "lora")
    with pytest.raises(error, match=words):
        load_models(checkpoint("llama-gqa"), None, Attached(tmp_path / "lora"), dtype=torch.float32)


@pytest.mark.parametrize("case", DETECTORS)
def test_a_detector_that_cannot_be_attached(case: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    change, error, words = DETECTORS[case]
    save_lora(checkpoint("llama-gqa"), tmp_path / "lora")
    change(tmp_path / "lora")
    with pytest.raises(error, match=words):
        load_models(checkpoint("llama-gqa"), Attached(tmp_path / "lora"), dtype=torch.float32)


def test_a_detector_has_one_head(checkpoint: Checkpoints, tmp_path: Path) -> None:
    save_lora(checkpoint("llama-gqa"), tmp_path / "lora", AutoModelForSequenceClassification, "SEQ_CLS")
    head_for(64, 2)(tmp_path / "lora")
    with pytest.raises(CheckpointMismatch, match=r"both score.weight and head.safetensors"):
        load_models(checkpoint("llama-gqa"), Attached(tmp_path / "lora"), dtype=torch.float32)


def test_an_adapter_in_the_wrong_place(checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = checkpoint("llama-gqa")
    save_lora(base, tmp_path / "alora", alora_invocation_tokens=INVOCATION)
    with pytest.raises(UnknownArchitecture, match=r"alora_invocation_tokens.*cannot be merged; attach it"):
        load_models(base, None, (tmp_path / "alora", base), dtype=torch.float32)
    with pytest.raises(CheckpointMismatch, match="attached to what"):
        load_models(Attached(tmp_path / "alora"), dtype=torch.float32)
    with pytest.raises(CheckpointMissing, match=r"adapter_config\.json"):
        load_models(base, None, Attached(base), dtype=torch.float32)
    rewrite_config(tmp_path / "alora", alora_invocation_tokens=[5, IMAGE_TOKEN])
    with pytest.raises(CheckpointMismatch, match="which is an image's"):
        load_models(checkpoint("llava"), None, Attached(tmp_path / "alora"), dtype=torch.float32)
