"""What a kernel must know of a ragged batch, as tensors on the device: whose the rows are, and where pages lie."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class RaggedTables(NamedTuple):
    """n sequences that share one layout; those at the end may be padding, which has no rows and no context.

    The numbers on the host bound what is on the device, so that a launch is decided without reading it; under a graph
    they are those of the graph, which holds for every batch that it replays.
    """

    first_row: Tensor  # [n + 1] int32: batch row of each sequence's first query; rows behind the last are nobody's
    length: Tensor  # [n] int32: tokens of context, the new ones included; 0 for padding
    pages: Tensor  # [n, max_pages] int32: row, in the pool, of each page's first token; undefined beyond `length`
    page_size: int  # tokens of a page, a power of two of at least 16
    max_rows: int  # the most query rows of any sequence; 1 = every sequence decodes
    max_length: int  # no context is longer
