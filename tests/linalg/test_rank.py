"""The numerical rank: numpy's rule, and the first steps of the worked example."""

import math

import numpy as np
import pytest
import torch

from eckart.errors import NonFiniteError, ShapeError, UsageError
from eckart.linalg.exact import exact_svd
from eckart.linalg.factors import Factors, factorize, pivot
from eckart.linalg.matrices import random_low_rank
from eckart.linalg.rank import matrix_rank, numerical_rank, product_rank

EPS = torch.finfo(torch.float32).eps


def test_identity_has_full_rank(dtype):
    """Every row of the identity counts."""
    assert matrix_rank(torch.eye(4, dtype=dtype)) == 4


def test_identity_with_an_empty_row_lacks_one():
    """A zero on the diagonal costs one."""
    W = torch.eye(4)
    W[3, 3] = 0

    assert matrix_rank(W) == 3


def test_zero_matrix_has_rank_zero(dtype):
    """Nothing is above the threshold 0, as the comparison is strict."""
    assert matrix_rank(torch.zeros(4, 4, dtype=dtype)) == 0
    assert matrix_rank(torch.zeros(1, 1, dtype=dtype)) == 0


@pytest.mark.parametrize("shape", [(), (1,), (4,)])
def test_vector_has_rank_one_unless_it_is_zero(shape):
    """A vector, or a number, has rank 1; a zero one has rank 0."""
    one = torch.zeros(shape)
    one.view(-1)[-1] = 1e-30

    assert matrix_rank(one) == 1
    assert matrix_rank(torch.zeros(shape)) == 0


def test_matrix_of_ones_has_rank_one():
    """Equal rows count once, in a matrix of any shape."""
    for shape in ((1, 1), (4, 4), (1, 9), (9, 1), (3, 50)):
        assert matrix_rank(torch.ones(shape)) == 1


def test_batches_give_one_rank_per_matrix():
    """A stack gives a list, a stack of stacks a list of lists."""
    eye, hole, zero = torch.eye(4), torch.eye(4), torch.zeros(4, 4)
    hole[0, 0] = 0
    stack = torch.stack([eye, hole, zero])

    assert matrix_rank(stack) == [4, 3, 0]
    assert matrix_rank(torch.stack([stack, stack.flip(0)])) == [[4, 3, 0], [0, 3, 4]]
    assert matrix_rank(stack[None, :1]) == [[4]]


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_rank_is_numpys_on_random_batches(precision):
    """On full, deficient and nearly deficient matrices of many shapes numpy says the same."""
    draw = np.random.default_rng(0)
    for _ in range(30):
        m, n = (int(side) for side in draw.integers(1, 20, 2))
        r = int(draw.integers(0, min(m, n) + 1))
        batch = draw.standard_normal((3, m, r)) @ draw.standard_normal((3, r, n))
        batch[1] += 10.0 ** -int(draw.integers(2, 12)) * draw.standard_normal((m, n))
        batch = batch.astype(precision)

        assert matrix_rank(batch) == np.linalg.matrix_rank(batch).tolist()


@pytest.mark.parametrize("rtol", [1e-1, 1e-3, 1e-6])
def test_relative_tolerance_is_numpys(rtol):
    """rtol counts from σ₁, as numpy's does."""
    W = torch.diag(10.0 ** -torch.arange(8, dtype=torch.float64))

    assert matrix_rank(W, rtol=rtol) == np.linalg.matrix_rank(W.numpy(), rtol=rtol)


@pytest.mark.parametrize("atol", [0.5, 2.0, 3.5])
def test_absolute_tolerance_is_numpys(atol):
    """atol alone is numpy's `tol`."""
    W = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64))

    assert matrix_rank(W, atol=atol) == np.linalg.matrix_rank(W.numpy(), tol=atol)


def test_larger_of_the_two_tolerances_counts():
    """A small atol does not switch the relative threshold off, nor the other way round."""
    W = torch.diag(torch.tensor([1.0, 1e-3, 1e-12], dtype=torch.float64))

    assert matrix_rank(W, rtol=1e-2, atol=1e-6) == 1
    assert matrix_rank(W, rtol=1e-6, atol=1e-2) == 1
    assert matrix_rank(W, rtol=0.0, atol=1e-6) == 2
    assert matrix_rank(W, rtol=0.0) == 3


def test_value_exactly_at_the_threshold_does_not_count():
    """σ = σ₁·max(m, n)·ε is out; the next number up is in."""
    at = 4 * EPS
    above = float(np.nextafter(np.float32(at), np.float32(1)))

    assert numerical_rank(torch.tensor([1.0, at]), (4, 2)) == 1
    assert numerical_rank(torch.tensor([1.0, above]), (4, 2)) == 2
    assert numerical_rank(torch.tensor([2.0, 1.0]), (2, 2), atol=1.0) == 1
    assert numerical_rank(torch.tensor([2.0, 1.0 + EPS]), (2, 2), atol=1.0) == 2


def test_threshold_of_a_matrix_is_strict():
    """On a diagonal matrix, whose values are exact, the same holds through the whole function."""
    for precision in (torch.float32, torch.float64):
        at = 4 * torch.finfo(precision).eps
        W = torch.zeros(4, 4, dtype=precision)
        W[0, 0], W[1, 1] = 1, at

        assert matrix_rank(W) == np.linalg.matrix_rank(W.numpy()) == 1
        W[1, 1] = at * 1.001
        assert matrix_rank(W) == np.linalg.matrix_rank(W.numpy()) == 2


def test_threshold_grows_with_the_longer_side():
    """max(m, n) is the longer side, also where it is the number of columns."""
    value = torch.tensor([1.0, 50 * EPS])

    assert numerical_rank(value, (2, 49)) == 2
    assert numerical_rank(value, (49, 2)) == 2
    assert numerical_rank(value, (2, 50)) == 1
    assert numerical_rank(value, (50, 2)) == 1


def test_half_precision_is_taken_at_its_word():
    """The rule for a bfloat16 matrix uses float32's ε, on the entries as they are."""
    W = torch.diag(torch.tensor([1.0, 1e-3, 1e-5])).bfloat16()

    assert matrix_rank(W) == 3
    assert matrix_rank(W, rtol=torch.finfo(torch.bfloat16).eps) == 1


def test_scale_does_not_change_the_rank():
    """A matrix times 10^±30, or in the subnormal range, keeps its rank."""
    W = random_low_rank(10, 10, 2)

    assert [matrix_rank(W * scale) for scale in (1e-30, 1.0, 1e30)] == [2, 2, 2]
    assert matrix_rank(torch.full((5, 5), 1e-42)) == 1


@pytest.mark.parametrize("option", ["rtol", "atol"])
@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
def test_impossible_tolerance_is_refused(option, value):
    """A negative or non-finite tolerance is a usage error that names the option."""
    with pytest.raises(UsageError, match=option):
        matrix_rank(torch.eye(2), **{option: value})


def test_empty_and_non_finite_arrays_are_refused():
    """Neither an empty array nor a NaN has a rank; a bad matrix of a batch has its index told."""
    with pytest.raises(ShapeError, match="layer"):
        matrix_rank(torch.zeros(0, 4), name="layer")
    with pytest.raises(ShapeError, match="layer"):
        matrix_rank(torch.zeros(2, 0, 4), name="layer")
    batch = torch.ones(2, 3, 3)
    batch[1, 2, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"at \[1, 2, 0\]"):
        matrix_rank(batch)


# The worked example: ten lines of algebra that everything else grows from.


@pytest.fixture
def W():
    """A 10×10 matrix of rank 2."""
    return random_low_rank(10, 10, 2)


def test_worked_example_ranks(W):
    """W has rank 2; its full U and V rank 10; its singular values, as a vector, rank 1."""
    svd = exact_svd(W)

    assert matrix_rank(W) == 2
    assert (tuple(svd.U.shape), tuple(svd.s.shape), tuple(svd.Vh.shape)) == (
        (10, 10),
        (10,),
        (10, 10),
    )
    assert [matrix_rank(part) for part in (svd.U, svd.s, svd.Vh)] == [10, 1, 10]


def test_worked_example_leading_parts_have_rank_two(W):
    """U_r, diag(S_r) and V_r have rank 2, and so have B and A."""
    svd = exact_svd(W).truncate(2)
    factors = factorize(W, rank=2, balanced=False)

    assert [matrix_rank(part) for part in (svd.U, svd.s.diag(), svd.Vh)] == [2, 2, 2]
    assert [matrix_rank(part) for part in (factors.B, factors.A)] == [2, 2]
    assert torch.allclose(factors.B, svd.U @ svd.s.diag())
    assert torch.allclose(factors.A, svd.Vh)


def test_worked_example_outputs_and_parameters(W):
    """y = Wx + b and y' = B(Ax) + b agree, with 40 parameters (pivoted: 36) for 100."""
    generator = torch.Generator().manual_seed(3)
    x, b = torch.randn(10, generator=generator), torch.randn(10, generator=generator)
    factors = factorize(W, rank=2)
    short = pivot(factors)

    assert (W.numel(), factors.parameters, short.parameters) == (100, 40, 36)
    assert torch.allclose(W @ x + b, factors.apply(x) + b, atol=1e-5)
    assert torch.allclose(W @ x + b, short.apply(x) + b, atol=1e-5)


@pytest.mark.parametrize(("m", "n", "r"), [(40, 30, 5), (1, 9, 1), (300, 20, 20), (64, 512, 32)])
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_a_product_has_the_rank_of_its_terms(copies, r, m, n, dtype):
    """However often they are given, at whatever scale of either side, of half precision too."""
    g = torch.Generator().manual_seed(m + r)
    B, A = torch.randn(m, r, generator=g).to(dtype), torch.randn(r, n, generator=g).to(dtype)
    weights = torch.rand(copies, generator=g, dtype=torch.float64) * 10.0 ** torch.arange(copies)
    exponents = 10.0 ** torch.linspace(-8, 8, r, dtype=torch.float64)
    given = Factors(
        torch.cat([weight * B.double() * exponents for weight in weights], 1),
        torch.cat([A.double() / exponents[:, None]] * copies),
    )

    assert product_rank(given) == r
    assert product_rank(given.padded(given.rank + 3)) == r


def test_what_cancels_is_no_rank():
    """Terms of size 1 whose sum is zero, or of rank 1: rounding is not counted."""
    g = torch.Generator().manual_seed(0)
    B, A = torch.randn(50, 6, generator=g).double(), torch.randn(6, 40, generator=g).double()
    b, a = torch.randn(50, 1, generator=g).double(), torch.randn(1, 40, generator=g).double()
    nothing = Factors(torch.cat([0.1 * B, -0.1 * B], 1), torch.cat([A, A]))
    little = Factors(torch.cat([0.3 * B, 1e-9 * b, -0.3 * B], 1), torch.cat([A, a, A]))

    assert product_rank(nothing) == 0
    assert product_rank(little) == 1
    assert product_rank(Factors(0 * B, A)) == 0
