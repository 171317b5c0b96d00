"""The models of an engine by their roles, from the sources that a user names."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ...kernels.quantized import Kind
from ..errors import CheckpointMismatch, UnknownArchitecture
from ..outside import OutsideDetector
from .adapters import Adapter, is_adapter, read_adapter
from .attached import AttachedAdapter
from .backbones import Backbones
from .checkpoint import open_checkpoint
from .decoder import FAMILIES, Decoder
from .heads import IN_CONTEXT, Head, HeadSpec, Labels, load_head
from .model import Model
from .sources import (
    BUNDLES,
    HEAD_FILE,
    ONNX,
    SMOL_ADAPTER,
    SMOL_ADAPTERS,
    SMOL_DETECTOR,
    SMOL_JUDGE,
    SMOL_JUDGE_FILE,
    SMOL_PROBE,
    Attached,
    Checkpointed,
    Classifier,
    DetectorSource,
    Source,
    bundle_of,
    local_source,
)


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
    backbones = Backbones(where, dtype or fast_dtype(where), weights, kv_dtype)
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
    mllm = _generator(backbones, "mllm", model)
    models = {"mllm": mllm}
    if isinstance(detoxifier, Attached):
        models["detoxifier"] = _attached_generator("detoxifier", detoxifier, mllm)
    elif detoxifier is not None:
        models["detoxifier"] = _generator(backbones, "detoxifier", detoxifier)
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
        models["detector"] = _detector(backbones, "detector", detector, mllm)
    if probe is not None:
        models["probe"] = _in_context("probe", mllm, Path(probe), where)
    return ModelSet(models, where, backbones.dtype, outside)


def _own_adapter(name: str, model: Source) -> Attached:
    if bundle_of(model) is None:
        raise CheckpointMismatch(f"{SMOL_ADAPTER} was trained on {', '.join(BUNDLES)}; it is of no use on {model}")
    return Attached(SMOL_ADAPTERS[name])


def _generator(backbones: Backbones, name: str, source: Checkpointed) -> Model:
    loaded = backbones.load(source, classifier=False)
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


def _detector(backbones: Backbones, name: str, source: Checkpointed | Classifier, mllm: Model) -> Model:
    if isinstance(source, Classifier):
        return _classifier(backbones, name, source)
    if str(source) in BUNDLES:
        return _text_head(name, _generator(backbones, name, source), SMOL_DETECTOR, backbones.device)
    if isinstance(source, str | Path) and Path(source).suffix == ".safetensors":
        return _text_head(name, mllm, Path(source), backbones.device)
    path, base = source if isinstance(source, tuple) else (source, None)
    if (Path(path) / HEAD_FILE).is_file():
        return _with_head_file(backbones, name, Path(path), base)
    loaded = backbones.load(source, classifier=True)
    if loaded.score is None:  # a guard model, which says its verdict as a word
        return _generator(backbones, name, source)
    return _classifier(backbones, name, Classifier(source))


def _with_head_file(backbones: Backbones, name: str, path: Path, base: str | Path | None) -> Model:
    """A folder with weights, or an adapter to merge, and the head that was trained with them: it states the hash
    of the weights, of an adapter's base."""
    if is_adapter(path):
        base = base or read_adapter(path).base or ""
        own = open_checkpoint(local_source(base)).content_hash()
        model = _generator(backbones, name, (path, base))
    else:
        model = _generator(backbones, name, path)
        own = model.backbone.content_hash
    return _text_head(name, model, path / HEAD_FILE, backbones.device, own)


def _classifier(backbones: Backbones, name: str, source: Classifier) -> Model:
    loaded = backbones.load(source.source, classifier=True)
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


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device multiplies it in hardware, else fp32."""
    if device.type == "cpu":
        able = torch.cpu._is_avx512_bf16_supported()
    else:
        able = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if able else torch.float32
