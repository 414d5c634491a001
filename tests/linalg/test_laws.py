"""Laws 1 and 2, for every way to a factorization, every spectrum and every number format."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from eckart.linalg.exact import TruncatedSVD, exact_svd
from eckart.linalg.factors import Factors, PivotedFactors, factorize, pivot, recompress, split
from eckart.linalg.matrices import matrix_with_spectrum
from eckart.linalg.residual import relative_error
from eckart.linalg.truncated import truncated_svd


def _triplets(svd: TruncatedSVD) -> tuple[Tensor, ...]:
    return svd.U.double() * svd.s.double(), svd.Vh


def _parts(factors: Factors | PivotedFactors) -> tuple[Tensor, ...]:
    if isinstance(factors, Factors):
        return factors.B, factors.A
    eye = torch.eye(factors.rank, dtype=torch.float64)
    return torch.cat([eye, factors.K.double()])[factors.perm.argsort()], factors.A


def _working(W: Tensor) -> Tensor:
    return W if W.dtype == torch.float64 else W.float()


def _overfull(W: Tensor) -> Factors:
    """W as a product with twice the inner dimension it needs."""
    whole = split(exact_svd(W))
    return Factors(torch.cat([whole.B, whole.B], 1) / 2, torch.cat([whole.A, whole.A]))


# Those that compute in float32 at least: half precision costs them nothing.
COMPUTED: dict[str, Callable[[Tensor, int], TruncatedSVD]] = {
    "exact_svd": lambda W, r: exact_svd(W).truncate(r),
    "truncated_svd": lambda W, r: truncated_svd(W, rank=r),
    "truncated_svd, exact": lambda W, r: truncated_svd(W, rank=r, method="exact"),
    "recompress": lambda W, r: recompress(_overfull(W), rank=r),
}
# Those that round the factors to the dtype of W.
STORED: dict[str, Callable[[Tensor, int], Factors | PivotedFactors]] = {
    "factorize": lambda W, r: factorize(W, rank=r),
    "factorize, unbalanced": lambda W, r: factorize(W, rank=r, balanced=False),
    "pivot": lambda W, r: pivot(factorize(_working(W), rank=r)).to(W.dtype),
}


def _slack(shape: tuple[int, int], dtype: torch.dtype) -> float:
    return 50 * torch.finfo(dtype).eps * max(shape) ** 0.5


@pytest.mark.parametrize("entry", COMPUTED)
def test_error_of_every_svd_is_the_optimum(entry, known, true_error):
    """Law 1 holds for triplets in the working dtype, also where W is in half precision."""
    for rank in known.ranks:
        svd = COMPUTED[entry](known.W, rank)
        missed = true_error(known.W, *_triplets(svd)) * known.norm
        allowed = _slack(known.shape, svd.s.dtype) * known.norm

        assert svd.rank == rank
        assert svd.s.dtype == _working(known.W).dtype
        assert missed <= (1 + 1e-3) * known.optimum(rank) + allowed


@pytest.mark.parametrize("entry", STORED)
def test_error_of_every_product_is_the_optimum(entry, known, true_error):
    """Law 1 holds for factors rounded to the dtype of W."""
    for rank in known.ranks:
        factors = STORED[entry](known.W, rank)
        missed = true_error(known.W, *_parts(factors)) * known.norm
        allowed = _slack(known.shape, known.W.dtype) * known.norm

        assert factors.rank == rank
        assert factors.A.dtype == known.W.dtype
        assert missed <= (1 + 1e-3) * known.optimum(rank) + allowed


@pytest.mark.parametrize("entry", [name for name in STORED if name != "pivot"])
def test_half_precision_costs_one_rounding_of_each_factor(entry, known, true_error):
    """B and A rounded to nearest add at most ε‖W‖_F: ½ε for each, as U and V are orthonormal."""
    eps = torch.finfo(known.W.dtype).eps
    for rank in known.ranks:
        factors = STORED[entry](known.W, rank)
        missed = true_error(known.W, factors.B, factors.A) * known.norm
        allowed = 1.01 * eps + _slack(known.shape, _working(known.W).dtype)

        assert missed <= (1 + 1e-3) * known.optimum(rank) + allowed * known.norm


@pytest.mark.parametrize("entry", STORED)
def test_reported_error_is_never_below_the_true_one(entry, known, true_error):
    """Law 2: the figure bounds the true error from above, and by no more than rounding."""
    for rank in known.ranks:
        factors = STORED[entry](known.W, rank)
        reported = relative_error(known.W, factors)
        true = true_error(known.W, *_parts(factors))

        assert true <= reported <= true * (1 + 1e-5) + 1e-14


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-5, 1e-8, 1e-11, 1e-14])
def test_reported_error_holds_for_tiny_tails(size, true_error):
    """Law 2 holds where the tail is so small that an energy balance would have lost it."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        values = torch.cat([torch.ones(4), size * torch.ones(6)]).double()
        W = matrix_with_spectrum(values, 24, 18, generator=generator)
        factors = factorize(W, rank=4)
        reported, true = relative_error(W, factors), true_error(W, factors.B, factors.A)

        assert true <= reported <= true * (1 + 1e-5) + 1e-14
        assert reported == pytest.approx(size / (4 / 6 + size**2) ** 0.5, rel=1e-4, abs=1e-14)


def test_reported_error_holds_for_products_that_cancel(true_error):
    """Law 2 holds where large parts of the product cancel, so that its rounding is large too."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        B, X = (torch.randn(20, 4, dtype=torch.float64, generator=generator) for _ in range(2))
        A = torch.randn(4, 16, dtype=torch.float64, generator=generator)
        factors = Factors(torch.cat([B, 1e3 * X, X], 1), torch.cat([A, A, -1e3 * A]))
        W = B @ A

        assert true_error(W, factors.B, factors.A) <= relative_error(W, factors)


def test_reported_error_holds_for_random_products(true_error):
    """Law 2 holds for three hundred random products of random sizes and number formats."""
    draw = np.random.default_rng(0)
    formats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    for case in range(300):
        m, n = (int(side) for side in draw.integers(1, 40, 2))
        r, dtype = int(draw.integers(1, min(m, n) + 1)), formats[case % 4]
        B, A = (torch.from_numpy(draw.standard_normal(size)).to(dtype) for size in ((m, r), (r, n)))
        noise = torch.from_numpy(draw.standard_normal((m, n))) * 10.0 ** -int(draw.integers(0, 17))
        W = (B.double() @ A.double() + noise).to(draw.choice(formats))
        reported, true = relative_error(W, Factors(B, A)), true_error(W, B, A)

        assert true <= reported <= true * (1 + 1e-5) + 1e-13
