"""A matrix as a product: its invariants, and the forms it can take."""

import itertools
import math

import pytest
import torch

from eckart.errors import NonFiniteError, RankError, ShapeError, UsageError
from eckart.linalg.exact import exact_svd
from eckart.linalg.factors import (
    Factors,
    PivotedFactors,
    factorize,
    from_short_side,
    pivot,
    product_energy,
    product_spectrum,
    recompress,
    split,
)
from eckart.linalg.gram import short_side_svd
from eckart.linalg.matrices import matrix_with_spectrum


def _random(m, n, seed=0, precision=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, dtype=precision, generator=generator)


def _factors(m, r, n, precision=torch.float64):
    return Factors(_random(m, r, 1, precision), _random(r, n, 2, precision))


def _unchecked(kind, **parts):
    """A value as users make it: the tests' shape checker would refuse the parts before it does."""
    value = object.__new__(kind)
    for name, part in parts.items():
        object.__setattr__(value, name, part)
    value.__post_init__()
    return value


FORMS = {
    "factors": lambda: _factors(9, 3, 7),
    "one component": lambda: _factors(9, 1, 7),
    "more components than rows": lambda: _factors(4, 6, 5),
    "pivoted": lambda: pivot(_factors(9, 3, 7)),
    "pivoted, full rank": lambda: pivot(_factors(3, 3, 7)),
    "pivoted, one row": lambda: pivot(_factors(1, 1, 7)),
}


@pytest.mark.parametrize("form", FORMS)
def test_product_rows_and_applications_agree(form):
    """product, rows, apply and apply_transposed are four views of one matrix."""
    factors = FORMS[form]()
    (m, n), W = factors.shape, factors.product()
    x, y = _random(5, n, 3), _random(5, m, 4)

    assert tuple(W.shape) == (m, n)
    assert torch.allclose(factors.rows(0, m), W)
    assert torch.allclose(factors.apply(x), x @ W.mT)
    assert torch.allclose(factors.apply_transposed(y), y @ W)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_any_range_are_those_of_the_product(form):
    """Every range start … stop, also an empty one and one beyond the end, slices the product."""
    factors = FORMS[form]()
    W = factors.product()
    for start, stop in itertools.combinations_with_replacement(range(len(W) + 3), 2):
        assert torch.allclose(factors.rows(start, stop), W[start:stop])


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_taken_out_in_place(form):
    """What is left of some rows of a matrix is what the product's rows miss."""
    factors = FORMS[form]()
    m, n = factors.shape
    for start, stop in itertools.combinations_with_replacement(range(m + 1), 2):
        rows = _random(stop - start, n, 6)
        expected = rows - factors.product()[start:stop]
        factors.subtract_from(rows, start)

        assert torch.allclose(rows, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_applications_take_any_leading_dimensions(form, lead):
    """One vector, a batch and a batch of sequences are all (…, n)."""
    factors = FORMS[form]()
    m, n = factors.shape

    assert factors.apply(torch.ones(*lead, n, dtype=torch.float64)).shape == (*lead, m)
    assert factors.apply_transposed(torch.ones(*lead, m, dtype=torch.float64)).shape == (*lead, n)


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_float64_in_any_dtype(form, dtype):
    """rows is float64 of the stored numbers, so that errors can be measured."""
    factors = FORMS[form]().to(dtype)
    exact = factors.to(torch.float64)

    assert factors.product().dtype == dtype
    assert torch.equal(factors.rows(0, 4), exact.rows(0, 4))


def test_inner_dimensions_must_agree():
    """B m×r and A r×n share r, or the error shows both shapes."""
    with pytest.raises(ShapeError, match=r"B \(4, 2\) and A \(3, 5\)"):
        _unchecked(Factors, B=torch.ones(4, 2), A=torch.ones(3, 5))


def test_factors_are_frozen():
    """A factorization is a value: its parts cannot be replaced."""
    factors = _factors(4, 2, 3)

    with pytest.raises(AttributeError):
        factors.B = torch.ones(4, 2)


@pytest.mark.parametrize(
    ("A", "K", "rows"), [((2, 5), (3, 3), 5), ((2, 5), (3, 2), 4), ((2, 5), (3, 2), 6)]
)
def test_pivoted_parts_must_fit(A, K, rows):
    """K is (m − r)×r and perm has m entries, or the error shows the shapes."""
    with pytest.raises(ShapeError, match="do not fit"):
        _unchecked(PivotedFactors, A=torch.ones(A), K=torch.ones(K), perm=torch.arange(rows))


@pytest.mark.parametrize("perm", [[0, 1, 2, 2], [1, 2, 3, 4], [-1, 0, 1, 2], [0, 0, 0, 0]])
def test_perm_must_be_a_permutation(perm):
    """A row that occurs twice, or not at all, is refused."""
    with pytest.raises(ShapeError, match="not a permutation"):
        PivotedFactors(torch.ones(2, 5), torch.ones(2, 2), torch.tensor(perm))


def test_perm_places_the_rows():
    """W'[perm] = [A; K·A], spelled out on a small case."""
    A, K = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0, 1.0]])
    product = PivotedFactors(A, K, torch.tensor([2, 0, 1])).product()

    assert product.tolist() == [[3.0, 4.0], [13.0, 24.0], [1.0, 2.0]]


@pytest.mark.parametrize(("m", "r", "n"), [(10, 2, 10), (9, 1, 3), (5, 5, 7), (1, 1, 1), (8, 3, 3)])
def test_parameters_are_counted(m, r, n):
    """r(m + n) numbers in B and A, r(m + n − r) in the pivoted form."""
    factors = _factors(m, r, n)
    short = pivot(factors)

    assert factors.parameters == r * (m + n)
    assert short.parameters == r * (m + n - r)
    assert (short.rank, short.shape) == (r, (m, n))


def test_balanced_split_gives_both_sides_the_root():
    """BᵀB = AAᵀ = diag(σ): both factors have the same norm."""
    svd = exact_svd(_random(9, 6))
    factors = split(svd)

    assert torch.allclose(factors.B.mT @ factors.B, svd.s.diag(), atol=1e-12)
    assert torch.allclose(factors.A @ factors.A.mT, svd.s.diag(), atol=1e-12)
    assert torch.allclose(factors.product(), _random(9, 6), atol=1e-12)


def test_unbalanced_split_is_the_textbooks():
    """B = U diag(σ) and A = Vh, whose rows are orthonormal."""
    svd = exact_svd(_random(9, 6))
    factors = split(svd, balanced=False)

    assert torch.equal(factors.A, svd.Vh)
    assert torch.equal(factors.B, svd.U * svd.s)
    assert torch.allclose(factors.product(), _random(9, 6), atol=1e-12)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_factorize_meets_the_closed_form_at_a_rank(rank, balanced, true_error):
    """σ = 4, 3, 2, 1: at rank r the error is the root of what the others hold."""
    values = torch.tensor([4.0, 3.0, 2.0, 1.0])
    W = matrix_with_spectrum(values, 12, 9)
    factors = factorize(W, rank=rank, balanced=balanced)
    optimum = math.sqrt(float((values[rank:] ** 2).sum()) / 30)

    assert true_error(W, factors.B, factors.A) == pytest.approx(optimum, abs=1e-14)


def test_factorize_meets_energy_and_error_with_the_smallest_rank(true_error):
    """Just below what r values hold, r is chosen; just above it, r + 1."""
    W = matrix_with_spectrum(torch.tensor([4.0, 3.0, 2.0, 1.0]), 12, 9)
    for rank, kept in enumerate((16 / 30, 25 / 30, 29 / 30), start=1):
        below, above = (factorize(W, energy=kept + step) for step in (-1e-9, 1e-9))
        wide, tight = (factorize(W, error=math.sqrt(1 - kept + step)) for step in (1e-9, -1e-9))

        assert (below.rank, above.rank, wide.rank, tight.rank) == (rank, rank + 1, rank, rank + 1)
        assert true_error(W, wide.B, wide.A) <= math.sqrt(1 - kept + 1e-9)


def test_zero_matrix_is_one_component_of_zeros(dtype):
    """A zero matrix has a factorization, of rank 1, whose product is zero."""
    for request in ({"rank": 1}, {"energy": 0.9}, {"error": 0.1}):
        factors = factorize(torch.zeros(5, 4, dtype=dtype), **request)

        assert factors.rank == 1
        assert not bool(factors.product().any())


@pytest.mark.parametrize(
    "request_", [{}, {"rank": 1, "energy": 0.5}, {"rank": 1, "error": 0.5}, {"energy": 0.0}]
)
def test_exactly_one_sensible_request_is_needed(request_):
    """None, two, or an impossible one is a usage error."""
    with pytest.raises(UsageError):
        factorize(torch.eye(3), **request_)


@pytest.mark.parametrize("rank", [0, 4])
def test_rank_beyond_the_matrix_is_refused_by_name(rank):
    """The error names the matrix and the range."""
    with pytest.raises(RankError, match=r"layer.*choose 1 to 3"):
        factorize(torch.eye(3), rank=rank, name="layer")


def test_factors_that_overflow_their_dtype_are_refused():
    """σ₁ = 3·10⁶ does not fit float16 on one side, but its root does on both."""
    W = torch.full((100, 100), 3e4, dtype=torch.float16)

    assert factorize(W, rank=1).rank == 1
    with pytest.raises(NonFiniteError, match="factors of layer overflow float16"):
        factorize(W, rank=1, balanced=False, name="layer")


def test_factorize_names_the_matrix_it_refuses():
    """A NaN is reported under the matrix's own name."""
    with pytest.raises(NonFiniteError, match="layer holds 1"):
        factorize(torch.tensor([[1.0, math.nan]]), rank=1, name="layer")


@pytest.mark.parametrize(
    ("m", "r", "n"), [(12, 4, 9), (9, 1, 12), (40, 20, 30), (6, 6, 6), (1, 1, 4)]
)
def test_pivot_keeps_the_product(m, r, n, true_error):
    """The pivoted form is the same matrix, to rounding."""
    factors = _factors(m, r, n)
    short = pivot(factors)
    W = factors.product()

    assert true_error(W, short.product()) < 1e-13


def test_pivot_keeps_pivot_rows_themselves():
    """A holds r rows of the product, bit for bit as B·A gives them."""
    factors = _factors(12, 4, 9)
    short = pivot(factors)

    assert torch.allclose(short.A, factors.product()[short.perm[:4]], rtol=1e-14, atol=1e-14)
    assert torch.equal(short.product()[short.perm[:4]], short.A)


@pytest.mark.parametrize("true_rank", [0, 1, 2, 3])
def test_pivot_of_a_rank_deficient_factor_keeps_the_product(true_rank):
    """Where B has fewer independent columns than r, K is zero beyond them, and finite."""
    B = (
        _random(10, true_rank) @ _random(true_rank, 4, 5)
        if true_rank
        else torch.zeros(10, 4).double()
    )
    factors = Factors(B, _random(4, 8, 6))
    short = pivot(factors)

    assert bool(torch.isfinite(short.K).all())
    assert not bool(short.K[:, true_rank:].any())
    assert torch.allclose(short.product(), factors.product(), atol=1e-12)


def test_pivot_rows_bound_k():
    """Pivoting keeps |K| far below its worst case: rows are combined, never blown up."""
    for seed in range(20):
        B = _random(60, 12, seed) * 10.0 ** -torch.linspace(0, 8, 12, dtype=torch.float64)
        K = pivot(Factors(B, _random(12, 5))).K

        assert float(K.abs().max()) < 8


def test_pivot_needs_as_many_rows_as_columns():
    """An overfull product has no pivoted form until it is recompressed."""
    with pytest.raises(ShapeError, match="4×6"):
        pivot(_factors(4, 6, 5))


def test_pivot_is_the_same_every_time():
    """Two calls choose the same rows and give the same bits."""
    one, two = pivot(_factors(20, 5, 9)), pivot(_factors(20, 5, 9))

    assert torch.equal(one.perm, two.perm)
    assert torch.equal(one.K, two.K)


@pytest.mark.parametrize("r", [1, 3, 6, 12])
def test_recompress_is_the_svd_of_the_product(r):
    """Without forming B·A its singular values come out, whatever the inner dimension."""
    factors = _factors(9, r, 7)
    svd = recompress(factors)
    expected = exact_svd(factors.product())
    k = min(r, 7)

    assert svd.method == "core"
    assert svd.shape == (9, 7)
    assert svd.rank == k
    assert torch.allclose(svd.s, expected.s[:k], atol=1e-12)
    assert svd.energy == pytest.approx(expected.energy)
    assert torch.allclose(split(svd).product(), factors.product(), atol=1e-12)


@pytest.mark.parametrize(("m", "r", "n"), [(9, 3, 7), (4, 6, 5), (1, 1, 1), (5, 9, 20), (7, 1, 2)])
def test_spectrum_and_energy_of_a_product_are_those_of_the_matrix(m, r, n):
    """Without forming it: more columns than rows too, and all of its zeros."""
    factors = _factors(m, r, n)
    W = factors.product()
    spectrum = product_spectrum(factors)

    assert spectrum.complete
    assert torch.allclose(spectrum.values, torch.linalg.svdvals(W), atol=1e-13)
    assert spectrum.energy == pytest.approx(float(W.square().sum()), rel=1e-13)
    assert product_energy(factors) == pytest.approx(float(W.square().sum()), rel=1e-13)


def test_the_energy_of_a_product_keeps_its_digits_where_its_terms_cancel():
    """‖B‖·‖A‖ is 10⁸ times ‖BA‖: a trace of Gram matrices would have lost them all."""
    B, A = _random(20, 2), _random(2, 30)
    A[1] = -A[0] + 1e-8 * A[1]
    B[:, 1] = B[:, 0]
    exact = float((B[:, :1] @ (A[0] + A[1])[None]).square().sum())

    assert product_energy(Factors(B, A)) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_recompress_at_a_rank_is_the_optimum(rank, true_error):
    """A product with known values is cut to its closed-form optimum."""
    values = torch.tensor([4.0, 3.0, 2.0, 1.0])
    W = matrix_with_spectrum(values, 12, 9)
    whole = factorize(W, rank=4)
    wasteful = Factors(torch.cat([whole.B, whole.B], 1), torch.cat([whole.A / 2, whole.A / 2]))
    factors = split(recompress(wasteful, rank=rank))
    optimum = math.sqrt(float((values[rank:] ** 2).sum()) / 30)

    assert true_error(W, factors.B, factors.A) == pytest.approx(optimum, abs=1e-14)


def test_recompress_by_energy_and_error_finds_the_rank():
    """The smallest rank for an energy or an error, as for a dense matrix."""
    whole = factorize(matrix_with_spectrum(torch.tensor([4.0, 3.0, 2.0, 1.0]), 12, 9), rank=4)

    assert recompress(whole, energy=0.7).rank == 2
    assert recompress(whole, error=math.sqrt(5 / 30) + 1e-9).rank == 2
    assert recompress(Factors(torch.ones(6, 3), torch.ones(3, 4)), error=1e-6).rank == 1


def test_recompress_of_half_precision_factors_is_float32(dtype):
    """The core is computed in float64 and given back in float32 at least."""
    svd = recompress(_factors(8, 3, 6, torch.float32).to(dtype))

    assert (
        svd.U.dtype == svd.s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    )


def test_recompress_never_forms_the_product():
    """Two factors of 200 000 rows need no 200 000² matrix (160 GB)."""
    factors = Factors(torch.ones(200_000, 2), torch.ones(2, 200_000))

    assert float(recompress(factors, rank=1).s[0]) == pytest.approx(400_000, rel=1e-5)


def test_recompress_knows_every_singular_value_of_the_product():
    """Those beyond the core are zero, so the spectrum is complete and the error at full rank 0."""
    B, A = torch.arange(18.0).reshape(9, 2), torch.arange(14.0).reshape(2, 7)
    spectrum = recompress(Factors(B, A), rank=1).spectrum

    assert spectrum.complete
    assert spectrum.relative_error(2) == 0
    assert 0 < spectrum.relative_error(1) < 1


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (24, 24)])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_factors_from_the_short_side_are_optimal_balanced_and_nested(shape, wide):
    """From vectors of one side only: the closed-form error at every rank, norms equal."""
    values = torch.arange(1, 21, dtype=torch.float64) ** -1.0
    W = matrix_with_spectrum(values, *shape)
    short = short_side_svd(W)
    full = from_short_side(W, short.vectors.mT[:12], short.values[:12], wide)
    for rank in (1, 5, 12):
        f = from_short_side(W, short.vectors.mT[:rank], short.values[:rank], wide)
        missed = float((W - f.product().double()).norm())

        assert missed == pytest.approx(float(values[rank:].norm()), rel=1e-5)
        assert torch.allclose(f.B.norm(dim=0), f.A.norm(dim=1), rtol=1e-4)
        assert torch.allclose(f.B, full.B[:, :rank], atol=1e-6)
        assert torch.allclose(f.A, full.A[:rank], atol=1e-6)


def test_a_zero_value_gives_zero_factors():
    """No division by it."""
    f = from_short_side(torch.zeros(3, 4), torch.eye(3)[:2], torch.zeros(2), torch.float64)

    assert not f.B.any()
    assert not f.A.any()
