"""Singular values and short-side vectors by the Gram matrix: every family, and every failure."""

import math

import numpy as np
import pytest
import torch

from eckart.errors import FactorizationError, NonFiniteError, ShapeError
from eckart.linalg import exact, gram
from eckart.linalg.gram import gram_values, short_side_svd
from eckart.linalg.matrices import matrix_with_spectrum
from eckart.linalg.norms import energy


def _numpy_values(W):
    return torch.from_numpy(np.linalg.svd(W.double().numpy(), compute_uv=False))


def _allowed(W, values):
    """What squaring in float64 leaves of the digits; for float64 that of the ladder."""
    return (1e-13 if W.dtype == torch.float64 else 1e-7) * float(values[0])


def _ladder(W):
    """The method without a Gram matrix, or None where there is one."""
    return "gesdd64" if W.dtype == torch.float64 else None


@pytest.fixture
def W():
    """A 12×9 float32 matrix with σ = 4, 3, 2, 1 and five zeros."""
    return matrix_with_spectrum(torch.tensor([4.0, 3.0, 2.0, 1.0]), 12, 9).float()


def test_values_are_those_of_float64(known):
    """Every family in every dtype: numpy's float64 values of the same numbers."""
    true = _numpy_values(known.W)
    for matrix in (known.W, known.W.mT):
        values, method = gram_values(matrix)

        assert values.dtype == torch.float64
        assert float((values - true).abs().max()) <= _allowed(matrix, true)
        assert method == (_ladder(matrix) or "gram64")


def test_large_values_keep_float64_digits(known):
    """σᵢ is exact to k·ε₆₄·σ₁²/σᵢ: far beyond what a float32 SVD can tell."""
    true = _numpy_values(known.W)
    values = gram_values(known.W)[0]
    large = true > 1e-3 * true[0]
    finest = len(true) * torch.finfo(torch.float64).eps * true[0] ** 2

    assert bool(((values - true).abs() * true <= 4 * finest)[large].all())


def test_vectors_are_orthonormal_and_optimal_at_every_rank(known):
    """‖W − U_r U_rᵀ W‖_F² is the Eckart–Young tail and 4kε₆₄·‖W‖_F² at most, at every rank."""
    for matrix in (known.W, known.W.mT):
        short = short_side_svd(matrix)
        wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().mT
        X, true = short.vectors, _numpy_values(matrix)
        overlap = X.mT @ X - torch.eye(len(X), dtype=torch.float64)

        assert X.dtype == short.values.dtype == torch.float64
        assert float(overlap.abs().max()) < (1e-13 if short.method == "gram64" else 1e-14)
        assert float((short.values - true).abs().max()) <= _allowed(matrix, true)
        for rank in range(len(X) + 1):
            missed = energy(wide - X[:, :rank] @ (X[:, :rank].mT @ wide))
            noise = 4 * len(X) * torch.finfo(torch.float64).eps * energy(wide)

            assert missed <= energy(true[rank:]) * (1 + 1e-9) + noise


def test_energy_method_and_sign_are_reported(known):
    """The energy is ‖W‖_F², the method names the way, and each vector's largest entry is > 0."""
    short = short_side_svd(known.W)
    tops = short.vectors.gather(0, short.vectors.abs().argmax(0, keepdim=True))

    assert short.energy == pytest.approx(known.norm**2, rel=1e-13)
    assert short.method == (_ladder(known.W) or "gram64")
    assert bool((tops > 0).all())


@pytest.mark.parametrize("shape", [(70, 50), (50, 70), (64, 64), (5, 200), (200, 5)])
@pytest.mark.parametrize(("panel", "entries"), [(16, 1), (7, 500), (512, 2**21)])
def test_blocks_of_any_size_give_the_same_values(shape, panel, entries, monkeypatch):
    """Uneven panels and blocks, many and one, agree to rounding."""
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(gram, "PANEL", panel)
    monkeypatch.setattr(gram, "BLOCK_ENTRIES", entries)
    values, method = gram_values(W)
    short = short_side_svd(W)

    assert method == short.method == "gram64"
    assert torch.allclose(values, _numpy_values(W), rtol=1e-12)
    assert torch.allclose(short.values, values, rtol=1e-12)


def test_large_matrix_is_never_held_in_float64(monkeypatch):
    """Blocks of the long side are widened one at a time, no wider than asked."""
    monkeypatch.setattr(gram, "PANEL", 8)
    monkeypatch.setattr(gram, "BLOCK_ENTRIES", 60)
    widths = [block.shape for block in gram._blocks(torch.ones(6, 33))]

    assert widths == [(6, 10)] * 3 + [(6, 3)]


def test_same_matrix_gives_the_same_bits(W):
    """Two runs agree bit for bit, whatever the global seed."""
    torch.manual_seed(3)
    one = short_side_svd(W)
    torch.manual_seed(4)
    two = short_side_svd(W.clone())

    assert torch.equal(one.vectors, two.vectors)
    assert torch.equal(one.values, two.values)
    assert torch.equal(gram_values(W)[0], gram_values(W.clone())[0])


@pytest.mark.parametrize("compute", [gram_values, short_side_svd])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_entries_are_refused_at_once(compute, bad, dtype, monkeypatch):
    """NaN and Inf raise with the name before any product is formed."""
    monkeypatch.setattr(gram, "_gram", None)
    W = torch.ones(3, 4, dtype=dtype)
    W[1, 2] = bad

    with pytest.raises(NonFiniteError, match=r"layer holds 1 non-finite entry, .* at \[1, 2\]"):
        compute(W, "layer")


@pytest.mark.parametrize("compute", [gram_values, short_side_svd])
def test_what_is_no_matrix_is_refused_by_name(compute):
    """An empty matrix has no values."""
    with pytest.raises(ShapeError, match="layer"):
        compute(torch.zeros(0, 3), "layer")


# Failures. Each fake stands for one way in which an eigensolver may go wrong.


def _raising(*_, **__):
    raise torch.linalg.LinAlgError("did not converge")


def _one_column_off(s, X):
    X[:, 3] += 1e-9 * X[:, 0]
    return s, X


VECTOR_JUNK = {
    "NaN vectors": lambda s, X: (s, X * math.nan),
    "Inf values": lambda s, X: (s * math.inf, X),
    "NaN values": lambda s, X: (s * math.nan, X),
    "zeros": lambda s, X: (s * 0, X * 0),
    "descending": lambda s, X: (s.flip(0), X.flip(1)),
    "wrong scale": lambda s, X: (s * (1 + 1e-9), X),
    "vectors too long": lambda s, X: (s, X * (1 + 1e-9)),
    "vectors in another order": lambda s, X: (s, X.roll(1, 1)),
    "two vectors swapped": lambda s, X: (s.abs(), X[:, [*range(7), 8, 7]]),
    "one vector not orthogonal": _one_column_off,
    "eigenvectors of another matrix": lambda s, X: (s, torch.eye(len(X), dtype=X.dtype)),
    "negative value": lambda s, X: (torch.cat([-s[-1:], s[1:-1], 3 * s[-1:]]), X),
}
VALUE_JUNK = {
    "NaN": lambda s: s * math.nan,
    "zeros": lambda s: s * 0,
    "descending": lambda s: s.flip(0),
    "wrong scale": lambda s: s * (1 + 1e-9),
    "right sum, wrong squares": lambda s: s + torch.tensor([0.0] * 7 + [-1e-6, 1e-6]),
    "negative": lambda s: torch.cat([-s[-1:], s[1:-1], 3 * s[-1:]]),
}


@pytest.mark.parametrize("junk", VECTOR_JUNK)
@pytest.mark.parametrize("transposed", [False, True])
def test_junk_vectors_lead_to_the_ladder(junk, transposed, W, monkeypatch):
    """A result that fails its check is replaced by the ladder's, and the method says so."""
    real = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda G: VECTOR_JUNK[junk](*real(G)))
    short = short_side_svd(W.mT if transposed else W)
    X, wide = short.vectors[:, :4], W.mT.double()

    assert short.method == "gram64→gesdd"
    assert torch.allclose(short.values[:4], torch.tensor([4.0, 3, 2, 1]).double(), atol=1e-5)
    assert float((wide - X @ (X.mT @ wide)).norm()) < 1e-5


@pytest.mark.parametrize("junk", VALUE_JUNK)
def test_junk_values_lead_to_the_ladder(junk, W, monkeypatch):
    """Wrong values are caught by their order, their sum or the sum of their squares."""
    real = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda G: VALUE_JUNK[junk](real(G)))
    values, method = gram_values(W)

    assert method == "gram64→gesdd"
    assert torch.allclose(values[:4], torch.tensor([4.0, 3, 2, 1]).double(), atol=1e-5)


def test_raising_eigensolver_leads_to_the_ladder(W, monkeypatch):
    """A LAPACK failure is a failed check like any other."""
    monkeypatch.setattr(torch.linalg, "eigh", _raising)
    monkeypatch.setattr(torch.linalg, "eigvalsh", _raising)

    assert short_side_svd(W).method == "gram64→gesdd"
    assert gram_values(W)[1] == "gram64→gesdd"


def test_wrong_gram_matrix_leads_to_the_ladder(W, monkeypatch):
    """The vectors are checked against W itself, so that a wrong G does not pass for its own."""
    real = gram._gram

    def turned(W):
        G = real(W)
        return (G + G.tril(-1).mT).roll((1, 1), (0, 1))  # same trace, same norm

    monkeypatch.setattr(gram, "_gram", turned)

    assert short_side_svd(W).method == "gram64→gesdd"


def test_every_rung_below_is_named(W, monkeypatch):
    """Where gesdd in float32 fails as well, the name goes on."""
    real = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "eigh", _raising)
    monkeypatch.setattr(
        torch.linalg,
        "svd",
        lambda W, **options: _raising() if W.dtype == torch.float32 else real(W, **options),
    )

    assert short_side_svd(W).method == "gram64→gesdd64"


def test_other_errors_are_not_swallowed(W, monkeypatch):
    """Only a LAPACK failure leads to the ladder: a MemoryError is not one."""

    def broken(*_, **__):
        raise MemoryError("no memory")

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    monkeypatch.setattr(torch.linalg, "eigvalsh", broken)

    for compute in (gram_values, short_side_svd):
        with pytest.raises(MemoryError):
            compute(W)


# The limits of LAPACK's 32-bit integers, moved to where a test can reach them.


@pytest.mark.parametrize("compute", [gram_values, short_side_svd])
def test_order_limit_is_that_of_the_ladder(compute, monkeypatch):
    """One below the limit is decomposed, the limit itself is refused by name."""
    monkeypatch.setattr(exact, "LAPACK_ORDER", 8)
    compute(torch.ones(7, 30))

    with pytest.raises(FactorizationError, match=r"layer \(30×8\)"):
        compute(torch.ones(30, 8), "layer")


@pytest.mark.parametrize("shape", [(100, 7), (7, 100)])
def test_long_side_has_no_limit(shape, monkeypatch):
    """Beyond LAPACK's entries the Gram matrix of the short side needs no QR."""
    monkeypatch.setattr(exact, "LAPACK_ENTRIES", 600)
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    assert gram_values(W)[1] == short_side_svd(W).method == "gram64"
    assert torch.allclose(short_side_svd(W).values, _numpy_values(W), rtol=1e-12)
    assert short_side_svd(W.double()).method == "tall-gesdd64"
