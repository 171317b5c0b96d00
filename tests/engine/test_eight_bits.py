"""Engines whose decoders have weights or pages of 8 bits: what they compute, and where they are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from gguf import GGMLQuantizationType

from stockade.engine.engine import Engine
from stockade.engine.errors import BadInput, CannotQuantize
from stockade.engine.guards import Guard
from stockade.engine.models.adapters import read_adapter
from stockade.engine.models.attached import AttachedAdapter
from stockade.engine.models.decoder import Decoder
from stockade.engine.models.kv_scales import measured
from stockade.engine.models.loader import load_models
from stockade.engine.sampling import SamplingParams
from stockade.kernels import backend
from stockade.kernels.linear import Linear
from stockade.kernels.paged_attention import LayerKV, SequenceSpan, widened, write_kv
from stockade.kernels.quantized import FP8, Kind
from tests.engine.test_parity import last_logits, prompts
from tests.models.test_attached import save_lora
from tests.models.test_gguf import tiny, write

SHORT = SamplingParams(max_tokens=8, ignore_eos=True)


def engine(folder: Path | str | tuple[Path, Path], weights: str | None, dtype: torch.dtype = torch.float32) -> Engine:
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


def test_a_classifier_in_fp32_takes_rows_of_fp32(checkpoint: Callable[[str], Path]) -> None:
    made = load_models("tiny-llama", checkpoint("classifier"), device="cpu", dtype=torch.float32, weights="int8")
    decoder = made.models["detector"].backbone.decoder
    assert isinstance(decoder, Decoder) and decoder.native is None
    assert decoder.layers[0].qkv(torch.ones(1, decoder.config.hidden_size)).dtype is torch.float32


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
    tiny().save_pretrained(tmp_path / "base")
    save_lora(tmp_path / "base", tmp_path / "lora")
    with pytest.raises(CannotQuantize, match="is quantized already"):
        engine((tmp_path / "lora", tmp_path / "packed.gguf"), "int8")


def narrow(folder: Path | str, kv_dtype: str | None = "fp8", **more: Any) -> Engine:
    return Engine(folder, device="cpu", dtype=torch.float32, kv_dtype=kv_dtype, **{"kv_bytes": 4 << 20, **more})


@pytest.mark.parametrize(
    ("family", "kernels"),
    [*product(("llama-gqa", "gemma2", "qwen3-window"), (None, "reference")), ("llama-gqa", "triton")],
)
def test_pages_of_fp8_hold_nearly_the_same(
    family: str, kernels: str | None, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(family)
    plain = narrow(folder, None)
    want = last_logits(plain, prompts()[1][:13])
    if kernels is not None:
        monkeypatch.setenv(backend.VARIABLE, kernels)
    made = narrow(folder, max_batch_tokens=13, max_sequences=4)  # chunks read what earlier ones wrote
    # Triton's interpreter halves what is rounded up to a power of two
    assert torch.cosine_similarity(last_logits(made, prompts()[1][:13]), want, 0) > (
        0.8 if kernels == "triton" else 0.99
    )
    if kernels == "triton":
        return  # steps of decoding take the interpreter minutes
    layout, wide = (one.models["mllm"].layout(64) for one in (made, plain))
    assert layout.dtype is torch.float8_e4m3fn and 2 * layout.page_bytes <= wide.page_bytes
    assert made.pool.capacity(layout) >= 2 * plain.pool.capacity(wide) - 2
    together = [reply.token_ids for reply in made.generate(prompts()[:3], SHORT)]
    assert together == [made.generate([prompt], SHORT)[0].token_ids for prompt in prompts()[:3]]  # from known pages
    made.check_integrity()
    assert made.pool.owned_pages == 0


def test_a_preempted_answer_is_computed_again_from_the_same_pages(checkpoint: Callable[[str], Path]) -> None:
    roomy = narrow(checkpoint("llama-gqa"), tokens_per_page=16)
    layout = roomy.models["mllm"].layout(16)
    tight = narrow(checkpoint("llama-gqa"), tokens_per_page=16, kv_bytes=9 * layout.page_bytes)
    many = [[5 + index, *range(20, 60)] for index in range(3)]
    long = SamplingParams(max_tokens=30, ignore_eos=True)
    want = [reply.token_ids for reply in roomy.generate(many, long)]
    assert [reply.token_ids for reply in tight.generate(many, long)] == want
    assert tight.scheduler.preemptions > 0
    tight.check_integrity()


def test_models_of_several_depths_and_weights_share_a_pool_of_fp8() -> None:
    made = narrow("tiny-llava", detector="tiny-llama", detoxifier="tiny-llama", weights="int8")
    reply = made.chat(["Is it so?"], guard=Guard.protector(template="response", max_rounds=0), sampling=SHORT)[0]
    assert reply.verdicts and 0 <= reply.verdicts[0].score <= 1
    assert {layout.dtype for layout in made.pool.layouts} == {torch.float8_e4m3fn}
    made.check_integrity()


def test_scales_leave_room_above_what_was_seen(checkpoint: Callable[[str], Path]) -> None:
    scales = decoder_of(narrow(checkpoint("llama-gqa"))).kv_scales
    assert scales is not None and scales.shape == (3, 4) and (scales > 0).all()
    assert torch.equal(scales, decoder_of(narrow(checkpoint("llama-gqa"))).kv_scales)


def test_pages_are_not_those_of_other_scales(checkpoint: Callable[[str], Path]) -> None:
    backbone = narrow(checkpoint("llama-gqa")).models["mllm"].backbone
    decoder = backbone.decoder
    assert isinstance(decoder, Decoder) and decoder.kv_scales is not None
    here = backbone.cache_key
    decoder.narrow_pages(2 * decoder.kv_scales)  # as of the same weights with another tokenizer
    assert replace(backbone).cache_key != here


def test_weights_that_compute_no_numbers_have_no_scales(checkpoint: Callable[[str], Path]) -> None:
    decoder = decoder_of(narrow(checkpoint("llama-gqa"), None))
    for broken in (float("nan"), float("inf")):
        decoder.embedding[7].fill_(broken)
        with pytest.raises(CannotQuantize, match="not all finite"):
            measured(decoder, [5, 6, 7])
    decoder.embedding.fill_(1e-40)
    assert measured(decoder, [5, 6, 7]).reciprocal().isfinite().all()


def test_weights_are_given_away_one_by_one_as_they_are_quantized(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize, kept = Linear.quantize, []

    def watched(linear: Linear, kind: Kind) -> None:
        wide = ref(linear.weight)
        quantize(linear, kind)
        kept.append(wide() is not None)

    monkeypatch.setattr(Linear, "quantize", watched)
    engine(checkpoint("llama-gqa"), "int8")
    assert kept and not any(kept)


def test_models_that_are_loaded_stay_as_they_are() -> None:
    models = load_models("tiny-llama", device="cpu")
    for asked in ({"weights": "int8"}, {"kv_dtype": "fp8"}):
        with pytest.raises(BadInput, match="models are loaded already"):
            Engine(models=models, kv_bytes=4 << 20, **asked)  # type: ignore[arg-type]


def test_what_is_beyond_the_largest_is_that_but_no_infinity_and_nan_stays_one() -> None:
    kv = torch.zeros(2, 16, 16, dtype=FP8)
    cache = LayerKV(kv, kv[:1].unsqueeze(0), kv[1:].unsqueeze(0))
    rows = torch.tensor([[1e9], [float("nan")]]).expand(2, 16).unsqueeze(0)
    scale = torch.tensor([0.5, 2.0])
    write_kv(cache, torch.tensor([3]), rows, scale)
    wide, (span,) = widened(cache, [SequenceSpan(0, 1, ((3, 1),))], scale, torch.float32)
    assert span.runs == ((0, 1),)
    assert (wide.kv[0] == 224.0).all() and wide.kv[1].isnan().all()
    write_kv(
        cache, torch.tensor([4]), torch.tensor([[float("inf")], [float("-inf")]]).expand(2, 16).unsqueeze(0), scale
    )
    assert kv[:, 4].float().isnan().all()


def test_other_pages_are_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(BadInput, match="kv_dtype may be fp8"):
        narrow("tiny-llama", "int8")
    with pytest.raises(CannotQuantize, match="kv_dtype='fp8' is for the engine's own decoders"):
        narrow(checkpoint("gpt_neox"))
