"""From names and paths to models that run: opens checkpoints, fills weights, shares what is the same."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig

from ...kernels.quantized import CannotQuantize as NoEightBits
from ...kernels.quantized import Kind
from ..errors import CannotQuantize, CheckpointMismatch, CheckpointMissing, UnknownArchitecture
from ..outside import OutsideDetector
from ..text import Codec
from .adapters import Adapter, is_adapter, read_adapter
from .attached import AttachedAdapter
from .bundles import smol_folder
from .checkpoint import Checkpoint, ContentHash, open_checkpoint
from .decoder import FAMILIES, Decoder, DecoderConfig
from .eight_bits import check_device, check_pages
from .eyes import read_eyes, template_with_images
from .heads import IN_CONTEXT, Head, HeadSpec, Labels, load_head
from .json_file import read_json
from .kv_scales import TEXT, measured
from .model import Backbone, Model
from .shapes import NAMED_SHAPES, byte_tokenizer, image_processor_for, named_config, random_tensor
from .vision.adapter import VisionAdapter
from .vision.families import ADAPTERS
from .vision.llava import LlavaVision


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

ONNX = "onnx:"
HEAD_FILE = "head.safetensors"
BUNDLES = ("smol",)
SMOL_DETECTOR = Path(__file__).parent / "data" / "smol-detector.safetensors"
SMOL_PROBE = Path(__file__).parent / "data" / "smol-probe.safetensors"
SMOL_JUDGE = "smol-judge"  # as detector of the bundle: trained on what tests the others
SMOL_JUDGE_FILE = Path(__file__).parent / "data" / "smol-judge.safetensors"
SMOL_ADAPTER = "smol-adapter"  # as detector and as detoxifier of the bundle: adapters on its own weights
SMOL_ADAPTERS = {name: Path(__file__).parent / "data" / f"smol-{name}" for name in ("detector", "detoxifier")}


@dataclass(frozen=True)
class ModelSet:
    """The models of an engine by name: "mllm", and where there are any "detector", "detoxifier" and "probe".

    outside: detectors that run beside the engine, on threads of their own, by name too.
    """

    models: dict[str, Model]
    device: torch.device
    dtype: torch.dtype
    outside: dict[str, OutsideDetector] = field(default_factory=dict)


def load_models(
    model: Source,
    detector: DetectorSource | OutsideDetector | None = None,
    detoxifier: Source | None = None,
    probe: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    weights: Kind | None = None,
    kv_dtype: str | None = None,
) -> ModelSet:
    """Load what an engine needs. Equal sources share one backbone.

    Each is a checkpoint folder (of an adapter: one that names a local base), an (adapter, base) pair, a GGUF file,
    a bundle or a named shape with random weights. A detector is a sequence classifier with one label, or a
    `Classifier` that says which of its labels mean harm; a bundle; a `.safetensors` file with a head fitted on the
    MLLM's own weights; "onnx:FOLDER", an exported one that ONNX Runtime runs on threads of its own (the extra
    `onnx`); or an object that is an `OutsideDetector`. Detector and detoxifier may be adapters `Attached` to the
    MLLM's backbone; those that come with `smol` are named "smol-adapter". A probe is a `.safetensors` file with a
    head fitted on the states that the MLLM has while it answers. A bundle as model, with eyes or without, brings its
    own detector, detoxifier and probe; the detector "smol-judge" on its weights is trained on other data than those.
    weights: 8 bits for the maps of all decoders' layers, quantized as they are loaded. kv_dtype: "fp8" for keys and
    values in pages of 8 bits. Both raise `CannotQuantize` where they cannot be, before that model's weights are read,
    but for numbers that are not finite.
    """
    where = _device(device)
    loader = _Loader(where, _dtype(where, dtype), weights, kv_dtype)
    bundle = bundle_of(model)
    if bundle is not None:
        detector = bundle if detector is None else detector
        detoxifier = bundle if detoxifier is None else detoxifier
        probe = SMOL_PROBE if probe is None else probe
    if detector == SMOL_JUDGE:
        detector = SMOL_JUDGE_FILE
    if detector == SMOL_ADAPTER:
        detector = _own_adapter("detector", model)
    if detoxifier == SMOL_ADAPTER:
        detoxifier = _own_adapter("detoxifier", model)
    if isinstance(model, Attached):
        raise CheckpointMismatch(f"{model.adapter}: attached to what? Give the MLLM as (adapter, base), which merges")
    mllm = loader.generator("mllm", model)
    models = {"mllm": mllm}
    if isinstance(detoxifier, Attached):
        models["detoxifier"] = _attached_generator("detoxifier", detoxifier, mllm)
    elif detoxifier is not None:
        models["detoxifier"] = loader.generator("detoxifier", detoxifier)
    outside: dict[str, OutsideDetector] = {}
    if isinstance(detector, str) and detector.startswith(ONNX):
        # what stands above the engine is imported only where it is asked for
        from ...export.onnx_detector import OnnxDetector

        outside["detector"] = OnnxDetector(detector.removeprefix(ONNX))
    elif isinstance(detector, OutsideDetector):
        outside["detector"] = detector
    elif isinstance(detector, Attached):
        models["detector"] = _attached_detector("detector", detector, mllm)
    elif detector is not None:
        models["detector"] = loader.detector("detector", detector, mllm)
    if probe is not None:
        models["probe"] = _in_context("probe", mllm, Path(probe), where)
    return ModelSet(models, where, loader.dtype, outside)


def bundle_of(model: Source) -> str | None:
    """The bundle that a source is, with eyes or without; None where it is none."""
    base = model[1] if isinstance(model, tuple) and _is_eyes(model[0]) else model
    return str(base) if isinstance(base, str | Path) and str(base) in BUNDLES else None


def _own_adapter(name: str, model: Source) -> Attached:
    if bundle_of(model) is None:
        raise CheckpointMismatch(f"{SMOL_ADAPTER} was trained on {', '.join(BUNDLES)}; it is of no use on {model}")
    return Attached(SMOL_ADAPTERS[name])


@dataclass(frozen=True, eq=False)
class _Loaded:
    backbone: Backbone
    codec: Codec
    config: PretrainedConfig
    score: Tensor | None  # of a sequence classifier, [labels, hidden]


class _Loader:
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
        self._loaded: dict[tuple[str, bool], _Loaded] = {}

    def generator(self, name: str, source: Checkpointed) -> Model:
        loaded = self._load(source, classifier=False)
        decoder, vision = loaded.backbone.decoder, loaded.backbone.vision
        if decoder.head is None:
            raise CheckpointMismatch(f"{source} is a classifier; {name} has to be a language model")
        context = decoder.config.context
        return Model(
            name,
            loaded.backbone,
            loaded.codec,
            context,
            decoder.depth,
            image_token_id=loaded.codec.image_id,
            max_images=(context - 1) // vision.fewest_tokens if vision is not None else 0,
            # merged into a bundle, an adapter changes nothing about the prompts it understands
            chat_only=str(source[1] if isinstance(source, tuple) else source) in BUNDLES,
        )

    def detector(self, name: str, source: Checkpointed | Classifier, mllm: Model) -> Model:
        if isinstance(source, Classifier):
            return self._classifier(name, source)
        if str(source) in BUNDLES:
            return _text_head(name, self.generator(name, source), SMOL_DETECTOR, self.device)
        if isinstance(source, str | Path) and Path(source).suffix == ".safetensors":
            return _text_head(name, mllm, Path(source), self.device)
        path, base = source if isinstance(source, tuple) else (source, None)
        if (Path(path) / HEAD_FILE).is_file():
            return self._with_head_file(name, Path(path), base)
        loaded = self._load(source, classifier=True)
        if loaded.score is None:  # a guard model, which says its verdict as a word
            return self.generator(name, source)
        return self._classifier(name, Classifier(source))

    def _with_head_file(self, name: str, path: Path, base: str | Path | None) -> Model:
        """A folder with weights, or an adapter to merge, and the head that was trained with them: it states the hash
        of the weights, of an adapter's base."""
        if is_adapter(path):
            base = base or read_adapter(path).base or ""
            own = open_checkpoint(_local(base)).content_hash()
            model = self.generator(name, (path, base))
        else:
            model = self.generator(name, path)
            own = model.backbone.content_hash
        return _text_head(name, model, path / HEAD_FILE, self.device, own)

    def _classifier(self, name: str, source: Classifier) -> Model:
        loaded = self._load(source.source, classifier=True)
        decoder = loaded.backbone.decoder
        if loaded.score is None:
            raise CheckpointMismatch(
                f"{source.source} has no score.weight; a detector is a *ForSequenceClassification checkpoint or "
                "adapter, or a head file"
            )
        assert isinstance(decoder, Decoder)
        head = _classifier_head(decoder, loaded.score, _labels(source, loaded.config), source.template)
        pad_id = loaded.config.get_text_config().pad_token_id
        return Model(name, loaded.backbone, loaded.codec, decoder.config.context, decoder.depth, head, pad_id=pad_id)

    def _load(self, source: Checkpointed, classifier: bool) -> _Loaded:
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

    def _read(self, source: Checkpointed) -> _Loaded:
        if isinstance(source, tuple) and _is_eyes(source[0]):
            return self._with_eyes(Path(source[0]), source[1])
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

    def _with_eyes(self, file: Path, base: str | Path) -> _Loaded:
        """A language model and the eyes that were trained for it: its weights, hash and texts stay as they are."""
        loaded = self._load(base, classifier=False)
        codec, decoder = loaded.codec, loaded.backbone.decoder
        if loaded.backbone.vision is not None or not isinstance(decoder, Decoder):
            raise CheckpointMismatch(f"{base} cannot be given eyes: it has its own, or runs on the fallback")
        eyes = read_eyes(file, loaded.config)
        vision = LlavaVision(eyes.config, eyes.processor, self.device, self.dtype)
        vision.freeze(_fill(dict(vision.slots()), eyes.weights, decoder).encode(), codec.tokenizer)
        token = codec.tokenizer.convert_ids_to_tokens(vision.image_token_id)
        seeing = Codec(
            codec.tokenizer,
            image_token=token,
            chat_template=template_with_images(codec.chat_template or codec.tokenizer.chat_template or "", token),
            template_adds_specials=codec.template_adds_specials,
            extra_stop_ids=codec.eos_ids,
        )
        return replace(loaded, backbone=replace(loaded.backbone, vision=vision), codec=seeing)

    def _fall_back(self, checkpoint: Checkpoint, refusal: UnknownArchitecture) -> _Loaded:
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
        return _Loaded(Backbone(decoder, content_hash), codec_of(checkpoint), checkpoint.config, None)

    def _random(self, name: str, classifier: bool) -> _Loaded:
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

    def finish(self, content_hash: str, codec: Codec) -> _Loaded:
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
        return _Loaded(backbone, codec, self.config, self.score)


def check_without_weights(source: Checkpointed) -> tuple[str, UnknownArchitecture | None]:
    """Check all of a checkpoint that can be checked without reading its weights.

    Returns its `model_type`, and None where the engine's own decoder will run it, why not where the fallback is to.
    Raises a `CheckpointError` for one that will not load.
    """
    if isinstance(source, tuple) and _is_eyes(source[0]):
        read_eyes(Path(source[0]), open_checkpoint(_local(source[1])).config)
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
    return open_checkpoint(_local(path), None if base is None else _local(base))


def _eyes_folder(checkpoint: Checkpoint) -> Path:
    """Where the image processor is: an adapter's folder has none; its base's is where the tokenizer is."""
    return checkpoint.tokenizer_path if is_adapter(checkpoint.path) else checkpoint.path


def _is_eyes(path: str | Path) -> bool:
    """Whether the first of a pair is a file of eyes and no adapter's folder."""
    return Path(path).suffix == ".safetensors"


def _local(source: str | Path) -> str | Path:
    """A bundle's folder; any other source as it is."""
    return smol_folder() if str(source) in BUNDLES else source


def _text_head(name: str, base: Model, path: Path, device: torch.device, weights: str | None = None) -> Model:
    """A detector that is a head on another model's backbone: it runs the layers below the head only. weights: the
    hash that the head must state, None for the backbone's."""
    model = _head_on(name, base, path, device, weights or base.backbone.content_hash)
    assert model.head is not None
    if model.head.spec.template == IN_CONTEXT:
        raise CheckpointMismatch(
            f"{path} reads the states that the MLLM has while it answers, not a text; load it as probe, not as {name}"
        )
    return model


def _in_context(name: str, mllm: Model, path: Path, device: torch.device) -> Model:
    """A head on the states of the MLLM's own answers."""
    model = _head_on(name, mllm, path, device, mllm.backbone.content_hash)
    assert model.head is not None
    spec = model.head.spec
    if (spec.template, spec.pooling) != (IN_CONTEXT, "mean"):
        raise CheckpointMismatch(
            f"{path} reads texts of the template {spec.template!r} and pools the {spec.pooling}; a {name} has the "
            f"template {IN_CONTEXT!r} and pools the mean (a head that reads a text is a detector)"
        )
    return model


def _head_on(name: str, base: Model, path: Path, device: torch.device, weights: str) -> Model:
    head = load_head(path).to(device)
    spec, config = head.spec, base.backbone.decoder.config
    if head.weight.shape[0] != config.hidden_size or not 1 <= spec.layer <= config.layers:
        raise CheckpointMismatch(
            f"{path} is a head for {head.weight.shape[0]} features after layer {spec.layer}; the model has "
            f"{config.hidden_size} features and {config.layers} layers"
        )
    if spec.backbone_hash is not None and spec.backbone_hash != weights:
        raise CheckpointMismatch(f"{path} was fitted on other weights than these; its scores would mean nothing here")
    return replace(base, name=name, depth=spec.layer, head=head)


def _attach(name: str, source: Attached, mllm: Model) -> tuple[Model, Adapter]:
    """The MLLM with an adapter, and what else is in the adapter's folder."""
    adapter, decoder = read_adapter(Path(source.adapter)), mllm.backbone.decoder
    if not isinstance(decoder, Decoder):
        raise UnknownArchitecture(
            f"{source.adapter} cannot be attached: the model's architecture runs on the fallback, which has merged "
            f"adapters only, (adapter, base); attached ones work on {', '.join(FAMILIES)}"
        )
    attached = AttachedAdapter.of(adapter, decoder)
    if mllm.image_token_id in attached.invocation:
        raise CheckpointMismatch(f"{source.adapter} is invoked by token {mllm.image_token_id}, which is an image's")
    return replace(mllm, name=name, adapter=mllm.backbone.attach(attached)), adapter


def _attached_generator(name: str, source: Attached, mllm: Model) -> Model:
    model, adapter = _attach(name, source, mllm)
    if adapter.task_type != "CAUSAL_LM":
        raise CheckpointMismatch(
            f"{source.adapter} is a {adapter.task_type} adapter; {name} has to be a language model (CAUSAL_LM)"
        )
    return model


def _attached_detector(name: str, source: Attached, mllm: Model) -> Model:
    model, adapter = _attach(name, source, mllm)
    decoder, file = model.backbone.decoder, Path(source.adapter) / HEAD_FILE
    assert isinstance(decoder, Decoder)
    weight = adapter.saved.get("score.weight")
    if (weight is None) != file.is_file():
        found = "neither score.weight nor" if weight is None else "both score.weight and"
        raise CheckpointMismatch(f"{source.adapter} has {found} {HEAD_FILE}; a detector's adapter has one of them")
    if weight is None:
        return _text_head(name, model, file, decoder.device)
    if tuple(weight.shape) != (1, decoder.config.hidden_size):
        raise CheckpointMismatch(
            f"{source.adapter}: score.weight is {tuple(weight.shape)}; a detector on this model has one label and "
            f"{decoder.config.hidden_size} features"
        )
    return replace(model, head=_classifier_head(decoder, weight.to(decoder.device, decoder.dtype), None, "response"))


def _classifier_head(decoder: Decoder, weight: Tensor, labels: Labels | None, template: str) -> Head:
    """What a sequence classifier does: its last token after the last layer, normed as the decoder norms."""
    spec = HeadSpec(layer=decoder.depth, pooling="last", norm=True, template=template)
    if labels is None:
        weight = weight[0]
    return Head(spec, weight, norm_weight=decoder.norm, norm_eps=decoder.config.norm_eps, labels=labels)


def _labels(source: Classifier, config: PretrainedConfig) -> Labels | None:
    """Which labels mean harm; None where the only one is P(harmless). Raises `CheckpointMismatch`."""
    if source.template == IN_CONTEXT:
        raise CheckpointMismatch(
            f"{source.source}: a classifier reads a text; its template is none of {IN_CONTEXT!r}"
        )
    names = {int(label): str(name) for label, name in config.id2label.items()}
    said = ", ".join(f"{label} ({name})" for label, name in sorted(names.items()))
    if source.harm is None:
        if len(names) == 1:
            return None
        raise CheckpointMismatch(
            f"{source.source} has the labels {said}: say which mean harm, as Classifier(path, harm=…) or harm=…:PATH"
        )
    by_name = {name.lower(): label for label, name in names.items()}
    harm = []
    for wanted in source.harm if isinstance(source.harm, tuple) else (source.harm,):
        label = by_name.get(wanted.lower()) if isinstance(wanted, str) else wanted
        if label not in names or isinstance(wanted, bool):
            raise CheckpointMismatch(f"{source.source} has no label {wanted!r}; it has {said}")
        harm.append(label)
    # one label alone is a sigmoid, too
    independent = len(names) == 1 or config.problem_type == "multi_label_classification"
    if not harm or (not independent and len(set(harm)) == len(names)):
        raise CheckpointMismatch(f"{source.source}: some of the labels {said} have to mean harm, and not all")
    return Labels(tuple(sorted(set(harm))), independent)


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


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _dtype(device: torch.device, dtype: torch.dtype | None) -> torch.dtype:
    """bf16 where the device multiplies it in hardware, else fp32."""
    if dtype is not None:
        return dtype
    if device.type == "cpu":
        able = torch.cpu._is_avx512_bf16_supported()
    else:
        able = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if able else torch.float32
