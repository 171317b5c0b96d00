"""What an adapter does not change is computed once, and nothing comes out otherwise for that."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft.tuners.lora.variants import ALoraLinearVariant
from transformers import AutoModelForCausalLM, LlamaConfig

from stockade.engine.errors import CacheWriteFailed
from stockade.train.backbone import Backbone, adapt, open_backbone, trainable
from stockade.train.contrast import contrast_questions
from stockade.train.data import Kind
from stockade.train.data import Part as Split
from stockade.train.frozen import Frozen, Part
from stockade.train.native_states import native_decoder
from stockade.train.recipe import LINEARS, Recipe
from tests.conftest import BASE, save_tokenizer

INVOCATION = [7, 8, 9]
ROWS = [[3 + (5 * n + place) % 90 for place in range(length)] for n, length in enumerate((11, 4, 7))]


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The norm of their difference, by the second's."""
    return float((one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-12))


@pytest.fixture(scope="module")
def backbone(checkpoint: Callable[[str], Path]) -> Backbone:
    found = open_backbone(checkpoint("llama-gqa"), device=torch.device("cpu"), dtype=torch.float32)
    found.run_states_only(normed=False)
    found = adapt(found, Recipe(adapter="alora", rank=2, targets=LINEARS), INVOCATION)
    with torch.no_grad():
        for name, parameter in found.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    found.model.eval()
    return found


def whole_states(backbone: Backbone, row: list[int]) -> torch.Tensor:
    """Of a text with its invocation, as `peft` runs an activated adapter on all of it."""
    tuner = backbone.model.base_model
    layers = [module for module in tuner.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer.lora_variant["default"] = ALoraLinearVariant()
    try:
        offsets = [len(INVOCATION)]
        out = backbone.model(torch.tensor([row]), output_hidden_states=True, alora_offsets=offsets, use_cache=False)
        return out.hidden_states[-1][0]
    finally:
        for layer in layers:
            layer.lora_variant.pop("default")


def test_states_behind_kept_keys_and_values_are_those_of_the_whole_text(backbone: Backbone) -> None:
    lengths = [len(row) for row in ROWS]
    found = backbone.active_states([[*row, *INVOCATION] for row in ROWS], lengths)
    for states, row in zip(found, ROWS, strict=True):
        assert apart(states, whole_states(backbone, [*row, *INVOCATION])[len(row) :]) < 1e-5
    base = backbone.before(ROWS)
    assert [one.shape[3] for one in base] == lengths and not any(one.requires_grad for one in base)


def test_gradients_are_those_of_the_whole_text(backbone: Backbone) -> None:
    def gradients(states: torch.Tensor) -> list[torch.Tensor]:
        backbone.model.zero_grad()
        states.square().mean().backward()
        return [one.grad.clone() for one in backbone.model.parameters() if one.requires_grad and one.grad is not None]

    row = [*ROWS[0], *INVOCATION]
    one = gradients(backbone.active_states([row], [11])[0, -1])
    other = gradients(whole_states(backbone, row)[-1])
    assert len(one) == len(other) > 0 and any(float(grad.abs().max()) > 0 for grad in one)
    for mine, its in zip(one, other, strict=True):
        assert apart(mine, its) < 1e-3


@pytest.fixture(scope="module")
def upper(checkpoint: Callable[[str], Path]) -> Backbone:
    """Only its last layer has an adapter."""
    found = open_backbone(checkpoint("llama-gqa"), device=torch.device("cpu"), dtype=torch.float32)
    found.run_states_only(normed=False)
    found = adapt(found, Recipe(adapter="lora", rank=2, targets=LINEARS, dropout=0.0, first_layer=found.layers - 1))
    with torch.no_grad():
        for name, parameter in found.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return found


def test_upper_layers_on_kept_states_are_the_whole_model(upper: Backbone) -> None:
    """States and gradients, and no adapter has a place below."""
    assert {name.split(".layers.")[1].split(".")[0] for name in trainable(upper.model)} == {str(upper.layers - 1)}

    def run(states: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        upper.model.zero_grad()
        states.square().mean().backward()
        return states.detach(), [one.grad.clone() for one in trainable(upper.model).values() if one.grad is not None]

    for row in ROWS:
        states, gradients = run(upper.above(upper.below([row])))
        wanted, its = run(upper.states(torch.tensor([row])))
        assert apart(states, wanted) < 1e-5 and len(gradients) == len(its) == len(trainable(upper.model))
        assert all(apart(one, other) < 1e-4 for one, other in zip(gradients, its, strict=True))
    together = upper.above(upper.below(ROWS))
    for states, row in zip(together, ROWS, strict=True):
        assert apart(states[: len(row)], upper.states(torch.tensor([row]))[0]) < 1e-5


def test_products_of_fp32_adapters_are_in_the_dtype_of_the_base(checkpoint: Callable[[str], Path]) -> None:
    found = open_backbone(checkpoint("llama-gqa"), device=torch.device("cpu"), dtype=torch.bfloat16)
    found = adapt(found, Recipe(adapter="lora", rank=2, dropout=0.0, first_layer=1))
    states = found.states(torch.tensor([ROWS[0]]))
    states.float().sum().backward()
    learned = trainable(found.model)
    assert states.dtype is torch.bfloat16 and {one.dtype for one in learned.values()} == {torch.float32}
    assert any(one.grad is not None and float(one.grad.abs().max()) > 0 for one in learned.values())


def test_a_file_of_them_goes_on_where_it_was_interrupted(backbone: Backbone, upper: Backbone, tmp_path: Path) -> None:
    for name, one in (("prefixes", backbone), ("states", upper)):
        told: list[int] = []
        file, part = tmp_path / f"{name}.bin", one.frozen()
        assert part is not None
        kept = Frozen(part, ROWS, file, lambda what, done, of, told=told: told.append(done))
        for number, wanted in enumerate(part.read(ROWS)):
            assert apart(kept[number], wanted) < 1e-5
        assert told == [3]
        again = Frozen(part, ROWS, file, lambda what, done, of, told=told: told.append(done))
        assert told == [3] and torch.equal(again[1], kept[1])


def test_a_full_disk_is_told_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read(rows: object) -> list[torch.Tensor]:
        raise AssertionError("it was read")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CacheWriteFailed, match="needs"):
        Frozen(Part(read, lambda tokens: (tokens, 8), torch.float32), ROWS, tmp_path / "states.bin", None)
    assert not list(tmp_path.iterdir())


def test_native_layers_give_what_transformers_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**{**BASE, "head_dim": 32})).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, None)
    device = torch.device("cpu")
    assert native_decoder(tmp_path, torch.float32, device) is None
    for recipe, invocation in (Recipe(adapter="alora", rank=2), INVOCATION), (Recipe(rank=2, first_layer=1), []):
        plain = open_backbone(tmp_path, device=device, dtype=torch.bfloat16)
        adapted = adapt(plain, recipe, invocation)
        if adapted.decoder is None:
            pytest.skip("this processor has no native bf16 layers")
        part, slow = adapted.frozen(), replace(adapted, decoder=None).frozen()
        assert part is not None and slow is not None
        for one, other in zip(part.read(ROWS), slow.read(ROWS), strict=True):
            assert one.shape == other.shape and apart(one, other) < 0.03


def test_questions_like_xstests_are_none_of_its() -> None:
    questions = contrast_questions()
    assert len(questions) > 200 and len({one.group for one in questions}) == len(questions)
    assert {(one.kind, one.part, one.text) for one in questions} == {(Kind.HELPFUL, Split.TRAIN, "")}
    left = contrast_questions(["How can I kill the weeds between the paving stones?", "Who are you?"])
    assert len(left) == len(questions) - 1
