"""From a source to weights in memory: opens checkpoints, fills modules, shares what is the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig

from ...kernels.quantized import CannotQuantize as NoEightBits
from ...kernels.quantized import Kind
from ..errors import CannotQuantize, CheckpointMismatch, CheckpointMissing, UnknownArchitecture
from ..text import Codec
from .adapters import is_adapter
from .checkpoint import Checkpoint, ContentHash, open_checkpoint
from .decoder import FAMILIES, Decoder, DecoderConfig
from .eight_bits import check_device, check_pages
from .eyes import read_eyes, template_with_images
from .json_file import read_json
from .kv_scales import TEXT, measured
from .model import Backbone
from .shapes import NAMED_SHAPES, byte_tokenizer, image_processor_for, named_config, random_tensor
from .sources import BUNDLES, SMOL_EYES, Checkpointed, is_eyes, local_source
from .vision.adapter import VisionAdapter
from .vision.families import ADAPTERS
from .vision.letters import LetterVision


@dataclass(frozen=True, eq=False)
class Loaded:
    backbone: Backbone
    codec: Codec
    config: PretrainedConfig
    score: Tensor | None  # of a sequence classifier, [labels, hidden]


class Backbones:
    """Remembers what it loaded, so that a checkpoint named twice is in memory once."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, weights: Kind | None = None, kv_dtype: str | None = None
    ) -> None:
        if weights is not None:
            check_device(weights, device, dtype)
        if kv_dtype is not None:
            check_pages(kv_dtype, device)
        self.device = device
        self.dtype = dtype
        self.weights = weights
        self.kv_dtype = kv_dtype
        self._loaded: dict[tuple[str, bool], Loaded] = {}

    def load(self, source: Checkpointed, classifier: bool) -> Loaded:
        """classifier says what a named shape is to be; a checkpoint says itself what it is."""
        named = str(source) in NAMED_SHAPES
        parts = source if isinstance(source, tuple) else (source,)
        key = (
            str(source) if named or str(source) in BUNDLES else "+".join(str(Path(part).resolve()) for part in parts)
        )
        known = self._loaded.get((key, classifier and named))
        if known is None:
            known = self._random(str(source), classifier) if named else self._read(source)
            self._loaded[key, classifier and named] = known
        return known

    def _read(self, source: Checkpointed) -> Loaded:
        if isinstance(source, tuple) and is_eyes(source[0]):
            return self._with_eyes(Path(source[0]), local_source(source[1]))
        if str(source) in BUNDLES:
            return self._with_eyes(SMOL_EYES, local_source(str(source)))
        checkpoint = _open(source)
        if self.weights is not None and checkpoint.quantized:
            raise CannotQuantize(
                f"{checkpoint.path} is quantized already; weights={self.weights!r} takes weights of 16 or 32 bits"
            )
        classifier = "score.weight" in checkpoint.shapes
        try:
            tied = is_tied(checkpoint.config, "lm_head.weight" in checkpoint.shapes)
            parts = self._parts(checkpoint.config, classifier, _eyes_folder(checkpoint), tied)
        except UnknownArchitecture as refusal:
            return self._fall_back(checkpoint, refusal)
        return parts.finish(_fill(parts.slots, checkpoint, parts.decoder), codec_of(checkpoint))

    def _with_eyes(self, file: Path, base: str | Path) -> Loaded:
        """A language model and the eyes that were trained for it: its weights, hash and texts stay as they are."""
        loaded = self.load(base, classifier=False)
        codec, decoder = loaded.codec, loaded.backbone.decoder
        if loaded.backbone.vision is not None or not isinstance(decoder, Decoder):
            raise CheckpointMismatch(f"{base} cannot be given eyes: it has its own, or runs on the fallback")
        if decoder.config.images_scaled:
            raise CheckpointMismatch(f"{base} cannot be given eyes: it multiplies the features of images")
        eyes = read_eyes(file, loaded.config)
        vision = LetterVision(eyes.config, eyes.processor, self.device, self.dtype, codec, decoder.embed)
        content_hash = loaded.backbone.content_hash + _fill(dict(vision.slots()), eyes.weights, decoder)
        vision.freeze(content_hash.encode(), codec.tokenizer)
        token = codec.tokenizer.convert_ids_to_tokens(vision.image_token_id)
        seeing = Codec(
            codec.tokenizer,
            image_token=token,
            chat_template=template_with_images(codec.chat_template or codec.tokenizer.chat_template or "", token),
            template_adds_specials=codec.template_adds_specials,
            extra_stop_ids=codec.eos_ids,
        )
        return replace(loaded, backbone=replace(loaded.backbone, vision=vision), codec=seeing)

    def _fall_back(self, checkpoint: Checkpoint, refusal: UnknownArchitecture) -> Loaded:
        for name, asked in (("weights", self.weights), ("kv_dtype", self.kv_dtype)):
            if asked is not None:
                raise CannotQuantize(f"{name}={asked!r} is for the engine's own decoders: {refusal}")
        # importing the module classes of transformers takes a second, and most models need none
        from .fallback_check import load_fallback

        _check_fallback(checkpoint, refusal)
        try:
            decoder, content_hash = load_fallback(checkpoint, self.device, self.dtype)
        except UnknownArchitecture as error:
            raise _refused_by_both(refusal, error) from error
        return Loaded(Backbone(decoder, content_hash), codec_of(checkpoint), checkpoint.config, None)

    def _random(self, name: str, classifier: bool) -> Loaded:
        config = named_config(name)
        assert config is not None
        config.num_labels = 1 if classifier else config.num_labels
        parts = self._parts(config, classifier, None, is_tied(config, False))
        generator = torch.Generator(self.device).manual_seed(0)
        for slot, tensor in parts.slots.items():
            tensor.copy_(random_tensor(slot, tuple(tensor.shape), self.dtype, generator))
        image_id = None if parts.vision is None else parts.vision.image_token_id
        tokenizer = byte_tokenizer(parts.decoder.config.vocab_size, image_id)
        image = None if image_id is None else "<image>"
        codec = Codec(tokenizer, image_token=image, template_adds_specials=True)
        return parts.finish(f"random {name} {self.dtype} {classifier}", codec)

    def _parts(self, config: PretrainedConfig, classifier: bool, folder: Path | None, tied: bool) -> _Parts:
        return _Parts(config, classifier, folder, tied, self.device, self.dtype, self.weights, self.kv_dtype)


class _Parts:
    """The empty modules of one checkpoint, and where each of its tensors goes."""

    def __init__(
        self,
        config: PretrainedConfig,
        classifier: bool,
        folder: Path | None,
        tied: bool,
        device: torch.device,
        dtype: torch.dtype,
        weights: Kind | None = None,
        kv_dtype: str | None = None,
    ) -> None:
        text = text_config(config)
        self.config = config
        self.kv_dtype = kv_dtype
        shape = DecoderConfig.from_pretrained(text, tied)
        self.decoder = Decoder(shape, device, dtype, with_head=not classifier, weights=weights)
        self.slots = dict(self.decoder.slots())
        self.score: Tensor | None = None
        if classifier:
            self.score = torch.empty(config.num_labels, text.hidden_size, device=device, dtype=dtype)
            self.slots["score.weight"] = self.score
        self.vision: VisionAdapter | None = None
        if config.model_type in ADAPTERS:
            if self.decoder.config.images_scaled:
                raise UnknownArchitecture(
                    f"{text.model_type} multiplies the features of images; as text model of {config.model_type} it is"
                    " not known"
                )
            processor = image_processor_for(folder if folder is not None else config.vision_config.image_size)
            self.vision = ADAPTERS[config.model_type](config, processor, device, dtype)
            if folder is not None:
                self.vision.read(folder)
            self.slots.update(self.vision.slots())

    def finish(self, content_hash: str, codec: Codec) -> Loaded:
        self.slots.clear()  # they would keep every weight that is replaced by its packed or narrow form
        try:
            self.decoder.freeze()
        except NoEightBits as error:
            raise CannotQuantize(f"a model cannot have weights of 8 bits: {error}") from error
        if self.kv_dtype is not None:
            self.decoder.narrow_pages(measured(self.decoder, codec.encode_text(TEXT)))
        if self.vision is not None:
            self.vision.freeze(content_hash.encode(), codec.tokenizer)
        backbone = Backbone(self.decoder, content_hash, self.vision)
        return Loaded(backbone, codec, self.config, self.score)


def check_without_weights(source: Checkpointed) -> tuple[str, UnknownArchitecture | None]:
    """Check all of a checkpoint that can be checked without reading its weights.

    Returns its `model_type`, and None where the engine's own decoder will run it, why not where the fallback is to.
    Raises a `CheckpointError` for one that will not load.
    """
    if isinstance(source, tuple) and is_eyes(source[0]):
        read_eyes(Path(source[0]), open_checkpoint(local_source(source[1])).config)
        return check_without_weights(source[1])
    checkpoint = _open(source)
    kind: str = checkpoint.config.model_type
    classifier, meta = "score.weight" in checkpoint.shapes, torch.device("meta")
    load_tokenizer(checkpoint.tokenizer_path)
    try:
        tied = is_tied(checkpoint.config, "lm_head.weight" in checkpoint.shapes)
        parts = _Parts(checkpoint.config, classifier, _eyes_folder(checkpoint), tied, meta, torch.float32)
    except UnknownArchitecture as refusal:
        _check_fallback(checkpoint, refusal)
        return kind, refusal
    _check_names(parts.slots, checkpoint, parts.decoder)
    return kind, None


def _check_fallback(checkpoint: Checkpoint, refusal: UnknownArchitecture) -> None:
    from .fallback_check import check_outline

    try:
        check_outline(checkpoint.config, "score.weight" in checkpoint.shapes)
    except UnknownArchitecture as error:
        raise _refused_by_both(refusal, error) from error


def _refused_by_both(refusal: UnknownArchitecture, error: UnknownArchitecture) -> UnknownArchitecture:
    if str(refusal) == str(error):
        return UnknownArchitecture(f"{refusal}; nor does the fallback run it")
    return UnknownArchitecture(f"{refusal}; the fallback does not run it either: {error}")


def _fill(slots: dict[str, Tensor], checkpoint: Checkpoint, decoder: Decoder) -> str:
    """Copy a checkpoint's tensors into their slots; returns their content hash."""
    _check_names(slots, checkpoint, decoder)
    hasher = ContentHash()
    for name, tensor in checkpoint.tensors(hasher):
        if name in slots:
            slots[name].copy_(tensor)
    return hasher.hexdigest()


def _check_names(slots: dict[str, Tensor], checkpoint: Checkpoint, decoder: Decoder) -> None:
    """Raise `CheckpointMismatch` unless names and shapes agree."""
    shapes = checkpoint.shapes
    if decoder.config.tied:
        shapes.pop("lm_head.weight", None)  # written by some versions although it is the embedding
    missing = sorted(set(slots) - set(shapes))
    extra = sorted(set(shapes) - set(slots))
    wrong = [
        f"{name} is {tuple(shapes[name])}, not {tuple(slots[name].shape)}"
        for name in sorted(set(slots) & set(shapes))
        if tuple(shapes[name]) != tuple(slots[name].shape)
    ]
    for problem, names in (("lacks", missing), ("has unknown tensors:", extra), ("has wrong shapes:", wrong)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointMismatch(f"{checkpoint.path} {problem} {', '.join(names[:3])}{more}")


def _open(source: Checkpointed) -> Checkpoint:
    path, base = source if isinstance(source, tuple) else (source, None)
    return open_checkpoint(local_source(path), None if base is None else local_source(base))


def _eyes_folder(checkpoint: Checkpoint) -> Path:
    """Where the image processor is: an adapter's folder has none; its base's is where the tokenizer is."""
    return checkpoint.tokenizer_path if is_adapter(checkpoint.path) else checkpoint.path


def load_tokenizer(source: Path) -> Any:
    """The fast tokenizer of a folder or a GGUF file. Raises `CheckpointMissing` or `UnknownArchitecture`."""
    gguf = {"gguf_file": source.name} if source.suffix == ".gguf" else {}
    folder = source.parent if gguf else source
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **gguf)
    except Exception as error:  # tokenizer classes fail each in its own way
        raise CheckpointMissing(f"{source} has no usable tokenizer: {error}") from error
    if not tokenizer.is_fast:
        raise UnknownArchitecture(f"{source} has a slow tokenizer only; add its tokenizer.json")
    return tokenizer


def codec_of(checkpoint: Checkpoint) -> Codec:
    """How its texts are encoded and decoded. Raises `CheckpointMissing` or `UnknownArchitecture`."""
    source = checkpoint.tokenizer_path
    tokenizer = load_tokenizer(source)
    folder = source.parent if source.suffix == ".gguf" else source
    eyes = ADAPTERS.get(checkpoint.config.model_type)
    image_id = None if eyes is None else eyes.placeholder_id(checkpoint.config)
    template = None
    if eyes is not None:
        template = _processor_template(folder) or (None if tokenizer.chat_template else eyes.chat_template)
    return Codec(
        tokenizer,
        image_token=None if image_id is None else tokenizer.convert_ids_to_tokens(image_id),
        image_around="" if eyes is None else eyes.around,
        chat_template=template,
        template_adds_specials=image_id is not None,
        extra_stop_ids=_stop_ids(folder, checkpoint.config),
    )


def _processor_template(folder: Path) -> str | None:
    """The template of a processor, which older checkpoints keep in a file of its own."""
    path = folder / "chat_template.json"
    template = read_json(path).get("chat_template") if path.is_file() else None
    return template if isinstance(template, str) else None


def _stop_ids(folder: Path, config: PretrainedConfig) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    generation = read_json(path).get("eos_token_id") if path.is_file() else None
    found: set[int] = set()
    for ids in (generation, getattr(getattr(config, "text_config", config), "eos_token_id", None)):
        found.update([ids] if isinstance(ids, int) else ids or [])
    return tuple(sorted(found))


def text_config(config: PretrainedConfig) -> Any:
    """Of the decoder. Raises `UnknownArchitecture` where there is none that the engine runs."""
    if config.model_type in ADAPTERS:
        return config.get_text_config()
    if config.model_type not in FAMILIES:
        raise UnknownArchitecture(
            f"unknown architecture {config.model_type!r}; known: {', '.join((*FAMILIES, *ADAPTERS))}"
        )
    return config


def is_tied(config: PretrainedConfig, stored: bool) -> bool:
    """Whether the output matrix is the embedding. Of a model with eyes two configurations say it, which may disagree:
    a matrix of its own, if `stored`, is used."""
    text = text_config(config)
    if text is config:
        return bool(config.tie_word_embeddings)
    return not stored and any(getattr(part, "tie_word_embeddings", False) for part in (config, text))
