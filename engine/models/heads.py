"""Heads: what turns a detector's hidden states into a score, and the small file that holds one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...kernels.pooled_logit import pooled_classes, pooled_logit
from ..errors import CheckpointMismatch, CheckpointMissing, CheckpointTruncated

IN_CONTEXT = "context"  # the answering model's own prompt and answer: a head on its own states
CHAT = "chat"  # the conversation in the detector's own chat template, the answer as its last turn
TEMPLATES = ("response", "question_answer", CHAT, IN_CONTEXT)


@dataclass(frozen=True)
class HeadSpec:
    """Where a head reads and what its score means.

    layer: it reads the output after this many blocks, un-normed. pooling: the last token, or the mean over the
    answer's tokens. norm: whether an RMSNorm follows the pooling (a sequence classifier's own final norm).
    template: the text it was fitted on. threshold: harmful below it, for a finished text; prefix_threshold:
    the same for a text still being written, None where it was never calibrated. backbone_hash: content hash of
    the weights it was fitted on, None for a head saved with its weights.
    """

    layer: int
    pooling: Literal["last", "mean"]
    norm: bool = False
    template: str = "response"
    threshold: float = 0.5
    prefix_threshold: float | None = None
    backbone_hash: str | None = None

    def __post_init__(self) -> None:
        if self.pooling not in ("last", "mean") or self.template not in TEMPLATES or self.layer < 1:
            raise CheckpointMismatch(
                f"a head needs layer >= 1, pooling last or mean and one of the templates {', '.join(TEMPLATES)}, "
                f"not {self.layer}, {self.pooling!r} and {self.template!r}"
            )
        if self.template == CHAT and self.pooling != "last":
            raise CheckpointMismatch(f"a head that reads a whole {CHAT} pools its last token, not the {self.pooling}")


@dataclass(frozen=True)
class Labels:
    """Which classes of a classifier are harm, and whether they exclude each other (softmax) or not (sigmoids)."""

    harm: tuple[int, ...]
    independent: bool = False


@dataclass(frozen=True, eq=False)
class Head:
    """A spec and its weights: weight [hidden], bias [1] or None, norm_weight [hidden] or None.

    labels: where the weight is a classifier's, [classes, hidden]; it has no bias then.
    """

    spec: HeadSpec
    weight: Tensor
    bias: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_eps: float = 1e-6
    labels: Labels | None = None

    def score(self, pooled: Tensor) -> Tensor:
        """pooled [n, hidden], any float dtype -> P(harmless) [n] in fp32."""
        if self.labels is not None:
            harm, independent = self.labels.harm, self.labels.independent
            return pooled_classes(pooled, self.weight, harm, independent, self.norm_weight, self.norm_eps)[1]
        return pooled_logit(pooled, self.weight, self.bias, self.norm_weight, self.norm_eps)[1]

    def to(self, device: torch.device) -> Head:
        weight, bias, norm = (
            None if tensor is None else tensor.to(device) for tensor in (self.weight, self.bias, self.norm_weight)
        )
        assert weight is not None
        return Head(self.spec, weight, bias, norm, self.norm_eps, self.labels)


def save_head(head: Head, path: Path, **card: str) -> None:
    """Write a head as safetensors; the spec and the card's entries go into its metadata."""
    tensors = {"weight": head.weight, "bias": head.bias, "norm_weight": head.norm_weight}
    metadata = {"spec": json.dumps(asdict(head.spec)), "norm_eps": repr(head.norm_eps), **card}
    save_file({k: v.contiguous() for k, v in tensors.items() if v is not None}, path, metadata=metadata)


def head_notes(path: Path) -> dict[str, str]:
    """What `save_head` was given besides the head. Raises a `CheckpointError` for a file that is none."""
    load_head(path)
    with safe_open(path, framework="pt") as file:
        return {name: text for name, text in file.metadata().items() if name not in ("spec", "norm_eps")}


def load_head(path: Path) -> Head:
    """Read what `save_head` wrote. Raises a `CheckpointError` for anything else."""
    if not path.is_file():
        raise CheckpointMissing(f"no head at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointTruncated(f"{path} is not a safetensors file, or ends early: {error}") from None
    try:
        spec = HeadSpec(**json.loads(metadata["spec"]))
        eps = float(metadata["norm_eps"])
        weight = tensors.pop("weight")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointMismatch(f"{path} is not a head saved by this package: {error!r}") from None
    head = Head(spec, weight, tensors.pop("bias", None), tensors.pop("norm_weight", None), eps)
    if tensors or weight.dim() != 1 or (head.norm_weight is None) == spec.norm:
        raise CheckpointMismatch(f"{path} holds tensors that its spec does not describe")
    return head
