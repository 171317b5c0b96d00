"""Fits the heads that `smol` brings, detector, probe and judge: one logit on hidden states of the frozen model.

The model itself is not trained. Layer, pooling and penalty are chosen on the validation part. The head is then fitted
on both parts, with its thresholds from scores of folds it did not see; the test part is looked at once, for the card.
"""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Callable, Sequence
from math import exp
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..engine.errors import BadInput, CacheWriteFailed
from ..engine.models.bundles import smol_folder
from ..engine.models.heads import IN_CONTEXT, Head, HeadSpec, save_head
from ..engine.models.loader import load_models
from ..engine.models.model import Model
from ..engine.models.sources import BUNDLES
from .answered import answered
from .beginnings import prefix_thresholds
from .card import Candidate, Card, Pooling, Quality
from .data import Example, Kind, Part, Source, exchanged, read_examples, read_questions, sizes, unique
from .features import Features, passage, pooled_states
from .fit import Fit, auroc, fit_logistic, threshold_at
from .quality import Beginnings, flagged, quality, stopped, where
from .rows import DataInvalid
from .sample import Sample

Progress = Callable[[str, int, int], None]
"""(what is under way, how much is done, how much there is)."""

TRAIN_TOKENS = 256  # of a training text; validation and test texts are whole, as served
PENALTIES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)  # L2, on standardized features; strongest first
HELPFUL_WEIGHT = 6.0  # of a helpful answer in the fit, a refusing or harmful one counts 1
HELPFUL_FLAGGED = 0.0125  # share of helpful answers that the threshold flags
# Share of harmless answers, one of `beginnings.SHARES`, of which the prefix threshold flags a beginning. What is
# held back is shown a moment later; what was shown cannot be taken back.
BEGINNING_FLAGGED = 0.1
TIE = 0.001  # of AUROC: within it the lowest layer wins, since the detector runs no further than that
FOLDS = 5  # of the final fit, for its thresholds
POOLINGS: dict[str, tuple[Pooling, ...]] = {"response": ("last", "mean"), IN_CONTEXT: ("mean",)}  # by template


def fit_probe(
    data: Path,
    out: Path,
    *,
    model: str | Path = "smol",
    template: str = "response",
    layers: Sequence[int] | None = None,
    seed: int = 0,
    limit: int | None = None,
    judge: bool = False,
    progress: Progress | None = None,
) -> Card:
    """Fit a head on the answers under `data` and write it to `out`, its card beside it as Markdown.

    model: "smol", or a checkpoint folder whose head it becomes. template: "response" for a detector, which reads the
    answer's text alone; "context" for a probe, which reads the answer's tokens as the model itself has them, behind
    its prompt. layers: to choose from, those of a probe below the last; None takes every other one of the model's
    middle third. seed: of the split. limit: at most so many texts of each source, part and kind. judge: train on
    what tests detectors, and test on what trains them.
    The same data, model, seed and machine give the same head.
    Raises `DataMissing`, `DataInvalid`, `BadInput`, or a `CheckpointError`.
    """
    data, out = Path(data), Path(out)
    if out.suffix != ".safetensors" or out.is_dir():
        raise BadInput(f"a head is written to a file that ends in .safetensors, not to {out}")
    if limit is not None and limit < 1:
        raise BadInput(f"limit must be at least 1, not {limit}")
    if template not in POOLINGS:
        raise BadInput(f"a head is fitted on one of the templates {', '.join(POOLINGS)}, not on {template!r}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{out.parent} cannot be made a folder: {error}") from None
    if judge and template == IN_CONTEXT:
        raise BadInput(f"a judge reads the answers of any model: it is fitted on response, not on {template}")
    examples = read_examples(data, seed=seed, limit=limit)
    questions = read_questions(data, seed=seed, limit=limit)
    _check(exchanged(examples, seed) if judge else examples)
    models = load_models(smol_folder() if str(model) in BUNDLES else model)
    base = models.models["mllm"]
    chosen = _layers(layers, base.depth, template)
    examples = unique([*examples, *answered(models, questions, progress)])
    if judge:
        examples = exchanged(examples, seed)
    parts = {part: [example for example in examples if example.part is part] for part in Part}
    features = {part: _features(base, template, part, some, chosen, progress) for part, some in parts.items()}
    samples = {
        (layer, pooling): {part: Sample.of(parts[part], features[part], layer, pooling) for part in Part}
        for layer in chosen
        for pooling in POOLINGS[template]
    }
    candidates = _candidates(samples, progress)
    layer, pooling, penalty, _ = choose(candidates)
    sample = samples[layer, pooling]
    fitted = sample[Part.TRAIN] + sample[Part.VALIDATION]
    fit = _fit(fitted, (penalty,))[0]
    unseen, unseen_beginnings = _out_of_fold(fitted, penalty, seed)
    # The bias moves the threshold to 0.5: the score at which the allowed share of helpful answers is flagged.
    shift = threshold_at(unseen[where(fitted.examples, Kind.HELPFUL)], HELPFUL_FLAGGED)
    fit = Fit(fit.weight, fit.bias - shift)
    early: dict[float, float] = {}
    if pooling == "mean":
        early = prefix_thresholds(unseen_beginnings - shift, fitted.owners, fitted.harmless)
    prefix = early.get(BEGINNING_FLAGGED)
    spec = HeadSpec(
        layer,
        pooling,
        template=template,
        threshold=0.5,
        prefix_threshold=None if prefix is None else _sigmoid(prefix),
        backbone_hash=base.backbone.content_hash,
    )
    head = Head(spec, fit.weight, torch.tensor([fit.bias], dtype=torch.float32))
    test = sample[Part.TEST]
    logits, beginnings = fit.logits(test.states), fit.logits(test.beginnings)
    marks = Beginnings(beginnings, test.owners, test.lengths, test.sizes)
    card = Card(
        model=str(model) if str(model) in BUNDLES else Path(model).name,
        spec=spec,
        penalty=penalty,
        seed=seed,
        limit=limit,
        train_tokens=TRAIN_TOKENS,
        helpful_weight=HELPFUL_WEIGHT,
        helpful_flagged=HELPFUL_FLAGGED,
        beginning_flagged=BEGINNING_FLAGGED,
        sizes=sizes(examples),
        candidates=_best_of_each(candidates),
        unseen=_of_gptfuzz(fitted.examples, unseen - shift),
        test=_of_gptfuzz(test.examples, logits),
        flagged=flagged(test.examples, logits, marks, prefix),
        stopped=stopped(test.examples, marks, early),
        versions=_versions(base),
        judge=judge,
    )
    _write(head, card, out)
    return card


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The best on the lowest layer that reaches the best AUROC of all, less `TIE`."""
    enough = max(candidate.auroc for candidate in candidates) - TIE
    return min(
        (candidate for candidate in candidates if candidate.auroc >= enough),
        key=lambda candidate: (candidate.layer, -candidate.auroc),
    )


def _layers(layers: Sequence[int] | None, depth: int, template: str) -> list[int]:
    """A probe's layer lies below the last: its answers' last tokens run no further than that."""
    last = depth - 1 if template == IN_CONTEXT else depth
    if layers is None:
        return sorted({min(last, max(1, depth * part // 15)) for part in range(5, 11)})
    wrong = [layer for layer in layers if not 1 <= layer <= last]
    if wrong or not layers:
        raise BadInput(f"layers must be some of 1 to {last}, the model's own, not {list(layers)}")
    return sorted(set(layers))


def _check(examples: Sequence[Example]) -> None:
    """Every part needs both labels, and those that set and test the threshold need helpful answers."""
    counts = sizes(examples)
    for part in Part:
        for source, kind in (
            (Source.GPTFUZZ, Kind.HARMFUL),
            (Source.GPTFUZZ, Kind.REFUSING),
            (Source.ALPACA_EVAL, Kind.HELPFUL),
        ):
            if not counts.get((source, part, kind)):
                raise DataInvalid(f"no {kind} answer of {source} is left for the {part} part; more data is needed")


def _features(
    model: Model,
    template: str,
    part: Part,
    examples: Sequence[Example],
    layers: Sequence[int],
    progress: Progress | None,
) -> Features:
    def told(done: int, of: int) -> None:
        if progress is not None:
            progress(f"reading the {part} part", done, of)

    limit = TRAIN_TOKENS if part is Part.TRAIN else None
    passages = [passage(model, template, example.question, example.text, limit) for example in examples]
    return pooled_states(model, passages, layers, progress=told)


def _fit(sample: Sample, penalties: Sequence[float]) -> list[Fit]:
    """Of whole answers alone: with their beginnings in it, weighted, a fit told beginnings apart better on the whole
    (AUROC 0.94 for 0.92), but at the prefix threshold it found fewer of the harmful answers (40 % for 47 %)."""
    counts = torch.ones(len(sample.examples))
    counts[where(sample.examples, Kind.HELPFUL)] = HELPFUL_WEIGHT
    return fit_logistic(sample.states, sample.harmless, counts, penalties)


def _candidates(samples: dict[tuple[int, Pooling], dict[Part, Sample]], progress: Progress | None) -> list[Candidate]:
    """Every layer, pooling and penalty, fitted on the training part and measured on the validation part."""
    candidates = []
    for done, ((layer, pooling), sample) in enumerate(samples.items(), 1):
        fits = _fit(sample[Part.TRAIN], PENALTIES)
        harmless = sample[Part.VALIDATION].harmless
        for penalty, fit in zip(PENALTIES, fits, strict=True):
            logits = fit.logits(sample[Part.VALIDATION].states)
            candidates.append(Candidate(layer, pooling, penalty, auroc(logits[harmless], logits[~harmless])))
        if progress is not None:
            progress("fitting", done, len(samples))
    return candidates


def _out_of_fold(sample: Sample, penalty: float, seed: int) -> tuple[Tensor, Tensor]:
    """Logits of the answers [answers] and of their beginnings [beginnings], by fits that saw none of their groups."""
    groups = sorted({(example.source, example.group) for example in sample.examples})
    random.Random(f"{seed} folds").shuffle(groups)
    folds = {group: number % FOLDS for number, group in enumerate(groups)}
    fold = torch.tensor([folds[example.source, example.group] for example in sample.examples])
    fold_of_beginning = fold[sample.owners]
    logits, beginnings = torch.empty(len(fold)), torch.empty(len(fold_of_beginning))
    for number in range(FOLDS):
        fit = _fit(sample.only(fold != number), (penalty,))[0]
        logits[fold == number] = fit.logits(sample.states[fold == number])
        beginnings[fold_of_beginning == number] = fit.logits(sample.beginnings[fold_of_beginning == number])
    return logits, beginnings


def _best_of_each(candidates: Sequence[Candidate]) -> list[Candidate]:
    best: dict[tuple[int, str], Candidate] = {}
    for candidate in candidates:
        key = (candidate.layer, candidate.pooling)
        best[key] = max(best.get(key, candidate), candidate, key=lambda item: item.auroc)
    return list(best.values())


def _of_gptfuzz(examples: Sequence[Example], logits: Tensor) -> Quality:
    """Of GPTFuzz alone, the set that others report."""
    kinds = (Kind.HARMFUL, Kind.REFUSING)
    return quality(*(logits[where(examples, kind, Source.GPTFUZZ)] for kind in kinds))


def _sigmoid(logit: float) -> float:
    return 1 / (1 + exp(-logit))


def _versions(model: Model) -> str:
    dtype = str(model.backbone.decoder.dtype).removeprefix("torch.")
    return f"torch {torch.__version__}, {dtype} on {model.backbone.decoder.device.type} ({platform.machine()})"


def _write(head: Head, card: Card, out: Path) -> None:
    """Both files appear whole or not at all."""
    part = out.with_name(f".{out.name}.part")
    try:
        trained_on = Part.TEST if card.judge else Part.TRAIN
        save_head(head, part, license="Apache-2.0", card=out.with_suffix(".md").name, trained_on=trained_on)
        os.replace(part, out)
        part.write_text(card.to_markdown(), encoding="utf-8")
        os.replace(part, out.with_suffix(".md"))
    except (OSError, SafetensorError) as error:
        raise CacheWriteFailed(f"{out} could not be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)
