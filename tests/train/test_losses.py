"""Losses against sums by hand."""

from __future__ import annotations

from math import exp, log, log1p

import pytest
import torch
from torch.nn import Identity

from stockade.train.detector import pairs_loss
from stockade.train.losses import harm_loss, pairwise_loss, streaming_loss
from stockade.train.targets import Target, target_loss


def bce(logit: float, label: int) -> float:
    return log1p(exp(-logit if label else logit))


def test_the_released_loss_of_pairs() -> None:
    j, k = [1.5, -0.2], [0.3, 0.7]
    labels = [[1, 0], [1, 1]]
    wanted = sum(
        2 * (bce(j[n], labels[n][0]) + bce(k[n], labels[n][1])) + log1p(exp(-(j[n] - k[n]))) for n in range(2)
    )
    found = pairwise_loss(torch.tensor(j), torch.tensor(k), torch.tensor(labels))
    assert float(found) == pytest.approx(wanted / 2, abs=1e-6)


def test_pairs_and_answers_that_stand_alone_in_one_batch() -> None:
    logits, labels = torch.tensor([1.5, 0.3, -0.4, 2.0, -1.0]), torch.tensor([True, False, False, True, True])
    first = 2 * (bce(1.5, 1) + bce(0.3, 0)) + log1p(exp(-1.2))
    second = 2 * (bce(2.0, 1) + bce(-1.0, 1)) + log1p(exp(-3.0))
    alone = 2 * bce(-0.4, 0)
    found = pairs_loss(logits, labels, [2, 1, 2])
    assert float(found) == pytest.approx((first + second + alone) / 3, abs=1e-6)


def test_the_streaming_loss_is_of_the_lowest_score() -> None:
    whole, early = torch.tensor([2.0, -1.0]), torch.tensor([[0.5, torch.inf], [3.0, -4.0]])
    found = streaming_loss(whole, early, torch.tensor([True, False]))
    assert float(found) == pytest.approx((bce(0.5, 1) + bce(-4.0, 0)) / 2, abs=1e-6)
    none = streaming_loss(whole, torch.full((2, 1), torch.inf), torch.tensor([True, False]))
    assert float(none) == pytest.approx(float(harm_loss(whole, torch.tensor([True, False]))))


def test_only_targets_count_and_each_is_told_from_the_token_before() -> None:
    """Two rows of one-hot states, whose logits are the states."""
    states = torch.zeros(2, 5, 3)
    states[0, 1, 2], states[0, 2, 0], states[1, 3, 1] = 5.0, 5.0, 5.0
    targets = [Target([0, 1, 2, 1], 2), Target([0, 0, 0, 0, 1], 4)]  # token 2 after place 1, 1 after 2; 1 after 3
    right, wrong = log(1 + 2 * exp(-5.0)), log(1 + 2 * exp(-5.0)) + 5
    assert float(target_loss(states, Identity(), targets)) == pytest.approx((right + wrong + right) / 3, abs=1e-6)
    changed = states.clone()
    changed[0, 0] = changed[0, 3] = changed[1, :3] = changed[1, 4] = 9.0  # prompts, last tokens, padding
    assert torch.equal(target_loss(changed, Identity(), targets), target_loss(states, Identity(), targets))
