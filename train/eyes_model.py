"""The eyes that `train eyes` trains: a small SigLIP tower and a projector, as LLaVA has them, and their files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaProcessor,
    PretrainedConfig,
    SiglipVisionConfig,
)

from ..engine.errors import BadInput
from ..engine.models.names import canonical_name

SIDE = 10  # patches in a row, and rows of patches
PIXELS = 240
# Images are shrunk to this, and the margin is cut off: 15 letters of FigStep's lists then stand in 10 patches, in two
# ways in a patch and not in ten.
SHRUNK = 253
MARGIN = 6
LETTERS = 3  # a patch is asked for so many of the characters whose middle is in it
WINDOW = 15  # and for so many around where a word begins in it,
BEFORE = 3  # these before that
FIRST_LETTER = 32  # " " stands for none
LETTER_COUNT = 95
EYES_FILE = "eyes.safetensors"
CODE = 28  # numbers in which a patch's state names its letters, and in which those beside it read them
TRAINING_ONLY = ("code.", "letters.", "places.", "windows.")  # how parameters begin that no checkpoint has
_PLACE_SIZE = 12.0
# What a file of eyes says of their configuration
_TOWER = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "vision_use_head",
)
_CONFIG = ("image_token_index", "image_seq_length", "vision_feature_layer", "vision_feature_select_strategy")
LETTERS_AFTER = 2  # layers of the tower, from whose states the letters are read

T = TypeVar("T")


def eyes_config(text: PretrainedConfig, image_token: int) -> LlavaConfig:
    """LLaVA with eyes of 7.7 M parameters: 240 x 240 pixels, 100 patches, no class token, no pooling head."""
    vision = SiglipVisionConfig(
        hidden_size=320,
        intermediate_size=1408,
        num_hidden_layers=5,
        num_attention_heads=10,  # one for each patch of a row that the layer above the letters has to look at
        image_size=PIXELS,
        patch_size=PIXELS // SIDE,
        hidden_act="gelu",  # the exact one: its gradient takes a third of the tanh form's time on a CPU
        vision_use_head=False,
    )
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        text_config=text,
        vision_config=vision,
        image_token_index=image_token,
        image_seq_length=SIDE * SIDE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )


class _Patches(nn.Conv2d):
    """A convolution whose patches do not overlap, as a matrix product: in bf16 its gradient takes a tenth of the time
    on a CPU."""

    def forward(self, pixels: Tensor) -> Tensor:
        size = self.kernel_size[0]
        images, colors, height, width = pixels.shape
        rows, columns = height // size, width // size
        patches = pixels.view(images, colors, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5).flatten(3)
        found = F.linear(patches, self.weight.flatten(1), self.bias)  # [images, rows, columns, hidden]
        return found.permute(0, 3, 1, 2)


class Eyes(nn.Module):
    """Tower and projector of LLaVA with random weights, and heads that name letters and places, which only training
    has. Places begin as codes of row and column about a third as large as the rest of a patch's state: with weak ones
    no upper layer can tell where a letter stands."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        without = LlavaConfig.from_dict(config.to_dict())
        text: Any = without.text_config
        text.num_hidden_layers, text.vocab_size, text.pad_token_id = 0, 1, None
        # eager: backward, four attention heads of 100 rows take a third of the fused kernel's time on a CPU
        model: Any = LlavaModel._from_config(without, attn_implementation="eager")
        self.vision_tower = model.vision_tower
        plain = self.vision_tower.embeddings.patch_embedding
        patches = _Patches(plain.in_channels, plain.out_channels, plain.kernel_size, plain.stride)
        patches.load_state_dict(plain.state_dict())
        self.vision_tower.embeddings.patch_embedding = patches
        self.multi_modal_projector = model.multi_modal_projector
        hidden = config.vision_config.hidden_size
        codes = nn.init.orthogonal_(torch.empty(2 * SIDE, hidden)) * _PLACE_SIZE
        at = torch.arange(SIDE * SIDE)
        self.vision_tower.embeddings.position_embedding.weight.data = codes[at // SIDE] + codes[SIDE + at % SIDE]
        self.code = nn.Linear(hidden, CODE, bias=False)
        self.letters = nn.Linear(CODE, LETTERS * LETTER_COUNT)
        self.places = nn.Linear(hidden, 2 * SIDE)
        self.windows = nn.Linear(hidden, WINDOW * LETTER_COUNT)

    @property
    def layers(self) -> Any:
        return self.vision_tower.encoder.layers

    def forward(self, method: Callable[..., T], *inputs: Any) -> T:
        return method(self, *inputs)

    def computed(self, dtype: torch.dtype, method: Callable[..., T], *inputs: Any) -> T:
        """A method with parameters in another dtype, whose gradients reach those in fp32."""
        if dtype is torch.float32:
            return method(self, *inputs)
        parameters = {name: value.to(dtype) for name, value in self.named_parameters()}
        found: T = torch.func.functional_call(self, parameters, (method, *inputs))
        return found

    def spell(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of [images, 3, height, width] the lower layers' states, [images, patches, hidden], the letters, [images,
        patches, LETTERS, 95], and the places, [images, patches, 2 * SIDE], for a patch's row, then its column."""
        states = self.vision_tower.embeddings(pixels)
        for layer in self.layers[:LETTERS_AFTER]:
            states = layer(states, None)
        # as the attention above reads them
        normed = self.layers[LETTERS_AFTER].layer_norm1(states)
        letters = self.letters(self.code(normed)).unflatten(-1, (LETTERS, LETTER_COUNT))
        return states, letters, self.places(normed)

    def look_around(self, pixels: Tensor) -> Tensor:
        """States behind the attention of the layer above the letters, [images, patches, hidden]."""
        states, _, _ = self.spell(pixels)
        layer = self.layers[LETTERS_AFTER]
        brought, _ = layer.self_attn(layer.layer_norm1(states))
        return states + brought

    def say(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Of single patches, from what `look_around` makes of them, the letters around, [n, WINDOW, 95], and what
        they say, [n, hidden of the language model], while the layers above look nowhere."""
        reading, *above = self.layers[LETTERS_AFTER:]
        states = states + reading.mlp(reading.layer_norm2(states))
        windows = self.windows(states).unflatten(-1, (WINDOW, LETTER_COUNT))
        for layer in above:
            states = states + layer.mlp(layer.layer_norm2(states))
        vectors: Tensor = self.multi_modal_projector(states)
        return windows, vectors

    def see(self, pixels: Tensor) -> Tensor:
        """What the patches say, [images, patches, hidden of the language model]."""
        states = self.vision_tower.embeddings(pixels)
        for layer in self.layers:
            states = layer(states, None)
        vectors: Tensor = self.multi_modal_projector(states)
        return vectors

    def spelling(self) -> dict[str, nn.Parameter]:
        """The parameters of `spell`."""
        lower = (self.vision_tower.embeddings, *self.layers[:LETTERS_AFTER])
        return self._named(*lower, self.layers[LETTERS_AFTER].layer_norm1, self.code, self.letters, self.places)

    def saying(self) -> dict[str, nn.Parameter]:
        """The parameters of `say`."""
        above = [part for layer in self.layers[LETTERS_AFTER:] for part in (layer.layer_norm2, layer.mlp)]
        return self._named(*above, self.windows, self.multi_modal_projector)

    def _named(self, *parts: nn.Module) -> dict[str, nn.Parameter]:
        chosen = {id(value) for part in parts for value in part.parameters()}
        return {name: value for name, value in self.named_parameters() if id(value) in chosen}


def pixels_of(images: Sequence[Image.Image]) -> Tensor:
    """As the checkpoint's image processor makes them: [images, 3, PIXELS, PIXELS] in -1 .. 1."""
    box = (MARGIN, MARGIN, MARGIN + PIXELS, MARGIN + PIXELS)
    shrunk = [image.convert("RGB").resize((SHRUNK, SHRUNK), Image.Resampling.BICUBIC).crop(box) for image in images]
    values = torch.from_numpy(np.stack([np.asarray(image) for image in shrunk])).permute(0, 3, 1, 2)
    return values.float() / 127.5 - 1


def patch_at(share: float) -> int:
    """In which row or column of patches a place of an image is, given as a share of its height or width."""
    return min(SIDE - 1, max(0, int((share * SHRUNK - MARGIN) * SIDE / PIXELS)))


def image_processor() -> Any:
    """What `pixels_of` does, as an image processor of `transformers`."""
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"height": SHRUNK, "width": SHRUNK},
        crop_size={"height": PIXELS, "width": PIXELS},
        resample=Image.Resampling.BICUBIC,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def image_token(tokenizer: Any) -> str:
    """A special token that the model's chats never hold, to stand for an image: `<image>`, else the last one.

    Raises `BadInput` where there is none.
    """
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token}
    template = tokenizer.chat_template or ""
    free = [
        token.content
        for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and token.content not in used and token.content not in template.replace("<image>", "")
    ]
    if not free:
        raise BadInput("the tokenizer has no special token to spare, and one has to stand for an image")
    return "<image>" if "<image>" in free else free[-1]


def save_eyes(eyes: Eyes, config: LlavaConfig, folder: Path) -> None:
    """Tower and projector alone in bf16, `EYES_FILE`, as the engine's `read_eyes` takes them."""
    tensors = {
        str(canonical_name(name)): value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in eyes.state_dict().items()
        if not name.startswith(TRAINING_ONLY)
    }
    vision = config.vision_config
    own = {
        "vision_config": {name: getattr(vision, name) for name in ("model_type", *_TOWER)},
        **{name: getattr(config, name) for name in _CONFIG},
    }
    metadata = {"format": "pt", "config": json.dumps(own), "processor": image_processor().to_json_string()}
    save_file(tensors, folder / EYES_FILE, metadata)


def save_llava(language: str | Path, tokenizer: Any, config: LlavaConfig, eyes: Eyes, folder: Path) -> None:
    """A whole LLaVA checkpoint in bf16: the language model with these eyes, tokenizer, template and processor."""
    known = AutoModelForCausalLM.from_pretrained(language, dtype=torch.bfloat16, local_files_only=True)
    with torch.random.fork_rng():
        whole: Any = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    whole.model.language_model.load_state_dict(known.model.state_dict())
    whole.lm_head.load_state_dict(known.lm_head.state_dict())
    whole.model.vision_tower.load_state_dict(eyes.vision_tower.state_dict())
    whole.model.multi_modal_projector.load_state_dict(eyes.multi_modal_projector.state_dict())
    whole.tie_weights()
    whole.generation_config = known.generation_config
    whole.save_pretrained(folder)
    images = image_processor()
    token = tokenizer.convert_ids_to_tokens(config.image_token_id)
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=PIXELS // SIDE,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
        image_token=token,
    ).save_pretrained(folder)
