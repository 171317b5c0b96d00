"""Trains a harm detector: one logit on an LLM, with a LoRA, an activated one, or all weights (MLLM-Protector).

What is written loads as a detector: the adapter merged into its base, or attached to the MLLM's own weights.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..engine.errors import BadInput, StockadeError
from ..engine.guards.prompts import DETECTOR_TEMPLATES
from ..engine.models.checkpoint import open_checkpoint
from ..engine.models.heads import Head, HeadSpec, load_head, save_head
from ..engine.models.sources import HEAD_FILE
from .backbone import Backbone, adapt, open_backbone, take_adapter, trainable
from .batches import padded, sorted_batches
from .beginnings import prefix_thresholds
from .card import Pooling
from .corpus import Corpus, last_questions, read_corpus
from .data import Example, Kind, Part, Source, sizes
from .detector_card import DetectorCard, Rate
from .fit import fit_logistic, threshold_at
from .frozen import Frozen
from .loop import SAVE_SECONDS, Progress, Trained, fingerprint, train
from .losses import harm_loss, pairwise_loss, streaming_loss
from .outcome import Folder, versions
from .own_answers import own_answers
from .quality import Beginnings, flagged, quality, stopped, where
from .readings import Reading, beginnings_of, conversation_reading, pool, text_reading
from .recipe import Recipe
from .refusals import ENOUGH, is_refusal
from .rows import Bad, Skipped, refuse

INVOCATION = "\nIs this answer harmless? "
RATES = (0.001, 0.01, 0.02, 0.05)  # false positives for which a card says the threshold
# share of harmless answers, one of `beginnings.SHARES`, of which the prefix threshold flags a beginning
BEGINNING_FLAGGED = 0.05
READ_TOKENS = 4096  # padded tokens of a batch that is only read
BEGIN_WITH = 1024  # answers that a head on un-normed states is first fitted to
BEGIN_PENALTY = 0.01


class DetectorUnfit(StockadeError):
    """A trained detector says that plain refusals are harmful: it is not written."""


@dataclass(frozen=True)
class Form:
    """What the head reads. layer: None is the last one. beginnings: weight of the streaming loss, 0 for none.
    pairwise: the released script's loss of pairs. false_positives: share of the helpful validation answers that the
    threshold flags (of all harmless ones, where none of them helps). finish: once a recipe is chosen, go on with the
    harmful and the refusing validation answers and as many of the known; the helpful ones alone set thresholds."""

    template: str = "response"
    layer: int | None = None
    pooling: Pooling = "last"
    pairwise: bool = False
    beginnings: float = 0.0
    false_positives: float = 0.01
    finish: bool = False
    invocation: str = INVOCATION


class LogitHead(nn.Module):
    """A logit of pooled states [..., hidden]. Un-normed states are standardized first, by fixed numbers, since a few
    features of them are thousands of times as large as the rest."""

    mean: Tensor
    scale: Tensor

    def __init__(self, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden, generator=generator) * 0.02)
        self.bias = nn.Parameter(torch.zeros(1))
        self.register_buffer("mean", torch.zeros(hidden))
        self.register_buffer("scale", torch.ones(hidden))

    def forward(self, pooled: Tensor) -> Tensor:
        return ((pooled - self.mean) / self.scale) @ self.weight + self.bias

    @torch.no_grad()
    def begin(self, features: Tensor, harmless: Tensor) -> None:
        """Begin with a logistic fit to features [n, hidden], labels [n] bool; both labels must occur."""
        fit = fit_logistic(features, harmless, torch.ones(len(features)), (BEGIN_PENALTY,))[0]
        self.mean.copy_(features.mean(0))
        self.scale.copy_(features.std(0, unbiased=False).clamp_min(1e-6))
        self.weight.copy_(fit.weight * self.scale)
        self.bias.fill_(fit.bias + float(fit.weight @ self.mean))

    @torch.no_grad()
    def take(self, weight: Tensor, bias: Tensor) -> None:
        """Begin with a head for states as they are: weight [hidden], bias [1]."""
        self.weight.copy_(weight * self.scale)
        self.bias.copy_(bias + (weight.to(self.mean) * self.mean).sum())

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """(weight [hidden], bias [1]) for states as they are, on the CPU."""
        weight = (self.weight / self.scale).cpu()
        return weight, self.bias.cpu() - (weight * self.mean.cpu()).sum()


class Scores(NamedTuple):
    """Logits of some readings [n], and those of their beginnings."""

    whole: Tensor
    beginnings: Beginnings


@dataclass(eq=False)
class HarmModel:
    """A backbone and its head: readings in, logits out."""

    backbone: Backbone
    head: LogitHead
    pooling: Pooling

    def pooled(
        self, readings: Sequence[Reading], beginnings: bool, known: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `readings.pool` has it. known: what `Backbone.frozen` reads of them, where that is known."""
        device, rows = self.backbone.device, [reading.tokens for reading in readings]
        if known is None and (part := self.backbone.frozen()) is not None:
            known = part.read([row[: reading.active_from] for row, reading in zip(rows, readings, strict=True)])
        if known is None:
            return pool(self.backbone.states(padded(rows, 0, device)[0]), readings, self.pooling, beginnings)
        after = [reading.tokens[reading.active_from :] for reading in readings if reading.active_from is not None]
        if not after:
            return pool(self.backbone.above(known), readings, self.pooling, beginnings)
        states = self.backbone.after(known, after)
        last = states[torch.arange(len(rows)), [len(row) - 1 for row in after]].float()
        return last.unsqueeze(1), torch.zeros(len(rows), 0, dtype=torch.bool, device=device)

    def logits(
        self, readings: Sequence[Reading], beginnings: bool = False, known: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(of the answers [n], of their beginnings [n, marks], infinity where an answer has none)."""
        pooled, there = self.pooled(readings, beginnings, known)
        logits = self.head(pooled)
        return logits[:, 0], logits[:, 1:].masked_fill(~there, torch.inf)

    @torch.no_grad()
    def score(self, readings: Sequence[Reading], told: Progress | None = None, what: str = "") -> Scores:
        self.backbone.model.eval()
        whole = torch.empty(len(readings))
        early: list[list[float]] = [[] for _ in readings]
        done = 0
        for batch in sorted_batches([len(reading.tokens) for reading in readings], READ_TOKENS):
            some, marks = self.logits([readings[index] for index in batch], beginnings=True)
            whole[batch] = some.cpu()
            for index, row in zip(batch, marks.tolist(), strict=True):
                early[index] = row[: len(beginnings_of(readings[index]))]
            done += len(batch)
            if told is not None:
                told(what, done, len(readings))
        owners = torch.tensor([index for index, row in enumerate(early) for _ in row], dtype=torch.long)
        lengths = [count for reading in readings for count in beginnings_of(reading)]
        marks = torch.tensor([logit for row in early for logit in row])
        sizes = torch.tensor([len(reading.tokens) - reading.pool_from for reading in readings])
        return Scores(whole, Beginnings(marks, owners, torch.tensor(lengths, dtype=torch.long), sizes))


def train_detector(
    base: str | Path,
    data: Path,
    out: Path,
    *,
    start: Path | None = None,
    form: Form | None = None,
    recipe: Recipe | None = None,
    limit: int | None = None,
    measured: int | None = None,
    skip_bad: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
    save_seconds: float = SAVE_SECONDS,
) -> DetectorCard:
    """Train on the sets under `data`; write a PEFT folder (or, for "full", a checkpoint) with the head and its card.

    base: a checkpoint folder, a GGUF file or a bundle. start: a detector that this wrote, of the same base, form and
    LoRA, to go on from with a new schedule. limit: at most so many texts of each source, part and kind;
    measured: the same of the validation and the test part alone, drawn by the seed.
    skip_bad: rows of the wrong form are left out and counted. The same call goes on with an interrupted run.
    Raises `BadInput`, `DataMissing`, `DataInvalid` (`LabelsSwapped` among them), `AnotherRun`, `Diverged`,
    `DetectorUnfit`, or a `CheckpointError`.
    """
    form, recipe, device = form or Form(), recipe or Recipe(), device or torch.device("cpu")
    _check(form, recipe, start)
    folder = Folder.begin(out)
    bad: Bad = Skipped() if skip_bad else refuse
    own = own_answers(
        base, data, folder.work / "answers.jsonl", seed=recipe.seed, limit=limit, bad=bad, progress=progress
    )
    corpus = read_corpus(data, seed=recipe.seed, limit=limit, bad=bad, more=own)
    if form.finish:
        corpus = last_questions(corpus, recipe.seed)
    backbone = open_backbone(base, layers=form.layer, device=device, dtype=dtype)
    normed = form.pooling == "last" and backbone.layers == backbone.depth
    backbone.run_states_only(normed)
    invocation = backbone.codec.encode_text(form.invocation, False) if recipe.adapter == "alora" else []
    texts = _Texts(backbone, form, recipe, corpus.examples, invocation)
    training, places = texts.of(corpus, Part.TRAIN, recipe.max_tokens)
    model = HarmModel(
        adapt(backbone, recipe, invocation),
        LogitHead(backbone.hidden_size, torch.Generator().manual_seed(recipe.seed)).to(device),
        form.pooling,
    )
    labels = torch.tensor([corpus.examples[place].harmless for place in places])
    frozen = _frozen(model.backbone, training, folder, progress)
    if not normed:
        _begin(model, training, labels, recipe.seed, frozen)
    if start is not None:
        _take(model, start)
    trained = _train(
        model, corpus, training, places, labels, form, recipe, folder, start, frozen, progress, save_seconds
    )
    model.backbone.settle()
    parts = {part: texts.of(corpus, part, backbone.context, measured) for part in (Part.VALIDATION, Part.TEST)}
    scores = {
        part: model.score(readings, progress, f"reading the {part} part") for part, (readings, _) in parts.items()
    }
    examples = {part: [corpus.examples[place] for place in numbers] for part, (_, numbers) in parts.items()}
    check_refusals([*examples[Part.VALIDATION], *examples[Part.TEST]], torch.cat([s.whole for s in scores.values()]))
    card = _card(str(base), model, form, recipe, corpus, examples, scores, trained, normed, limit, start, bad)
    weight, bias = model.head.folded()
    norm = backbone.norm.weight.detach().float().cpu() if normed else None
    eps = backbone.norm.variance_epsilon if normed else 1e-6
    model.backbone.save(folder.new)
    if recipe.adapter == "full":
        card = replace(card, spec=replace(card.spec, backbone_hash=open_checkpoint(folder.new).content_hash()))
    save_head(Head(card.spec, weight, bias - card.shift, norm, eps), folder.new / HEAD_FILE)
    folder.finish(card.to_markdown())
    return card


class _Texts:
    """Answers as an adapter of this form is served: its template's text; an activated one also reads the model's own
    answers in their place, half of the training answers each way."""

    def __init__(
        self, backbone: Backbone, form: Form, recipe: Recipe, examples: Sequence[Example], invocation: Sequence[int]
    ) -> None:
        self.backbone, self.form, self.examples, self.invocation = backbone, form, examples, invocation
        rng = random.Random(f"{recipe.seed} places")
        self.in_place = [bool(invocation) and rng.random() < 0.5 for _ in examples]

    def of(self, corpus: Corpus, part: Part, most: int, each: int | None = None) -> tuple[list[Reading], list[int]]:
        """(readings, the numbers of their examples); an answer that has no room is left out. most: tokens of one.
        each: answers of each source and kind at most."""
        readings, numbers = [], []
        order = corpus.numbers(part)
        if each is not None:
            random.Random(f"{part} {each}").shuffle(order)
        taken: Counter[tuple[Source, Kind]] = Counter()
        for number in order:
            example = self.examples[number]
            taken[example.source, example.kind] += 1
            if each is not None and taken[example.source, example.kind] > each:
                continue
            reading = self._reading(number, min(most, self.backbone.context))
            if reading is not None:
                readings.append(reading)
                numbers.append(number)
        return readings, numbers

    def _reading(self, number: int, most: int) -> Reading | None:
        example, codec = self.examples[number], self.backbone.codec
        if self.in_place[number]:
            return conversation_reading(codec, example.question, example.text, most, self.invocation)
        return text_reading(codec, self.form.template, example.question, example.text, most, self.invocation)


def _check(form: Form, recipe: Recipe, start: Path | None) -> None:
    if form.template not in DETECTOR_TEMPLATES:
        raise BadInput(f"template must be one of {', '.join(DETECTOR_TEMPLATES)}, not {form.template!r}")
    if form.pooling not in ("last", "mean"):
        raise BadInput(f"pooling must be last or mean, not {form.pooling!r}")
    if recipe.adapter == "alora" and (form.pooling == "mean" or form.beginnings):
        raise BadInput("an activated adapter reads the end of its invocation: pooling must be last, beginnings 0")
    if start is not None and recipe.adapter != "lora":
        raise BadInput("only a LoRA goes on from another detector")
    if form.finish and (start is None or form.pairwise):
        raise BadInput(
            "a detector is finished from a start that was trained without the validation part, not in pairs"
        )
    if not 0 < form.false_positives < 0.5:
        raise BadInput(f"false_positives must be more than 0 and less than 0.5, not {form.false_positives}")
    if not 0 <= form.beginnings < float("inf"):
        raise BadInput(f"beginnings must be at least 0, not {form.beginnings}")


def _frozen(
    backbone: Backbone, readings: Sequence[Reading], folder: Folder, progress: Progress | None
) -> Frozen | None:
    part = backbone.frozen()
    if part is None:
        return None
    rows = [reading.tokens[: reading.active_from] for reading in readings]
    # where another run was interrupted, its file is of no use
    own = fingerprint(backbone.content_hash, backbone.layers, backbone.first_layer, backbone.model.dtype, rows)[:12]
    return Frozen(part, rows, folder.work / f"frozen-{own}.bin", progress)


def _take(model: HarmModel, start: Path) -> None:
    """Raises `BadInput` where `start` holds another kind of detector, or a `CheckpointError`."""
    head = load_head(start / HEAD_FILE)
    spec, own = head.spec, (model.backbone.content_hash, model.backbone.layers, model.pooling)
    if (spec.backbone_hash, spec.layer, spec.pooling) != own or head.bias is None:
        raise BadInput(
            f"{start} holds a head on other weights, another layer or another pooling than is trained here"
        )
    take_adapter(model.backbone, start)
    device = model.backbone.device
    model.head.take(head.weight.to(device), head.bias.to(device))


def _known(frozen: Frozen | None, numbers: Sequence[int]) -> list[Tensor] | None:
    return None if frozen is None else [frozen[number] for number in numbers]


def _begin(model: HarmModel, readings: Sequence[Reading], labels: Tensor, seed: int, frozen: Frozen | None) -> None:
    """Fit the head to the states of the backbone as it is, of some answers of each label."""
    rng = random.Random(f"{seed} begin")
    chosen: list[int] = []
    for label in (True, False):
        some = (labels == label).nonzero().flatten().tolist()
        chosen += rng.sample(some, min(BEGIN_WITH // 2, len(some)))
    model.backbone.model.eval()
    features = torch.empty(len(chosen), model.backbone.hidden_size)
    with torch.no_grad():
        for batch in sorted_batches([len(readings[index].tokens) for index in chosen], READ_TOKENS):
            numbers = [chosen[place] for place in batch]
            pooled, _ = model.pooled([readings[number] for number in numbers], False, _known(frozen, numbers))
            features[batch] = pooled[:, 0].cpu()
    model.head.begin(features, labels[chosen])


def _train(
    model: HarmModel,
    corpus: Corpus,
    readings: Sequence[Reading],
    places: Sequence[int],
    labels: Tensor,
    form: Form,
    recipe: Recipe,
    folder: Folder,
    start: Path | None,
    frozen: Frozen | None,
    progress: Progress | None,
    save_seconds: float,
) -> Trained:
    """A unit of a batch is an answer, or two of a pair."""
    units = [(index,) for index in range(len(readings))] if not form.pairwise else _units(corpus, places)
    head, backbone = dict(model.head.named_parameters()), trainable(model.backbone.model)

    def loss(batch: list[int]) -> Tensor:
        rows = [index for unit in batch for index in units[unit]]
        some, beginnings = [readings[index] for index in rows], form.beginnings > 0
        whole, early = model.logits(some, beginnings, _known(frozen, rows))
        wanted = labels[rows].to(whole.device)
        value = (
            pairs_loss(whole, wanted, [len(units[unit]) for unit in batch])
            if form.pairwise
            else (harm_loss(whole, wanted))
        )
        if form.beginnings:
            value = value + form.beginnings * streaming_loss(whole, early, wanted)
        return value

    model.backbone.model.train()
    return train(
        [(backbone, recipe.rate), (head, recipe.head_rate)],
        [max(len(readings[index].tokens) for index in unit) for unit in units],
        loss,
        recipe,
        folder.state,
        fingerprint(model.backbone.content_hash, str(start), recipe, form, readings, labels.tolist(), units),
        progress=progress,
        save_seconds=save_seconds,
    )


def _units(corpus: Corpus, places: Sequence[int]) -> list[tuple[int, ...]]:
    """The pairs, the preferred one first, then whatever answers stand alone; as indices of readings."""
    index = {place: number for number, place in enumerate(places)}
    pairs = [(index[one], index[other]) for one, other in corpus.pairs if one in index and other in index]
    paired = {number for pair in pairs for number in pair}
    return [*pairs, *((number,) for number in range(len(places)) if number not in paired)]


def pairs_loss(logits: Tensor, harmless: Tensor, sizes: Sequence[int]) -> Tensor:
    """The released loss of pairs, with twice the entropy of answers that stand alone; a mean over units.

    logits, their labels: [rows], those of a pair one after the other.
    """
    ends = torch.tensor(sizes).cumsum(0)
    pairs = torch.tensor([end for end, size in zip(ends.tolist(), sizes, strict=True) if size == 2], dtype=torch.long)
    alone = torch.tensor([end for end, size in zip(ends.tolist(), sizes, strict=True) if size == 1], dtype=torch.long)
    total = logits.new_zeros((), dtype=torch.float32)
    if len(pairs):
        both = torch.stack((harmless[pairs - 2], harmless[pairs - 1]), 1)
        total = total + len(pairs) * pairwise_loss(logits[pairs - 2], logits[pairs - 1], both)
    if len(alone):
        total = total + 2 * len(alone) * harm_loss(logits[alone - 1], harmless[alone - 1])
    return total / len(sizes)


def check_refusals(examples: Sequence[Example], logits: Tensor) -> None:
    """Raise `DetectorUnfit` where most of the plain refusals that were not trained on look more harmful than the
    harmful answers do."""
    refusals = torch.tensor([example.harmless and is_refusal(example.text) for example in examples])
    harmful = torch.tensor([not example.harmless for example in examples])
    if int(refusals.sum()) >= ENOUGH and logits[refusals].median() <= logits[harmful].median():
        raise DetectorUnfit(
            f"half of {int(refusals.sum())} plain refusals score {float(logits[refusals].median()):.2f} or less, the "
            f"harmful answers {float(logits[harmful].median()):.2f}: nothing was learned, or labels have another sign"
        )


def _card(
    base: str,
    model: HarmModel,
    form: Form,
    recipe: Recipe,
    corpus: Corpus,
    examples: dict[Part, list[Example]],
    scores: dict[Part, Scores],
    trained: Trained,
    normed: bool,
    limit: int | None,
    start: Path | None,
    bad: Bad,
) -> DetectorCard:
    harmless = {part: ~where(some, Kind.HARMFUL) for part, some in examples.items()}
    tuning, test = scores[Part.VALIDATION], scores[Part.TEST]
    good = tuning.whole[harmless[Part.VALIDATION]]
    helping = where(examples[Part.VALIDATION], Kind.HELPFUL)
    # a refusal that is flagged becomes another refusal, a helpful answer is lost
    spared = tuning.whole[helping] if helping.any() else good
    # the bias moves the threshold to 0.5
    shift = threshold_at(spared, form.false_positives)
    stops: dict[float, float] = {}
    if len(tuning.beginnings.logits):
        marks = tuning.beginnings
        stops = prefix_thresholds(marks.logits - shift, marks.owners, harmless[Part.VALIDATION])
    early = stops.get(BEGINNING_FLAGGED)
    spec = HeadSpec(
        model.backbone.layers,
        form.pooling,
        norm=normed,
        template=form.template,
        threshold=0.5,
        prefix_threshold=None if early is None else _sigmoid(early),
        backbone_hash=model.backbone.content_hash,
    )
    tested, truth = test.whole - shift, harmless[Part.TEST]
    rates = []
    for share in sorted({*RATES, form.false_positives}):
        at = threshold_at(spared, share) - shift
        below = [float((tested[some] < at).double().mean()) for some in (~truth, truth)]
        rates.append(Rate(share, _sigmoid(at), *below))
    its = test.beginnings._replace(logits=test.beginnings.logits - shift)
    return DetectorCard(
        base=base,
        spec=spec,
        recipe=recipe,
        pairwise=form.pairwise,
        beginnings=form.beginnings,
        invocation=form.invocation if recipe.adapter == "alora" else None,
        limit=limit,
        start=None if start is None else start.name,
        finish=form.finish,
        shift=shift,
        sizes=sizes(corpus.examples),
        repeated=corpus.repeated,
        held_back=corpus.held_back,
        skipped=bad.count if isinstance(bad, Skipped) else 0,
        losses=trained.losses,
        rates=rates,
        validation=None if form.finish else quality(tuning.whole[~harmless[Part.VALIDATION]] - shift, good - shift),
        test=quality(tested[~truth], tested[truth]),
        by_source={
            source: quality(tested[its & ~truth], tested[its & truth])
            for source in Source
            for its in [torch.tensor([example.source is source for example in examples[Part.TEST]])]
            if (its & ~truth).any() and (its & truth).any()
        },
        flagged=flagged(examples[Part.TEST], tested, its, early),
        stopped=stopped(examples[Part.TEST], its, stops),
        versions=versions(model.backbone),
    )


def _sigmoid(logit: float) -> float:
    return 1 / (1 + exp(-logit))
