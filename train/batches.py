"""Examples of about one length together, in an order that depends on the seed alone; and token lists as tensors."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

POOL = 16  # batches that are sorted by length together


def epoch_batches(lengths: Sequence[int], size: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of examples, each once, `size` a batch (the last ones of a pool may be smaller), in random order.

    Examples are shuffled, cut into pools of `POOL` batches, and sorted by length within: little is padded, and
    batches still differ from epoch to epoch.
    """
    rng = random.Random(f"{seed} epoch {epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    batches = []
    for first in range(0, len(order), POOL * size):
        pool = sorted(order[first : first + POOL * size], key=lambda index: lengths[index])
        batches += [pool[at : at + size] for at in range(0, len(pool), size)]
    rng.shuffle(batches)
    return batches


def sorted_batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices of examples by length, about `tokens` padded tokens a batch: for what is only read."""
    batches: list[list[int]] = []
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batch and (len(batch) + 1) * lengths[index] > tokens:
            batches.append(batch)
            batch = []
        batch.append(index)
    return [*batches, batch] if batch else batches


def padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, where a token is) [rows, longest], padded on the right; int64 and bool."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), fill)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = True
    return ids.to(device), mask.to(device)
