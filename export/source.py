"""Where a detector's weights come from: any checkpoint the engine takes as one, read tensor by tensor.

It knows checkpoints and heads; nothing of ONNX.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..engine.errors import CheckpointMismatch, UnknownArchitecture
from ..engine.models.backbones import load_tokenizer
from ..engine.models.bundles import smol_folder
from ..engine.models.checkpoint import ContentHash, open_checkpoint
from ..engine.models.decoder import Decoder, DecoderConfig
from ..engine.models.heads import IN_CONTEXT, Head, HeadSpec, load_head
from ..engine.models.shapes import NAMED_SHAPES, byte_tokenizer, named_config, random_tensor
from ..engine.models.sources import BUNDLES, SMOL_DETECTOR
from ..engine.models.weight_files import TensorSource

DetectorSource: TypeAlias = str | Path | tuple[str | Path, str | Path]
"""A classifier's folder or GGUF file, a bundle, a named shape (random weights), (PEFT adapter, its base), or
(head file, the model it was fitted on)."""

EXPORTED = ("llama", "mistral", "qwen2", "qwen3")
_SCORE, _NORM = "score.weight", "model.norm.weight"


@dataclass(frozen=True, eq=False)
class OpenDetector:
    """A detector whose weights are still on disk. depth: layers below its head. name: as it was asked for.

    spec, head: what is known of the head before the weights are read; head is None where they hold it.
    """

    name: str
    config: DecoderConfig
    spec: HeadSpec
    head: Head | None
    tokenizer: Any
    _source: TensorSource

    @property
    def depth(self) -> int:
        return self.spec.layer

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor of the embedding and of the layers below the head, once, in any order and stored dtype; then
        the head's: `head.weight` [hidden], and `head.bias` [1] and `head.norm` [hidden] where it has them.

        A tensor is valid until the next one is asked for. Raises `CheckpointMismatch` in the end if the head was
        fitted on other weights.
        """
        wanted = {name for name, _ in _slots(self.config, self.depth)} - {_NORM}
        hasher, own = ContentHash(), {}
        for name, tensor in self._source.read():
            if self.spec.backbone_hash is not None:
                hasher.add(name, tensor)
            if name in wanted:
                yield name, tensor
            elif self.head is None and name in (_SCORE, _NORM):
                own[name] = tensor.clone()
            del tensor
        if self.spec.backbone_hash not in (None, hasher.hexdigest()):
            raise CheckpointMismatch(f"{self.name}: the head was fitted on other weights than these")
        head = self.head or Head(self.spec, own[_SCORE][0], norm_weight=own[_NORM])
        yield "head.weight", head.weight
        if head.bias is not None:
            yield "head.bias", head.bias
        if head.norm_weight is not None:
            yield "head.norm", head.norm_weight

    @property
    def norm_eps(self) -> float:
        """Of the head's norm."""
        return self.config.norm_eps if self.head is None else self.head.norm_eps

    @property
    def has_bias(self) -> bool:
        return self.head is not None and self.head.bias is not None


def open_detector(source: DetectorSource) -> OpenDetector:
    """Open a detector and check that it has all the tensors it needs; reads no weights (of an adapter: all of it).

    Raises the types under `CheckpointError`.
    """
    name = ",".join(str(part) for part in source) if isinstance(source, tuple) else str(source)
    path, base = source if isinstance(source, tuple) else (source, None)
    if str(path) in BUNDLES and base is None:
        return _with_head(_open(name, str(path), None), SMOL_DETECTOR)
    if Path(path).suffix == ".safetensors":
        if base is None:
            raise CheckpointMismatch(f"{path} is a head; give the model it was fitted on too, as HEAD,MODEL")
        return _with_head(_open(name, str(base), None), Path(path))
    found = _open(name, str(path), None if base is None else str(base))
    if _SCORE not in found._source.shapes:
        raise CheckpointMismatch(
            f"{path} has no score.weight; a detector is a *ForSequenceClassification checkpoint or adapter with one "
            "label, or a head file with its model (HEAD,MODEL)"
        )
    _check(name, found._source, [*_slots(found.config, found.depth), (_SCORE, (1, found.config.hidden_size))])
    return found


def rotary_tables(config: DecoderConfig, positions: int) -> tuple[Tensor, Tensor]:
    """(cos, sin) [positions, head_dim / 2] in fp32, as the engine's decoder has them."""
    shell = Decoder(config, torch.device("cpu"), torch.float32, depth=0, with_head=False)
    cos, sin = shell.angles(torch.arange(positions))
    half = config.head_dim // 2
    return cos[:, 0, :half], sin[:, 0, half:]  # the engine's sines of the first half are negated


def _open(name: str, path: str, base: str | None) -> OpenDetector:
    """As a classifier; `_with_head` puts another head on it."""
    if path in NAMED_SHAPES and base is None:
        config = named_config(path)
        assert config is not None
        text = DecoderConfig.from_pretrained(config.get_text_config())
        return OpenDetector(name, text, _classifier(text), None, byte_tokenizer(text.vocab_size), _Random(text))
    folder = smol_folder() if path in BUNDLES else Path(path)
    checkpoint = open_checkpoint(folder, base)
    text = DecoderConfig.from_pretrained(checkpoint.config.get_text_config())
    if not text.like_llama or text.embedding_scale != 1.0 or text.fused_maps:
        raise UnknownArchitecture(
            f"{name} is a {text.family} model, which is not exported; exported are {', '.join(EXPORTED)}"
        )
    tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    if _SCORE in checkpoint.shapes:
        _check_labels(name, checkpoint.config)
    return OpenDetector(name, text, _classifier(text), None, tokenizer, checkpoint.source)


def _classifier(config: DecoderConfig) -> HeadSpec:
    """What `transformers` does: the last token after the last layer, normed."""
    return HeadSpec(layer=config.layers, pooling="last", norm=True)


def _with_head(found: OpenDetector, path: Path) -> OpenDetector:
    head, config = load_head(path), found.config
    if head.spec.template == IN_CONTEXT:
        raise CheckpointMismatch(
            f"{path} reads the states that a model has while it answers, not a text; it cannot run on its own"
        )
    if head.weight.shape[0] != config.hidden_size or not 1 <= head.spec.layer <= config.layers:
        raise CheckpointMismatch(
            f"{path} is a head for {head.weight.shape[0]} features after layer {head.spec.layer}; the model has "
            f"{config.hidden_size} features and {config.layers} layers"
        )
    _check(found.name, found._source, _slots(config, head.spec.layer))
    return replace(found, spec=head.spec, head=head)


def _check_labels(name: str, config: PretrainedConfig) -> None:
    if config.num_labels != 1:
        raise CheckpointMismatch(
            f"{name} has {config.num_labels} labels; exported are classifiers with one (the engine itself runs it)"
        )


def _slots(config: DecoderConfig, depth: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the embedding and of the first layers, and of the last norm where all layers are run."""
    decoder = Decoder(config, torch.device("meta"), torch.float32, depth=depth, with_head=False)
    return [(name, tuple(tensor.shape)) for name, tensor in decoder.slots()]


def _check(name: str, source: TensorSource, slots: list[tuple[str, tuple[int, ...]]]) -> None:
    shapes = source.shapes
    for slot, shape in slots:
        if slot not in shapes:
            raise CheckpointMismatch(f"{name} lacks {slot}")
        if tuple(shapes[slot]) != shape:
            raise CheckpointMismatch(f"{name}: {slot} is {tuple(shapes[slot])}, not {shape}")


class _Random:
    """The random classifier of a named shape: the tensors that the engine would fill it with, one at a time."""

    def __init__(self, config: DecoderConfig) -> None:
        self._slots = [*_slots(config, config.layers), (_SCORE, (1, config.hidden_size))]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._slots)

    def read(self) -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for name, shape in self._slots:
            yield name, random_tensor(name, shape, torch.float32, generator)
