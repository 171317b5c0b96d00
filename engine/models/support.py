"""Which models run here, how, and what to take in place of those that do not: the data behind `stockade models`.

Families come from the code's own registries; what is written here is names, and models that cannot run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import CheckpointError

if TYPE_CHECKING:
    from .sources import Checkpointed


class Way(StrEnum):
    """How a model runs."""

    ENGINE = "engine"
    FALLBACK = "fallback"
    REFUSED = "refused"


@dataclass(frozen=True)
class Row:
    """One line of the table. kind: what the line is about. types: `model_type` in a checkpoint's configuration.
    note: what was checked, or why it does not run and what does."""

    kind: str
    name: str
    types: tuple[str, ...]
    way: Way
    note: str


class Foreign(NamedTuple):
    """A model that does not run. instead: `model_type` of what may be taken in its place, best first. mark: a key of
    its configuration, where others share its `model_type`."""

    name: str
    why: str
    instead: tuple[str, ...] = ()
    mark: str | None = None


class Outlook(NamedTuple):
    """How one checkpoint would run, as far as that can be told without its weights."""

    way: Way
    reason: str


EXACT = "logits and greedy tokens as transformers'"
PAPERS = "models of the papers"
NAMES = {
    "llama": "Llama, Vicuna, OpenLLaMA, SmolLM2",
    "mistral": "Mistral",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "gemma3_text": "Gemma 3, text only",
    "phi3": "Phi-3, Phi-4",
    "granite": "Granite 3",
    "llava": "LLaVA-1.5",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "internvl": "InternVL 3",
    "smolvlm": "SmolVLM",
    "idefics3": "Idefics3",
    "instructblip": "InstructBLIP with Vicuna",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3, mixture of experts",
    "olmo2": "OLMo 2",
    "starcoder2": "StarCoder2",
    "gpt_neox": "GPT-NeoX, Pythia",
    "cohere2": "Command R7B, Command A",
    "glm4": "GLM-4-0414",
    "smollm3": "SmolLM3",
    "exaone4": "EXAONE 4",
    "llama4_text": "Llama 4, text only",
    "llama4": "Llama 4 and Llama Guard 4 by their text, without their eyes",
}
ON_FALLBACK = (
    *("mixtral", "qwen3_moe", "olmo2", "starcoder2", "gpt_neox", "cohere2", "glm4", "smollm3", "exaone4"),
    *("llama4_text", "llama4"),
)
"""Architectures that tests run on the fallback; it takes others, too."""
GUARDS_ON_FALLBACK = ("llama-guard-4",)

_OWN_CODE = "its architecture is code of its own"
_FIRST_NAMES = "its weights have the names of LLaVA's first release"
FOREIGN = {
    "llava_llama": Foreign("LLaVA as first released", _FIRST_NAMES, ("llava", "llava_next")),
    "share4v": Foreign(
        "ShareGPT4V-7B",
        f"{_FIRST_NAMES}; its architecture is LLaVA-1.5's, and it runs once it is converted to transformers' names "
        "with its own vision tower",
        ("llava",),
    ),
    "mplug_owl2": Foreign("mPLUG-Owl2-7B", f"{_OWN_CODE}, and transformers has nothing like it"),
    "qwen": Foreign("Qwen-VL-Chat", _OWN_CODE, ("qwen2_5_vl",), mark="visual"),
    "InternLMXComposer": Foreign("InternLM-XComposer-7B", _OWN_CODE, ("internvl", "qwen2_5_vl")),
    "minigpt4": Foreign(
        "MiniGPT-4", "it was released as a projector without a configuration", ("instructblip", "llava")
    ),
    "flamingo": Foreign(
        "OpenFlamingo",
        "its layers attend to images across, and it was released without a configuration",
        ("idefics3", "smolvlm", "llava_onevision"),
    ),
    "internvl_chat": Foreign("InternVL as first released", _OWN_CODE, ("internvl", "qwen2_5_vl")),
}
IN_PAPERS = (
    *("llava", "share4v", "mplug_owl2", "qwen", "InternLMXComposer"),
    *("instructblip", "minigpt4", "flamingo"),
)


def with_eyes() -> tuple[str, ...]:
    """`model_type` of the vision-language models that run."""
    from .vision.families import ADAPTERS

    return tuple(ADAPTERS)


def hint(config: Mapping[str, Any]) -> str:
    """What is known of a model whose configuration file cannot be used, as a sentence; empty for nothing."""
    found = _foreign(config)
    return "" if found is None else f"{found.name}: {found.why}; {_instead(found)}"


def _foreign(config: Mapping[str, Any]) -> Foreign | None:
    kind = str(config.get("model_type"))
    found = FOREIGN.get(kind)
    if found is None:
        return FOREIGN["llava_llama"] if "mm_vision_tower" in config else None
    if found.mark is not None and found.mark not in config:
        return None
    return None if kind in with_eyes() else found


def rows() -> Iterator[Row]:
    """The table, in order."""
    from .decoder import FAMILIES

    for kind in FAMILIES:
        yield _runs("text", kind, Way.ENGINE)
    for kind in with_eyes():
        yield _runs("text and images", kind, Way.ENGINE)
    for kind in ON_FALLBACK:
        yield _runs("text", kind, Way.FALLBACK)
    note = "those that pass a trial against their own forward pass, when they are loaded"
    yield Row("text", "other causal language models", (), Way.FALLBACK, note)
    for kind in IN_PAPERS:
        if kind in with_eyes():
            yield _runs(PAPERS, kind, Way.ENGINE)
        else:
            found = FOREIGN[kind]
            yield Row(PAPERS, found.name, (kind,), Way.REFUSED, f"{found.why}; {_instead(found)}")


def guard_rows(prompts: Mapping[str, str]) -> Iterator[Row]:
    """Lines of guard models, by the name of their prompt; `prompts` says whose each is."""
    for name, whose in prompts.items():
        yield Row(
            "guard models",
            whose.partition(" (")[0],
            (name,),
            Way.FALLBACK if name in GUARDS_ON_FALLBACK else Way.ENGINE,
            "prompt as documented, scores as transformers'",
        )


def markdown(table: Iterable[Row]) -> str:
    """The table as a document has it: models of which the same is true share a line."""
    lines = ["| | runs on | models, by `model_type` | |", "|---|---|---|---|"]
    for (kind, way, note), some in groupby(table, lambda row: (row.kind, row.way, row.note)):
        names = [
            f"{row.name} ({', '.join(f'`{kind}`' for kind in row.types)})" if row.types else row.name for row in some
        ]
        lines.append(f"| {kind} | {way} | {'; '.join(names)} | {note} |")
    return "\n".join(lines)


def outlook(source: Checkpointed) -> Outlook:
    """How a source (see `load_models`) would run. Reads no weights, only names and shapes (of an adapter: all of it).

    What is wrong with a checkpoint is an answer here, not an error.
    """
    from .backbones import check_without_weights
    from .shapes import NAMED_SHAPES

    if str(source) in NAMED_SHAPES:
        return Outlook(Way.ENGINE, "random weights in a well-known shape")
    try:
        kind, refusal = check_without_weights(source)
    except CheckpointError as error:
        return Outlook(Way.REFUSED, f"{error} [{type(error).__name__}]")
    if refusal is None:
        return Outlook(Way.ENGINE, f"{NAMES.get(kind, kind)}; names and shapes of all tensors are as they should be")
    tried = f"{NAMES[kind]}, in the tests" if kind in ON_FALLBACK else "not one of those in the tests"
    return Outlook(Way.FALLBACK, f"{tried}; a trial run when it is loaded has the last word ({refusal})")


def _runs(kind: str, model_type: str, way: Way) -> Row:
    return Row(kind, NAMES.get(model_type, model_type), (model_type,), way, EXACT)


def _instead(found: Foreign) -> str:
    runs = [NAMES.get(kind, kind) for kind in found.instead if kind in with_eyes()]
    return f"instead: {', '.join(runs)}" if runs else "nothing here takes its place"
