"""Matrices with a prescribed rank or spectrum, and generators that repeat."""

import numpy as np
import pytest
import torch

from eckart.errors import RankError, ShapeError
from eckart.linalg.matrices import matrix_with_spectrum, named_generator, random_low_rank


@pytest.mark.parametrize(("m", "n"), [(10, 10), (20, 7), (7, 20), (1, 5), (5, 1)])
def test_random_matrix_has_the_rank_asked(m, n):
    """From rank 1 to full rank, numpy finds the rank that was asked for."""
    for rank in {1, min(2, m, n), min(m, n)}:
        W = random_low_rank(m, n, rank)

        assert tuple(W.shape) == (m, n)
        assert np.linalg.matrix_rank(W.numpy()) == rank


def test_random_matrix_repeats_without_a_generator():
    """The same call gives the same matrix; a generator moves on."""
    generator = torch.Generator().manual_seed(0)
    first = random_low_rank(6, 5, 2, generator=generator)
    second = random_low_rank(6, 5, 2, generator=generator)

    assert torch.equal(random_low_rank(6, 5, 2), random_low_rank(6, 5, 2))
    assert torch.equal(random_low_rank(6, 5, 2), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=str)
def test_random_matrix_has_the_dtype_asked(precision):
    """The dtype is an argument, float32 unless given."""
    assert random_low_rank(4, 4, 2, dtype=precision).dtype == precision
    assert random_low_rank(4, 4, 2).dtype == torch.float32


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_impossible_rank_is_refused(rank):
    """A rank below 1 or above the shorter side is refused."""
    with pytest.raises(RankError, match=f"rank {rank}"):
        random_low_rank(4, 9, rank)


@pytest.mark.parametrize(("m", "n"), [(0, 4), (4, 0), (-1, 4)])
def test_empty_random_matrix_is_refused(m, n):
    """Both sides must be at least 1."""
    with pytest.raises(ShapeError, match="at least 1"):
        random_low_rank(m, n, 1)


def test_spectrum_is_what_numpy_finds(family, known_matrix):
    """The singular values put in come out of numpy's SVD, with zeros behind."""
    known = known_matrix(family)
    if family == "subnormal":
        pytest.skip("LAPACK squares them away; exact_svd scales first")
    found = np.linalg.svd(known.W.numpy(), compute_uv=False)

    assert np.allclose(found, known.values.numpy(), rtol=0, atol=1e-13 * float(found[0]))


def test_spectrum_is_padded_with_zeros():
    """Fewer values than min(m, n) give a matrix of that rank."""
    W = matrix_with_spectrum(torch.tensor([2.0, 1.0]), 6, 5)

    assert W.dtype == torch.float64
    assert np.linalg.matrix_rank(W.numpy()) == 2


def test_more_values_than_the_shorter_side_are_refused():
    """A 3×4 matrix has no four singular values."""
    with pytest.raises(RankError):
        matrix_with_spectrum(torch.ones(4), 3, 4)


def test_named_generator_depends_on_seed_and_name_only():
    """Equal seed and name give equal numbers, in any order; others differ."""

    def draw(seed, name):
        return torch.rand(4, generator=named_generator(seed, name)).tolist()

    assert draw(0, "layer.0") == draw(0, "layer.0")
    assert draw(0, "layer.0") != draw(0, "layer.1")
    assert draw(0, "layer.0") != draw(1, "layer.0")
    assert draw(1, "1") != draw(11, "")


def test_named_generator_is_frozen():
    """The seeding is part of the promise that a resumed run gives the same bytes."""
    assert named_generator(0, "layer").initial_seed() == 1646016819402699212
    assert named_generator(7, "gewicht·ß").initial_seed() == 236344938937418707
