"""The eyes that `train eyes` trains: a small SigLIP tower and a projector that names letters, and their file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaModel, PretrainedConfig, SiglipVisionConfig

from ..engine.errors import BadInput
from ..engine.models.names import canonical_name
from ..engine.models.vision.letters import INSIDE, LETTERS, likely, squared

SIDE = 10  # patches in a row, and rows of patches
PIXELS = 240
# Images are shrunk to this, and the margin is cut off: 15 letters of FigStep's lists then stand in 10 patches, in two
# ways in a patch and not in ten.
SHRUNK = 253
MARGIN = 6
EYES_FILE = "eyes.safetensors"
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


def eyes_config(text: PretrainedConfig, image_token: int) -> LlavaConfig:
    """LLaVA with eyes of 7.7 M parameters: 240 x 240 pixels, 100 patches, no class token, no pooling head."""
    vision = SiglipVisionConfig(
        hidden_size=320,
        intermediate_size=1408,
        num_hidden_layers=5,
        num_attention_heads=10,
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
    """Tower and projector of LLaVA with random weights, and the codes of letters that the projector names. Places
    begin as codes of row and column about a third as large as the rest of a patch's state: with weak ones no layer
    can tell where a letter stands."""

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
        rows_columns = nn.init.orthogonal_(torch.empty(2 * SIDE, hidden)) * _PLACE_SIZE
        at = torch.arange(SIDE * SIDE)
        self.vision_tower.embeddings.position_embedding.weight.data = (
            rows_columns[at // SIDE] + rows_columns[SIDE + at % SIDE]
        )
        code = text.hidden_size // INSIDE
        self.codes = nn.Parameter(torch.randn(LETTERS, code) / code**0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        """How likely each letter is in each place of patches, [images, patches, INSIDE, LETTERS]. pixels: [images, 3,
        height, width]."""
        states = self.vision_tower.embeddings(pixels)
        for layer in self.vision_tower.encoder.layers:
            states = layer(states, None)
        return likely(self.multi_modal_projector(states), self.codes)

    def computed(self, dtype: torch.dtype, pixels: Tensor) -> Tensor:
        """`forward` with parameters in another dtype, whose gradients reach those in fp32."""
        if dtype is torch.float32:
            found: Tensor = self(pixels)
        else:
            parameters = {name: value.to(dtype) for name, value in self.named_parameters()}
            found = torch.func.functional_call(self, parameters, (pixels.to(dtype),))
        return found

    def learning(self) -> dict[str, nn.Parameter]:
        """The parameters that `forward` uses."""
        return {name: value for name, value in self.named_parameters() if "post_layernorm" not in name}


def pixels_of(images: Sequence[Image.Image]) -> Tensor:
    """As the checkpoint's image processor makes them: [images, 3, PIXELS, PIXELS] in -1 .. 1."""
    box = (MARGIN, MARGIN, MARGIN + PIXELS, MARGIN + PIXELS)
    shrunk = [squared(image.convert("RGB"), SHRUNK).crop(box) for image in images]
    values = torch.from_numpy(np.stack([np.asarray(image) for image in shrunk])).permute(0, 3, 1, 2)
    return values.float() / 127.5 - 1


def patches_at(share: float) -> float:
    """Where a place of an image, given as a share of its height or width, is in rows or columns of patches, 0 to less
    than `SIDE`."""
    return min(SIDE - 1e-3, max(0.0, (share * SHRUNK - MARGIN) * SIDE / PIXELS))


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


def save_eyes(eyes: Eyes, blank: Tensor, config: LlavaConfig, folder: Path) -> None:
    """Tower, projector, codes, and what stands behind an image's tokens, [patches, hidden], in bf16: `EYES_FILE`, as
    the engine's `read_eyes` takes it."""
    state = {str(canonical_name(name)): value for name, value in eyes.state_dict().items()}
    state |= {"letters.codes": state.pop("codes"), "letters.blank": blank}
    tensors = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in state.items()}
    vision = config.vision_config
    own = {
        "vision_config": {name: getattr(vision, name) for name in ("model_type", *_TOWER)},
        **{name: getattr(config, name) for name in _CONFIG},
    }
    metadata = {"format": "pt", "config": json.dumps(own), "processor": image_processor().to_json_string()}
    save_file(tensors, folder / EYES_FILE, metadata)
