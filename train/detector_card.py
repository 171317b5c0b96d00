"""The card of a trained detector: what it was trained on, how, and how well it does, as data and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..engine.models.heads import HeadSpec
from .card import Flagged, Quality, Stopped, data_table, stopped_table, table
from .data import Kind, Part, Source
from .recipe import Recipe

HOW = {"lora": "a LoRA", "alora": "an activated LoRA", "full": "all weights trained"}


class Rate(NamedTuple):
    """A threshold [P(harmless)] that flags `stated` of the helpful validation answers, and what it flags of the test
    part's harmful and harmless ones."""

    stated: float
    threshold: float
    harmful: float
    harmless: float


@dataclass(frozen=True)
class DetectorCard:
    """shift: of the logit, so that the threshold is 0.5. repeated, held_back: see `Corpus`. skipped: rows of the
    wrong form. losses: of each step. limit: of texts of each source, part and kind; None for a full run. start: the
    detector that the run went on from; finish: as `Form` has it, `validation` is None then. by_source: of the test
    part, where a set has both labels."""

    base: str
    spec: HeadSpec
    recipe: Recipe
    pairwise: bool
    beginnings: float
    invocation: str | None
    limit: int | None
    start: str | None
    finish: bool
    shift: float
    sizes: dict[tuple[Source, Part, Kind], int]
    repeated: int
    held_back: int
    skipped: int
    losses: list[float]
    rates: list[Rate]
    validation: Quality | None
    test: Quality
    by_source: dict[Source, Quality]
    flagged: list[Flagged]
    stopped: list[Stopped]
    versions: str

    def to_markdown(self) -> str:
        spec, recipe = self.spec, self.recipe
        parts = [
            f"# Harm detector on {self.base}",
            self._what(),
            "## Data",
            data_table(self.sizes),
            "A text counts once; case and white space make no difference. Split by question and behavior, never by "
            f"answer; seed {recipe.seed}. Left out: {self.repeated} repeated texts, {self.held_back} training "
            f"answers to questions that measure elsewhere, {self.skipped} rows of the wrong form. Training texts are "
            f"cut to {recipe.max_tokens} tokens; all others are whole.",
            "## Training",
            self._how(),
            "## Quality",
            table(
                ("part", "harmful", "harmless", "AUROC", "TPR at 1 % FPR", "TPR at 5 % FPR", "TPR at the threshold"),
                [
                    *([] if self.validation is None else [_row("validation", self.validation)]),
                    _row("test", self.test),
                    *(_row(f"test, {source}", quality) for source, quality in self.by_source.items()),
                ],
            ),
            "Thresholds for stated shares of helpful validation answers, and what they flag of the test part:",
            table(
                ("stated", "threshold", "harmful flagged", "harmless flagged"),
                [(f"{a:.1%}", f"{at:.4f}", f"{bad:.1%}", f"{good:.1%}") for a, at, bad, good in self.rates],
            ),
            "Flagged in the test part at the threshold, and answers with a beginning below the prefix threshold:",
            table(
                ("kind of answer", "set", "answers", "flagged", "a beginning is"),
                [(r.kind, r.source, r.answers, f"{r.share:.1%}", f"{r.early:.1%}") for r in self.flagged],
            ),
            *stopped_table("harmless validation answers", self.stopped),
            f"Made by `stockade train detector` with {self.versions}. Backbone: `{spec.backbone_hash}`.",
        ]
        return "\n\n".join(parts) + "\n"

    def _what(self) -> str:
        spec, recipe = self.spec, self.recipe
        lora = (
            f", rank {recipe.rank}, alpha {recipe.alpha}, dropout {recipe.dropout:g} on {', '.join(recipe.targets)}"
            + (f" from layer {recipe.first_layer} on" if recipe.first_layer else "")
        )
        load = {
            "lora": "Load it as `ADAPTER,BASE` (merged into weights of its own) or `attach:ADAPTER` (on the MLLM's).",
            "alora": f"Load it as `attach:ADAPTER`; it applies from its invocation {self.invocation!r} on.",
            "full": "Load it as a checkpoint folder.",
        }
        early = "is never judged" if spec.prefix_threshold is None else f"below {spec.prefix_threshold:.4f}"
        limited = "" if self.limit is None else f" A trial run: at most {self.limit} texts of each kind."
        return (
            f"One logit on the {'normed ' if spec.norm else ''}{spec.pooling} hidden state after layer {spec.layer}, "
            f"with {HOW[recipe.adapter]}{'' if recipe.adapter == 'full' else lora}. {load[recipe.adapter]} It reads "
            f"the template `{spec.template}`; the score is P(harmless); harmful is below {spec.threshold:g}, a "
            f"beginning of an answer {early}.{limited}"
        )

    def _how(self) -> str:
        recipe, tenth = self.recipe, max(1, len(self.losses) // 10)
        first, last = (sum(some) / tenth for some in (self.losses[:tenth], self.losses[-tenth:]))
        loss = "The released script's loss of pairs" if self.pairwise else "Binary cross entropy"
        if self.beginnings:
            loss += f" and {self.beginnings:g} times that of the lowest score of any beginning"
        if self.start is not None:
            loss = f"Goes on from {self.start}, which had a training part of its own. {loss}"
        if self.finish:
            loss = (
                "The recipe was chosen by the validation part; its harmful and refusing answers are in the training "
                f"part now, with as many that were there before, and its helpful ones set the thresholds. {loss}"
            )
        return (
            f"{loss}; AdamW, rate {recipe.rate:g} (head {recipe.head_rate:g}), {recipe.epochs} epochs, "
            f"{recipe.batch} a batch, {len(self.losses)} steps; the loss fell from {first:.3f} to {last:.3f} (means "
            "of the first and last tenth)."
        )


def _row(name: str, quality: Quality) -> tuple[object, ...]:
    shares = (f"{share:.3f}" for share in (quality.tpr_at_1, quality.tpr_at_5, quality.tpr))
    return (name, quality.harmful, quality.harmless, f"{quality.auroc:.4f}", *shares)
