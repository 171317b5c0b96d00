"""Engines whose decoders have weights of 8 bits: what they compute, on every path, and where they are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from stockade.engine.engine import Engine
from stockade.engine.errors import BadInput, CannotQuantize
from stockade.engine.guards import Guard
from stockade.engine.models.adapters import read_adapter
from stockade.engine.models.attached import AttachedAdapter
from stockade.engine.models.decoder import Decoder
from stockade.engine.sampling import SamplingParams
from stockade.kernels import backend
from tests.engine.test_parity import last_logits, prompts
from tests.models.test_attached import save_lora
from tests.models.test_gguf import tiny, write

SHORT = SamplingParams(max_tokens=8, ignore_eos=True)


def engine(folder: Path | str, weights: str | None, dtype: torch.dtype = torch.float32) -> Engine:
    return Engine(folder, device="cpu", dtype=dtype, kv_bytes=4 << 20, weights=weights)


def decoder_of(engine: Engine) -> Decoder:
    found = engine.models["mllm"].backbone.decoder
    assert isinstance(found, Decoder)
    return found


def rounded(folder: Path) -> Engine:
    """An engine in fp32 whose maps hold what those of 8 bits stand for."""
    made = Engine(folder, device="cpu", dtype=torch.float32, kv_bytes=4 << 20)
    for plain, narrow in zip(decoder_of(made).layers, decoder_of(engine(folder, "int8")).layers, strict=True):
        for linear, other in zip(plain.linears, narrow.linears, strict=True):
            assert other.quantized is not None
            linear.weight = other.quantized.weight.float() * other.quantized.scale[:, None]
            linear.packed = False
    return made


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", ["llama-biases", "gemma2", "phi3"])
def test_logits_are_those_of_the_stored_weights(
    family: str, fused: bool, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(family)
    want = last_logits(rounded(folder), prompts()[1])
    if fused:
        monkeypatch.setenv(backend.VARIABLE, "reference")
    made = engine(folder, "int8")
    layer = decoder_of(made).layers[0]
    assert all(linear.weight.dtype is torch.int8 for linear in (layer.qkv, layer.o, layer.gate, layer.up, layer.down))
    assert torch.allclose(last_logits(made, prompts()[1]), want, atol=1e-4, rtol=0)
    plain = last_logits(engine(folder, None), prompts()[1])
    assert torch.cosine_similarity(plain, want, 0) > 0.99 and not torch.equal(plain, want)


def test_one_and_many_say_the_same(checkpoint: Callable[[str], Path]) -> None:
    made = engine(checkpoint("llama-gqa"), "int8")
    together = [reply.token_ids for reply in made.generate(prompts()[:4], SHORT)]
    assert together == [made.generate([prompt], SHORT)[0].token_ids for prompt in prompts()[:4]]
    made.check_integrity()


def test_an_attached_adapter_works_on_top(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = checkpoint("llama-gqa")
    save_lora(folder, tmp_path, seed=1)
    found = {}
    for name, made in (("int8", engine(folder, "int8")), ("same", rounded(folder))):
        backbone = made.models["mllm"].backbone
        plain = last_logits(made, prompts()[1])
        index = backbone.attach(AttachedAdapter.of(read_adapter(tmp_path), backbone.decoder))  # type: ignore[arg-type]
        object.__setattr__(made.models["mllm"], "adapter", index)
        found[name] = plain, last_logits(made, prompts()[2])
    assert all(torch.allclose(a, b, atol=1e-4, rtol=0) for a, b in zip(*found.values(), strict=True))


def test_a_guarded_answer_has_a_verdict() -> None:
    made = Engine("tiny-llava", "tiny-llama", "tiny-llama", weights="int8", kv_bytes=4 << 20)
    reply = made.chat(["Is it so?"], guard=Guard.protector(template="response", max_rounds=0), sampling=SHORT)[0]
    assert reply.verdicts and 0 <= reply.verdicts[0].score <= 1
    assert all(model.backbone.decoder.weights == "int8" for model in made.models.values())  # type: ignore[attr-defined]


def test_pages_are_not_those_of_other_weights(checkpoint: Callable[[str], Path]) -> None:
    keys = {engine(checkpoint("llama-gqa"), weights).models["mllm"].backbone.cache_key for weights in (None, "int8")}
    assert len(keys) == 2


def test_what_cannot_be_is_refused_before_weights_are_read(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="weights may be fp8 or int8"):
        engine("tiny-llama", "int4")
    with pytest.raises(CannotQuantize, match="the cpu multiplies no fp8; int8 works"):
        engine(tmp_path / "nothing is there", "fp8", torch.bfloat16)
    with pytest.raises(CannotQuantize, match="a hidden size of 200; 16 has to divide it"):
        engine(checkpoint("llama-dim100"), "int8")
    with pytest.raises(CannotQuantize, match="engine's own decoders: unknown architecture 'gpt_neox'"):
        engine(checkpoint("gpt_neox"), "int8")
    write(tmp_path / "packed.gguf", tiny(), GGMLQuantizationType.Q8_0)
    with pytest.raises(CannotQuantize, match=r"is quantized already; weights='int8' takes weights of 16 or 32 bits"):
        engine(tmp_path / "packed.gguf", "int8")
