"""What a sampler on the device is told of each row, and what it answers. How tokens are chosen is said elsewhere."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SamplingRows(NamedTuple):
    """Each row's parameters, [n] on the device, named as those of a request are.

    temperature (0: greedy), top_p, min_p: fp64, rounded where torch rounds a Python number. top_k: int32, 0 = all.
    seed: int64, the bits of the unsigned number. pass_index, position: int32, of the token to draw.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor
    pass_index: Tensor
    position: Tensor


class SampledRows(NamedTuple):
    """ids: [n] int32, -1 where the row holds no numbers to choose by. logprobs: [n] fp32, of that token before
    temperature; NaN beside -1."""

    ids: Tensor
    logprobs: Tensor
