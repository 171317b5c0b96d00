"""Fits one logit on features, and measures how well it tells harmless from harmful. It knows no model and no text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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
