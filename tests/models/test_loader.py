"""From names and paths to models: shared weights, named shapes, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GraniteConfig,
    LlavaConfig,
)

from stockade.engine.engine import Engine
from stockade.engine.errors import (
    BadInput,
    CheckpointError,
    CheckpointMismatch,
    CheckpointMissing,
    InvalidGuard,
    UnknownArchitecture,
)
from stockade.engine.guards import Guard
from stockade.engine.models.loader import load_models
from stockade.engine.models.shapes import named_config
from stockade.engine.models.sources import Classifier
from stockade.engine.named import detector_named
from stockade.engine.sampling import SamplingParams
from stockade.export.source import open_detector
from tests.conftest import BASE

SHORT = SamplingParams(max_tokens=5, ignore_eos=True)


def test_equal_sources_share_one_backbone(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama-gqa")
    models = load_models(folder, checkpoint("classifier"), str(folder), dtype=torch.float32).models
    assert models["mllm"].backbone is models["detoxifier"].backbone
    assert models["detector"].backbone is not models["mllm"].backbone
    assert models["detector"].backbone.decoder.head is None
    engine = Engine(folder, checkpoint("classifier"), folder, dtype=torch.float32, kv_bytes=8 << 20)
    assert len(engine.lanes) == 2


def test_equal_weights_in_two_folders_have_one_hash(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint("llama-gqa"), tmp_path / "copy")
    models = load_models(checkpoint("llama-gqa"), None, copy, dtype=torch.float32).models
    assert models["mllm"].backbone is not models["detoxifier"].backbone
    assert models["mllm"].backbone.cache_key == models["detoxifier"].backbone.cache_key
    other = load_models(checkpoint("llama-biases"), dtype=torch.float32).models["mllm"]
    assert other.backbone.content_hash != models["mllm"].backbone.content_hash


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tiny-llama", "tiny-llava"])
def test_tiny_named_shapes_answer(name: str, dtype: torch.dtype) -> None:
    engine = Engine(name, "tiny-llama", "tiny-llama", dtype=dtype, kv_bytes=16 << 20)
    reply = engine.chat(["Hi"], sampling=SHORT)[0]
    assert len(reply.token_ids) == 5 and reply.error is None
    assert engine.models["detector"].head is not None
    again = Engine(name, dtype=dtype, kv_bytes=16 << 20).chat(["Hi"], sampling=SHORT)[0]
    assert again.token_ids == reply.token_ids  # random, but the same every time


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llava-1.5-7b", 6.76e9), ("llava-1.5-13b", 13.05e9), ("open-llama-3b", 3.43e9), ("vicuna-7b", 6.74e9)],
)
def test_large_named_shapes_have_the_size_of_the_real_ones(name: str, parameters: float) -> None:
    """Parameters of the language model; nothing is allocated."""
    config = named_config(name)
    assert config is not None
    text: Any = getattr(config, "text_config", config)
    head = text.hidden_size // text.num_attention_heads
    attention = text.hidden_size * head * 2 * (text.num_attention_heads + text.num_key_value_heads)
    layer = attention + 3 * text.hidden_size * text.intermediate_size + 2 * text.hidden_size
    total = 2 * text.vocab_size * text.hidden_size + text.num_hidden_layers * layer + text.hidden_size
    assert total == pytest.approx(parameters, rel=0.01)


def changed(folder: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return target


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            {"model_type": "mamba", "architectures": ["MambaLMHeadModel"]},
            UnknownArchitecture,
            "llama, mistral, qwen2",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            UnknownArchitecture,
            "known: default, linear, llama3, yarn",
        ),
        ({"num_hidden_layers": 4}, CheckpointMismatch, "lacks model.layers.3"),
        ({"num_hidden_layers": 2}, CheckpointMismatch, "has unknown tensors: model.layers.2"),
        ({"intermediate_size": 100}, CheckpointMismatch, r"has wrong shapes: .*\(96, 64\), not \(100, 64\)"),
    ],
)
def test_a_checkpoint_that_is_not_what_its_configuration_says(
    config: dict[str, Any], error: type[Exception], message: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = changed(checkpoint("llama-gqa"), tmp_path / "changed", **config)
    with pytest.raises(error, match=message) as caught:
        load_models(folder, dtype=torch.float32)
    assert isinstance(caught.value, CheckpointError)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("gemma3", {"use_bidirectional_attention": True}, "known: causal attention"),
        (
            "gemma3",
            {"rope_parameters": {"full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}},
            "known: default, linear, llama3, yarn",
        ),
    ],
)
def test_variants_of_a_family_that_nothing_runs(
    family: str, config: dict[str, Any], message: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(UnknownArchitecture, match=message):
        load_models(changed(checkpoint(family), tmp_path / "changed", **config), dtype=torch.float32)


def test_eyes_in_front_of_a_model_that_scales_them_are_refused(tmp_path: Path) -> None:
    shape = named_config("tiny-llava")
    assert shape is not None
    text = GraniteConfig(**BASE, embedding_multiplier=12.0)
    LlavaConfig(text_config=text, vision_config=shape.vision_config).save_pretrained(tmp_path)
    save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnknownArchitecture, match="granite multiplies the features of images"):
        load_models(tmp_path)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "phi3"])
def test_what_is_not_exported_says_so(family: str, checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(UnknownArchitecture, match="which is not exported; exported are llama"):
        open_detector(checkpoint(f"classifier-{family}"))


def test_models_in_the_wrong_place(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match="is a classifier; mllm has to be a language model"):
        load_models(checkpoint("classifier"))
    with pytest.raises(CheckpointMismatch, match=r"has no score.weight; a detector is a \*ForSequenceClassification"):
        load_models(checkpoint("llama-gqa"), Classifier(checkpoint("llama-gqa"), 1))
    engine = Engine(checkpoint("llama-gqa"), checkpoint("llama-gqa"), dtype=torch.float32, kv_bytes=8 << 20)
    with pytest.raises(InvalidGuard, match=r"'detector' has no head.*ask a guard model with GenerativeGuard"):
        engine.chat(["Hi"], guard=Guard.protector(detoxifier=None))
    with pytest.raises(CheckpointMissing):
        load_models(tmp_path / "nowhere")
    with pytest.raises(CheckpointMissing, match="no head at"):
        load_models(checkpoint("llama-gqa"), tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (None, r"has the labels 0 \(Safe\), 1 \(Violence\), 2 \(Fraud\): say which mean harm"),
        ("unsafe", r"has no label 'unsafe'; it has 0 \(Safe\), 1"),
        ((1, 3), "has no label 3"),
        ((True,), "has no label True"),
        ((), "some of the labels"),
        ((0, "violence", "fraud"), "have to mean harm, and not all"),
    ],
)
def test_labels_that_say_nothing_about_harm_are_refused(
    harm: Any, message: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = changed(
        checkpoint("classifier"), tmp_path / "three", id2label={"0": "Safe", "1": "Violence", "2": "Fraud"}
    )
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["score.weight"] = torch.zeros(3, 64)
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointMismatch, match=message):
        load_models(checkpoint("llama-gqa"), Classifier(folder, harm))
    with pytest.raises(CheckpointMismatch, match="has 3 labels; exported are classifiers with one"):
        open_detector(folder)


def test_classifiers_by_name(tmp_path: Path) -> None:
    assert detector_named("harm=1:some/folder") == Classifier("some/folder", (1,))
    assert detector_named("harm=toxic+1:adapter,base") == Classifier(("adapter", "base"), ("toxic", 1))
    assert detector_named("some/folder") == "some/folder"
    assert detector_named("chat:harm=1:some/folder") == Classifier("some/folder", (1,), "chat")
    assert detector_named("chat:some/folder") == Classifier("some/folder", None, "chat")
    with pytest.raises(BadInput, match="only classifiers are given one"):
        detector_named("chat:attach:folder")
    for wrong in ("harm=1", "harm=:folder", "harm=1:attach:folder"):
        with pytest.raises(BadInput, match="is not harm=LABEL:SOURCE"):
            detector_named(wrong)


def test_a_checkpoint_without_a_tokenizer(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("llama-gqa"), tmp_path / "mute")
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_models(folder)


def test_a_tied_checkpoint_may_hold_the_output_matrix_too(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("llama-mha-tied"), tmp_path / "tied")
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, weights, metadata={"format": "pt"})
    replies = [
        Engine(source, dtype=torch.float32, kv_bytes=8 << 20).generate([[5, 6, 7]], SHORT)[0]
        for source in (folder, checkpoint("llama-mha-tied"))
    ]
    assert replies[0].token_ids == replies[1].token_ids


def test_bf16_runs_and_stays_close_to_fp32(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("llama-dim100")
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(folder, dtype=dtype, kv_bytes=16 << 20, tokens_per_page=16)
        engine.submit_prompt(list(range(10, 60)), SHORT)
        result = engine.runner.run(engine.lanes[0], engine.scheduler.schedule(engine.lanes[0]))
        assert result.logits is not None
        logits.append(result.logits[0].float())
        replies = Engine(folder, dtype=dtype, kv_bytes=16 << 20).generate([[5] * 70, [7]], SHORT)
        assert [len(reply.token_ids) for reply in replies] == [5, 5]
    assert float((logits[0] - logits[1]).norm() / logits[0].norm()) < 0.1
