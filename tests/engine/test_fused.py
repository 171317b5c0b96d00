"""Fused layers against plain ones and against `transformers`: the same tokens, for every switch of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig

from stockade.engine.engine import Engine
from stockade.engine.guards import Guard, Probe, Refuse
from stockade.engine.models.adapters import read_adapter
from stockade.engine.models.attached import AttachedAdapter
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.passes import Generate, Score, Scored
from stockade.engine.sampling import SamplingParams
from stockade.engine.text import Untrusted
from stockade.kernels import backend
from tests.conftest import BASE, save_tokenizer, scatter_norms
from tests.engine import eyes, test_gemma3_vision, test_qwen_vl
from tests.engine.screened import asking, detector_on, engine_of, finish, head, probe_on, submit, with_models
from tests.engine.test_parity import last_logits, prompts, reference_tokens
from tests.models.test_attached import INVOCATION, save_lora

SHORT = SamplingParams(max_tokens=8, ignore_eos=True)
# biases; rows that are padded; norms of queries and keys, windows; output norms and a cap; two rotary tables; maps
# that are fused in the checkpoint; scales of residuals, attention and logits
FAMILIES = ("llama-biases", "llama-dim100", "qwen3-window", "gemma2", "gemma3", "phi3", "granite")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "reference")


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_logits_are_those_of_transformers(
    family: str, checkpoint: Callable[[str], Path], fused: None
) -> None:
    folder = checkpoint(family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # chunks of 13 rows: contexts longer than the windows are extended, and decoding rows share a batch with them
    engine = Engine(
        folder, device="cpu", dtype=torch.float32, kv_bytes=16 << 20, tokens_per_page=16, max_batch_tokens=13
    )
    assert engine.models["mllm"].backbone.decoder.fused is not None
    with torch.inference_mode():
        want = model(torch.tensor([prompts()[1]])).logits[0, -1]
    assert torch.allclose(last_logits(engine, prompts()[1]), want, atol=1e-4, rtol=0)
    for _ in range(2):  # the second time from known pages
        replies = engine.generate(prompts()[:4], SHORT)
        for prompt, reply in zip(prompts(), replies, strict=False):
            assert reply.token_ids == reference_tokens(model, prompt, 8)
    engine.check_integrity()
    assert engine.pool.owned_pages == 0


def test_gate_and_up_are_one_map(checkpoint: Callable[[str], Path], fused: None) -> None:
    engine = Engine(checkpoint("llama-gqa"), device="cpu", dtype=torch.float32, kv_bytes=1 << 20)
    layer = engine.models["mllm"].backbone.decoder.layers[0]  # type: ignore[attr-defined]
    assert layer.wide.weight.shape == (2 * BASE["intermediate_size"], BASE["hidden_size"])


STEPS = [
    *(Generate(name, tuple(range(5, 75)), sampling=SHORT) for name in ("mllm", "tuned")),
    Generate("invoked", tuple(range(25, 65)), sampling=SHORT),
    *(Score(name, (Untrusted("Is this a long and winding answer? " * 3),)) for name in ("low", "high", "mean")),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    base, tuned, invoked = (tmp_path_factory.mktemp(name) for name in ("base", "tuned", "invoked"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**BASE))
    scatter_norms(model)
    model.eval().save_pretrained(base)
    save_tokenizer(base, None)
    save_lora(base, tuned, seed=1)
    save_lora(base, invoked, seed=2, alora_invocation_tokens=INVOCATION)
    return base, tuned, invoked


def many(folders: tuple[Path, Path, Path]) -> ModelSet:
    """A base, two adapters on it, and heads on several of its layers: several depths, so several layouts."""
    base, *adapters = folders
    loaded = load_models(base, None, None, dtype=torch.float32)
    mllm = loaded.models["mllm"]
    heads = {"low": head(2, "last"), "high": head(mllm.depth, "last"), "mean": head(mllm.depth, "mean")}
    more = {name: detector_on(mllm, found, name) for name, found in heads.items()}
    for name, folder in zip(("tuned", "invoked"), adapters, strict=True):
        index = mllm.backbone.attach(AttachedAdapter.of(read_adapter(folder), mllm.backbone.decoder))  # type: ignore[arg-type]
        more[name] = replace(mllm, name=name, adapter=index)
    return with_models(loaded, probe=probe_on(mllm), **more)


def results(models: ModelSet) -> list[Any]:
    """Tokens or score of each of STEPS, all in one engine, in chunks of 50 rows; then of an answer under a probe."""
    found: list[list[Any]] = [[] for _ in STEPS]
    engine = engine_of(models, max_batch_tokens=50, max_sequences=6)
    for step, into in zip(STEPS, found, strict=True):
        submit(engine, asking(step, into))
    finish(engine)
    guarded = engine.chat(["Is it so?"], guard=Guard(Probe("probe"), Refuse()), sampling=SHORT)
    flat = [result.score if isinstance(result, Scored) else result.ids for (result,) in found]
    return [*flat, guarded[0].token_ids, guarded[0].verdicts[0].score]


def test_depths_layouts_adapters_and_sums_share_a_batch(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    plain = results(many(folders))
    monkeypatch.setenv(backend.VARIABLE, "reference")
    models = many(folders)
    assert models.models["mllm"].backbone.decoder.fused is not None
    for want, got in zip(plain, results(models), strict=True):
        assert got == (pytest.approx(want, abs=1e-6) if isinstance(want, float) else want)


@pytest.mark.parametrize("family", [test_gemma3_vision.TestGemma3, test_qwen_vl.TestQwen3])
def test_images_come_out_as_through_plain_layers(
    family: type[eyes.FamilyTests], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3's images see themselves in both directions; Qwen3-VL's have positions in three axes, and features for
    later layers."""
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_config(family().save(tmp_path))
    scatter_norms(model)
    model.eval().save_pretrained(tmp_path)
    tokens = []
    for name in ("", "reference"):
        monkeypatch.setenv(backend.VARIABLE, name)
        models = load_models(tmp_path, dtype=torch.float32)
        assert (models.models["mllm"].backbone.decoder.fused is None) == (not name)
        engine = Engine(models=models, kv_bytes=8 << 20, tokens_per_page=16, max_batch_tokens=40)
        tokens.append([reply.token_ids for reply in engine.chat(eyes.CHATS, sampling=SHORT)])
    assert tokens[0] == tokens[1]
