"""The table of models says what is so: each line against the code, the tests and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from typer.testing import CliRunner

from stockade.cli import app
from stockade.engine.errors import CheckpointError, UnknownArchitecture, UnsafeCheckpoint
from stockade.engine.guards.templates import TEMPLATES
from stockade.engine.models.decoder import FAMILIES as OWN
from stockade.engine.models.fallback import FallbackDecoder
from stockade.engine.models.loader import load_models
from stockade.engine.models.support import (
    FOREIGN,
    IN_PAPERS,
    ON_FALLBACK,
    PAPERS,
    Way,
    guard_rows,
    markdown,
    outlook,
    rows,
    with_eyes,
)
from stockade.engine.models.vision.families import ADAPTERS
from tests.conftest import BASE, FAMILIES, OTHER_FAMILIES, save_tokenizer

# What marks the configuration of a model of the papers, as it was released.
RELEASED: dict[str, dict[str, Any]] = {
    "share4v": {"architectures": ["Share4VLlamaForCausalLM"], "mm_vision_tower": "Lin-Chen/ShareGPT4V"},
    "mplug_owl2": {"architectures": ["MPLUGOwl2LlamaForCausalLM"]},
    "qwen": {"auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"}, "visual": {"width": 1664}},
    "InternLMXComposer": {"auto_map": {"AutoConfig": "configuration_InternLM_XComposer.InternLMXComposerConfig"}},
}


def of_kind(*ways: Way) -> set[str]:
    return {kind for row in rows() if row.kind != PAPERS and row.way in ways for kind in row.types}


def test_the_families_are_those_of_the_code() -> None:
    assert of_kind(Way.ENGINE) == {*OWN, *ADAPTERS}
    assert of_kind(Way.FALLBACK) == set(ON_FALLBACK)


def test_every_family_that_is_said_to_be_exact_has_a_test_of_it() -> None:
    """Parity is shown for the checkpoints of conftest, and for eyes by the tests that make theirs."""
    assert {config().model_type for config in FAMILIES.values()} == set(OWN)
    assert {name: config().model_type for name, config in OTHER_FAMILIES.items()} == {
        kind: kind for kind in ON_FALLBACK
    }
    tests = "".join(path.read_text() for path in (Path(__file__).parents[1] / "engine").glob("test_*.py"))
    for kind in ADAPTERS:
        made = (
            CONFIG_MAPPING[kind].__name__,
            CONFIG_MAPPING[kind].__name__.replace("Config", "ForConditionalGeneration"),
        )
        tests_here = tests + (Path(__file__).parents[1] / "models" / "test_loader.py").read_text()
        assert any(name in tests_here for name in made) or f'checkpoint("{kind}")' in tests_here, kind


@pytest.mark.parametrize("kind", IN_PAPERS)
def test_the_papers_models_run_or_say_what_does(kind: str, tmp_path: Path) -> None:
    (row,) = (row for row in rows() if row.kind == PAPERS and kind in row.types)
    if kind in with_eyes():
        assert row.way is Way.ENGINE
        return
    config = {"model_type": kind, **RELEASED.get(kind, {})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsafeCheckpoint if "auto_map" in config else UnknownArchitecture) as caught:
        load_models(tmp_path)
    assert row.way is Way.REFUSED
    assert str(caught.value).endswith(f". {row.name}: {row.note}")
    assert outlook(tmp_path) == (Way.REFUSED, f"{caught.value} [{type(caught.value).__name__}]")


def test_what_is_named_in_place_of_others_runs() -> None:
    assert all(kind in CONFIG_MAPPING for found in FOREIGN.values() for kind in found.instead)
    for row in rows():
        if row.way is Way.REFUSED:
            assert ("instead: " in row.note) == any(kind in ADAPTERS for kind in FOREIGN[row.types[0]].instead)


def test_llava_in_its_first_names_is_told_from_llava(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    config = {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownArchitecture, match=r"LLaVA as first released: .*instead: LLaVA-1\.5"):
        load_models(tmp_path)
    assert outlook(checkpoint("llava")).way is Way.ENGINE


def test_another_model_of_the_same_type_is_not_taken_for_the_one_with_eyes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen", "auto_map": {}}))
    with pytest.raises(UnsafeCheckpoint, match=r"that is never done$"):
        load_models(tmp_path)


@pytest.mark.parametrize("kind", ["llama-gqa", "gemma2", "llava", "classifier", "olmo2", "llama4"])
def test_the_outlook_is_what_loading_does(kind: str, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(kind)
    detector = kind == "classifier"
    models = load_models(checkpoint("llama-gqa") if detector else folder, folder if detector else None).models
    decoder = models["detector" if detector else "mllm"].backbone.decoder
    assert outlook(folder).way is (Way.FALLBACK if isinstance(decoder, FallbackDecoder) else Way.ENGINE)


def test_the_outlook_reads_no_weights(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr("stockade.engine.models.weight_files.WeightFiles.read", read)
    for kind in ("llama-gqa", "mixtral", "llava"):
        assert outlook(checkpoint(kind)).way is not Way.REFUSED
    with pytest.raises(AssertionError, match="weights were read"):
        load_models(checkpoint("llama-gqa"))


def damaged(folder: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(3)}, folder / "model.safetensors")


def mute(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(("harm", "reason"), [(damaged, "lacks lm_head.weight"), (mute, "no usable tokenizer")])
def test_the_outlook_of_what_will_not_load(harm: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(FAMILIES["llama-gqa"]()).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert outlook(tmp_path).way is Way.ENGINE
    harm(tmp_path)
    with pytest.raises(CheckpointError, match=reason):
        load_models(tmp_path)
    found = outlook(tmp_path)
    assert found.way is Way.REFUSED and reason in found.reason


def test_the_outlook_knows_what_pages_cannot_run(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(CONFIG_MAPPING["stablelm"](**BASE)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    found = outlook(tmp_path)
    assert found.way is Way.REFUSED and "is not handed what its layer is called with" in found.reason


def test_the_command_shows_the_table_and_one_checkpoint(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    run = CliRunner().invoke
    shown = run(app, ["models"], env={"COLUMNS": "200"}).output
    guards = list(guard_rows({name: prompt.model for name, prompt in TEMPLATES.items()}))
    assert [row.types for row in guards] == [(name,) for name in TEMPLATES]
    for row in (*rows(), *guards):
        assert all(kind in shown for kind in row.types)
    assert run(app, ["models", "--markdown"]).output == markdown([*rows(), *guards]) + "\n"
    here = run(app, ["models", str(checkpoint("olmo2"))])
    assert here.exit_code == 0 and here.output.startswith("fallback: OLMo 2, in the tests; a trial run")
    gone = run(app, ["models", str(tmp_path / "gone")])
    assert gone.exit_code == 1 and gone.output.startswith("refused: ")
    for name in ("smol", "tiny-llava"):
        assert run(app, ["models", name]).output.startswith("engine: ")


def test_the_readme_has_this_table() -> None:
    prompts = {name: prompt.model for name, prompt in TEMPLATES.items()}
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- models -->\n")[2].partition("\n<!-- /models -->")[0]
    assert shown == markdown([*rows(), *guard_rows(prompts)]), "stockade models --markdown prints what belongs there"
