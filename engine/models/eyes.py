"""Eyes in a file of their own: a tower and projector that read for a language model, apart from its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from transformers import LlavaConfig, PretrainedConfig

from ..errors import CheckpointMismatch, CheckpointMissing, CheckpointTruncated
from .checkpoint import Checkpoint
from .names import canonical_names
from .shapes import image_processor_of
from .weight_files import WeightFiles

# What stands around an image in a prompt: the language model has never seen one, but it knows quoted text.
_BEFORE, _AFTER = 'Here is the text in the image:\n"', '"\n'


class Eyes(NamedTuple):
    """config: LLaVA's, with the language model's own inside. processor: of images. weights: the file's tensors."""

    config: LlavaConfig
    processor: Any
    weights: Checkpoint


def read_eyes(file: Path, text: PretrainedConfig) -> Eyes:
    """Eyes for a language model of the configuration `text`. Raises a `CheckpointError` for a file that is none.

    A file holds the tensors of LLaVA's tower and projector by their canonical names, `letters.codes` and
    `letters.blank` as `LetterVision` has them, and as metadata `config` (LLaVA's, without `text_config`) and
    `processor` (as preprocessor_config.json has it), both JSON.
    """
    if not file.is_file():
        raise CheckpointMissing(f"no eyes at {file}")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
    except SafetensorError as error:
        raise CheckpointTruncated(f"{file} is not a safetensors file, or ends early: {error}") from None
    try:
        config = LlavaConfig(text_config=text, **json.loads(metadata["config"]))
        settings = json.loads(metadata["processor"])
    except Exception as error:  # configuration classes check their values each in its own way
        raise CheckpointMismatch(f"{file} holds no eyes saved by this package: {error!r}") from None
    weights = Checkpoint(file, config, WeightFiles([file], rename=canonical_names), file)
    return Eyes(config, image_processor_of(settings, file), weights)


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
