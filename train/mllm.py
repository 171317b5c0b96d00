"""Fine-tunes a multimodal model on conversations: a LoRA on its language model, its projector whole.

The data is ECSO's or anything in LLaVA's format; prompts and images are what the engine makes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from ..engine.chat import Chat, Message
from ..engine.errors import BadInput, MissingExtra, UnknownArchitecture
from ..engine.images import LoadedImage, load_image
from ..engine.models.checkpoint import open_checkpoint
from ..engine.models.loader import load_models
from ..engine.models.model import Model
from ..engine.prepare import encode
from .backbone import trainable
from .batches import padded
from .ecso_data import located
from .loop import SAVE_SECONDS, Progress, fingerprint, train
from .outcome import Folder, device_and_versions
from .pairs import Conversation, read_mixed
from .recipe import Recipe
from .rows import Bad, Skipped, refuse
from .targets import Target, target, target_loss

PROJECTOR = "multi_modal_projector"


class Shown(NamedTuple):
    """A target and the picture in its prompt, by its file."""

    target: Target
    image: Path | None


@dataclass(frozen=True)
class MllmCard:
    """conversations: that were trained on. turns: answers in them. too_long: answers left out because they have more
    than `recipe.max_tokens` with their prompt."""

    base: str
    recipe: Recipe
    conversations: int
    turns: int
    with_image: int
    repeated: int
    too_long: int
    skipped: int
    losses: list[float]
    versions: str

    def to_markdown(self) -> str:
        recipe, tenth = self.recipe, max(1, len(self.losses) // 10)
        first, last = (sum(some) / tenth for some in (self.losses[:tenth], self.losses[-tenth:]))
        return (
            f"# Adapter for {self.base}\n\n"
            f"A LoRA on the language model, rank {recipe.rank}, alpha {recipe.alpha}, dropout {recipe.dropout:g} on "
            f"{', '.join(recipe.targets)}, and the projector whole; load it merged, as `ADAPTER,BASE`.\n\n"
            f"{self.turns} answers of {self.conversations} conversations, {self.with_image} of them about an image; "
            f"{self.repeated} repeated conversations, {self.too_long} answers of more than {recipe.max_tokens} "
            f"tokens and {self.skipped} rows of the wrong form were left out. Loss on answers alone; AdamW, rate "
            f"{recipe.rate:g}, {recipe.epochs} epochs, {recipe.batch} a batch, {len(self.losses)} steps, seed "
            f"{recipe.seed}; it went from {first:.3f} to {last:.3f} (means of the first and last tenth).\n\n"
            f"Made by `stockade train mllm` with {self.versions}.\n"
        )


def train_mllm(
    base: str | Path,
    safe: Sequence[Path],
    out: Path,
    *,
    utility: Sequence[Path] = (),
    share: float = 0.5,
    images: Path | None = None,
    recipe: Recipe | None = None,
    skip_bad: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> MllmCard:
    """Train a LLaVA checkpoint on conversations of the files `safe`, with a share of `utility`; write a PEFT folder
    with its card. images: the folder that images must lie in. The same call goes on with an interrupted run.

    Raises `UnknownArchitecture` for other checkpoints, `BadInput`, `BadImage`, `DataMissing`, `DataInvalid`,
    `AnotherRun`, `Diverged`, or a `CheckpointError`.
    """
    recipe, device = recipe or Recipe(), device or torch.device("cpu")
    if recipe.adapter != "lora":
        raise BadInput("an MLLM is trained with --adapter lora")
    folder = Folder.begin(out)
    bad: Bad = Skipped() if skip_bad else refuse
    mixed = read_mixed(safe, utility, share, recipe.seed, bad)
    if open_checkpoint(base).config.model_type != "llava":
        raise UnknownArchitecture(f"{base} is no LLaVA checkpoint (model_type llava), which is what is trained here")
    # the engine's own model encodes prompts and prepares images; it stays on the CPU
    encoder = load_models(base, device="cpu", dtype=dtype).models["mllm"]
    found = [shown for item in mixed.items for shown in conversation_targets(encoder, item, images)]
    most = min(recipe.max_tokens, encoder.context)
    kept = [shown for shown in found if len(shown.target.tokens) <= most]
    if not kept:
        raise BadInput(f"no answer has at most {most} tokens with its prompt; max_tokens must be larger")
    model = _adapted(str(base), recipe, device, dtype)
    model.train()
    trained = train(
        [(trainable(model), recipe.rate)],
        [len(shown.target.tokens) for shown in kept],
        lambda batch: conversation_loss(model, encoder, [kept[index] for index in batch]),
        recipe,
        folder.state,
        fingerprint(encoder.backbone.content_hash, recipe, kept),
        progress=progress,
        save_seconds=save_seconds,
    )
    card = MllmCard(
        base=str(base),
        recipe=recipe,
        conversations=len(mixed.items),
        turns=len(kept),
        with_image=sum(item.image is not None for item in mixed.items),
        repeated=mixed.repeated,
        too_long=len(found) - len(kept),
        skipped=bad.count if isinstance(bad, Skipped) else 0,
        losses=trained.losses,
        versions=device_and_versions(dtype, device),
    )
    model.save_pretrained(folder.new, save_embedding_layers=False)  # else `peft` asks the hub about the vocabulary
    folder.finish(card.to_markdown())
    return card


def conversation_targets(encoder: Model, item: Conversation, images: Path | None) -> list[Shown]:
    """Each answer behind all that was said before it. Raises `BadImage` for one that cannot be shown."""
    path = None if item.image is None else located(item.image, images)
    parts: list[str | LoadedImage] = [] if path is None else [load_image(str(path))]
    messages: list[Message] = []
    found = []
    for turn in item.turns:
        messages.append(Message("user", (*parts, turn.question)))
        prompt = encode(encoder, Chat(tuple(messages))).tokens
        found.append(Shown(target(encoder.codec, prompt, turn.answer), path))
        messages.append(Message("assistant", (turn.answer,)))
        parts = []
    return found


def conversation_loss(model: Any, encoder: Model, batch: Sequence[Shown]) -> Tensor:
    """Mean loss an answer's token, of a `peft` model of LLaVA."""
    targets = [shown.target for shown in batch]
    inner = model.get_base_model()
    device = inner.lm_head.weight.device
    ids, _ = padded([item.tokens for item in targets], 0, device)
    vision = encoder.backbone.vision
    assert vision is not None
    pictures = [load_image(str(shown.image)) for shown in batch if shown.image is not None]
    prepared = [vision.prepare((picture,), "")[0] for picture in pictures]
    pixels = {}
    if prepared:
        dtype = next(inner.model.vision_tower.parameters()).dtype
        stacked = torch.cat([image.inputs["pixel_values"] for image in prepared])  # [images, 3, height, width]
        pixels = {"pixel_values": stacked.to(device, dtype)}
    states = inner.model(input_ids=ids, use_cache=False, **pixels).last_hidden_state
    return target_loss(states, inner.lm_head, targets)


def _adapted(base: str, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingExtra("adapters are trained with peft: pip install 'stockade[train]'") from None
    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=dtype, local_files_only=True)
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=rf".*language_model\..*\.(?:{'|'.join(recipe.targets)})",
        modules_to_save=[PROJECTOR],
    )
    return get_peft_model(model, config).to(device)
