"""The target that undoes a drift of the inputs, and the factors nearest to it."""

import pytest
import torch
from torch import Tensor

from eckart.errors import FactorizationError
from eckart.linalg.drift import drift_target, fit_to_drift
from eckart.linalg.factors import from_weighted_side
from eckart.linalg.matrices import named_generator
from eckart.linalg.metric import Metric

SHAPES = [(12, 20), (20, 12), (15, 15)]


def drawn(name: str, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=named_generator(0, name))


def moments(n: int, drift: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs before and after, with E[x x'ᵀ] and E[x' x'ᵀ]."""
    X = drawn("x", 400, n) * torch.linspace(0.2, 2, n, dtype=torch.float64)
    Y = X + drift * drawn("noise", 400, n) + drift * X.roll(1, 1)
    return X, Y, X.mT @ Y / 400, Y.mT @ Y / 400


@pytest.mark.parametrize("shape", SHAPES)
def test_the_whole_target_is_least_squares(shape):
    """With a share of 1, W*x' is as near to W x as any matrix of x' can be."""
    X, Y, cross, C = moments(shape[1], 0.3)
    W = drawn("W", *shape)
    found = drift_target(W, cross, C, share=1.0, damping=0.0)
    best = torch.linalg.lstsq(Y, X @ W.mT).solution.mT

    torch.testing.assert_close(found, best)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_target_is_between_the_matrix_and_least_squares(shape):
    """A share of it; with none, or where nothing drifted, it is W itself."""
    _, _, cross, C = moments(shape[1], 0.3)
    still = moments(shape[1], 0.0)[3]
    W = drawn("W", *shape)
    whole, half = (drift_target(W, cross, C, share=share) for share in (1.0, 0.5))

    torch.testing.assert_close(half, (W + whole) / 2)
    torch.testing.assert_close(drift_target(W, cross, C, share=0.0), W)
    torch.testing.assert_close(drift_target(W, still, still, damping=0.0), W)


def test_damping_holds_directions_that_no_input_took():
    """C' may be singular; where all of it is zero nothing is known, and that is said."""
    Y = torch.cat([drawn("few", 3, 8)])
    C = Y.mT @ Y / 3
    found = drift_target(drawn("W", 5, 8), C, C)

    assert bool(found.isfinite().all())
    with pytest.raises(FactorizationError, match="the text never used it"):
        drift_target(drawn("W", 5, 8), C, torch.zeros(8, 8))


@pytest.mark.parametrize("curvature", ["full", "diagonal", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_drift_a_fit_is_the_decomposition(shape, curvature):
    """As good as the same product, of the same rank, as the SVD in the metric of W itself."""
    m, n = shape
    C = moments(n, 0.0)[3]
    g = drawn("g", 400, m)
    G = {"full": g.mT @ g / 400, "diagonal": g.square().mean(0), "none": None}[curvature]
    W = drawn("W", m, n)
    found = fit_to_drift(W, C, C, G, 4, generator=torch.Generator()).factors
    metric = Metric.of(C, G)
    U, _, Vh = torch.linalg.svd(metric.transformed(W))
    vectors = U.mT[:4] if m <= n else Vh[:4]
    expected = from_weighted_side(W, vectors, metric.short_side(shape), torch.float64)

    assert found.rank == 4
    away = metric.energy(found.product() - expected.product())
    assert away < 1e-5 * metric.energy(expected.product())  # its own damping takes so much


@pytest.mark.parametrize("shape", SHAPES)
def test_a_fit_serves_drifted_inputs_better(shape):
    """‖W x − B A x'‖ is smaller than that of the factors of W, at the same rank."""
    X, Y, cross, C = moments(shape[1], 0.5)
    W, before = drawn("W", *shape), X.mT @ X / 400
    generator = torch.Generator()
    plain = fit_to_drift(W, before, before, None, 6, generator=generator).factors
    fitted = fit_to_drift(W, cross, C, None, 6, generator=generator).factors

    def missed(product: Tensor) -> float:
        return float((X @ W.mT - Y @ product.mT).square().sum())

    assert missed(fitted.product()) < 0.95 * missed(plain.product())
