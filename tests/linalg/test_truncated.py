"""The public truncated SVD: requests, the cost rule, both methods, and every way out of trouble.

Some cases follow the ideas, not the text, of scipy's `interpolative` tests and of torch's for
`svd_lowrank`.
"""

import inspect
import math

import numpy as np
import pytest
import torch

from eckart.errors import (
    DtypeError,
    FactorizationError,
    NonFiniteError,
    RankError,
    ShapeError,
    UsageError,
)
from eckart.linalg import exact, truncated
from eckart.linalg.matrices import matrix_with_spectrum, random_low_rank
from eckart.linalg.rank import matrix_rank
from eckart.linalg.truncated import beyond_lapack, prefers_exact, truncated_svd

METHODS = ["exact", "randomized"]

unchecked = inspect.unwrap(truncated_svd)
"""`truncated_svd` as users get it: the tests' type checker would refuse a wrong type before it."""


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def _error(W, svd):
    W = W.double()
    return float((W - (svd.U.double() * svd.s.double()) @ svd.Vh.double()).norm())


def _hilbert(m, n):
    """The classic of interpolative decompositions: 1/(i + j + 1), of tiny numerical rank."""
    return 1 / (torch.arange(m)[:, None] + torch.arange(n)[None, :] + 1).double()


@pytest.mark.parametrize("method", METHODS)
def test_error_is_the_optimum(method, known, true_error):
    """Law 1 by both methods, on every family and dtype."""
    for rank in known.ranks:
        svd = truncated_svd(known.W, rank=rank, method=method)
        eps = torch.finfo(svd.s.dtype).eps
        allowed = 50 * eps * math.sqrt(max(known.shape)) * known.norm
        missed = true_error(known.W, svd.U.double() * svd.s.double(), svd.Vh) * known.norm

        assert svd.rank == rank
        assert svd.s.dtype == (torch.float64 if known.W.dtype == torch.float64 else torch.float32)
        assert missed <= (1 + 1e-3) * known.optimum(rank) + allowed


@pytest.mark.parametrize("method", METHODS)
def test_energy_and_error_are_met_by_the_smallest_rank(method, known):
    """The computed values say that the rank suffices, and that one less would not."""
    total = float(known.W.double().square().sum())
    if total == 0 and bool(known.W.any()):
        pytest.skip("the squares underflow even in float64")
    for share in (0.5, 0.9, 0.999):
        svd = truncated_svd(known.W, energy=share, method=method)
        again = truncated_svd(known.W, error=math.sqrt(1 - share), method=method)
        kept = svd.s.double().square().cumsum(0)

        assert again.rank == svd.rank
        assert float(kept[-1]) >= (share - 1e-5) * total
        assert svd.rank == 1 or float(kept[-2]) < (share + 2e-3 * (1 - share) + 1e-5) * total


@pytest.mark.parametrize(("request_", "word"), [
    ({}, "none of them"),
    ({"rank": 2, "energy": 0.5}, "rank and energy"),
    ({"rank": 2, "energy": 0.5, "error": 0.5}, "rank and energy and error"),
])  # fmt: skip
def test_exactly_one_request(request_, word):
    """None or several of rank, energy and error are refused, and named."""
    with pytest.raises(UsageError, match=word):
        truncated_svd(torch.eye(4), **request_)


@pytest.mark.parametrize("request_", [
    {"energy": 0.0}, {"energy": 1.1}, {"energy": math.nan}, {"error": -0.1}, {"error": 1.0},
    {"error": math.nan}, {"rank": 2, "accuracy": 0.0}, {"rank": 2, "accuracy": 1.0},
    {"rank": 2, "accuracy": math.nan},
])  # fmt: skip
def test_request_out_of_range(request_):
    """Shares and accuracies outside their range are usage errors."""
    with pytest.raises(UsageError, match="out of range"):
        truncated_svd(torch.eye(4), **request_)


def test_unknown_method():
    """A misspelt method is a usage error that lists the right ones."""
    with pytest.raises(UsageError, match="auto, exact or randomized"):
        unchecked(torch.eye(4), rank=1, method="random")


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_rank_out_of_range(rank):
    """A rank below 1 or above min(m, n) is a RankError naming the matrix."""
    with pytest.raises(RankError, match=r"layer\.7"):
        truncated_svd(torch.ones(4, 6), rank=rank, name="layer.7")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_non_finite_entry(method, value):
    """NaN and Inf are refused at once, with the matrix's name, whatever the method."""
    W = torch.ones(300, 280)
    W[3, 5] = value

    with pytest.raises(NonFiniteError, match=r"layer\.7"):
        truncated_svd(W, rank=2, method=method, name="layer.7")


def test_what_is_no_matrix():
    """Empty, not two-dimensional or of a wrong dtype: refused by the border."""
    with pytest.raises(ShapeError):
        truncated_svd(torch.ones(0, 3), rank=1)
    with pytest.raises(ShapeError):
        truncated_svd(torch.ones(3), rank=1)
    with pytest.raises(DtypeError):
        truncated_svd(torch.ones(3, 3, dtype=torch.int64), rank=1)


@pytest.mark.parametrize("method", METHODS)
def test_numpy_and_dlpack_are_taken(method):
    """The same numbers from torch, numpy and DLPack give the same bits."""
    W = torch.randn(60, 50, generator=_seeded())

    class Foreign:
        """What another array library looks like."""

        def __dlpack__(self, *, stream=None):
            return W.__dlpack__(stream=stream)

        def __dlpack_device__(self):
            return W.__dlpack_device__()

    expected = truncated_svd(W, rank=3, method=method)
    for array in (W.numpy(), Foreign()):
        svd = truncated_svd(array, rank=3, method=method)

        assert torch.equal(svd.U, expected.U)
        assert torch.equal(svd.s, expected.s)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "reversed"])
def test_any_memory_layout(layout, method):
    """Views are factored as what they show, and are not written to."""
    base = torch.randn(60, 50, generator=_seeded())
    W = {
        "transposed": base.mT,
        "strided": base[::2, ::3],
        "expanded": base[:1].expand(60, 50),
        "reversed": base.numpy()[::-1, ::-1],
    }[layout]
    before = base.clone()
    svd = truncated_svd(W, rank=1, method=method)
    dense = torch.as_tensor(np.ascontiguousarray(W) if layout == "reversed" else W)
    values = torch.linalg.svdvals(dense.double())

    assert _error(dense, svd) <= (1 + 1e-3) * float(values[1:].norm()) + 1e-4
    assert torch.equal(base, before)


def test_left_vectors_point_up():
    """The largest entry of each left vector is positive, so equal inputs have equal factors."""
    W = torch.randn(70, 60, generator=_seeded())
    one = truncated_svd(W, rank=4, method="randomized", generator=_seeded(1))
    two = truncated_svd(-W, rank=4, method="randomized", generator=_seeded(2))
    top = one.U.gather(0, one.U.abs().argmax(0, keepdim=True))

    assert bool((top > 0).all())
    assert torch.allclose(one.s, two.s, rtol=1e-3)


def test_diagonal_matrix_by_every_seed():
    """diag(2, 1) is its own SVD: every seed and method returns it (scikit-learn's case)."""
    W = torch.diag(torch.tensor([2.0, 1.0]))
    for seed in range(5):
        svd = truncated_svd(W, rank=2, method="randomized", generator=_seeded(seed))

        assert torch.allclose(svd.U, torch.eye(2), atol=1e-6)
        assert torch.allclose(svd.Vh, torch.eye(2), atol=1e-6)
        assert svd.s.tolist() == pytest.approx([2.0, 1.0])


@pytest.mark.parametrize("shape", [(100, 200), (200, 100), (100, 100)])
@pytest.mark.parametrize("rank", [1, 3, 10])
def test_spectral_error_is_the_next_value(shape, rank):
    """With a tail of 10⁻⁵ under the rank, ‖W − U diag(s) Vh‖₂ is that tail (fbpca's case)."""
    values = torch.cat([torch.ones(rank), 1e-5 * torch.ones(100 - rank)]).double()
    W = matrix_with_spectrum(values, *shape)
    svd = truncated_svd(W, rank=rank, method="randomized")
    missed = W - (svd.U * svd.s) @ svd.Vh

    assert float(torch.linalg.matrix_norm(missed, 2)) == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_hilbert_matrix(method):
    """A numerical rank of a dozen: found for a fixed error, and right at a fixed rank (scipy)."""
    W = _hilbert(300, 290)
    values = torch.linalg.svdvals(W)
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt() / values.norm()
    svd = truncated_svd(W, error=1e-10, method=method)
    fixed = truncated_svd(W, rank=8, method=method)

    assert abs(svd.rank - int((tails > 1e-10).sum())) <= 1
    assert _error(W, svd) <= 1e-10 * float(values.norm())
    assert _error(W, fixed) <= (1 + 1e-3) * float(values[8:].norm()) + 1e-14
    assert matrix_rank(W) >= svd.rank


@pytest.mark.parametrize("size", [(17, 4), (4, 17), (17, 17), (60, 100)])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_low_rank_is_exact(size, rank):
    """A matrix of the asked rank is reproduced, tall, wide and square (torch's case)."""
    W = random_low_rank(*size, rank, dtype=torch.float64)
    svd = truncated_svd(W, rank=rank, method="randomized")

    assert _error(W, svd) <= 1e-13 * float(W.norm())
    assert (svd.U.shape, svd.Vh.shape) == ((size[0], rank), (rank, size[1]))


@pytest.mark.parametrize("rank", [1, 8, 24])
def test_low_rank_matrix_never_costs_a_dense_svd(rank, monkeypatch):
    """Exactly low rank, its tail is rounding: measured, accepted, and LAPACK is not called."""
    monkeypatch.setattr(truncated, "exact_svd_checked", _forbidden)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        W = random_low_rank(400, 330, 8).to(dtype)
        svd = truncated_svd(W, rank=rank)

        assert svd.method == "krylov"
    for error in (0.1, 1e-3, 1e-4):
        assert truncated_svd(random_low_rank(400, 330, 8), error=error).rank <= 8


def _forbidden(*_):
    raise AssertionError("LAPACK was called on the whole matrix")


@pytest.mark.parametrize("method", METHODS)
def test_zero_matrix(method):
    """Zeros have any orthonormal vectors, and the smallest rank there is."""
    for shape in ((5, 3), (3, 5)):
        W = torch.zeros(shape)
        svd = truncated_svd(W, rank=2, method=method)

        assert svd.s.tolist() == [0.0, 0.0]
        assert svd.energy == 0
        assert torch.allclose(svd.U.mT @ svd.U, torch.eye(2))
        assert torch.allclose(svd.Vh @ svd.Vh.mT, torch.eye(2))
        assert truncated_svd(W, energy=0.9, method=method).rank == 1
        assert truncated_svd(W, error=0.1, method=method).rank == 1


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1.0, 1e30, 1e36])
def test_scale_changes_nothing(scale):
    """From subnormal to nearly overflowing float32: the same vectors, values scaled."""
    W = matrix_with_spectrum(torch.arange(40.0, 0.0, -1.0), 50, 40)
    W = W / float(W.abs().max())
    small = (W * scale).float()
    svd = truncated_svd(small, rank=3, method="randomized")
    reference = torch.linalg.svdvals(small.double())
    tail = float(reference[3:].norm())

    assert _error(small, svd) <= (1 + 1e-3) * tail + 1e-4 * float(reference[0])
    assert svd.energy == pytest.approx(float(small.double().square().sum()), rel=1e-6)


def test_value_beyond_the_dtype_is_an_error():
    """Where σ₁ overflows float32 the matrix is named, not silently given Inf."""
    W = torch.full((300, 300), 3e38)

    with pytest.raises(NonFiniteError, match=r"layer overflows"):
        truncated_svd(W, rank=1, method="randomized", name="layer")


def test_energy_of_the_whole_matrix_is_known():
    """‖W‖_F² comes with the triplets, so the tail of the spectrum is known too."""
    W = torch.randn(300, 280, generator=_seeded())
    svd = truncated_svd(W, rank=5)

    assert svd.method == "krylov"
    assert svd.energy == pytest.approx(float(W.double().square().sum()), rel=1e-7)
    assert svd.spectrum.relative_error(5) == pytest.approx(
        _error(W, svd) / float(W.norm()), rel=1e-4
    )


def test_cost_rule():
    """Exact for k = min(m, n) ≤ 256 or rank > k/8; randomized one hair beyond either."""
    assert prefers_exact((256, 10_000), 1)
    assert not prefers_exact((257, 10_000), 32)
    assert prefers_exact((10_000, 257), 33)
    assert not prefers_exact((4096, 4096), 512)
    assert prefers_exact((4096, 4096), 513)
    assert not prefers_exact((4096, 4096), None, 0.01)
    assert prefers_exact((4096, 4096), None, 0.0)
    assert prefers_exact((4096, 4096), None, 1e-14, torch.float32)
    assert not prefers_exact((4096, 4096), None, 1e-14, torch.float64)


def test_cost_rule_is_obeyed():
    """The method that answered is the one the rule names."""
    W = torch.randn(272, 260, generator=_seeded())

    assert truncated_svd(W, rank=32).method == "krylov"
    assert truncated_svd(W, rank=33).method == "gesdd"
    assert truncated_svd(W[:256], rank=8).method == "gesdd"
    assert truncated_svd(W, error=0.0).method == "gesdd"
    assert truncated_svd(W, energy=1.0).rank == 260


def test_exact_after_the_randomized_method_gave_up(monkeypatch):
    """When the steps run out the exact method takes over, and the result says so."""
    monkeypatch.setattr(truncated, "MAX_STEPS", 1)
    W = torch.randn(272, 260, generator=_seeded())
    svd = truncated_svd(W, rank=4)

    assert svd.method == "krylov→gesdd"
    assert svd.excess_estimate == 0
    assert _error(W, svd) == pytest.approx(float(torch.linalg.svdvals(W)[4:].norm()), rel=1e-5)


def test_exact_where_the_error_needs_a_large_rank():
    """A Gaussian matrix at 10 % error needs almost every triplet, which is LAPACK's work."""
    W = torch.randn(272, 260, generator=_seeded())
    svd = truncated_svd(W, error=0.1)

    assert svd.method == "krylov→gesdd"
    assert svd.rank == svd.spectrum.rank_at_error(0.1)


def test_limits_of_lapack():
    """min(m, n) ≥ 23 170 or more than 2³¹ − 1 entries, and nothing less."""
    assert not beyond_lapack((23_169, 60_000))
    assert beyond_lapack((23_170, 23_170))
    assert not beyond_lapack((2**31 - 1, 1))
    assert beyond_lapack((2**31, 1))
    assert not prefers_exact((2**31, 1), 1)


@pytest.fixture
def small_lapack(monkeypatch):
    """A LAPACK that overflows from order 50 on, and may not be called."""
    monkeypatch.setattr(exact, "LAPACK_ORDER", 50)
    monkeypatch.setattr(truncated, "exact_svd_checked", _forbidden)


@pytest.mark.usefixtures("small_lapack")
@pytest.mark.parametrize("request_", [{"rank": 30}, {"energy": 0.3}, {"error": 0.05}])
def test_beyond_lapack_only_the_randomized_method(request_):
    """Whatever the rank, no LAPACK call sees the matrix."""
    W = matrix_with_spectrum(0.9 ** torch.arange(60), 70, 60)
    svd = truncated_svd(W, **request_)

    assert svd.method == "krylov"
    assert _error(W, svd) <= 1.002 * float((0.9 ** torch.arange(60)).double()[svd.rank :].norm())


@pytest.mark.usefixtures("small_lapack")
def test_beyond_lapack_more_steps_are_allowed(monkeypatch):
    """Ten steps are not the end there: a Gaussian matrix and a tight accuracy need more."""
    monkeypatch.setattr(truncated, "MAX_STEPS", 1)
    W = torch.randn(150, 140, generator=_seeded())

    assert truncated_svd(W, rank=4).method == "krylov"


@pytest.mark.usefixtures("small_lapack")
def test_beyond_lapack_failure_is_said(monkeypatch):
    """If even then the accuracy is not reached, that is an error that says what to do."""
    monkeypatch.setattr(truncated, "LIMITLESS_STEPS", 1)
    W = torch.randn(80, 70, generator=_seeded())

    with pytest.raises(FactorizationError, match=r"layer.*80×70.*smaller rank"):
        truncated_svd(W, rank=4, name="layer")


@pytest.mark.usefixtures("small_lapack")
def test_beyond_lapack_exact_is_refused(monkeypatch):
    """Asking for the exact method there is refused by name."""
    monkeypatch.setattr(truncated, "exact_svd_checked", exact.exact_svd_checked)

    with pytest.raises(FactorizationError, match=r"layer.*beyond LAPACK"):
        truncated_svd(torch.ones(60, 60), rank=2, method="exact", name="layer")


def test_excess_is_an_estimate_and_zero_when_exact():
    """The exact method has no excess; the randomized one says what it expects."""
    W = torch.randn(272, 260, generator=_seeded())
    svd = truncated_svd(W, rank=8)
    best = float(torch.linalg.svdvals(W.double())[8:].norm())

    assert truncated_svd(W, rank=8, method="exact").excess_estimate == 0
    assert 0 < svd.excess_estimate <= 1e-3
    assert _error(W, svd) <= (1 + svd.excess_estimate) * best


def test_seed_of_the_process_is_never_used():
    """The default generator is a fresh one with a fixed seed: repeatable, and without traces."""
    W = torch.randn(272, 260, generator=_seeded())
    before = torch.get_rng_state()
    one = truncated_svd(W, rank=8)
    torch.rand(3)
    two = truncated_svd(W, rank=8)
    torch.set_rng_state(before)

    assert torch.equal(one.U, two.U)
    assert torch.equal(one.Vh, two.Vh)


def test_settings_of_the_process_are_left_alone():
    """Threads and default dtype are the same after a call."""
    before = torch.get_num_threads(), torch.get_default_dtype()
    truncated_svd(torch.randn(272, 260, generator=_seeded()), rank=8)

    assert (torch.get_num_threads(), torch.get_default_dtype()) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu():
    """On the GPU the same optimum is met, and the factors stay there."""
    W = torch.randn(300, 280, generator=_seeded())
    svd = truncated_svd(W.cuda(), rank=8)

    assert svd.U.is_cuda
    assert _error(W, truncated_svd(W, rank=8)) == pytest.approx(_error(W.cuda(), svd), rel=1e-3)
