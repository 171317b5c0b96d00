"""PEFT LoRA folders: read, and merged into their base while it is loaded: W + scale · B A, tensor by tensor.

Only plain LoRA on linear layers, and activated LoRA, which cannot be merged; whatever else an adapter may ask for
(DoRA, biases …) is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointMismatch, CheckpointMissing, UnknownArchitecture
from .json_file import read_json
from .names import canonical_names
from .weight_files import TensorSource, WeightFiles

CONFIG_FILE = "adapter_config.json"
_TASKS = ("SEQ_CLS", "CAUSAL_LM")
# Settings that change nothing about how saved A and B are merged. Any other one has to be off (or missing).
_HARMLESS = frozenset(
    (
        *("task_type", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora"),
        *("modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "bias"),
        *("megatron_core", "loftq_config", "eva_config", "qalora_group_size", "init_lora_weights"),
    )
)
_INVOCATION = "alora_invocation_tokens"
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "loftq")  # others also change the base's weights
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
_SAVED = re.compile(r"(?P<module>.+?)(?:\.modules_to_save(?:\.default)?)?\.(?P<kind>weight|bias)")
_CHUNK = 1 << 22  # elements merged at once, in fp32


@dataclass(frozen=True)
class LowRank:
    """One linear layer's update: `scale` · `b` `a`."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter folder in memory. Keys are canonical parameter names."""

    path: Path
    task_type: str  # "SEQ_CLS" or "CAUSAL_LM"
    base: str | None  # base_model_name_or_path
    updates: Mapping[str, LowRank]
    saved: Mapping[str, Tensor]  # whole parameters that replace or add to the base's, such as `score.weight`
    invocation: tuple[int, ...] = ()  # token ids from which on an activated LoRA applies; empty for a plain one


def is_adapter(path: Path) -> bool:
    """Whether a folder is a PEFT adapter."""
    return (path / CONFIG_FILE).is_file()


def read_adapter(path: Path) -> Adapter:
    """Read a PEFT LoRA folder (`adapter_config.json`, `adapter_model.safetensors` or `.bin`).

    Raises `CheckpointMissing`, `CheckpointTruncated`, `UnsafeCheckpoint`; `UnknownArchitecture` for other kinds of
    adapters than plain or activated LoRA; `CheckpointMismatch` for tensors that make no pairs or do not fit the
    configuration.
    """
    config = read_json(path / CONFIG_FILE)
    _refuse_unsupported(config, path)
    stored = dict(_files(path).read())
    sides: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if match := _LORA.fullmatch(name):
            sides.setdefault(match["module"], {})[match["side"]] = tensor.clone()
        elif ".lora_" not in name and (match := _SAVED.fullmatch(name)):
            parameter = f"{match['module']}.{match['kind']}"
            if parameter in saved:
                raise CheckpointMismatch(f"{path}: {parameter!r} is saved twice")
            saved[parameter] = tensor.clone()
        else:
            raise UnknownArchitecture(f"{path}: {name!r} is no part of a LoRA on a linear layer")
    updates = {f"{module}.weight": _update(module, pair, config, path) for module, pair in sides.items()}
    if not updates:
        raise CheckpointMismatch(f"{path} holds no LoRA tensors")
    if both := updates.keys() & saved.keys():
        raise CheckpointMismatch(f"{path}: {sorted(both)[0]!r} is both saved whole and given as LoRA")
    base = config.get("base_model_name_or_path")
    return Adapter(path, config["task_type"], base, updates, saved, _invocation(config, path))


def merge(adapter: Adapter, name: str, tensor: Tensor) -> Tensor:
    """The base's parameter `name` with the adapter merged in, in the base's dtype; computed in fp32."""
    if name in adapter.saved:
        return adapter.saved[name]
    if name not in adapter.updates:
        return tensor
    update = adapter.updates[name]
    a, b = update.a.float(), update.b.float()
    merged = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    step = max(1, _CHUNK // tensor.shape[1])
    for first in range(0, tensor.shape[0], step):
        rows = slice(first, first + step)
        merged[rows] = tensor[rows].float() + update.scale * (b[rows] @ a)
    return merged


class MergedSource:
    """A base's tensors with an adapter merged into them."""

    def __init__(self, base: TensorSource, adapter: Adapter) -> None:
        """Raises `CheckpointMismatch` unless every tensor of the adapter has its place in the base, and
        `UnknownArchitecture` for an activated LoRA: merged it would apply to every token."""
        if adapter.invocation:
            raise UnknownArchitecture(
                f"{adapter.path} is an activated LoRA ({_INVOCATION}), which cannot be merged; attach it to its base"
            )
        shapes = dict(base.shapes)
        if adapter.task_type == "SEQ_CLS":
            shapes.pop("lm_head.weight", None)
            if "score.weight" not in {*shapes, *adapter.saved}:
                raise CheckpointMismatch(f"{adapter.path} is a SEQ_CLS adapter without its head (score.weight)")
        for name, update in adapter.updates.items():
            if shapes.get(name) != (found := (update.b.shape[0], update.a.shape[1])):
                raise CheckpointMismatch(
                    f"{adapter.path}: the LoRA for {name!r} is {found}, the base has {shapes.get(name, 'none')}"
                )
        for name, tensor in adapter.saved.items():
            head = name in ("score.weight", "score.bias")  # a base may have none, or one with other labels
            if not head and shapes.get(name) != tuple(tensor.shape):
                raise CheckpointMismatch(
                    f"{adapter.path}: the saved {name!r} is {tuple(tensor.shape)}, "
                    f"the base has {shapes.get(name, 'none')}"
                )
            shapes[name] = tuple(tensor.shape)
        self.shapes = shapes
        self._base, self._adapter = base, adapter

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor once: the base's in the base's order, then what only the adapter has."""
        missing = dict(self.shapes)
        for name, tensor in self._base.read():
            if name in missing:
                del missing[name]
                yield name, merge(self._adapter, name, tensor)
        for name in missing:
            yield name, self._adapter.saved[name]


def _refuse_unsupported(config: Mapping[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise UnknownArchitecture(f"{path} is a PEFT adapter of type {config.get('peft_type')!r}; supported is LORA")
    if config.get("task_type") not in _TASKS:
        raise UnknownArchitecture(
            f"{path} is an adapter for task {config.get('task_type')!r}; supported are {', '.join(_TASKS)}"
        )
    if config.get("bias", "none") != "none":
        raise UnknownArchitecture(f"{path}: LoRA with bias={config['bias']!r}; supported is bias='none'")
    if config.get("init_lora_weights", True) not in _INITS:
        raise UnknownArchitecture(
            f"{path}: init_lora_weights={config['init_lora_weights']!r} also changes the base; merge it with peft"
        )
    if wrong := [key for key, value in config.items() if value and key not in (*_HARMLESS, _INVOCATION)]:
        raise UnknownArchitecture(f"{path}: LoRA with {', '.join(sorted(wrong))} is not supported; plain LoRA is")


def _invocation(config: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    ids = config.get(_INVOCATION)
    if ids is None:
        return ()
    if not isinstance(ids, list) or not ids or not all(type(token) is int and token >= 0 for token in ids):
        raise CheckpointMismatch(f"{path}: {_INVOCATION} is {ids!r}; it has to be a list of token ids, or missing")
    return tuple(ids)


def _files(path: Path) -> WeightFiles:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (path / name).is_file():
            return WeightFiles([path / name], rename=_without_prefix)
    raise CheckpointMissing(f"{path} has neither adapter_model.safetensors nor adapter_model.bin")


def _without_prefix(stored: Iterable[str]) -> dict[str, str]:
    prefix = "base_model.model."
    stored = list(stored)
    if foreign := [name for name in stored if not name.startswith(prefix)]:
        raise CheckpointMismatch(f"an adapter's tensors begin with {prefix!r}; {foreign[0]!r} does not")
    inner = {name.removeprefix(prefix): name for name in stored}
    return {canonical: inner[name] for canonical, name in canonical_names(inner).items()}


def _update(module: str, pair: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> LowRank:
    if pair.keys() != {"A", "B"}:
        raise CheckpointMismatch(f"{path}: {module!r} has lora_{min(pair)} without its other half")
    a, b = pair["A"], pair["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise CheckpointMismatch(f"{path}: {module!r} has A {tuple(a.shape)} and B {tuple(b.shape)}: no product B·A")
    rank = _setting("rank_pattern", "r", module, config, path)
    if rank != a.shape[0]:
        raise CheckpointMismatch(f"{path}: {module!r} has rank {a.shape[0]}, its configuration says {rank}")
    alpha = _setting("alpha_pattern", "lora_alpha", module, config, path)
    return LowRank(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _setting(pattern: str, default: str, module: str, config: Mapping[str, Any], path: Path) -> float:
    """A module's own value where a pattern names it, else the adapter's. PEFT reads a pattern as a regular expression
    for the end of the name; here it is plain text (a hostile expression could run for ever)."""
    value = config.get(default)
    owns = config.get(pattern) or {}
    if not isinstance(owns, dict):
        raise CheckpointMismatch(f"{path}: {pattern} is {type(owns).__name__}; it has to be an object")
    for key, own in owns.items():
        if not re.fullmatch(r"\^?[\w.]+", key):
            raise UnknownArchitecture(f"{path}: {pattern} key {key!r}; supported are plain ends of module names")
        if module == key.removeprefix("^") or (key[0] != "^" and module.endswith(f".{key}")):
            value = own
            break
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0 or not math.isfinite(value):
        raise CheckpointMismatch(f"{path}: {default} is {value!r} for {module!r}; it has to be positive")
    return value
