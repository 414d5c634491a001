"""What a decomposition is predicted to take, from shapes alone."""

import pytest

from eckart.decompose.request import (
    Request,
    is_exact,
    part_bytes,
    peak_bytes,
    seconds_for,
    threads_for,
)
from eckart.matrix import Matrix

ALL, FEW = Request(2047, all_values=True), Request(32, all_values=False)


@pytest.mark.parametrize(
    ("shape", "threads"),
    [((1, 1), 1), ((8192, 8192), 1), ((8192, 8193), 2), ((16384, 16384), 2), ((16384, 16385), 4)],
)
def test_threads_are_a_function_of_the_shape(shape, threads):
    """Never of the machine: the same threads give the same bits everywhere."""
    assert threads_for(shape) == threads_for(shape[::-1]) == threads


@pytest.mark.parametrize("request_", [ALL, FEW], ids=["all values", "rank 32"])
def test_more_to_do_takes_longer_and_more_threads_less(request_):
    """Larger matrices, more of them, fewer threads: each takes more seconds."""
    one = seconds_for(Matrix((4096, 4096)), request_, 1)

    assert seconds_for(Matrix((4096, 2048)), request_, 1) < one
    assert seconds_for(Matrix((3, 4096, 4096)), request_, 1) == pytest.approx(3 * one)
    assert seconds_for(Matrix((4096, 4096)), request_, 2) == pytest.approx(one / 2)


def test_the_peak_is_that_of_the_widest_rung_it_may_reach():
    """17 float32 copies where LAPACK may be called; else a few, and the bases of 40 steps."""
    entries = 4096 * 4096

    assert peak_bytes(Matrix((4096, 4096)), ALL, 2) == entries * (2 + 4 * 17)
    assert peak_bytes(Matrix((1024, 1024)), FEW, 2) == 1024 * 1024 * (2 + 4 * 17)
    assert 2 * 4 * entries < peak_bytes(Matrix((4096, 4096)), FEW, 2) < 8 * 4 * entries
    assert peak_bytes(Matrix((8, 4096, 4096)), ALL, 2) == peak_bytes(Matrix((4096, 4096)), ALL, 2)
    assert peak_bytes(Matrix((4096, 4096)), ALL, 8) > peak_bytes(Matrix((4096, 4096)), ALL, 2)


@pytest.mark.parametrize(("rank", "share"), [("ba", 1.5), ("pivoted", 2.5)])
@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096)])
def test_parts_of_half_precision_weights_stay_within_their_share_of_the_source(shape, rank, share):
    """Break-even rank for `ba`, all but one for pivoted: at most 1.5 and 2.5 times the source."""
    m, n = shape
    largest = (m * n - 1) // (m + n) if rank == "ba" else min(m, n) - 1

    size = part_bytes(Matrix(shape), Request(largest, all_values=True), 2)

    assert size <= share * 2 * m * n


@pytest.mark.parametrize(
    ("asked", "kept", "serves"),
    [
        (Request(8, all_values=False), Request(8, all_values=False), True),
        (Request(7, all_values=False), Request(8, all_values=False), True),
        (Request(9, all_values=False), Request(8, all_values=False), False),
        (Request(8, all_values=True), Request(8, all_values=False), False),
        (Request(8, all_values=True), Request(9, all_values=True), True),
        (Request(8, all_values=False), Request(9, all_values=True), True),
    ],
)
def test_what_was_kept_serves_no_more_than_it_holds(asked, kept, serves):
    """Fewer ranks yes, more no; all values only where all are known."""
    assert asked.within(kept) == serves


def test_a_small_rank_of_a_large_matrix_needs_no_exact_method():
    """And all values always do."""
    assert not is_exact((4096, 4096), FEW)
    assert is_exact((4096, 4096), ALL)
    assert is_exact((200, 200), FEW)


@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (1024, 4096)])
def test_in_a_metric_the_roots_come_before_the_svd_and_not_on_top_of_it(shape):
    """It takes longer; the peak is that of the SVD, or of the roots beside three copies of W."""
    (m, n), matrix = shape, Matrix(shape)
    plain, weighted = (peak_bytes(matrix, ALL, 2, weighted=weighted) for weighted in (False, True))
    roots = 2 * m * n + 28 * max(m, n) ** 2 + 8 * min(m, n) ** 2 + 3 * 8 * m * n

    assert weighted == max(plain, roots)
    assert seconds_for(matrix, ALL, 1, weighted=True) > seconds_for(matrix, ALL, 1)
