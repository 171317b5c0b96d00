"""Which checkpoints the fallback takes: what a configuration says, the weights in a module of `transformers`, and a
trial run that holds the fallback against that module's own forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ...kernels.paged_attention import attention_reference
from ..errors import CheckpointMismatch, StockadeError, UnknownArchitecture
from .checkpoint import Checkpoint, ContentHash
from .decoder import ROPE_TYPES
from .fallback import FallbackDecoder, layer_list

PAGED_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")
TRIAL_LENGTHS = (11, 1, 19)
TRIAL_WINDOW = 5
TOLERANCE = 1e-4  # of the largest logit, or of 1
# Models with eyes whose language model runs without them, and how the names of the eyes' tensors begin.
BY_TEXT = {"llama4": ("vision_model.", "multi_modal_projector.")}
# Settings of a configuration by which `transformers` would fetch or run what is no weight.
_FOREIGN = ("quantization_config", "fusion_config", "transformers_weights", "distributed_config")


def check_outline(config: PretrainedConfig, classifier: bool) -> None:
    """Raise `UnknownArchitecture` for a model that the fallback cannot run whatever its weights are.

    Allocates nothing; what only a run with numbers can tell is left to the trial.
    """
    if reason := _why_not(config, classifier):
        raise UnknownArchitecture(reason)
    text = _text_part(config)
    with torch.device("meta"), _quietly():
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]._from_config(
            text, attn_implementation="eager", dtype=torch.bfloat16
        )
    try:
        FallbackDecoder(model.eval())
    except UnknownArchitecture:
        raise
    except Exception:  # some modules look at their numbers, and there are none
        return


def load_fallback(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> tuple[FallbackDecoder, str]:
    """The model of a checkpoint that `check_outline` lets through, and the content hash of its weights.

    Raises `UnknownArchitecture` for one that the fallback cannot run, or runs differently than `transformers` does;
    `CheckpointMismatch` for weights that are not what the configuration says.
    """
    hasher = ContentHash()
    model = _filled(checkpoint, hasher, dtype).to(device)
    try:
        _check_trial(model)
        return FallbackDecoder(model), hasher.hexdigest()
    except StockadeError:
        raise
    except Exception as error:  # modules that are used as they were not meant to be fail each in its own way
        raise UnknownArchitecture(f"its layers do not run one by one ({type(error).__name__}: {error})") from error


def _why_not(config: PretrainedConfig, classifier: bool) -> str | None:
    if classifier:
        return "it is a sequence classifier; the fallback runs language models, and head files on them"
    if config.is_encoder_decoder:
        return "it is an encoder with a decoder; the fallback runs decoders alone"
    for name in _FOREIGN:
        if getattr(config, name, None):
            return f"its configuration has a {name}; weights are taken as they are, or from GGUF files"
    if config.model_type in BY_TEXT:
        return _why_not(config.get_text_config(), classifier)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "transformers has no causal language model of this type"
    if config.sub_configs:
        return "it has more than a text model"
    kinds = getattr(config, "layer_types", None) or ()
    if others := sorted(set(kinds) - set(PAGED_LAYERS)):
        return f"it has layers of {', '.join(others)}; pages hold those of {', '.join(PAGED_LAYERS)}"
    for rope_type in _rope_types(getattr(config, "rope_parameters", None) or {}):
        if rope_type not in ROPE_TYPES:
            return (
                f"rotary scaling {rope_type!r} depends on the length of the text, so its keys cannot be shared; "
                f"known: {', '.join(ROPE_TYPES)}"
            )
    return None


def _rope_types(parameters: dict[str, Any]) -> list[str]:
    """Of all layers, or of each kind of layers where they differ."""
    nested = [item for item in parameters.values() if isinstance(item, dict)]
    return [item.get("rope_type", "default") for item in nested or [parameters]]


def _text_part(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of what the language model is made by, with all that its forward pass asks for."""
    text = copy.deepcopy(config.get_text_config() if config.model_type in BY_TEXT else config)
    text.output_router_logits = False
    if getattr(text, "attention_chunk_size", 0) is None:
        # so Llama Guard 4 says that there are no chunks; whoever makes the mask wants their size all the same
        text.attention_chunk_size = text.max_position_embeddings
    return text


def _filled(checkpoint: Checkpoint, hasher: ContentHash, dtype: torch.dtype) -> PreTrainedModel:
    """The module with its weights. `transformers` knows how the names of a file become those of its modules, what is
    tied and what is computed anew; it gets tensors that were read already, and no path."""
    config = _text_part(checkpoint.config)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    eyes = BY_TEXT.get(checkpoint.config.model_type, ())
    # copied, because they are views of files
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors(hasher) if not name.startswith(eyes)}
    try:
        with _quietly():
            model, told = kind.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                attn_implementation="eager",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told, and refused below
                local_files_only=True,
                trust_remote_code=False,
                use_kernels=False,
            )
    except Exception as error:  # it checks in many places
        raise CheckpointMismatch(f"{checkpoint.path}: {error}") from error
    for problem, key in (
        ("lacks", "missing_keys"),
        ("has unknown tensors:", "unexpected_keys"),
        ("has wrong shapes:", "mismatched_keys"),
    ):
        names = sorted(str(name) for name in told[key])
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointMismatch(f"{checkpoint.path} {problem} {', '.join(names[:3])}{more}")
    return model.requires_grad_(False).eval()


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the bars and reports of `transformers`: what they tell is refused or nobody's business."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@torch.inference_mode()
def _check_trial(model: PreTrainedModel) -> None:
    """Raise `UnknownArchitecture` unless the model's first layers, in fp32, give on the fallback what they give in
    their own forward pass: ragged sequences together against each alone, with windows shorter than those.
    """
    cut = _first_layers(model)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(cut.config.vocab_size, (size,), generator=generator) for size in TRIAL_LENGTHS]
    texts = [text.to(model.device) for text in texts]
    want = torch.cat([cut(input_ids=text.unsqueeze(0), use_cache=False).logits.squeeze(0) for text in texts])
    decoder = FallbackDecoder(cut)

    config = decoder.config

    def attend(index: int, qkv: Tensor) -> Tensor:
        outs = []
        for rows in qkv.split(TRIAL_LENGTHS):
            q, k, v = rows.split((config.heads, config.kv_heads, config.kv_heads), 1)
            keys, values = k.transpose(0, 1), v.transpose(0, 1)
            window, scale, cap = config.windows[index], config.attention_scale, config.attention_cap
            outs.append(attention_reference(q, keys, values, scale, window, cap))
        return torch.cat(outs).to(qkv.dtype)

    x = decoder.embed(torch.cat(texts))
    angles = decoder.angles(torch.cat([torch.arange(size, device=model.device) for size in TRIAL_LENGTHS]))
    for index in range(decoder.depth):
        x = decoder.block(index, x, angles, attend)
    worst = float((decoder.logits(x) - want).abs().max())
    if not worst <= TOLERANCE * max(1.0, float(want.abs().max())):
        raise UnknownArchitecture(
            f"its logits on paged attention are {worst:.1e} away from those of its own forward pass, so its "
            "attention has something that pages do not"
        )


def _first_layers(model: PreTrainedModel) -> PreTrainedModel:
    """An fp32 copy with as many layers as it takes to have one of each kind, and with windows so short that the trial
    leaves them."""
    body, name = layer_list(model)
    layers = getattr(body, name)
    lists = {
        key: value
        for key, value in model.config.to_dict().items()
        # one that counts the layers (all of them are experts') tells none from another
        if isinstance(value, list | tuple) and len(value) == len(layers) and [*value] != [*range(len(layers))]
    }
    kinds = [
        str([*((key, value[index]) for key, value in lists.items())])
        + str([(key, tuple(tensor.shape)) for key, tensor in layer.named_parameters()])
        for index, layer in enumerate(layers)
    ]
    count = 1 + max(kinds.index(kind) for kind in kinds)
    setattr(body, name, layers[:count])
    try:
        cut = copy.deepcopy(model).float()
    finally:
        setattr(body, name, layers)
    configs = {id(part.config): part.config for part in cut.modules() if hasattr(part, "config")}.values()
    for config in configs:
        config.num_hidden_layers = count
        for key, value in lists.items():
            setattr(config, key, value[:count])
    for part in (*configs, *cut.modules()):
        if isinstance(getattr(part, "sliding_window", None), int):
            part.sliding_window = TRIAL_WINDOW
    return cut
