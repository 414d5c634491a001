"""Singular values, and the vectors of the shorter side, through a checked float64 Gram matrix.

Knows tensors and LAPACK; must not know files. The ladder it falls back on is in `exact`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.linalg import exact
from eckart.linalg.arrays import Array, as_matrix, working_dtype
from eckart.linalg.exact import (
    LAPACK_FAILURES,
    RATIO,
    column_signs,
    exact_svd_checked,
    singular_values_checked,
)
from eckart.linalg.norms import energy

PANEL = 512
"""Rows of the lower triangle formed at once: 60 % of the time of the whole square at k = 4096."""

BLOCK_ENTRIES = 2**21
"""The long side is widened to float64 in blocks of about this many entries (16 MiB)."""

PROBES = 16
"""Gaussian vectors z of the check: Σ‖Rz‖²/16 is an unbiased estimate of ‖R‖_F², and a hundredth
of it with a chance below 10⁻¹³ (that is R of rank 1; of a higher rank, less)."""

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, slots=True)
class ShortSide:
    """All k = min(m, n) singular values of an m×n matrix, and the vectors of its shorter side.

    `vectors` is U where m ≤ n, else V, in float64 as the values are; the largest entry of each is
    positive. `energy` is ‖W‖_F². `method` is "gram64", a rung of `exact_svd`, or both where the
    first failed its check ("gram64→gesdd").
    """

    vectors: Float[Tensor, "k k"]
    values: Float[Tensor, " k"]
    energy: float
    method: str


def gram_values(W: Array, name: str = "matrix") -> tuple[Float[Tensor, " k"], str]:
    """Returns all singular values of W, descending, in float64, and the method that gave them.

    The roots of the eigenvalues λ of G = WWᵀ or WᵀW, whichever is smaller, in float64. They count
    only if Σλ = ‖W‖_F² and Σλ² = ‖G‖_F² to rounding; else the ladder of `singular_values` answers,
    and the method says so ("gram64→gesdd"). So it does for a float64 matrix, whose digits G halves.

    Guarantee: σᵢ is exact to about k·ε₆₄·σ₁²/σᵢ, and what should be 0 is below 10⁻⁷·σ₁, which is
    where float32 ends anyway. Nothing is scaled: float64 holds the square of every float32.
    Cost: k²·max(m, n) + 4k³/3 flops, about half the time of `singular_values`; peak 16k² bytes
    and 32 MiB. The order is limited as `exact_svd`'s, k ≤ 23 169; the long side is not.

    >>> values, method = gram_values(torch.diag(torch.tensor([3.0, 2.0, 0.0])))
    >>> values.tolist(), method
    ([3.0, 2.0, 0.0], 'gram64')
    """
    W = as_matrix(W, name)
    squares = _checked_squares(_wide(W)) if _has_gram(W) else None
    if squares is not None:
        return squares.clamp(min=0).sqrt(), "gram64"
    values, rung = singular_values_checked(W.to(working_dtype(W.dtype)), name)
    return values.double(), _method(W, rung)


def short_side_svd(W: Array, name: str = "matrix") -> ShortSide:
    """Returns all singular values of W and the singular vectors of its shorter side.

    The eigenvectors X of the G of `gram_values`. They count only if Σλ = ‖W‖_F² and LAPACK's test
    ratios of an eigenproblem (TESTING/EIG/dsyt21.f) stay below 50: ‖WWᵀX − XΛ‖/(‖Λ‖·max(m, n)·ε)
    and ‖XᵀX − I‖/(k·ε), in the Frobenius norm. Two departures: the first is taken of W itself, so
    that it judges G as well; and both norms are estimated from 16 fixed Gaussian vectors
    (Freivalds, 1977; Hutchinson, 1990), which costs O(mn) instead of three k×k products. Else the
    ladder of `exact_svd` answers, as it does for float64.

    Guarantee: X is orthonormal to float64 rounding, and W ≈ X_r X_rᵀ W (W X_r X_rᵀ where m > n)
    optimal at every rank r, with an error² within about k·ε₆₄·‖W‖_F² of Σ_{i>r} σᵢ².
    Cost: k²·max(m, n) + about 9k³ flops, two thirds of the time of `exact_svd` where square, a
    quarter at 3:1; peak 32k² bytes and 32 MiB.

    >>> short = short_side_svd(torch.tensor([[3.0, 0.0, 4.0], [0.0, 2.0, 0.0]]))
    >>> short.values.tolist(), short.vectors.tolist(), short.method
    ([5.0, 2.0], [[1.0, 0.0], [0.0, 1.0]], 'gram64')
    """
    W = as_matrix(W, name)
    found = _checked_vectors(_wide(W)) if _has_gram(W) else None
    if found is not None:
        return found
    svd = exact_svd_checked(W.to(working_dtype(W.dtype)), name)
    vectors = (svd.U if svd.shape[0] <= svd.shape[1] else svd.Vh.mT).double()
    vectors = vectors * column_signs(vectors)
    return ShortSide(vectors, svd.s.double(), svd.energy, _method(W, svd.method))


def _has_gram(W: Tensor) -> bool:
    """Whether G loses none of W's digits, and LAPACK can take it."""
    return W.dtype != torch.float64 and min(W.shape) < exact.LAPACK_ORDER


def _method(W: Tensor, rung: str) -> str:
    return f"gram64→{rung}" if _has_gram(W) else rung


def _wide(W: Tensor) -> Float[Tensor, "k d"]:
    return W if W.shape[0] <= W.shape[1] else W.mT


def _checked_squares(W: Float[Tensor, "k d"]) -> Float[Tensor, " k"] | None:
    """The eigenvalues of WWᵀ, descending; None if they failed their check."""
    G = _gram(W)
    try:
        squares = torch.linalg.eigvalsh(G).flip(0)
    except LAPACK_FAILURES:
        return None
    below = 2 * energy(G.tril(-1)) + float(G.diagonal().square().sum())
    sound = _sums_hold(W, squares, energy(W)) and _near(W, energy(squares), below, below)
    return squares if sound else None


def _checked_vectors(W: Float[Tensor, "k d"]) -> ShortSide | None:
    """The eigenvalues and eigenvectors of WWᵀ, descending; None if they failed their check."""
    try:
        squares, X = torch.linalg.eigh(_gram(W))
    except LAPACK_FAILURES:
        return None
    squares, X, total = squares.flip(0), X.flip(1), energy(W)
    if not (_sums_hold(W, squares, total) and _vectors_hold(W, squares, X)):
        return None
    return ShortSide(X * column_signs(X), squares.clamp(min=0).sqrt(), total, "gram64")


def _gram(W: Float[Tensor, "k d"]) -> Float[Tensor, "k k"]:
    """The lower triangle of WWᵀ in float64, and of the upper one whatever lies in a panel."""
    G = torch.zeros(len(W), len(W), dtype=torch.float64, device=W.device)
    for block in _blocks(W):
        for start in range(0, len(W), PANEL):
            stop = start + PANEL
            G[start:stop, :stop].addmm_(block[start:stop], block[:stop].mT)
    return G


def _blocks(W: Float[Tensor, "k d"]) -> Iterator[Float[Tensor, "k b"]]:
    """W in float64, some columns at a time: no more than 16 MiB of it, or 512 columns."""
    return (block.double() for block in W.split(max(PANEL, BLOCK_ENTRIES // len(W)), dim=1))


def _sums_hold(W: Float[Tensor, "k d"], squares: Float[Tensor, " k"], total: float) -> bool:
    """Whether the λ are finite, descending, not negative but for rounding, and add up to ‖W‖_F²."""
    ordered = bool(torch.isfinite(squares).all()) and not bool((squares.diff() > 0).any())
    negative = float(squares[-1].clamp(max=0))
    return (
        ordered and _near(W, negative, 0.0, total) and _near(W, float(squares.sum()), total, total)
    )


def _near(W: Tensor, found: float, expected: float, size: float) -> bool:
    return abs(found - expected) <= RATIO * max(W.shape) * EPS * size


def _vectors_hold(
    W: Float[Tensor, "k d"], squares: Float[Tensor, " k"], X: Float[Tensor, "k k"]
) -> bool:
    """Whether WWᵀX = XΛ and XᵀX = I to rounding."""
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(len(X), PROBES, dtype=torch.float64, generator=generator).to(X.device)
    Y = X @ Z
    R = X @ (-squares[:, None] * Z)
    for block in _blocks(W):
        R.addmm_(block, block.mT @ Y)
    residual, overlap = (float(torch.linalg.vector_norm(E)) for E in (R, X.mT @ Y - Z))
    size = float(torch.linalg.vector_norm(squares)) * PROBES**0.5
    return _near(W, residual, 0.0, size) and overlap <= RATIO * len(X) * EPS * PROBES**0.5
