"""Batches through the native layers: what comes out does not depend on how prompts were cut, adapted or not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from stockade.engine.models.adapters import read_adapter
from stockade.engine.models.attached import AttachedAdapter
from stockade.engine.models.bundles import default_cache
from stockade.engine.models.loader import ModelSet, load_models
from stockade.engine.passes import Generate, Score, Scored
from stockade.engine.sampling import SamplingParams
from stockade.engine.text import Untrusted
from stockade.kernels import backend, native
from tests.conftest import BASE, save_tokenizer, scatter_norms
from tests.engine.screened import asking, detector_on, engine_of, finish, head, submit, with_models
from tests.models.test_attached import INVOCATION, save_lora

LIBRARY = native.load(default_cache())
WITHOUT = LIBRARY if isinstance(LIBRARY, str) else backend.asked() and f"{backend.VARIABLE} asks for others"
needs_native = pytest.mark.skipif(WITHOUT is not None, reason=f"native kernels: {WITHOUT}")
SHORT = SamplingParams(max_tokens=8, ignore_eos=True)
STEPS = [
    *(Generate(name, tuple(range(5, 155)), sampling=SHORT) for name in ("mllm", "tuned")),
    Generate("invoked", tuple(range(25, 115)), sampling=SHORT),
    *(Score(name, (Untrusted("Is this a long and winding answer? " * 6),)) for name in ("low", "high", "mean")),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelSet:
    base, tuned, invoked = (tmp_path_factory.mktemp(name) for name in ("base", "tuned", "invoked"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**BASE, "head_dim": 32}))
    scatter_norms(model)
    model.eval().save_pretrained(base)
    save_tokenizer(base, None)
    save_lora(base, tuned, seed=1)
    save_lora(base, invoked, seed=2, alora_invocation_tokens=INVOCATION)
    loaded = load_models(base, None, None, dtype=torch.bfloat16)
    mllm = loaded.models["mllm"]
    heads = {"low": head(2, "last"), "high": head(mllm.depth, "last"), "mean": head(mllm.depth, "mean")}
    more = {name: detector_on(mllm, found, name) for name, found in heads.items()}
    for name, folder in (("tuned", tuned), ("invoked", invoked)):
        index = mllm.backbone.attach(AttachedAdapter.of(read_adapter(folder), mllm.backbone.decoder))
        more[name] = replace(mllm, name=name, adapter=index)
    return with_models(loaded, **more)


def results(models: ModelSet, tokens: int, together: bool) -> list[Any]:
    """Tokens or score of each of STEPS, one engine for all or for each, that computes so many tokens a step."""
    found: list[list[Any]] = [[] for _ in STEPS]
    for numbers in [range(len(STEPS))] if together else [[number] for number in range(len(STEPS))]:
        engine = engine_of(models, max_batch_tokens=tokens, max_sequences=6)
        for number in numbers:
            submit(engine, asking(STEPS[number], found[number]))
        finish(engine)
    return [result.score if isinstance(result, Scored) else result.ids for (result,) in found]


@needs_native
def test_whole_prompts_give_what_small_pieces_give(models: ModelSet) -> None:
    """Pieces of 20 rows are computed entirely; of whole prompts the last layer computes what is read of it."""
    assert models.models["mllm"].backbone.decoder.native is not None
    pieces, whole = results(models, 20, together=False), results(models, 2000, together=False)
    assert pieces[:5] == whole[:5]
    assert pieces[5] == pytest.approx(whole[5], abs=1e-6)  # a sum over tokens, in other groups
    assert len(set(pieces)) == len(STEPS)
    both = results(models, 2000, together=True)  # pages lie elsewhere, so that attention rounds elsewhere
    assert both[:3] == whole[:3]
    assert both[3:] == pytest.approx(whole[3:], abs=1e-3)
