"""The eigenproblem of a projected matrix against torch's eigh."""

import pytest
import torch

from eckart.linalg.tridiagonal import Tridiagonal

ORDERS = [1, 2, 3, 17, 64, 130]


def gram(order: int, rank: int | None = None) -> torch.Tensor:
    """A positive semidefinite matrix of this order and rank."""
    draw = torch.randn(
        order, rank or order, dtype=torch.float64, generator=torch.Generator().manual_seed(order)
    )
    return draw @ draw.mT


@pytest.mark.parametrize("order", ORDERS)
def test_values_are_those_of_eigh(order):
    """All eigenvalues come back, the largest first."""
    G = gram(order)

    expected = torch.linalg.eigvalsh(G).flip(0)

    assert torch.allclose(Tridiagonal(G).values(), expected, rtol=1e-12, atol=1e-12 * expected[0])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("count", [1, 2, 50, 1000])
def test_leading_vectors_are_orthonormal_eigenvectors(order, count):
    """G X = X diag(values), XᵀX = I, and no more than there are."""
    G = gram(order)

    values, X = Tridiagonal(G).leading(count)

    assert X.shape == (order, min(count, order))
    assert torch.dist(G @ X, X * values) <= 1e-12 * order * values[0]
    assert torch.dist(X.mT @ X, torch.eye(X.shape[1])) <= 1e-12 * order
    assert torch.allclose(values, Tridiagonal(G).values()[: len(values)], rtol=1e-12)


@pytest.mark.parametrize("G", [torch.zeros(5, 5), torch.eye(5), gram(40, 3)], ids=["0", "I", "low"])
def test_repeated_values_keep_their_vectors_apart(G):
    """Zero, identity and low rank: the basis is orthonormal even where values coincide."""
    values, X = Tridiagonal(G.double()).leading(5)

    assert torch.dist(G.double() @ X, X * values) <= 1e-11
    assert torch.dist(X.mT @ X, torch.eye(5)) <= 1e-12
