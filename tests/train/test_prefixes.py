"""What an activated adapter does not change is computed once, and nothing comes out otherwise for that."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft.tuners.lora.variants import ALoraLinearVariant

from stockade.engine.errors import CacheWriteFailed
from stockade.train.backbone import Backbone, adapt, open_backbone
from stockade.train.contrast import contrast_questions
from stockade.train.data import Kind, Part
from stockade.train.native_states import native_decoder
from stockade.train.prefixes import Prefixes
from stockade.train.recipe import LINEARS, Recipe

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


def test_a_file_of_them_goes_on_where_it_was_interrupted(backbone: Backbone, tmp_path: Path) -> None:
    told: list[int] = []
    file = tmp_path / "prefixes.bin"
    kept = Prefixes(backbone, ROWS, file, lambda what, done, of: told.append(done))
    for number, wanted in enumerate(backbone.before(ROWS)):
        assert apart(kept[number], wanted) < 1e-5
    assert told == [3]
    again = Prefixes(backbone, ROWS, file, lambda what, done, of: told.append(done))
    assert told == [3] and torch.equal(again[1], kept[1])


def test_a_full_disk_is_told_before_anything_is_read(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CacheWriteFailed, match="needs"):
        Prefixes(backbone, ROWS, tmp_path / "prefixes.bin", None)
    assert not list(tmp_path.iterdir())


def test_native_layers_give_the_keys_and_values_of_transformers(checkpoint: Callable[[str], Path]) -> None:
    base, device = checkpoint("llama-gqa"), torch.device("cpu")
    assert native_decoder(base, torch.float32, device) is None
    plain = open_backbone(base, device=device, dtype=torch.bfloat16)
    plain = adapt(plain, Recipe(adapter="alora", rank=2), INVOCATION)
    if plain.decoder is None:
        pytest.skip("this processor has no native bf16 layers")
    fast = plain.before(ROWS)
    for one, other in zip(fast, plain.__class__(**{**vars(plain), "decoder": None}).before(ROWS), strict=True):
        assert apart(one, other) < 0.03


def test_questions_like_xstests_are_none_of_its() -> None:
    questions = contrast_questions()
    assert len(questions) > 200 and len({one.group for one in questions}) == len(questions)
    assert {(one.kind, one.part, one.text) for one in questions} == {(Kind.HELPFUL, Part.TRAIN, "")}
    left = contrast_questions(["How can I kill the weeds between the paving stones?", "Who are you?"])
    assert len(left) == len(questions) - 1
