"""Rows widened a block at a time: all of them, in order, whatever the block size."""

import pytest
import torch

from eckart.linalg import blocks
from eckart.linalg.blocks import row_blocks


@pytest.mark.parametrize("entries", [1, 7, 14, 15, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_blocks_are_the_matrix(entries, dtype, monkeypatch):
    """Put together again, wider; each starts where it says."""
    monkeypatch.setattr(blocks, "BLOCK_ENTRIES", entries)
    W = torch.arange(35.0).reshape(5, 7).bfloat16()
    found = [(start, rows.clone()) for start, rows in row_blocks(W, dtype)]

    assert torch.equal(torch.cat([rows for _, rows in found]), W.to(dtype))
    assert [start for start, _ in found] == [*range(0, 5, max(1, entries // 7))]
    assert all(rows.dtype == dtype for _, rows in found)


def test_a_block_is_a_copy():
    """What is done to it is not done to the matrix."""
    W = torch.ones(3, 2, dtype=torch.float64)
    for _, rows in row_blocks(W, torch.float64):
        rows.zero_()

    assert torch.equal(W, torch.ones(3, 2, dtype=torch.float64))


def test_transposed_matrices_are_read_as_they_act():
    """Strides do not matter."""
    W = torch.arange(6.0).reshape(2, 3).mT

    assert torch.equal(torch.cat([rows.clone() for _, rows in row_blocks(W, torch.float64)]), W)
