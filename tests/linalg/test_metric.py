"""The metric: roots of second moments, and the best approximation that they weigh."""

import math

import pytest
import torch
from torch import Tensor

from eckart.errors import FactorizationError, NonFiniteError, ShapeError
from eckart.linalg import metric as module
from eckart.linalg.factors import from_weighted_side
from eckart.linalg.gram import short_side_svd
from eckart.linalg.metric import CURVATURE_DAMPING, INPUT_DAMPING, Metric, damped_root

SHAPES = [(9, 6), (6, 9), (7, 7), (1, 5), (5, 1), (1, 1)]


def moment(k: int, samples: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """E[x xᵀ] of so many Gaussian vectors of unequal entries: of rank min(k, samples)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, k, generator=generator, dtype=torch.float64)
    x *= torch.arange(1, k + 1) ** -0.5
    return (x.mT @ x / samples).to(dtype)


def weights(m: int, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator, dtype=torch.float64)


def damped(S: Tensor, share: float) -> Tensor:
    """S + share·mean(diag S)·I, as a matrix."""
    S = (torch.diag(S) if S.ndim == 1 else S).double()
    return S + share * S.diagonal().mean() * torch.eye(len(S), dtype=torch.float64)


def quadratic_form(E: Tensor, C: Tensor, G: Tensor) -> float:
    """½ tr(G E C Eᵀ), entry by entry of the definition."""
    return 0.5 * float(torch.einsum("ij,jk,kl,il->", G, E, C, E))


METRICS = {
    "curvature": lambda m, n: (moment(n, 40), moment(m, 50, 1)),
    "diagonal curvature": lambda m, n: (moment(n, 40), moment(m, 50, 1).diagonal().clone()),
    "inputs": lambda _, n: (moment(n, 40), None),
    "singular": lambda m, n: (moment(n, 3), moment(m, 2, 1)),
    "float32": lambda m, n: (moment(n, 3, 0, torch.float32), moment(m, 50, 1, torch.float32)),
}


def second_moments(kind: str, m: int, n: int) -> tuple[Metric, Tensor, Tensor]:
    """The metric, and damped C and G as matrices: the identity where there is no curvature."""
    C, G = METRICS[kind](m, n)
    eye = torch.eye(m, dtype=torch.float64)
    full = eye if G is None else damped(G, CURVATURE_DAMPING)
    return Metric.of(C, G), damped(C, INPUT_DAMPING), full


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_half_the_energy_is_the_quadratic_form(kind, shape):
    """½‖LᵀER‖² = ½ tr(G E C Eᵀ), of damped second moments, whatever their kind."""
    metric, C, G = second_moments(kind, *shape)
    E = weights(*shape, 5)

    assert metric.energy(E) / 2 == pytest.approx(quadratic_form(E, C, G), rel=1e-6)


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_of_the_factors_is_the_tail_of_the_spectrum(kind, shape):
    """½ tr(G E C Eᵀ) = Σ_{i>r} σᵢ²/2 at every rank: the predicted loss is that of the factors."""
    metric, C, G = second_moments(kind, *shape)
    W = weights(*shape)
    short = short_side_svd(metric.transformed(W))
    root = metric.short_side(shape)
    for rank in range(1, min(shape) + 1):
        vectors = short.vectors[:, :rank].mT
        factors = from_weighted_side(W, vectors, root, torch.float64)
        E = W - factors.product()
        predicted = float(short.values[rank:].square().sum()) / 2

        assert quadratic_form(E, C, G) == pytest.approx(predicted, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("kind", METRICS)
def test_no_perturbed_product_of_the_rank_is_nearer(kind):
    """200 random steps from the factors, at four sizes: the form never falls."""
    shape, rank, generator = (8, 6), 2, torch.Generator().manual_seed(3)
    metric, C, G = second_moments(kind, *shape)
    W = weights(*shape)
    short = short_side_svd(metric.transformed(W))
    root = metric.short_side(shape)
    best = from_weighted_side(W, short.vectors[:, :rank].mT, root, torch.float64)
    least = quadratic_form(W - best.product(), C, G)
    for step in range(200):
        size = 10.0 ** -(step % 4)
        B = best.B + size * torch.randn(8, rank, generator=generator, dtype=torch.float64)
        A = best.A + size * torch.randn(rank, 6, generator=generator, dtype=torch.float64)

        assert quadratic_form(W - B @ A, C, G) >= least * (1 - 1e-9)


def test_the_optimum_is_the_closed_form_where_moments_are_diagonal():
    """C and G diagonal, W diagonal: component i is worth gᵢ·cᵢ·wᵢ²/2, and the largest are kept."""
    w, c, g = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([9.0, 4.0, 1.0]), torch.ones(3)
    metric = Metric.of(torch.diag(c), torch.diag(g), input_damping=0.0, curvature_damping=0.0)
    short = short_side_svd(metric.transformed(torch.diag(w)))
    root = metric.short_side((3, 3))
    factors = from_weighted_side(torch.diag(w), short.vectors[:, :1].mT, root, torch.float64)

    assert short.values.tolist() == pytest.approx([4.0, 3.0, 3.0])
    assert torch.allclose(factors.product(), torch.diag(torch.tensor([0.0, 2.0, 0.0])).double())


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_inputs_alone_give_the_best_outputs(shape):
    """‖(W − BA) C^½‖_F is the optimum of W C^½ by a plain SVD, with C singular too."""
    C = moment(shape[1], 4)
    metric, W = Metric.of(C), weights(*shape)
    short = short_side_svd(metric.transformed(W))
    root = metric.short_side(shape)
    factors = from_weighted_side(W, short.vectors[:, :3].mT, root, torch.float64)
    values, X = torch.linalg.eigh(damped(C, INPUT_DAMPING))
    half = X @ torch.diag(values.sqrt()) @ X.mT
    optimum = float(torch.linalg.svdvals(W @ half)[3:].norm())

    assert float(((W - factors.product()) @ half).norm()) == pytest.approx(optimum, rel=1e-6)


def test_factors_are_balanced_and_nested():
    """Columns of B and rows of A of one norm; those of rank 2 are the first of those of rank 4."""
    W, metric = weights(9, 6), second_moments("curvature", 9, 6)[0]
    short = short_side_svd(metric.transformed(W))
    root = metric.short_side((9, 6))
    large, small = (
        from_weighted_side(W, short.vectors[:, :r].mT, root, torch.float64) for r in (4, 2)
    )

    assert torch.allclose(large.B.norm(dim=0), large.A.norm(dim=1))
    assert torch.allclose(small.B, large.B[:, :2])
    assert torch.allclose(small.A, large.A[:2])


@pytest.mark.parametrize("k", [1, 5, 2 * module.PANEL + 3])
def test_a_root_is_applied_as_the_matrix_it_is(k):
    """S X, Sᵀ X and S⁻ᵀ X of a triangle, also where it is multiplied in panels."""
    S, X = damped_root(moment(k, k + 9), 1e-3), weights(k, 3)

    assert torch.allclose(S.times(X), S.factor @ X)
    assert torch.allclose(S.transposed_times(X), S.factor.mT @ X)
    assert torch.allclose(S.factor.mT @ S.inverse_transposed_times(X), X, atol=1e-8)


def test_a_diagonal_root_is_applied_as_the_matrix_it_is():
    """A vector stands for diag(d)."""
    S, X = damped_root(torch.tensor([4.0, 9.0]), 0.0), torch.ones(2, 3)

    assert S.factor.tolist() == [2.0, 3.0]
    assert S.times(X)[1].tolist() == S.transposed_times(X)[1].tolist() == [3.0] * 3
    assert torch.allclose(
        S.inverse_transposed_times(X)[1], torch.full((3,), 1 / 3, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    "S",
    [
        torch.diag(torch.tensor([1.0, -1e-3, 0.5])),
        torch.ones(6, 6) + 1e-7 * torch.eye(6).flip(0),
        moment(40, 3, dtype=torch.float32) - 1e-6 * torch.eye(40),
    ],
    ids=["a negative eigenvalue", "rank one", "rounded"],
)
def test_where_cholesky_fails_the_eigenvectors_answer(S):
    """S Sᵀ is the nearest positive one, damped: what is negative counts as zero."""
    root = damped_root(S, 0.0)
    values, X = torch.linalg.eigh(S.double())
    nearest = X @ torch.diag(values.clamp(min=0)) @ X.mT

    assert torch.equal(root.factor, root.factor.tril())
    assert torch.isfinite(root.inverse_transposed_times(torch.eye(len(S)))).all()
    assert torch.allclose(root.factor @ root.factor.mT, nearest, atol=1e-5)


def test_the_damping_is_a_share_of_the_mean_diagonal():
    """Whatever the scale of the inputs, the same relative damping; of a vector too."""
    for scale in (1e-6, 1.0, 1e6):
        S = torch.diag(torch.tensor([3.0, 1.0])) * scale
        expected = torch.tensor([3.2, 1.2], dtype=torch.float64) * scale

        assert torch.allclose(damped_root(S, 0.1).factor.diagonal().square(), expected, rtol=1e-6)
        assert torch.allclose(damped_root(S.diagonal(), 0.1).factor.square(), expected, rtol=1e-6)


@pytest.mark.parametrize("S", [torch.zeros(3, 3), torch.zeros(3)])
def test_a_second_moment_of_nothing_is_refused(S):
    """Inputs that were always zero tell no direction from another."""
    with pytest.raises(FactorizationError, match=r"inputs of q is zero: the text never used it"):
        Metric.of(S, name="q")


def test_what_is_no_second_moment_is_refused():
    """Not square, not finite: by name."""
    with pytest.raises(ShapeError, match=r"the curvature of q has shape \(2, 3\)"):
        Metric.of(torch.eye(3), torch.ones(2, 3), name="q")
    with pytest.raises(NonFiniteError, match="the inputs of q holds 1 non-finite"):
        Metric.of(torch.tensor([1.0, math.inf]), name="q")


def test_kinds_have_names():
    """As certificates call them; only with curvature there are nats."""
    found = {kind: second_moments(kind, 4, 4)[0] for kind in list(METRICS)[:3]}

    assert [metric.kind for metric in found.values()] == list(found)
    assert [metric.has_curvature for metric in found.values()] == [True, True, False]
