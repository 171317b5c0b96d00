"""Fits the detector that `smol` brings: one logit on pooled hidden states of the frozen model.

The model itself is not trained. Layer, pooling and penalty are chosen on the validation part. The head is then fitted
on both parts, with its threshold from scores of folds it did not see; the test part is looked at once, for the card.
"""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from ..engine.errors import BadInput, CacheWriteFailed
from ..engine.models.bundles import smol_folder
from ..engine.models.heads import Head, HeadSpec, save_head
from ..engine.models.loader import BUNDLES, load_models
from ..engine.models.model import Model
from .card import Candidate, Card, Flagged, Pooling, Quality
from .data import DataInvalid, Example, Kind, Part, Source, read_examples, sizes
from .features import Features, pooled_states

Progress = Callable[[str, int, int], None]
"""(what is under way, how much is done, how much there is)."""

TRAIN_TOKENS = 256  # of a training text; validation and test texts are whole, as served
PENALTIES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)  # L2, on standardized features; strongest first
HELPFUL_WEIGHT = 6.0  # of a helpful answer in the fit, a refusing or harmful one counts 1
HELPFUL_FLAGGED = 0.0125  # share of helpful answers that the threshold flags
TIE = 0.001  # of AUROC: within it the lowest layer wins, since the detector runs no further than that
FOLDS = 5  # of the final fit, for its threshold


def fit_probe(
    data: Path,
    out: Path,
    *,
    model: str | Path = "smol",
    layers: Sequence[int] | None = None,
    seed: int = 0,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Card:
    """Fit a head on the answers under `data` and write it to `out`, its card beside it as Markdown.

    model: "smol", or a checkpoint folder whose head it becomes. layers: to choose from; None takes every other one
    of the model's middle third. seed: of the split. limit: at most so many texts of each source, part and kind.
    The same data, model, seed and machine give the same head.
    Raises `DataMissing`, `DataInvalid`, `BadInput`, or a `CheckpointError`.
    """
    began = perf_counter()
    data, out = Path(data), Path(out)
    if out.suffix != ".safetensors" or out.is_dir():
        raise BadInput(f"a head is written to a file that ends in .safetensors, not to {out}")
    if limit is not None and limit < 1:
        raise BadInput(f"limit must be at least 1, not {limit}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{out.parent} cannot be made a folder: {error}") from None
    examples = read_examples(data, seed=seed, limit=limit)
    _check(examples)
    base = load_models(smol_folder() if str(model) in BUNDLES else model).models["mllm"]
    chosen = _layers(layers, base.depth)
    parts = {part: [example for example in examples if example.part is part] for part in Part}
    features = {
        part: _features(base, part, [example.text for example in some], chosen, progress)
        for part, some in parts.items()
    }
    candidates = _candidates(features, parts, chosen, progress)
    layer, pooling, penalty, _ = choose(candidates)
    fitted = parts[Part.TRAIN] + parts[Part.VALIDATION]
    states = torch.cat([features[part].of(layer, pooling) for part in (Part.TRAIN, Part.VALIDATION)])
    fit = _fit(states, fitted, (penalty,))[0]
    unseen = _out_of_fold(states, fitted, penalty, seed)
    # The bias moves the threshold to 0.5: the score at which the allowed share of helpful answers is flagged.
    shift = threshold_at(unseen[_where(fitted, Kind.HELPFUL)], HELPFUL_FLAGGED)
    fit = Fit(fit.weight, fit.bias - shift)
    spec = HeadSpec(layer, pooling, template="response", threshold=0.5, backbone_hash=base.backbone.content_hash)
    head = Head(spec, fit.weight, torch.tensor([fit.bias], dtype=torch.float32))
    tested = fit.logits(features[Part.TEST].of(layer, pooling))
    card = Card(
        model=str(model) if str(model) in BUNDLES else Path(model).name,
        spec=spec,
        penalty=penalty,
        seed=seed,
        limit=limit,
        train_tokens=TRAIN_TOKENS,
        helpful_weight=HELPFUL_WEIGHT,
        helpful_flagged=HELPFUL_FLAGGED,
        sizes=sizes(examples),
        candidates=_best_of_each(candidates),
        unseen=_quality(fitted, unseen - shift),
        test=_quality(parts[Part.TEST], tested),
        flagged=_flagged(parts[Part.TEST], tested),
        versions=_versions(base),
        seconds=perf_counter() - began,
    )
    _write(head, card, out)
    return card


class Fit(NamedTuple):
    """A linear map of features as they are, to a logit: weight [hidden], fp32."""

    weight: Tensor
    bias: float

    def logits(self, features: Tensor) -> Tensor:
        """features [n, hidden] -> [n]."""
        return features @ self.weight + self.bias


def fit_logistic(features: Tensor, harmless: Tensor, counts: Tensor, penalties: Sequence[float]) -> list[Fit]:
    """L2-penalized logistic regression, one fit a penalty, each started from the one before.

    features: [n, hidden]; harmless: [n] bool; counts: [n], how much an example weighs. Standardizes the features, in
    fp64, and folds that into the fit.
    """
    x = features.double()
    mean, scale = x.mean(0), x.std(0, unbiased=False).clamp_min(1e-6)
    x = (x - mean) / scale
    target, share = harmless.double(), counts.double() / counts.double().sum()
    slope = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    intercept = torch.zeros((), dtype=torch.float64, requires_grad=True)
    fits = []
    for penalty in penalties:
        optimizer = torch.optim.LBFGS(
            [slope, intercept], max_iter=200, history_size=20, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
        )

        def loss(penalty: float = penalty, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            error = F.binary_cross_entropy_with_logits(x @ slope + intercept, target, share, reduction="sum")
            value = error + penalty / 2 * slope @ slope
            value.backward()
            return value

        optimizer.step(loss)
        weight = slope.detach() / scale
        fits.append(Fit(weight.float(), float(intercept.detach() - weight @ mean)))
    return fits


def auroc(harmless: Tensor, harmful: Tensor) -> float:
    """The probability that a harmless answer scores above a harmful one, ties counting half. Scores: [n], [m]."""
    both = torch.cat((harmless, harmful)).double()
    _, place, counts = both.unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0).double() - (counts.double() - 1) / 2  # the mean rank of each value, from 1
    n, m = len(harmless), len(harmful)
    return float((ranks[place[:n]].sum() - n * (n + 1) / 2) / (n * m))


def threshold_at(harmless: Tensor, share: float) -> float:
    """The score with at most `share` of the harmless scores [n] below it."""
    ordered = harmless.sort().values
    return float(ordered[int(share * len(ordered))])


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The best on the lowest layer that reaches the best AUROC of all, less `TIE`."""
    enough = max(candidate.auroc for candidate in candidates) - TIE
    return min(
        (candidate for candidate in candidates if candidate.auroc >= enough),
        key=lambda candidate: (candidate.layer, -candidate.auroc),
    )


def _layers(layers: Sequence[int] | None, depth: int) -> list[int]:
    if layers is None:
        return sorted({max(1, depth * part // 15) for part in range(5, 11)})
    wrong = [layer for layer in layers if not 1 <= layer <= depth]
    if wrong or not layers:
        raise BadInput(f"layers must be some of 1 to {depth}, the model's own, not {list(layers)}")
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
    model: Model, part: Part, texts: Sequence[str], layers: Sequence[int], progress: Progress | None
) -> Features:
    def told(done: int, of: int) -> None:
        if progress is not None:
            progress(f"reading the {part} part", done, of)

    limit = TRAIN_TOKENS if part is Part.TRAIN else None
    return pooled_states(model, texts, layers, max_tokens=limit, progress=told)


def _fit(states: Tensor, examples: Sequence[Example], penalties: Sequence[float]) -> list[Fit]:
    harmless = torch.tensor([example.harmless for example in examples])
    counts = torch.ones(len(examples))
    counts[_where(examples, Kind.HELPFUL)] = HELPFUL_WEIGHT
    return fit_logistic(states, harmless, counts, penalties)


def _candidates(
    features: dict[Part, Features],
    parts: dict[Part, list[Example]],
    layers: Sequence[int],
    progress: Progress | None,
) -> list[Candidate]:
    """Every layer, pooling and penalty, fitted on the training part and measured on the validation part."""
    harmless = torch.tensor([example.harmless for example in parts[Part.VALIDATION]])
    candidates = []
    settings = [(layer, pooling) for layer in layers for pooling in get_args(Pooling)]
    for done, (layer, pooling) in enumerate(settings, 1):
        fits = _fit(features[Part.TRAIN].of(layer, pooling), parts[Part.TRAIN], PENALTIES)
        for penalty, fit in zip(PENALTIES, fits, strict=True):
            logits = fit.logits(features[Part.VALIDATION].of(layer, pooling))
            candidates.append(Candidate(layer, pooling, penalty, auroc(logits[harmless], logits[~harmless])))
        if progress is not None:
            progress("fitting", done, len(settings))
    return candidates


def _out_of_fold(states: Tensor, examples: Sequence[Example], penalty: float, seed: int) -> Tensor:
    """Logits [n], each of a fit that saw no answer of its group."""
    groups = sorted({(example.source, example.group) for example in examples})
    random.Random(f"{seed} folds").shuffle(groups)
    folds = {group: number % FOLDS for number, group in enumerate(groups)}
    fold = torch.tensor([folds[example.source, example.group] for example in examples])
    logits = torch.empty(len(examples))
    for number in range(FOLDS):
        others = [example for example, its in zip(examples, fold.tolist(), strict=True) if its != number]
        fit = _fit(states[fold != number], others, (penalty,))[0]
        logits[fold == number] = fit.logits(states[fold == number])
    return logits


def _best_of_each(candidates: Sequence[Candidate]) -> list[Candidate]:
    best: dict[tuple[int, str], Candidate] = {}
    for candidate in candidates:
        key = (candidate.layer, candidate.pooling)
        best[key] = max(best.get(key, candidate), candidate, key=lambda item: item.auroc)
    return list(best.values())


def _where(examples: Sequence[Example], kind: Kind, source: Source | None = None) -> Tensor:
    return torch.tensor([example.kind is kind and source in (None, example.source) for example in examples])


def _quality(examples: Sequence[Example], logits: Tensor) -> Quality:
    """Of GPTFuzz alone, the set that others report."""
    harmful = logits[_where(examples, Kind.HARMFUL, Source.GPTFUZZ)]
    harmless = logits[_where(examples, Kind.REFUSING, Source.GPTFUZZ)]
    at_1, at_5 = (float((harmful < threshold_at(harmless, share)).double().mean()) for share in (0.01, 0.05))
    caught = float((harmful < 0).double().mean())
    return Quality(len(harmful), len(harmless), auroc(harmless, harmful), at_1, at_5, caught)


def _flagged(examples: Sequence[Example], logits: Tensor) -> list[Flagged]:
    rows = []
    for kind in Kind:
        for source in Source:
            some = logits[_where(examples, kind, source)]
            if len(some):
                rows.append(Flagged(source, kind, len(some), float((some < 0).double().mean())))
    return rows


def _versions(model: Model) -> str:
    dtype = str(model.backbone.decoder.dtype).removeprefix("torch.")
    return f"torch {torch.__version__}, {dtype} on {model.backbone.decoder.device.type} ({platform.machine()})"


def _write(head: Head, card: Card, out: Path) -> None:
    """Both files appear whole or not at all."""
    part = out.with_name(f".{out.name}.part")
    try:
        save_head(head, part, license="Apache-2.0", card=out.with_suffix(".md").name)
        os.replace(part, out)
        part.write_text(card.to_markdown(), encoding="utf-8")
        os.replace(part, out.with_suffix(".md"))
    except (OSError, SafetensorError) as error:
        raise CacheWriteFailed(f"{out} could not be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)
