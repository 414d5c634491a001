"""A matrix in a wider dtype, some rows at a time, in memory that stays in the cache.

Knows tensors only.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK_ENTRIES = 2**20
"""Rows are widened in blocks of about this many entries: 8 MiB of float64 stay in the cache."""


def row_blocks(W: Float[Tensor, "m n"], dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yields where each block of rows starts, and its rows in `dtype`: a copy.

    One and the same memory for every block, so that each must be used up before the next. New
    memory would cost more than the arithmetic: malloc gives blocks of this size back to the system
    at once, and every page of the next is mapped anew (measured: 150 ms, not 30).

    >>> [(start, rows.tolist()) for start, rows in row_blocks(torch.eye(2), torch.float64)]
    [(0, [[1.0, 0.0], [0.0, 1.0]])]
    """
    step = max(1, BLOCK_ENTRIES // W.shape[1])
    memory = W.new_empty(min(step, W.shape[0]), W.shape[1], dtype=dtype)
    for start in range(0, W.shape[0], step):
        rows = W[start : start + step]
        yield start, memory[: len(rows)].copy_(rows)
