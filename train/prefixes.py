"""Keys and values of what stands before the tokens that an activated adapter applies to, kept in a file.

They are the frozen base's, hence the same in every epoch: they are computed once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..engine.errors import CacheWriteFailed
from .backbone import Backbone
from .batches import sorted_batches
from .loop import Progress

BATCH_TOKENS = 2048


class Prefixes:
    """Of some rows of tokens, by number. file: is made, and left there; an interrupted run goes on with what it
    holds.

    Raises `CacheWriteFailed` where there is no room for it.
    """

    def __init__(
        self, backbone: Backbone, rows: Sequence[Sequence[int]], file: Path, progress: Progress | None
    ) -> None:
        config = backbone.model.config
        heads = config.num_key_value_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._shape = (backbone.layers, 2, heads, -1, dim)
        each = backbone.layers * 2 * heads * dim
        self._starts = [0]
        for row in rows:
            self._starts.append(self._starts[-1] + each * len(row))
        dtype = backbone.model.dtype
        count = self._starts[-1]
        try:
            # a full disk would otherwise be noticed by a signal, in the middle of a copy
            with open(file, "ab") as whole:
                os.posix_fallocate(whole.fileno(), 0, count * dtype.itemsize)
        except OSError as error:
            file.unlink(missing_ok=True)
            raise CacheWriteFailed(
                f"{file} needs {count * dtype.itemsize / 1e9:.1f} GB, which cannot be had: {error}; fewer answers "
                "(--limit), shorter ones (--max-tokens) or a lower layer need less"
            ) from error
        self._values = torch.from_file(str(file), shared=True, size=count, dtype=dtype)
        self._fill(backbone, rows, file.with_suffix(".done"), progress)

    def __getitem__(self, number: int) -> Tensor:
        """[layers, 2, heads, tokens, head_dim]."""
        return self._values[self._starts[number] : self._starts[number + 1]].view(self._shape)

    def _fill(self, backbone: Backbone, rows: Sequence[Sequence[int]], done: Path, progress: Progress | None) -> None:
        """done: a file that says how many batches are filled: they come in the same order every time."""
        batches = sorted_batches([len(row) for row in rows], BATCH_TOKENS)
        first = int(done.read_text() or 0) if done.is_file() else 0
        ready = sum(map(len, batches[:first]))
        for number, batch in enumerate(batches[first:], first + 1):
            for index, found in zip(batch, backbone.before([rows[index] for index in batch]), strict=True):
                self[index].copy_(found)
            done.write_text(str(number))
            ready += len(batch)
            if progress is not None:
                progress("reading what adapters do not change", ready, len(rows))
