"""Well-known model shapes by name, for random weights: configurations, a tokenizer, an image processor, no files.

Random weights say nothing true; they cost what the real ones cost, which is what benchmarks and tests need.
"""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, PretrainedConfig, PreTrainedTokenizerFast

from ..errors import CheckpointMismatch, UnknownArchitecture
from .json_file import read_json

NAMED_SHAPES = ("llava-1.5-7b", "llava-1.5-13b", "open-llama-3b", "vicuna-7b", "tiny-llava", "tiny-llama")
# How the names of a family's image processors begin, slow or fast -> the one that runs on PIL
_PROCESSORS = {
    "CLIP": "CLIPImageProcessorPil",
    "Siglip": "SiglipImageProcessorPil",
    "Gemma3": "Gemma3ImageProcessorPil",
    "LlavaNext": "LlavaNextImageProcessorPil",
    "LlavaOnevision": "LlavaOnevisionImageProcessorPil",
    "Qwen2": "Qwen2VLImageProcessorPil",
    "Blip": "BlipImageProcessorPil",
    "GotOcr2": "GotOcr2ImageProcessorPil",
    "Idefics3": "Idefics3ImageProcessorPil",
    "SmolVLM": "SmolVLMImageProcessorPil",
}
_SPECIAL = ("<unk>", "<s>", "</s>")
_IMAGE = "<image>"
_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def named_config(name: str) -> PretrainedConfig | None:
    """The configuration of a named shape; None where the name is not in `NAMED_SHAPES`."""
    match name:
        case "llava-1.5-7b":
            return _llava(_llama(32064, 4096, 11008, 32, 32, 4096, 1e-5), _clip_large(), image_token=32000)
        case "llava-1.5-13b":
            return _llava(_llama(32064, 5120, 13824, 40, 40, 4096, 1e-5), _clip_large(), image_token=32000)
        case "open-llama-3b":
            return _llama(32000, 3200, 8640, 26, 32, 2048, 1e-6)
        case "vicuna-7b":
            return _llama(32000, 4096, 11008, 32, 32, 4096, 1e-5)
        case "tiny-llava":
            vision = CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=56,
                patch_size=14,
                projection_dim=32,
            )
            return _llava(_llama(320, 64, 128, 2, 4, 1024, 1e-5, kv_heads=2), vision, image_token=319)
        case "tiny-llama":
            return _llama(320, 64, 128, 2, 4, 1024, 1e-5, kv_heads=2)
    return None


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A parameter of `shape` on the generator's device: ones for the weights of norms, else N(0, 0.02)."""
    if re.search(r"norm\d?\.weight$", name):
        return torch.ones(shape, dtype=dtype, device=generator.device)
    return torch.empty(shape, dtype=dtype, device=generator.device).normal_(0.0, 0.02, generator=generator)


def byte_tokenizer(vocab_size: int, image_token_id: int | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer in which every id below `vocab_size` is some text, with a Vicuna-like chat template.

    `<unk>`, `<s>`, `</s>` are 0, 1, 2 (`<s>` opens every text, `</s>` ends an answer and pads); `<image>` has
    `image_token_id`, else 3; the 256 bytes follow, then pairs and longer runs of printable characters, so that what
    a random model says can be decoded and encoded again. Raises ValueError if the vocabulary is too small.
    """
    image = len(_SPECIAL) if image_token_id is None else image_token_id
    if vocab_size < 260 or not len(_SPECIAL) <= image < vocab_size:
        raise ValueError(
            f"a vocabulary of {vocab_size} with <image> at {image}; needed are at least 260, with it inside"
        )
    ids = (number for number in range(len(_SPECIAL), vocab_size) if number != image)
    vocab = {token: number for number, token in enumerate(_SPECIAL)} | {_IMAGE: image}
    vocab |= dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), ids, strict=False))
    merges = []
    for number, (left, right) in zip(ids, _runs(), strict=False):
        merges.append((left, right))
        vocab[left + right] = number
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*_SPECIAL, _IMAGE)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def image_processor_for(folder_or_size: str | Path | int) -> Any:
    """The image processor of a checkpoint folder, or CLIP's for square images of so many pixels a side.

    Always the PIL implementation: results must not depend on whether torchvision is installed.
    Raises `CheckpointMissing`, `CheckpointTruncated`, `UnknownArchitecture` or `CheckpointMismatch` for a folder
    without a usable one.
    """
    import transformers  # the processors themselves take most of a second to import, and a text model needs none

    if isinstance(folder_or_size, int):
        side = folder_or_size
        return transformers.CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )
    folder = Path(folder_or_size)
    if (folder / "preprocessor_config.json").is_file():
        settings = read_json(folder / "preprocessor_config.json")
    else:
        settings = read_json(folder / "processor_config.json").get("image_processor", {})
    return image_processor_of(settings, folder)


def image_processor_of(settings: dict[str, Any], source: Path) -> Any:
    """The same from the settings that `source` has of it. Raises `UnknownArchitecture` or `CheckpointMismatch`."""
    import transformers

    kind = settings.get("image_processor_type", settings.get("feature_extractor_type"))
    found = next((name for start, name in _PROCESSORS.items() if str(kind).startswith(start)), None)
    if found is None:
        raise UnknownArchitecture(f"{source}: unknown image processor {kind!r}; known: {', '.join(_PROCESSORS)}")
    # by its module, since some releases say of some that they need torchvision, and have a placeholder for them
    module = importlib.import_module(getattr(transformers, found).__module__)
    try:
        return getattr(module, found).from_dict(settings)
    except (TypeError, ValueError) as error:
        raise CheckpointMismatch(f"{source} has no usable image processor: {error}") from error


def _llama(
    vocab: int, hidden: int, ffn: int, layers: int, heads: int, context: int, eps: float, kv_heads: int | None = None
) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        max_position_embeddings=context,
        rms_norm_eps=eps,
        bos_token_id=1,
        eos_token_id=2,
    )


def _clip_large() -> CLIPVisionConfig:
    """CLIP ViT-L/14 at 336 pixels."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


def _llava(text: LlamaConfig, vision: CLIPVisionConfig, image_token: int) -> LlavaConfig:
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        text_config=text,
        vision_config=vision,
        image_token_index=image_token,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _runs() -> Iterator[tuple[str, str]]:
    """Pairs of tokens to merge, without end: what spells yes and no, then letters with letters, and so on."""
    first = [("n", "o"), ("N", "o"), ("y", "e"), ("ye", "s"), ("Y", "e"), ("Ye", "s")]
    yield from first
    seen = {left + right for left, right in first}
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    known = letters
    while True:
        longer = []
        for left, right in itertools.product(known, letters):
            longer.append(left + right)
            if left + right not in seen:
                yield left, right
        known = longer
