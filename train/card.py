"""The card of a fitted head: what it was fitted on and how well it does, as data and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..engine.models.heads import IN_CONTEXT, HeadSpec
from .data import SETS, Kind, Part, Source
from .features import FIRST_BEGINNING, NEXT_BEGINNING

Pooling = Literal["last", "mean"]

# Of each template: what its head is, what it reads, and what it knows.
READS = {
    "response": ("Harm detector", "the answer alone", "it sees neither the question nor the image"),
    IN_CONTEXT: (
        "Probe",
        "the tokens of the model's own answer, behind its chat prompt",
        "GPTFuzz and JailbreakBench's questions stand in their plain form, without the jailbreak that was put around "
        "them, and the answers are those of other models",
    ),
}


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
    """What the thresholds flag of the test answers of one source and kind.

    share: of whole answers. early: of answers of which a beginning is below the prefix threshold. tokens: where that
    is so, the median length of the shortest such beginning.
    """

    source: Source
    kind: Kind
    answers: int
    share: float
    early: float
    tokens: float | None


class Stopped(NamedTuple):
    """A prefix threshold [P(harmless)] below which `stated` of the harmless answers it was set by have a beginning,
    and what it stops of the test answers. in_time: of the harmful ones, before half of their tokens; the rest: of
    each kind, at any beginning."""

    stated: float
    threshold: float
    in_time: float
    harmful: float
    refusing: float
    helpful: float


@dataclass(frozen=True)
class Card:
    """Everything a user of the head should know. Scores are P(harmless): harmful below `spec.threshold`.

    penalty: L2 weight. limit: of texts of each source, part and kind; None for a full run. train_tokens: to which
    training texts were cut. helpful_weight: of a helpful answer in the fit. helpful_flagged: share of helpful answers
    below the threshold; beginning_flagged: share of harmless ones with a beginning below the prefix threshold.
    candidates: the best penalty of each layer and pooling. unseen: train and validation part together, by fits that
    saw no answer of the same question. judge: fitted on what tests detectors.
    """

    model: str
    spec: HeadSpec
    penalty: float
    seed: int
    limit: int | None
    train_tokens: int
    helpful_weight: float
    helpful_flagged: float
    beginning_flagged: float
    sizes: dict[tuple[Source, Part, Kind], int]
    candidates: list[Candidate]
    unseen: Quality
    test: Quality
    flagged: list[Flagged]
    stopped: list[Stopped]
    versions: str
    judge: bool = False

    def to_markdown(self) -> str:
        spec = self.spec
        limited = (
            "" if self.limit is None else f" A trial run: at most {self.limit} texts of each set, part and kind."
        )
        title, reads, knows = READS[spec.template]
        paragraphs = [
            f"# {'Judge' if self.judge else title} on {self.model}",
            *self._judge(),
            f"One logit on the {spec.pooling} hidden state after layer {spec.layer} of the frozen model, over "
            f"{reads} (template `{spec.template}`). The score is P(harmless); an answer is harmful when its "
            f"score is below {spec.threshold:g}. The bias was set so that {self.helpful_flagged:.2%} of the helpful "
            "answers, scored by fits that saw no answer to the same question, fall below it: the score ranks, it is "
            f"no calibrated probability.{limited}",
            *self._beginnings(),
            f"A small probe on a small model, no substitute for a trained guard model. It knows English answers of "
            f"chat models; {knows}; it was not tested on answers written to deceive it; and it clears nearly every "
            "text of a few tokens, whatever that says.",
            "## Data",
            data_table(self.sizes),
            "A text counts once, in the first part it appears in; case and white space make no difference. Split by "
            "question (GPTFuzz, AlpacaEval, XSTest) and by behavior (JailbreakBench), never by answer; seed "
            f"{self.seed}. {self._gptfuzz()} Training texts are cut to {self.train_tokens} tokens; all others are "
            f"whole. In the fit a helpful answer counts {self.helpful_weight:g} times. The answers to XSTest's safe "
            "prompts, which look alarming and are not, are the model's own, greedy, and nobody checked them.",
            "## Quality",
            "Harmful against refusing answers of GPTFuzz:",
            self._quality(),
            "Flagged in the test part (of the harmful answers all should be, of the others none): whole answers at "
            "the threshold; answers of which some beginning is below the prefix threshold; and the median length of "
            "the first such beginning.",
            table(
                ("kind of answer", "set", "answers", "flagged", "a beginning is", "after tokens"),
                [
                    (row.kind, row.source, row.answers, f"{row.share:.1%}", f"{row.early:.1%}", _count(row.tokens))
                    for row in self.flagged
                ],
            ),
            *stopped_table("harmless answers, scored by fits that saw no answer to the same question", self.stopped),
            "## Choice",
            "AUROC of harmful against all harmless answers in the validation part after a fit on the training part, "
            f"for the best L2 penalty of each. Chosen: layer {spec.layer}, {spec.pooling}, {self.penalty:g}: the "
            "lowest layer that is as good as the best. The head was then fitted on both parts.",
            table(
                ("layer", "pooling", "penalty", "AUROC"),
                [(c.layer, c.pooling, f"{c.penalty:g}", f"{c.auroc:.4f}") for c in self.candidates],
            ),
            f"Made by `stockade train probe --template {spec.template}{self._option()}` with {self.versions}. "
            f"Backbone: `{spec.backbone_hash}`.",
        ]
        return "\n\n".join(paragraphs) + "\n"

    def _judge(self) -> list[str]:
        if not self.judge:
            return []
        return [
            "It judges what guards let through. What tests this project's detectors trained it, and what trained and "
            "validated them tests it, so that it shares no question and no answer with them; but it reads the same "
            "model's states as they do, and may err where they err."
        ]

    def _option(self) -> str:
        return " --judge" if self.judge else ""

    def _gptfuzz(self) -> str:
        where = "published evaluation file without the texts that also stand in the training file."
        if self.judge:
            return f"GPTFuzz's training and validation part is its {where}"
        return f"GPTFuzz's test part is its {where}"

    def _beginnings(self) -> list[str]:
        threshold = self.spec.prefix_threshold
        if threshold is None:
            return []
        return [
            f"A beginning of an answer that is still being written is harmful below {threshold:.4f}, the prefix "
            f"threshold: {self.beginning_flagged:.1%} of the harmless answers, scored by fits that saw no answer to "
            f"the same question, have a beginning below it, of {FIRST_BEGINNING} tokens, {NEXT_BEGINNING} more, and "
            "so on."
        ]

    def _quality(self) -> str:
        rows: list[tuple[object, ...]] = []
        for where, quality in (("train and validation, out of fold", self.unseen), ("test", self.test)):
            shares = (f"{share:.3f}" for share in (quality.tpr_at_1, quality.tpr_at_5, quality.tpr))
            rows.append((where, quality.harmful, quality.harmless, f"{quality.auroc:.4f}", *shares))
        head = ("part", "harmful", "harmless", "AUROC", "TPR at 1 % FPR", "TPR at 5 % FPR", "TPR at the threshold")
        return table(head, rows)


def _count(tokens: float | None) -> str:
    return "" if tokens is None else f"{tokens:.0f}"


def stopped_table(whose: str, rows: Sequence[Stopped]) -> list[str]:
    """What is stopped while it is written, where there are prefix thresholds."""
    if not rows:
        return []
    return [
        f"Prefix thresholds for stated shares of {whose}, that have a beginning below them; of the test part's "
        "answers, those stopped before half of their tokens, and at any beginning:",
        table(
            ("stated", "threshold", "harmful, in their first half", *(f"{kind}, ever" for kind in Kind)),
            [(f"{row.stated:.0%}", f"{row.threshold:.4f}", *(f"{share:.1%}" for share in row[2:])) for row in rows],
        ),
    ]


def data_table(sizes: dict[tuple[Source, Part, Kind], int]) -> str:
    """How many answers of each set and kind are in each part, and where they are from."""
    rows: list[tuple[object, ...]] = []
    for source, kind in sorted({(source, kind) for source, _, kind in sizes}):
        counts = [sizes.get((source, part, kind), 0) for part in Part]
        rows.append((source, kind, *counts, SETS[source].license, SETS[source].origin))
    return table(("set", "kind of answer", *Part, "license", "from"), rows)


def table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
