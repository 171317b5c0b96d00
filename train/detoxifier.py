"""Trains a detoxifier: a language model that rewrites harmful answers, with a LoRA, plain or activated.

The loss is of the rewritten answer alone. Both published prompts are trained, as the engine asks with them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..engine.chat import Chat
from ..engine.errors import BadInput
from ..engine.guards.prompts import rewrite, rewrite_with_question
from ..engine.models.sources import BUNDLES
from ..engine.text import segments_text
from .backbone import Backbone, adapt, open_backbone, trainable
from .batches import padded, sorted_batches
from .loop import SAVE_SECONDS, Progress, fingerprint, train
from .outcome import Folder, versions
from .recipe import Recipe
from .rows import Bad, Skipped, refuse
from .targets import Target, target, target_loss
from .triples import Triple, read_triples, split_triples

INVOCATION = "\nHarmless: "
VALIDATION = 0.05  # share of the questions
MEASURED = 200  # validation rewrites whose loss is measured
READ_TOKENS = 2048  # padded tokens of a batch that is only read


@dataclass(frozen=True)
class DetoxifierCard:
    """before, after: mean loss a token of validation rewrites, of the base and of what was trained. too_long: triples
    left out because they have more than `recipe.max_tokens`."""

    base: str
    recipe: Recipe
    chat: bool
    invocation: str | None
    triples: int
    validation: int
    repeated: int
    too_long: int
    skipped: int
    losses: list[float]
    before: float
    after: float
    versions: str

    def to_markdown(self) -> str:
        recipe = self.recipe
        activated = f", activated by {self.invocation!r}" if self.invocation else ""
        load = "`attach:ADAPTER`" if self.invocation else "`attach:ADAPTER` or `ADAPTER,BASE`"
        prompt = "in the base's chat template" if self.chat else "as they are"
        return (
            f"# Detoxifier on {self.base}\n\n"
            f"A LoRA{activated}, rank {recipe.rank}, alpha {recipe.alpha}, dropout {recipe.dropout:g} on "
            f"{', '.join(recipe.targets)}; load it as {load}. It rewrites a harmful answer, asked by either of "
            f"MLLM-Protector's prompts (with the question and without), {prompt}.\n\n"
            f"{self.triples} triples of question, harmful and harmless answer trained it, {self.validation} of other "
            f"questions measured it; {self.repeated} repeated, {self.too_long} of more than {recipe.max_tokens} "
            f"tokens and {self.skipped} rows of the wrong form were left out. Loss on the harmless answer alone; "
            f"AdamW, rate {recipe.rate:g}, {recipe.epochs} epochs, {recipe.batch} a batch, {len(self.losses)} steps, "
            f"seed {recipe.seed}.\n\n"
            f"Loss a token of rewrites that were not trained on: {self.before:.3f} before, {self.after:.3f} after. "
            "Whether a rewrite is harmless is for a detector to say.\n\n"
            f"Made by `stockade train detoxifier` with {self.versions}.\n"
        )


def train_detoxifier(
    base: str | Path,
    data: Sequence[Path],
    out: Path,
    *,
    recipe: Recipe | None = None,
    invocation: str = INVOCATION,
    limit: int | None = None,
    skip_bad: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> DetoxifierCard:
    """Train on the triples in the files `data`; write a PEFT folder with its card.

    limit: so many triples at most. invocation: text from which on an activated adapter applies. The same call goes on
    with an interrupted run.
    Raises `BadInput`, `DataMissing`, `DataInvalid` (`LabelsSwapped` among them), `AnotherRun`, `Diverged`, or a
    `CheckpointError`.
    """
    recipe, device = recipe or Recipe(rank=128), device or torch.device("cpu")
    if recipe.adapter == "full":
        raise BadInput("a detoxifier is trained as an adapter: lora or alora")
    folder = Folder.begin(out)
    bad: Bad = Skipped() if skip_bad else refuse
    found = read_triples(data, bad)
    training, held = split_triples(found.items[:limit], VALIDATION, recipe.seed)
    backbone = open_backbone(base, device=device, dtype=dtype)
    backbone.run_states_only(normed=True)
    ids = backbone.codec.encode_text(invocation, False) if recipe.adapter == "alora" else []
    chat = str(base) in BUNDLES  # whose models understand nothing else: the engine asks them so, too
    rng = random.Random(f"{recipe.seed} prompts")
    most = min(recipe.max_tokens, backbone.context)
    parts = [[rewriting(backbone, item, rng.random() < 0.5, chat, ids) for item in some] for some in (training, held)]
    targets, measured = ([item for item in some if len(item.tokens) <= most] for some in parts)
    if not targets or not measured:
        raise BadInput(f"no triple has at most {most} tokens with its prompt; max_tokens must be larger")
    backbone = adapt(backbone, recipe, ids)
    before = mean_loss(backbone, measured[:MEASURED])  # a fresh adapter changes nothing
    backbone.model.train()
    trained = train(
        [(trainable(backbone.model), recipe.rate)],
        [len(item.tokens) for item in targets],
        lambda batch: loss_of(backbone, [targets[index] for index in batch]),
        recipe,
        folder.state,
        fingerprint(backbone.content_hash, recipe, targets),
        progress=progress,
        save_seconds=save_seconds,
    )
    backbone.settle()
    card = DetoxifierCard(
        base=str(base),
        recipe=recipe,
        chat=chat,
        invocation=invocation if ids else None,
        triples=len(targets),
        validation=len(measured),
        repeated=found.repeated,
        too_long=sum(map(len, parts)) - len(targets) - len(measured),
        skipped=bad.count if isinstance(bad, Skipped) else 0,
        losses=trained.losses,
        before=before,
        after=mean_loss(backbone, measured[:MEASURED]),
        versions=versions(backbone),
    )
    backbone.save(folder.new)
    folder.finish(card.to_markdown())
    return card


def rewriting(
    backbone: Backbone, triple: Triple, with_question: bool, chat: bool, invocation: Sequence[int]
) -> Target:
    """The harmless answer behind the prompt that the remedy `Detoxify` asks with."""
    segments = rewrite_with_question(triple.question, triple.harmful) if with_question else rewrite(triple.harmful)
    codec = backbone.codec
    if chat:
        prompt = codec.encode_chat(Chat.single(segments_text(segments)))
    else:
        prompt = codec.encode(segments, add_special_tokens=True)
    return target(codec, prompt, triple.harmless, invocation)


def loss_of(backbone: Backbone, targets: Sequence[Target]) -> torch.Tensor:
    """Mean loss a target token."""
    rows = [item.tokens for item in targets]
    active = [item.active_from for item in targets if item.active_from is not None]
    if active:
        return target_loss(backbone.active_states(rows, active), backbone.head, targets, active)
    ids, _ = padded(rows, 0, backbone.device)
    return target_loss(backbone.states(ids), backbone.head, targets)


@torch.no_grad()
def mean_loss(backbone: Backbone, targets: Sequence[Target]) -> float:
    """A target token, over all of them."""
    backbone.model.eval()
    total, tokens = 0.0, 0
    for batch in sorted_batches([len(item.tokens) for item in targets], READ_TOKENS):
        some = [targets[index] for index in batch]
        count = sum(len(item.tokens) - item.target_from for item in some)
        total += float(loss_of(backbone, some)) * count
        tokens += count
    return total / tokens
