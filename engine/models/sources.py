"""What models can be loaded from: folders, files, bundles, named shapes, adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from .bundles import smol_folder

ONNX = "onnx:"
HEAD_FILE = "head.safetensors"
BUNDLES = ("smol",)
_DATA = Path(__file__).parent / "data"
SMOL_EYES = _DATA / "smol-eyes.safetensors"
SMOL_DETECTOR = _DATA / "smol-detector.safetensors"
SMOL_PROBE = _DATA / "smol-probe.safetensors"
SMOL_JUDGE = "smol-judge"  # as detector of the bundle: trained on what tests the others
SMOL_JUDGE_FILE = _DATA / "smol-judge.safetensors"
SMOL_ADAPTER = "smol-adapter"  # as detector and as detoxifier of the bundle: adapters on its own weights
SMOL_ADAPTERS = {name: _DATA / f"smol-{name}" for name in ("detector", "detoxifier")}


@dataclass(frozen=True)
class Attached:
    """A PEFT LoRA folder, plain or activated, on the MLLM's own weights: not merged, but added token by token.

    A detector's folder holds a classifier's `score.weight` (SEQ_CLS), or a head fitted on the adapted model as
    `head.safetensors` (see `save_head`). The tokenizer is the MLLM's.
    """

    adapter: str | Path


Checkpointed: TypeAlias = str | Path | tuple[str | Path, str | Path]
"""A checkpoint folder, a GGUF file, a bundle, a named shape, (PEFT adapter, its base), or (the file of eyes that
`train eyes` wrote, the language model)."""


@dataclass(frozen=True)
class Classifier:
    """A *ForSequenceClassification checkpoint (folder, GGUF file or adapter), and which of its labels mean harm.

    harm: an id, a name of `id2label` in any case, or several of them. None: a single label is P(harmless), as of
    MLLM-Protector's detector and of reward models; of several the harmful ones have to be named. P(harm) is the sum
    of the harmful labels' softmax over all; where the configuration's `problem_type` is multi_label_classification,
    the largest of their sigmoids. template: the text it was trained on: "response", "question_answer", or "chat" for
    the conversation in its own chat template with the answer as the last turn, as reward models read it.
    """

    source: Checkpointed
    harm: int | str | tuple[int | str, ...] | None = None
    template: str = "response"


Source: TypeAlias = Checkpointed | Attached
"""Whatever weights of its own, or an adapter on the MLLM's."""


DetectorSource: TypeAlias = Source | Classifier


def is_eyes(path: str | Path) -> bool:
    """Whether the first of a pair is a file of eyes and no adapter's folder."""
    return Path(path).suffix == ".safetensors"


def local_source(source: str | Path) -> str | Path:
    """A bundle's folder; any other source as it is."""
    return smol_folder() if str(source) in BUNDLES else source


def bundle_of(model: Source) -> str | None:
    """The bundle that a source is, with eyes or without; None where it is none."""
    base = model[1] if isinstance(model, tuple) and is_eyes(model[0]) else model
    return str(base) if isinstance(base, str | Path) and str(base) in BUNDLES else None
