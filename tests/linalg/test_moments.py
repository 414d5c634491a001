"""Second moments against numpy in long double."""

import numpy as np
import pytest
import torch
from torch import Tensor

from eckart.errors import NonFiniteError
from eckart.linalg.matrices import named_generator
from eckart.linalg.moments import DiagonalMoment, SecondMoment, moment_bytes


def rows(count: int, n: int) -> Tensor:
    X = torch.randn(count, n, generator=named_generator(3, f"{count}×{n}"))
    return X * torch.logspace(-2, 2, n)


def exact(X: Tensor) -> np.ndarray:
    wide = X.double().numpy().astype(np.longdouble)
    return wide.T @ wide / len(wide)


@pytest.mark.parametrize("n", [1, 2, 127, 255, 256, 257, 800])
def test_a_moment_is_the_mean_of_the_outer_products(n):
    """Whatever the number of bands, and exactly symmetric."""
    X, moment = rows(50, n), SecondMoment(n)
    for piece in X.split(17):
        moment.add(piece)
    C = moment.value(50)
    scale = C.diagonal().double().sqrt().numpy()

    assert torch.equal(C, C.mT)
    assert (np.abs(C.double().numpy() - exact(X)) <= 3e-7 * np.outer(scale, scale)).all()


@pytest.mark.parametrize("n", [1, 300])
def test_the_diagonal_is_that_of_the_whole(n):
    """To float32's rounding."""
    X, diagonal, whole = rows(40, n), DiagonalMoment(n), SecondMoment(n)
    diagonal.add(X)
    whole.add(X)

    torch.testing.assert_close(diagonal.value(40), whole.value(40).diagonal(), rtol=1e-6, atol=0.0)


def test_a_long_sum_keeps_its_digits():
    """Sums in float64: a float32 one would stand still at 2²⁴."""
    moment, piece = SecondMoment(1), torch.ones(4096, 1) * 4096
    for _ in range(64):
        moment.add(piece)
    moment.add(torch.ones(1, 1))

    assert moment.sums[0].item() == 64 * 4096.0**3 + 1


def test_half_precision_is_widened_and_float64_kept():
    """float64 rows differ in digits that float32 does not have."""
    half, double = SecondMoment(1), SecondMoment(1)
    half.add(torch.full((3, 1), 0.1, dtype=torch.bfloat16))
    double.add(torch.tensor([[1 + 2**-40]], dtype=torch.float64))

    assert half.sums[0].item() == pytest.approx(3 * float(torch.tensor(0.1).bfloat16()) ** 2)
    assert double.sums[0].item() == (1 + 2**-40) ** 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("kind", [SecondMoment, DiagonalMoment])
@pytest.mark.parametrize("column", [0, 299])
def test_what_has_no_finite_square_is_refused(kind, bad, column):
    """In whatever band."""
    X = rows(5, 300)
    X[3, column] = bad

    with pytest.raises(NonFiniteError):
        kind(300).add(X)


@pytest.mark.parametrize("n", [1, 128, 1000])
def test_the_bytes_are_those_of_the_sums(n):
    """A plan by shapes is what is then taken."""
    for kind, diagonal in ((SecondMoment, False), (DiagonalMoment, True)):
        taken = sum(part.nbytes for part in kind(n).sums)

        assert moment_bytes(n, diagonal=diagonal) == taken
    assert moment_bytes(3072, diagonal=False) < 8 * 3072**2 * 0.6
