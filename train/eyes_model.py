"""The eyes that `train eyes` trains: a small SigLIP tower and a projector, as LLaVA has them, and their files."""

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
LETTERS = 3  # a patch is asked for so many of the characters whose middle is in it
FIRST_LETTER = 32  # " " stands for none
LETTER_COUNT = 95
EYES_FILE = "eyes.safetensors"
_LETTERS_AFTER = 3  # layers of the tower, from whose states the letters are read
# What stands around an image in a prompt: the language model has never seen one, but it knows quoted text.
_BEFORE, _AFTER = 'Here is the text in the image:\n"', '"\n'


def eyes_config(text: PretrainedConfig, image_token: int) -> LlavaConfig:
    """LLaVA with a tower of 4.5 M parameters: 240 x 240 pixels, 100 patches, no class token, no pooling head."""
    vision = SiglipVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=5,
        num_attention_heads=4,
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
    """Tower and projector of LLaVA with random weights, and a head that names letters, which only training has."""

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
        self.letters = nn.Linear(config.vision_config.hidden_size, LETTERS * LETTER_COUNT)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[images, 3, height, width] -> vectors [images, patches, hidden], letters [images, patches, LETTERS, 95]."""
        states = self.vision_tower(pixel_values=pixels, output_hidden_states=True).hidden_states
        letters = self.letters(states[_LETTERS_AFTER])
        return self.multi_modal_projector(states[-1]), letters.unflatten(-1, (LETTERS, LETTER_COUNT))

    def in_bf16(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` in bf16, whose gradients reach the fp32 parameters."""
        parameters = {name: value.bfloat16() for name, value in self.named_parameters()}
        found: tuple[Tensor, Tensor] = torch.func.functional_call(self, parameters, (pixels.bfloat16(),))
        return found


def pixels_of(images: Sequence[Image.Image]) -> Tensor:
    """As SigLIP's image processor makes them: [images, 3, PIXELS, PIXELS] in -1 .. 1."""
    shrunk = [image.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BICUBIC) for image in images]
    values = torch.from_numpy(np.stack([np.asarray(image) for image in shrunk])).permute(0, 3, 1, 2)
    return values.float() / 127.5 - 1


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


def template_with_images(template: str, token: str) -> str:
    """A chat template of texts, made to take lists of parts, too: an image is `token` in a few words."""
    shown = json.dumps(f"{_BEFORE}{token}{_AFTER}")
    return (
        "{%- set whole = namespace(messages=[], text='') -%}"
        "{%- for message in messages -%}"
        "{%- if message['content'] is string -%}{%- set whole.text = message['content'] -%}"
        "{%- else -%}{%- set whole.text = '' -%}{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'image' -%}{%- set whole.text = whole.text + " + shown + " -%}"
        "{%- else -%}{%- set whole.text = whole.text + part['text'] -%}{%- endif -%}"
        "{%- endfor -%}{%- endif -%}"
        "{%- set whole.messages = whole.messages + [{'role': message['role'], 'content': whole.text}] -%}"
        "{%- endfor -%}{%- set messages = whole.messages -%}"
    ) + template


def save_eyes(eyes: Eyes, folder: Path) -> None:
    """Tower and projector alone in bf16, `EYES_FILE`, by the names that the engine gives them."""
    tensors = {
        str(canonical_name(name)): value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in eyes.state_dict().items()
        if not name.startswith("letters.")
    }
    save_file(tensors, folder / EYES_FILE, {"format": "pt"})


def save_llava(language: str | Path, tokenizer: Any, config: LlavaConfig, eyes: Eyes, folder: Path) -> None:
    """A whole LLaVA checkpoint in bf16: the language model with these eyes, tokenizer, template and processor."""
    from transformers import SiglipImageProcessorPil

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
    images = SiglipImageProcessorPil(size={"height": PIXELS, "width": PIXELS}, resample=Image.Resampling.BICUBIC)
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
