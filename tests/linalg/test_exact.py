"""The exact SVD: LAPACK's test ratios on LAPACK's kinds of matrices, and every rung below."""

import inspect
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from eckart.errors import FactorizationError, NonFiniteError, ShapeError
from eckart.linalg import exact
from eckart.linalg.exact import exact_svd, singular_values
from eckart.linalg.matrices import matrix_with_spectrum

SIZES = [
    (1, 1), (1, 2), (2, 1), (3, 1), (3, 3), (10, 10), (10, 16),
    (16, 10), (16, 16), (30, 30), (30, 40), (40, 30), (40, 40),
]  # fmt: skip
"""The sizes of LAPACK's TESTING/svd.in that are not empty."""


def _spread(values):
    def build(m, n, info):
        k = min(m, n)
        return matrix_with_spectrum(torch.from_numpy(values(k, info).copy()), m, n)

    return build


def _even(k, info):
    """1 … ulp, evenly spaced, as LAPACK's types 3 to 5."""
    return np.linspace(1.0, info.eps, k)


def _geometric(k, _):
    return 1e-12 ** (np.arange(k) / max(k - 1, 1))


def _entries(formula):
    def build(m, n, _):
        i, j = np.indices((m, n))
        return torch.from_numpy(np.asarray(formula(i, j, m, n), dtype=np.float64))

    return build


def _gaussian(m, n, _=None):
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(m + n))


def _column_scales(m, n, info):
    power = 18 if info.dtype == "float64" else 9
    return _gaussian(m, n) * 10.0 ** torch.linspace(-power, power, n, dtype=torch.float64)


def _duplicates(m, n, _):
    return _gaussian(m, n)[:, torch.arange(n) // 2]


KINDS = {
    "zero": _entries(lambda i, j, m, n: 0.0 * i),
    "identity": _entries(lambda i, j, m, n: i == j),
    "evenly spaced": _spread(_even),
    "near underflow": _spread(lambda k, f: _even(k, f) * f.tiny / f.eps),
    "near overflow": _spread(lambda k, f: _even(k, f) * f.max * f.eps),
    "repeated": _spread(lambda k, _: np.ceil((np.arange(k) + 1) / 4)[::-1]),
    "all equal": _spread(lambda k, _: np.ones(k)),
    "exact rank": _spread(lambda k, _: (np.arange(k) < 5) * 1.0),
    "geometric": _spread(_geometric),
    "hilbert": _entries(lambda i, j, m, n: 1.0 / (i + j + 1)),
    "kahan": _entries(
        lambda i, j, m, n: 0.96**i * np.where(i == j, 1.0, np.where(i < j, -0.28, 0.0))
    ),
    "frank": _entries(lambda i, j, m, n: np.where(j >= i - 1, n - np.maximum(i, j), 0)),
    "ones": _entries(lambda i, j, m, n: 1.0 + 0 * i),
    "gaussian": _gaussian,
    "huge": lambda m, n, f: _gaussian(m, n) * 1e30,
    "tiny": lambda m, n, f: _gaussian(m, n) * 1e-30,
    "subnormal": lambda m, n, f: _gaussian(m, n) * f.tiny * f.eps * 700,
    "one subnormal": _entries(lambda i, j, m, n: np.where((i == 0) & (j == 0), 5e-324, 0.0)),
    "column scales": _column_scales,
    "duplicate columns": _duplicates,
    "one large entry": _entries(lambda i, j, m, n: np.where((i == 0) & (j == 0), 1e8, 1.0)),
}


def _one_norm(W):
    return np.abs(W).sum(0).max()


def _ratios(W, svd):
    """LAPACK's R1 to R4 in long double, with numpy: independent of the package's own check."""
    exponent = math.frexp(float(W.abs().max()))[1]  # R1 does not change with the scale of W

    def wide(tensor, shift=0):
        return np.ldexp(tensor.double().numpy().astype(np.longdouble), shift)

    (m, n), ulp = W.shape, torch.finfo(W.dtype).eps
    A, U, s, Vh = wide(W, -exponent), wide(svd.U), wide(svd.s, -exponent), wide(svd.Vh)
    norm, residual, eye = _one_norm(A), _one_norm(A - (U * s) @ Vh), np.eye(len(s))
    # s cannot be finer than the subnormal step, however exactly it was computed.
    step = np.ldexp(np.longdouble(torch.finfo(W.dtype).smallest_normal) * ulp, -exponent)
    first = residual / (norm * max(m, n) * ulp + len(s) * step)
    second = _one_norm(eye - U.T @ U) / (m * ulp)
    third = _one_norm(eye - Vh @ Vh.T) / (n * ulp)
    ordered = (s >= 0).all() and (np.diff(s) <= 0).all()
    return float(first), float(second), float(third), 0.0 if ordered else 1 / ulp


@pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_lapack_ratios_stay_below_ten(kind, precision):
    """R1 to R4 stay below 10 (LAPACK passes 50) on every size of svd.in."""
    for m, n in SIZES:
        W = KINDS[kind](m, n, torch.finfo(precision)).to(precision)
        svd = exact_svd(W)

        assert max(_ratios(W, svd)) < 10, (m, n)
        assert svd.s.dtype == svd.U.dtype == precision
        assert svd.method in {"gesdd", "gesdd64"}


@pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["geometric", "hilbert", "kahan", "frank", "exact rank", "zero"])
def test_lapack_ratios_stay_below_ten_at_128(kind, precision):
    """The hard kinds keep their ratios at a size where LAPACK's blocked code runs."""
    W = KINDS[kind](128, 128, torch.finfo(precision)).to(precision)

    assert max(_ratios(W, exact_svd(W))) < 10


@pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_alone_equal_those_of_the_full_decomposition(kind, precision):
    """LAPACK's R7: the values differ by less than 50·min(m, n)·ulp·σ₁ without the vectors."""
    for m, n in SIZES[::3]:
        W = KINDS[kind](m, n, torch.finfo(precision)).to(precision)
        s, full = singular_values(W), exact_svd(W).s
        step = torch.finfo(precision).smallest_normal * torch.finfo(precision).eps
        allowed = 50 * min(m, n) * torch.finfo(precision).eps * float(full[0]) + step

        assert float((s.double() - full.double()).abs().max()) <= allowed, (m, n)


def test_values_equal_those_that_were_put_in(known_matrix):
    """A matrix with prescribed singular values has them, to rounding."""
    for family in ("slow", "fast", "step", "low rank", "tall", "wide", "repeated"):
        known = known_matrix(family)
        allowed = 1e-13 * float(known.values[0])

        assert torch.allclose(exact_svd(known.W).s, known.values, rtol=0, atol=allowed)
        assert torch.allclose(singular_values(known.W), known.values, rtol=0, atol=allowed)


def test_half_precision_is_decomposed_in_float32(dtype):
    """The factors of a half-precision matrix are float32; of the others, their own dtype."""
    W = torch.diag(torch.tensor([3.0, 2.0, 1.0])).to(dtype)
    svd = exact_svd(W)

    assert svd.s.tolist() == [3.0, 2.0, 1.0]
    assert svd.s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert svd.method == ("gesdd64" if dtype == torch.float64 else "gesdd")


def test_energy_is_summed_in_float64():
    """‖W‖_F² is right where a float32 sum of squares would be infinite or zero."""
    assert exact_svd(torch.full((4, 4), 1e30)).energy == pytest.approx(16e60, rel=1e-6)
    assert exact_svd(torch.full((4, 4), 1e-30)).energy == pytest.approx(16e-60, rel=1e-6)


def test_sign_of_every_pair_is_fixed():
    """The largest entry of each left vector is positive, and W and −W share their left vectors."""
    W = KINDS["gaussian"](12, 9)
    plus, minus = exact_svd(W), exact_svd(-W)
    largest = plus.U.gather(0, plus.U.abs().argmax(0, keepdim=True))

    assert bool((largest > 0).all())
    assert torch.allclose(plus.U, minus.U, atol=1e-12)
    assert torch.allclose(plus.Vh, -minus.Vh, atol=1e-12)


def test_same_matrix_gives_the_same_bits():
    """Two runs agree bit for bit."""
    W = KINDS["gaussian"](40, 30).float()
    one, two = exact_svd(W), exact_svd(W.clone())

    assert torch.equal(one.U, two.U)
    assert torch.equal(one.s, two.s)
    assert torch.equal(one.Vh, two.Vh)


def test_matrix_itself_is_not_changed():
    """Scaling happens on a copy, also where the scale is one."""
    for factor in (1.0, 0.75, 1e30):
        W = KINDS["gaussian"](8, 6).float() * factor
        before = W.clone()
        exact_svd(W)
        singular_values(W)

        assert torch.equal(W, before)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_truncate_keeps_leading_triplets_and_all_values(rank):
    """A cut SVD still knows every singular value, also after a second cut."""
    svd = exact_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    cut = svd.truncate(3).truncate(rank)

    assert cut.rank == rank
    assert cut.shape == (3, 3)
    assert cut.s.tolist() == [3.0, 2.0, 1.0][:rank]
    assert cut.spectrum.values.tolist() == [3.0, 2.0, 1.0]
    assert cut.spectrum.complete
    assert cut.energy == pytest.approx(14.0)


@pytest.mark.parametrize("shape", [(0, 0), (0, 1), (0, 3), (1, 0), (2, 0), (3, 0)])
def test_empty_matrix_is_refused(shape):
    """The empty sizes of svd.in are an error that names the matrix."""
    with pytest.raises(ShapeError, match="layer has shape"):
        exact_svd(torch.zeros(shape), "layer")


@pytest.mark.parametrize("compute", [exact_svd, singular_values])
def test_overflow_of_the_largest_value_is_refused_by_name(compute):
    """Entries that fit float32 with a σ₁ that does not raise, instead of returning Inf."""
    with pytest.raises(NonFiniteError, match=r"layer overflows torch\.float32"):
        compute(torch.full((40, 40), 3e38), "layer")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("compute", [exact_svd, singular_values])
def test_non_finite_entries_are_refused_before_lapack(compute, bad, dtype, monkeypatch):
    """NaN and Inf anywhere raise at once, with the name, the count and the first index."""

    def never(*_, **__):
        raise AssertionError("LAPACK was called")

    monkeypatch.setattr(torch.linalg, "svd", never)
    monkeypatch.setattr(torch.linalg, "svdvals", never)
    monkeypatch.setattr(scipy.linalg, "svd", never)
    for first, second in (((0, 0), (2, 2)), ((0, 2), (1, 0)), ((1, 1), (2, 0)), ((2, 2), (2, 2))):
        W = torch.ones(3, 3, dtype=dtype)
        W[first] = W[second] = bad
        with pytest.raises(NonFiniteError) as raised:
            compute(W, "model.layer")

        count = 1 if first == second else 2
        assert f"model.layer holds {count} non-finite entr" in str(raised.value)
        assert f"({bad}) at [{first[0]}, {first[1]}]" in str(raised.value)


# The ladder. Each fake stands for one way in which a LAPACK has been seen to fail.


def _raising(*_, **__):
    raise torch.linalg.LinAlgError("did not converge")


def _distort(change):
    real = torch.linalg.svd

    def fake(W, full_matrices=True):
        U, s, Vh = (part.clone() for part in real(W, full_matrices=full_matrices))
        return change(U, s, Vh)

    return fake


def _lost_orthogonality(U, s, Vh):
    """What the Gram shortcut does: a perfect residual, a last column that is not orthogonal."""
    U[:, -1] += 0.3 * U[:, 0]
    s[-1] = 0.0
    return U, s, Vh


JUNK = {
    "NaN vectors": lambda U, s, Vh: (U * math.nan, s, Vh),
    "Inf values": lambda U, s, Vh: (U, s * math.inf, Vh),
    "wrong vectors": lambda U, s, Vh: (U.roll(1, 1), s, Vh),
    "wrong scale": lambda U, s, Vh: (U, s * 1.01, Vh),
    "right side not orthogonal": lambda U, s, Vh: (U, s, Vh * 1.001),
    "lost orthogonality": _lost_orthogonality,
    "ascending": lambda U, s, Vh: (U.flip(1), s.flip(0), Vh.flip(0)),
    "negative value": lambda U, s, Vh: (-U, -s, Vh),
    "zeros": lambda U, s, Vh: (U * 0, s * 0, Vh * 0),
}


def _only_in(precision, fake, real):
    def choose(W, *args, **kwargs):
        return (fake if W.dtype == precision else real)(W, *args, **kwargs)

    return choose


def _low_rank_matrix():
    values = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    return matrix_with_spectrum(values, 12, 5).float()


def test_raising_first_rung_leads_to_float64(monkeypatch):
    """Where gesdd raises in float32, gesdd in float64 answers, in float32, and is recorded."""
    fake = _only_in(torch.float32, _raising, torch.linalg.svd)
    monkeypatch.setattr(torch.linalg, "svd", fake)
    W = _low_rank_matrix()
    svd = exact_svd(W)

    assert svd.method == "gesdd64"
    assert svd.s.dtype == torch.float32
    assert max(_ratios(W, svd)) < 10


@pytest.mark.parametrize("junk", JUNK)
def test_junk_of_the_first_rung_is_caught(junk, monkeypatch):
    """A result that LAPACK returns without an error is rejected by the ratios."""
    fake = _only_in(torch.float32, _distort(JUNK[junk]), torch.linalg.svd)
    monkeypatch.setattr(torch.linalg, "svd", fake)
    W = _low_rank_matrix()
    svd = exact_svd(W)

    assert svd.method == "gesdd64"
    assert max(_ratios(W, svd)) < 10


@pytest.mark.parametrize("junk", [*JUNK, "raises"])
@pytest.mark.parametrize("precision", [torch.float64, torch.float32], ids=str)
def test_failing_gesdd_leads_to_gesvd(junk, precision, monkeypatch):
    """Where both gesdd rungs fail, scipy's gesvd answers and is recorded."""
    fake = _raising if junk == "raises" else _distort(JUNK[junk])
    monkeypatch.setattr(torch.linalg, "svd", fake)
    W = _low_rank_matrix().to(precision)
    svd = exact_svd(W)

    assert svd.method == "gesvd64"
    assert svd.s.dtype == precision
    assert max(_ratios(W, svd)) < 10


@pytest.mark.parametrize("junk", JUNK)
def test_failing_ladder_names_the_matrix_and_each_reason(junk, monkeypatch):
    """Where every rung fails, nothing is returned: the error names the matrix and the rungs."""
    real = scipy.linalg.svd

    def gesvd(W, **options):
        parts = (torch.from_numpy(part) for part in real(W, **options))
        return tuple(part.numpy() for part in JUNK[junk](*parts))

    monkeypatch.setattr(torch.linalg, "svd", _distort(JUNK[junk]))
    monkeypatch.setattr(scipy.linalg, "svd", gesvd)

    with pytest.raises(FactorizationError, match=r"layer.*gesdd: .*gesdd64: .*gesvd64: "):
        exact_svd(_low_rank_matrix(), "layer")


def test_ladder_where_every_rung_raises_names_the_matrix(monkeypatch):
    """numpy's and torch's LinAlgError are both taken as a failed rung."""

    def gesvd(*_, **__):
        raise np.linalg.LinAlgError("gesvd failed")

    monkeypatch.setattr(torch.linalg, "svd", _raising)
    monkeypatch.setattr(scipy.linalg, "svd", gesvd)

    with pytest.raises(FactorizationError, match=r"layer.*converge.*converge.*gesvd failed"):
        exact_svd(_low_rank_matrix(), "layer")


def test_other_errors_are_not_swallowed(monkeypatch):
    """Only a LAPACK failure leads to the next rung: a MemoryError is not one."""

    def broken(*_, **__):
        raise MemoryError("no memory")

    monkeypatch.setattr(torch.linalg, "svd", broken)

    with pytest.raises(MemoryError):
        exact_svd(_low_rank_matrix())


VALUE_JUNK = {
    "NaN": lambda s: s * math.nan,
    "wrong scale": lambda s: s * 1.01,
    "ascending": lambda s: s.flip(0),
    "negative": lambda s: -s,
    "too short a tail": lambda s: s * (s > s[1]),
}


@pytest.mark.parametrize("junk", VALUE_JUNK)
def test_values_alone_climb_the_same_ladder(junk, monkeypatch):
    """Wrong values of one rung are caught by their order or by Σσ² = ‖W‖_F²."""
    real, W = torch.linalg.svdvals, _low_rank_matrix()
    expected = singular_values(W)
    calls = []

    def fake(W):
        calls.append(W.dtype)
        return VALUE_JUNK[junk](real(W))

    monkeypatch.setattr(torch.linalg, "svdvals", fake)

    assert torch.allclose(singular_values(W), expected, atol=1e-6)
    assert calls == [torch.float32, torch.float64]


def test_values_alone_name_the_matrix_when_no_rung_holds(monkeypatch):
    """Where no rung gives values that pass, the error names the matrix."""
    monkeypatch.setattr(torch.linalg, "svdvals", _raising)
    monkeypatch.setattr(scipy.linalg, "svd", _raising)

    with pytest.raises(FactorizationError, match=r"layer.*gesdd.*gesdd64.*gesvd64"):
        singular_values(_low_rank_matrix(), "layer")


def test_package_ratios_agree_with_independent_ones():
    """The ratios the ladder acts on are those computed here in long double, to a few units."""
    W = KINDS["gaussian"](30, 40)
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    ours = exact.svd_ratios(W, U, s, Vh)
    theirs = _ratios(W, exact_svd(W))

    assert all(abs(a - b) < 3 for a, b in zip(ours, theirs[:3], strict=True))
    assert exact.svd_ratios(W, U, s * 1.1, Vh)[0] > 1e10


def test_ratio_of_a_zero_matrix_is_zero_or_enormous():
    """A zero matrix passes with zero values and fails with any others."""
    eye, zero = torch.eye(3), torch.zeros(3, 3)

    assert exact.svd_fault(zero, eye, torch.zeros(3), eye) is None
    assert "test ratio" in str(exact.svd_fault(zero, eye, torch.ones(3), eye))


# The limits of LAPACK's 32-bit integers, moved to where a test can reach them.


@pytest.fixture
def seen(monkeypatch):
    """The shapes that torch.linalg.svd and svdvals are called with."""
    shapes, svd, svdvals = [], torch.linalg.svd, torch.linalg.svdvals

    def watched(W, full_matrices=True):
        shapes.append(tuple(W.shape))
        return svd(W, full_matrices=full_matrices)

    def watched_values(W):
        shapes.append(tuple(W.shape))
        return svdvals(W)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    monkeypatch.setattr(torch.linalg, "svdvals", watched_values)
    return shapes


def test_limits_are_those_of_32_bit_integers():
    """The order limit is the first whose workspace 4·min² + 7·min is beyond 2³¹ − 1."""
    order = exact.LAPACK_ORDER

    assert 4 * order**2 + 7 * order > 2**31 - 1 >= 4 * (order - 1) ** 2 + 7 * (order - 1)
    assert exact.LAPACK_ENTRIES == 2**31 - 1


def test_real_limit_is_refused_without_touching_lapack(seen):
    """A 23 170 × 23 170 matrix (one number, expanded) is refused by name, at once."""
    order = exact.LAPACK_ORDER
    huge = torch.ones(1, 1).expand(order, order)

    with pytest.raises(FactorizationError, match=r"layer \(23170×23170\).*small rank"):
        inspect.unwrap(exact.exact_svd_checked)(huge, "layer")
    assert seen == []


@pytest.mark.parametrize("compute", [exact_svd, singular_values])
def test_order_limit_refuses_exactly_from_the_limit_on(compute, seen, monkeypatch):
    """One below the limit is decomposed, the limit itself is refused and never sent to LAPACK."""
    monkeypatch.setattr(exact, "LAPACK_ORDER", 8)
    compute(KINDS["gaussian"](7, 30))
    with pytest.raises(FactorizationError, match="layer"):
        compute(KINDS["gaussian"](8, 30), "layer")

    assert seen == [(7, 30)]


@pytest.mark.parametrize("shape", [(100, 7), (7, 100), (86, 7)])
def test_entry_limit_takes_the_tall_qr(shape, seen, monkeypatch):
    """Beyond the entry limit LAPACK sees the 7×7 core only, and the ratios still hold."""
    monkeypatch.setattr(exact, "LAPACK_ENTRIES", 600)
    W = KINDS["gaussian"](*shape).float()
    svd = exact_svd(W)

    assert seen == [(7, 7)]
    assert svd.method == "tall-gesdd"
    assert max(_ratios(W, svd)) < 10
    assert torch.allclose(singular_values(W), svd.s)


def test_exactly_at_the_entry_limit_lapack_is_asked(seen, monkeypatch):
    """m·n equal to the limit is still one call."""
    monkeypatch.setattr(exact, "LAPACK_ENTRIES", 700)

    assert exact_svd(KINDS["gaussian"](100, 7)).method == "gesdd64"
    assert seen == [(100, 7)]


def test_entry_limit_beyond_two_levels_is_refused(seen, monkeypatch):
    """Where even the stacked R factors exceed the limit, the matrix is refused by name."""
    monkeypatch.setattr(exact, "LAPACK_ENTRIES", 100)

    with pytest.raises(FactorizationError, match="layer"):
        exact_svd(KINDS["gaussian"](100, 7), "layer")
    assert seen == []


def test_tall_path_handles_rank_deficiency(monkeypatch):
    """The QR of a zero or rank-deficient tall matrix still gives orthonormal vectors."""
    monkeypatch.setattr(exact, "LAPACK_ENTRIES", 600)
    for kind in ("zero", "duplicate columns", "exact rank", "column scales"):
        W = KINDS[kind](100, 7, torch.finfo(torch.float64))

        assert max(_ratios(W, exact_svd(W))) < 10, kind
