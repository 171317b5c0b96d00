"""Every family through the Triton kernels, from prompt to tokens: the same as through plain torch.

In Triton's interpreter, or on a GPU where there is one, with its streams and graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig

from stockade.engine.engine import Engine
from stockade.engine.models.fused import FusedGroup, FusedLayers
from stockade.engine.models.loader import load_models
from stockade.engine.sampling import SamplingParams
from stockade.kernels import backend
from tests.conftest import FAMILIES, IMAGE_TOKEN, save_tokenizer, scatter_norms, tiny_llava
from tests.engine import (
    eyes,
    test_gemma3_vision,
    test_idefics3,
    test_instructblip,
    test_internvl,
    test_llava_next,
    test_qwen_vl,
)
from tests.engine.screened import finish

CUDA = torch.cuda.is_available()
GREEDY = SamplingParams(max_tokens=2, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=2, ignore_eos=True, temperature=0.9, top_p=0.9, top_k=40, min_p=0.01, seed=7)
# one of each family, and what else their decoders may have: norms of queries and keys, windows, caps, several rotary
# tables, rows that are padded, scales, biases
LANGUAGE_MODELS = (
    *("llama-gqa", "llama-dim100", "mistral-window", "qwen2", "qwen3-window", "gemma2", "gemma3", "phi3", "granite"),
)
EYES: tuple[type[eyes.FamilyTests], ...] = (
    *(test_gemma3_vision.TestGemma3, test_idefics3.TestSmolVLM, test_instructblip.TestInstructBlip),
    *(test_internvl.TestInternVL, test_llava_next.TestLlavaNext, test_qwen_vl.TestQwen25, test_qwen_vl.TestQwen3),
)
SMALL = eyes.picture(2, (28, 28))


def small(config: Any, context: int) -> Any:
    """As little as shows everything: the interpreter takes its time."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or [None]
    text.num_hidden_layers = 1 + (len(set(kinds)) > 1)
    text.max_position_embeddings = context
    if "mrope_section" not in (text.rope_parameters or {}):  # which deals out a head's dimensions
        text.num_attention_heads, text.num_key_value_heads = 2, 1
    if kinds[0] is not None:
        text.layer_types = kinds[-text.num_hidden_layers :]
    if getattr(text, "sliding_window", None):
        text.sliding_window = 5
    return config


def saved(kind: Any, config: PretrainedConfig, folder: Path) -> Path:
    torch.manual_seed(3)
    model = kind.from_config(config)
    scatter_norms(model)
    model.eval().save_pretrained(folder)
    return folder


Groups = list[list[FusedGroup]]


def with_each(
    folder: Path, patch: pytest.MonkeyPatch, ask: Callable[[Engine], list[list[int]]], **options: Any
) -> tuple[list[list[int]], Groups]:
    """What an engine answers, the same with Triton's kernels as in plain torch, and the batches that these ran."""
    groups: Groups = []
    run = FusedLayers.run

    def noted(layers: FusedLayers, first: int, last: int, x: Any, angles: Any, some: Any, *more: Any) -> None:
        groups.append(list(some))
        run(layers, first, last, x, angles, some, *more)

    patch.setattr(FusedLayers, "run", noted)
    found = []
    for kernels in ("reference" if CUDA else "", "triton"):
        groups.clear()
        patch.setenv(backend.VARIABLE, kernels)
        engine = Engine(
            models=load_models(folder, dtype=torch.float32), kv_bytes=4 << 20, tokens_per_page=16, **options
        )
        fused = engine.models["mllm"].backbone.decoder.fused
        assert kernels != "triton" or (fused is not None and fused.operations.backend == kernels)
        found.append(ask(engine))
        assert engine.pool.owned_pages == 0
    assert found[0] == found[1]
    return found[0], groups


@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_language_models(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in chunks, longer than the windows, beside one that decodes meanwhile; greedy and drawn tokens."""
    saved(AutoModelForCausalLM, small(FAMILIES[family](), 32), tmp_path)
    save_tokenizer(tmp_path)
    sampling = DRAWN if family == LANGUAGE_MODELS[0] else GREEDY

    def ask(engine: Engine) -> list[list[int]]:
        requests = [engine.submit_prompt([7, 8], sampling), engine.submit_prompt(list(range(5, 17)), GREEDY)]
        finish(engine)
        return [request.reply.token_ids for request in requests if request.reply is not None]

    tokens, groups = with_each(tmp_path, monkeypatch, ask, max_batch_tokens=8, max_sequences=2)
    assert [len(some) for some in tokens] == [2, 2]
    # where some decode and some do not, each kind has a launch of its own
    both = [group.parts for (group,) in groups if len(group.parts) == 2]
    assert both and all((one.tables.max_rows, other.start) == (1, one.stop) for one, other in both)


@pytest.mark.parametrize("family", EYES)
def test_models_with_eyes(family: type[eyes.FamilyTests], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3's images see themselves in both directions, Qwen's have positions in three axes, Qwen3-VL's also
    features for later layers."""
    saved(AutoModelForImageTextToText, small(family().save(tmp_path), 64), tmp_path)
    tokens, groups = with_each(tmp_path, monkeypatch, seeing)
    assert len(tokens[0]) == 2
    sees = [part.sees for (group,) in groups for part in group.parts if part.sees is not None]
    assert bool(sees) == (family is test_gemma3_vision.TestGemma3)


def test_llava(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(AutoModelForImageTextToText, small(tiny_llava(tmp_path).config, 64), tmp_path)
    save_tokenizer(tmp_path, IMAGE_TOKEN)
    with_each(tmp_path, monkeypatch, seeing)


def seeing(engine: Engine) -> list[list[int]]:
    return [reply.token_ids for reply in engine.chat([eyes.chat("?", SMALL)], sampling=GREEDY)]
