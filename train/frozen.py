"""What a frozen part of a model makes of some texts, kept in a file: the same in every epoch, it is computed once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine.errors import CacheWriteFailed
from .batches import sorted_batches
from .loop import Progress

BATCH_TOKENS = 2048


class Part(NamedTuple):
    """A frozen part of a model. read: token rows in, a tensor of each out; shape: of a row of so many tokens."""

    read: Callable[[Sequence[Sequence[int]]], list[Tensor]]
    shape: Callable[[int], tuple[int, ...]]
    dtype: torch.dtype


class Frozen:
    """What `part` makes of some rows of tokens, by number. file: is made, and left there; an interrupted run goes on
    with what it holds.

    Raises `CacheWriteFailed` where there is no room for it.
    """

    def __init__(self, part: Part, rows: Sequence[Sequence[int]], file: Path, progress: Progress | None) -> None:
        self._shapes = [part.shape(len(row)) for row in rows]
        self._starts = [0]
        for shape in self._shapes:
            self._starts.append(self._starts[-1] + prod(shape))
        count = self._starts[-1]
        try:
            # a full disk would otherwise be noticed by a signal, in the middle of a copy
            with open(file, "ab") as whole:
                os.posix_fallocate(whole.fileno(), 0, count * part.dtype.itemsize)
        except OSError as error:
            file.unlink(missing_ok=True)
            raise CacheWriteFailed(
                f"{file} needs {count * part.dtype.itemsize / 1e9:.1f} GB, which cannot be had: {error}; fewer "
                "answers (--limit) or shorter ones (--max-tokens) need less"
            ) from error
        self._values = torch.from_file(str(file), shared=True, size=count, dtype=part.dtype)
        self._fill(part, rows, file.with_suffix(".done"), progress)

    def __getitem__(self, number: int) -> Tensor:
        return self._values[self._starts[number] : self._starts[number + 1]].view(self._shapes[number])

    def _fill(self, part: Part, rows: Sequence[Sequence[int]], done: Path, progress: Progress | None) -> None:
        """done: a file that says how many batches are filled: they come in the same order every time."""
        batches = sorted_batches([len(row) for row in rows], BATCH_TOKENS)
        first = int(done.read_text() or 0) if done.is_file() else 0
        ready = sum(map(len, batches[:first]))
        for number, batch in enumerate(batches[first:], first + 1):
            for index, found in zip(batch, part.read([rows[index] for index in batch]), strict=True):
                self[index].copy_(found)
            done.write_text(str(number))
            ready += len(batch)
            if progress is not None:
                progress("reading what is not trained", ready, len(rows))
