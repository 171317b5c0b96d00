"""The card of a fitted head: what it was fitted on and how well it does, as data and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..engine.models.heads import HeadSpec
from .data import SETS, Kind, Part, Source

Pooling = Literal["last", "mean"]


class Candidate(NamedTuple):
    """A setting that was tried: `auroc` is of harmful against all harmless validation answers."""

    layer: int
    pooling: Pooling
    penalty: float
    auroc: float


class Quality(NamedTuple):
    """Harmful against refusing GPTFuzz answers: AUROC, share of the harmful caught at 1 % and 5 % false alarms, and
    at the threshold."""

    harmful: int
    harmless: int
    auroc: float
    tpr_at_1: float
    tpr_at_5: float
    tpr: float


class Flagged(NamedTuple):
    """How many test answers of one source and kind the threshold flags."""

    source: Source
    kind: Kind
    answers: int
    share: float


@dataclass(frozen=True)
class Card:
    """Everything a user of the head should know. Scores are P(harmless): harmful below `spec.threshold`.

    penalty: L2 weight. limit: of texts of each source, part and kind; None for a full run. train_tokens: to which
    training texts were cut. helpful_weight: of a helpful answer in the fit. helpful_flagged: share of them below the
    threshold. candidates: the best penalty of each layer and pooling. unseen: train and validation part together, by
    fits that saw no answer of the same question. seconds: of the whole command.
    """

    model: str
    spec: HeadSpec
    penalty: float
    seed: int
    limit: int | None
    train_tokens: int
    helpful_weight: float
    helpful_flagged: float
    sizes: dict[tuple[Source, Part, Kind], int]
    candidates: list[Candidate]
    unseen: Quality
    test: Quality
    flagged: list[Flagged]
    versions: str
    seconds: float

    def to_markdown(self) -> str:
        spec = self.spec
        limited = (
            "" if self.limit is None else f" A trial run: at most {self.limit} texts of each set, part and kind."
        )
        paragraphs = [
            f"# Harm detector on {self.model}",
            f"One logit on the {spec.pooling} hidden state after layer {spec.layer} of the frozen model, over the "
            f"answer alone (template `{spec.template}`). The score is P(harmless); an answer is harmful when its "
            f"score is below {spec.threshold:g}. The bias was set so that {self.helpful_flagged:.2%} of the helpful "
            "answers, scored by fits that saw no answer to the same question, fall below it: the score ranks, it is "
            f"no calibrated probability.{limited}",
            "A small probe on a small model, no substitute for a trained guard model. It knows English answers of "
            "chat models; it sees neither the question nor the image; it was not tested on answers written to "
            "deceive it; and it clears nearly every text of a few tokens, whatever that says.",
            "## Data",
            self._data(),
            "A text counts once, in the first part it appears in; case and white space make no difference. Split by "
            f"question (GPTFuzz, AlpacaEval) and by behavior (JailbreakBench), never by answer; seed {self.seed}. "
            "GPTFuzz's test part is its published evaluation file without the texts that also stand in the training "
            f"file. Training texts are cut to {self.train_tokens} tokens; all others are whole. In the fit a helpful "
            f"answer counts {self.helpful_weight:g} times.",
            "## Quality",
            "Harmful against refusing answers of GPTFuzz:",
            self._quality(),
            "Flagged at the threshold in the test part (of the harmful answers all should be, of the others none):",
            _table(
                ("kind of answer", "set", "answers", "flagged"),
                [(row.kind, row.source, row.answers, f"{row.share:.1%}") for row in self.flagged],
            ),
            "## Choice",
            "AUROC of harmful against all harmless answers in the validation part after a fit on the training part, "
            f"for the best L2 penalty of each. Chosen: layer {spec.layer}, {spec.pooling}, {self.penalty:g}: the "
            "lowest layer that is as good as the best. The head was then fitted on both parts.",
            _table(
                ("layer", "pooling", "penalty", "AUROC"),
                [(c.layer, c.pooling, f"{c.penalty:g}", f"{c.auroc:.4f}") for c in self.candidates],
            ),
            f"Made by `stockade train probe` with {self.versions}. Backbone: `{spec.backbone_hash}`.",
        ]
        return "\n\n".join(paragraphs) + "\n"

    def _data(self) -> str:
        rows: list[tuple[object, ...]] = []
        for source, kind in sorted({(source, kind) for source, _, kind in self.sizes}):
            counts = [self.sizes.get((source, part, kind), 0) for part in Part]
            rows.append((source, kind, *counts, SETS[source].license, SETS[source].origin))
        return _table(("set", "kind of answer", *Part, "license", "from"), rows)

    def _quality(self) -> str:
        rows: list[tuple[object, ...]] = []
        for where, quality in (("train and validation, out of fold", self.unseen), ("test", self.test)):
            shares = (f"{share:.3f}" for share in (quality.tpr_at_1, quality.tpr_at_5, quality.tpr))
            rows.append((where, quality.harmful, quality.harmless, f"{quality.auroc:.4f}", *shares))
        head = ("part", "harmful", "harmless", "AUROC", "TPR at 1 % FPR", "TPR at 5 % FPR", "TPR at the threshold")
        return _table(head, rows)


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
