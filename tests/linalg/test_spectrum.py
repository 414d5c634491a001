"""Questions to a spectrum, and their off-by-ones."""

import math

import numpy as np
import pytest
import torch

from eckart.errors import RankError, ShapeError, UsageError
from eckart.linalg.matrices import matrix_with_spectrum
from eckart.linalg.spectrum import LOST_DIGITS, Spectrum, break_even_rank


def _spectrum(*values, shape=None, energy=None):
    s = torch.tensor(values, dtype=torch.float64)
    total = float(s.square().sum()) if energy is None else float(energy)
    return Spectrum(shape or (len(values), len(values)), s, total)


def test_energy_rank_is_the_smallest_sufficient_one():
    """Of σ = 4, 3, 2, 1 two hold 25/30 of the energy: 0.7 needs two, not three."""
    s = _spectrum(4, 3, 2, 1)

    assert s.rank_at_energy(0.7) == 2
    assert [s.rank_at_energy(k / 30) for k in (16, 25, 29, 30)] == [1, 2, 3, 4]


@pytest.mark.parametrize(("kept", "rank"), [(16, 1), (25, 2), (29, 3)])
def test_energy_threshold_is_met_exactly_and_missed_by_a_hair(kept, rank):
    """Exactly at what r values hold, r is enough; a hair above, r + 1."""
    s = _spectrum(4, 3, 2, 1)

    assert s.rank_at_energy(kept / 30) == rank
    assert s.rank_at_energy(kept / 30 + 1e-12) == rank + 1
    assert s.rank_at_energy(kept / 30 - 1e-12) == rank


@pytest.mark.parametrize(("lost", "rank"), [(14, 1), (5, 2), (1, 3)])
def test_error_threshold_is_met_exactly_and_missed_by_a_hair(lost, rank):
    """Exactly at the error of rank r, r is enough; a hair below, r + 1."""
    s, error = _spectrum(4, 3, 2, 1), math.sqrt(lost / 30)

    assert s.rank_at_error(error) == rank
    assert s.rank_at_error(error * (1 - 1e-11)) == rank + 1
    assert s.rank_at_error(error * (1 + 1e-11)) == rank


def test_chosen_rank_keeps_what_was_asked_and_one_less_does_not():
    """For random spectra and shares the rank is sufficient, and the smallest."""
    draw = np.random.default_rng(0)
    for _ in range(200):
        k = int(draw.integers(1, 30))
        values = np.sort(draw.exponential(size=k))[::-1]
        s, wanted = _spectrum(*values), float(draw.uniform(0.01, 0.999))
        shares = np.concatenate([[0.0], np.cumsum(values**2)]) / (values**2).sum()
        rank = s.rank_at_energy(wanted)

        assert shares[rank] >= wanted * (1 - 1e-12)
        assert shares[rank - 1] < wanted
        assert s.rank_at_error(math.sqrt(1 - wanted)) == rank


def test_whole_energy_needs_every_value_that_is_not_zero():
    """All of the energy is reached at the rank, not at min(m, n)."""
    assert _spectrum(2, 1, 0, 0).rank_at_energy(1.0) == 2
    assert _spectrum(2, 1, 0, 0).rank_at_error(0.0) == 2
    assert _spectrum(2, 1, 1, 1).rank_at_energy(1.0) == 4


def test_zero_matrix_needs_rank_zero():
    """A zero matrix is met by nothing, with error 0."""
    s = _spectrum(0, 0, 0)

    assert s.rank_at_energy(1.0) == s.rank_at_energy(0.5) == s.rank_at_error(0.0) == 0
    assert [s.relative_error(rank) for rank in range(4)] == [0.0] * 4
    assert s.effective_rank == s.stable_rank == 0.0


def test_flat_spectrum_counts_values():
    """Ten equal values: each holds a tenth, and the ranks are whole tenths."""
    s = _spectrum(*[3.0] * 10)

    assert [s.rank_at_energy(k / 10) for k in range(1, 11)] == list(range(1, 11))
    assert s.effective_rank == pytest.approx(10)
    assert s.stable_rank == pytest.approx(10)


def test_single_value_answers_everything():
    """A 1×1 matrix has rank 1 at any energy and error 0 there, 1 at rank 0."""
    s = _spectrum(5.0)

    assert s.rank_at_energy(0.01) == s.rank_at_energy(1.0) == s.rank_at_error(0.5) == 1
    assert (s.relative_error(0), s.relative_error(1)) == (1.0, 0.0)
    assert (s.effective_rank, s.stable_rank, s.break_even) == (1.0, 1.0, 0)


def test_error_is_the_optimum(family, known_matrix):
    """The error at every rank is the closed form of Eckart and Young."""
    values = known_matrix(family).values / (float(known_matrix(family).values[0]) or 1.0)
    s, squares = _spectrum(*values.tolist()), values.numpy() ** 2
    total = squares.sum() or 1.0
    for rank in range(len(values) + 1):
        optimum = math.sqrt(squares[rank:].sum() / total)

        assert s.relative_error(rank) == pytest.approx(optimum, rel=1e-12, abs=1e-300)


def test_tiny_tail_keeps_its_digits_when_every_value_is_known():
    """A complete spectrum sums its tail from the small end: 10⁻¹² is not lost beside 1."""
    s = _spectrum(1.0, 1e-12, 1e-13)

    assert s.relative_error(1) == pytest.approx(math.hypot(1e-12, 1e-13), rel=1e-12)
    assert s.rank_at_error(2e-13) == 2


def test_error_never_grows_with_the_rank():
    """The error falls from 1 to 0 as the rank goes from 0 to min(m, n)."""
    s = _spectrum(*(torch.arange(20, 0, -1) ** 1.5).tolist())
    errors = [s.relative_error(rank) for rank in range(21)]

    assert errors == sorted(errors, reverse=True)
    assert (errors[0], errors[-1]) == (1.0, 0.0)


def test_partial_spectrum_knows_its_tail_from_the_energy():
    """The leading values and the energy of the whole give the error, by Pythagoras."""
    whole = _spectrum(4, 3, 2, 1)
    part = _spectrum(4, 3, shape=(4, 4), energy=30)

    assert (whole.complete, part.complete) == (True, False)
    assert [part.tail_energy(r) for r in range(3)] == [30.0, 14.0, 5.0]
    assert [part.relative_error(r) for r in range(3)] == pytest.approx(
        [whole.relative_error(r) for r in range(3)]
    )
    assert part.rank_at_energy(0.7) == 2
    assert part.stable_rank == whole.stable_rank


def test_partial_spectrum_refuses_what_it_cannot_know():
    """Ranks beyond the known values, and the effective rank, need more of them."""
    part = _spectrum(4, 3, shape=(4, 4), energy=30)

    with pytest.raises(RankError, match="2 values known"):
        part.rank_at_energy(0.9)
    with pytest.raises(RankError, match="2 values known"):
        part.rank_at_error(0.1)
    with pytest.raises(RankError, match="2 singular values are known"):
        part.relative_error(3)
    with pytest.raises(RankError, match="every singular value"):
        _ = part.effective_rank


def test_partial_spectrum_refuses_errors_below_its_lost_digits():
    """Just above 3·10⁻³ the balance is an answer, just below it is noise; a complete one tells."""
    above, below = (1 + 1e-9) * LOST_DIGITS, (1 - 1e-3) * LOST_DIGITS

    def part(error):
        return _spectrum(1.0, shape=(2, 2), energy=1 / (1 - error**2))

    assert part(above).relative_error(1) == pytest.approx(LOST_DIGITS, rel=1e-6)
    with pytest.raises(RankError, match="measure the residual"):
        part(below).relative_error(1)
    assert _spectrum(1.0, below).relative_error(1) == pytest.approx(below, rel=1e-3)


def test_balance_below_zero_is_no_tail():
    """Where rounding puts Σσ² above the energy the tail is 0, never negative."""
    s = _spectrum(1.0, shape=(2, 2), energy=1 - 1e-7)

    assert s.tail_energy(1) == 0.0
    assert s.relative_error(0) == 1.0


@pytest.mark.parametrize("rank", [-1, 5])
def test_rank_out_of_range_is_refused(rank):
    """There is no error at a rank below 0 or beyond min(m, n)."""
    with pytest.raises(RankError, match=f"rank {rank}"):
        _spectrum(4, 3, 2, 1).relative_error(rank)


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.0000001, 2.0, math.nan])
def test_energy_out_of_range_is_refused(energy):
    """A share of the energy is above 0, up to 1."""
    with pytest.raises(UsageError, match="energy"):
        _spectrum(4, 3, 2, 1).rank_at_energy(energy)


@pytest.mark.parametrize("error", [-1e-9, 1.0, 2.0, math.nan])
def test_error_out_of_range_is_refused(error):
    """A relative error is from 0 to below 1."""
    with pytest.raises(UsageError, match="error"):
        _spectrum(4, 3, 2, 1).rank_at_error(error)


BROKEN = {
    "ascending": ((2, 2), [1.0, 2.0], 5.0),
    "negative": ((2, 2), [1.0, -1.0], 2.0),
    "too many": ((2, 1), [1.0, 1.0], 2.0),
    "none": ((2, 2), [], 2.0),
    "NaN value": ((2, 2), [math.nan, 1.0], 2.0),
    "Inf value": ((2, 2), [math.inf, 1.0], 2.0),
    "NaN energy": ((2, 2), [1.0, 1.0], math.nan),
    "Inf energy": ((2, 2), [1.0, 1.0], math.inf),
    "negative energy": ((2, 2), [1.0, 1.0], -1.0),
    "energy lost to underflow": ((2, 2), [1e-200, 1e-200], 0.0),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_impossible_spectrum_is_refused(kind):
    """Whatever cannot be the singular values and energy of a matrix is refused when made."""
    shape, values, energy = BROKEN[kind]

    with pytest.raises(ShapeError):
        Spectrum(shape, torch.tensor(values, dtype=torch.float64), energy)


def test_values_are_kept_in_float64_and_detached():
    """float32 values become float64 once, without a gradient history."""
    s = Spectrum((2, 2), torch.tensor([2.0, 1.0], requires_grad=True), 5.0)

    assert s.values.dtype == torch.float64
    assert not s.values.requires_grad


def test_effective_rank_is_the_entropy_of_the_values():
    """exp of the entropy of σ/Σσ (not of σ²): two values 3:1 give 2^0.811 = 1.755."""
    assert _spectrum(3, 1).effective_rank == pytest.approx(1.7547654)
    assert _spectrum(3, 1, 0).effective_rank == pytest.approx(1.7547654)


def test_stable_rank_is_energy_over_the_largest_square():
    """‖W‖_F²/σ₁², at most the rank."""
    assert _spectrum(4, 3, 2, 1).stable_rank == pytest.approx(30 / 16)


def test_scale_changes_no_rank():
    """Ranks and errors are the same for 10^±100·σ."""
    for scale in (1e-100, 1e100):
        s = _spectrum(4 * scale, 3 * scale, 2 * scale, scale)

        assert s.rank_at_energy(0.7) == 2
        assert s.relative_error(2) == pytest.approx(math.sqrt(5 / 30))


@pytest.mark.parametrize(
    ("m", "n"), [(1, 1), (1, 7), (2, 2), (3, 3), (10, 10), (64, 32), (512, 512), (11008, 4096)]
)
def test_break_even_is_the_last_rank_that_saves(m, n):
    """At the break-even rank r(m + n) < mn; at the next one no longer."""
    r = break_even_rank((m, n))

    assert r * (m + n) < m * n
    assert (r + 1) * (m + n) >= m * n


def test_spectrum_of_a_matrix_asks_the_right_rank():
    """From a matrix with known values: 90 % of the energy of 1/i is in the first five of forty."""
    from eckart.linalg.exact import exact_svd

    values = 1 / torch.arange(1, 41, dtype=torch.float64)
    spectrum = exact_svd(matrix_with_spectrum(values, 50, 40)).spectrum
    shares = (values**2).cumsum(0) / (values**2).sum()

    assert spectrum.rank_at_energy(0.9) == int((shares < 0.9).sum()) + 1 == 5


def test_a_partial_spectrum_refuses_a_rank_for_an_error_it_cannot_tell():
    """Below 3·10⁻³ of ‖W‖_F the balance of a cut spectrum is noise."""
    cut = Spectrum((4, 4), torch.tensor([1.0, 1e-4]), energy=1.0 + 1e-8)

    assert cut.rank_at_error(0.1) == 1
    with pytest.raises(RankError, match="partial"):
        cut.rank_at_error(1e-5)
    with pytest.raises(RankError, match="partial"):
        cut.rank_at_energy(1.0)
