"""The randomized method: when it stops, what it promises, and the cases of its elders.

The cases follow the ideas, not the text, of scikit-learn's `randomized_svd`, fbpca's and
torch's `svd_lowrank` tests.
"""

import math

import numpy as np
import pytest
import torch

from eckart.linalg import randomized
from eckart.linalg.krylov import GolubKahan, Progress, product
from eckart.linalg.matrices import matrix_with_spectrum, random_low_rank
from eckart.linalg.norms import energy
from eckart.linalg.randomized import at_error, at_rank, block_width, residual_energy

i = torch.arange(1, 121, dtype=torch.float64)

SPECTRA = {
    "slow": i**-0.5,
    "slower": i**-0.1,
    "fast": i**-2.0,
    "geometric": 0.9**i,
    "linear": 1 - (i - 1) / 120,
    "flat": torch.ones(120, dtype=torch.float64),
    "step": torch.where(i <= 10, 1.0, 0.1).double(),
    "soft step": torch.where(i <= 12, 1.0, 0.7).double(),
    "pairs": torch.ceil(i / 2) ** -1.0,
    "cluster": torch.where(i <= 10, 1 + 1e-4 * (10 - i), 0.5 * i**-0.3).double(),
    "spikes": torch.where(i <= 4, 3.0, torch.sqrt(1 - i / 121)).double(),
    "fast with a floor": i**-2.0 + 1e-3,
}


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def _run(W, rank, accuracy=1e-3, seed=0, steps=randomized.MAX_STEPS):
    return at_rank(
        W, rank, energy=energy(W), accuracy=accuracy, generator=_seeded(seed), steps=steps
    )


def _error(W, found):
    return float((W.double() - (found.U.double() * found.s.double()) @ found.Vh.double()).norm())


def _slack(W):
    return 50 * torch.finfo(W.dtype).eps * math.sqrt(max(W.shape)) * float(W.double().norm())


@pytest.mark.parametrize("shape", [(150, 120), (120, 150), (120, 120)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_error_is_within_the_accuracy(spectrum, shape):
    """Law 1 on known spectra, over seeds and ranks, by the randomized path alone."""
    values = SPECTRA[spectrum]
    W = matrix_with_spectrum(values, *shape).float()
    for seed, rank in enumerate((1, 4, 10, 13)):
        found = _run(W, rank, seed=seed)
        optimum = float(values[rank:].square().sum().sqrt())

        assert found is not None
        assert len(found.s) == rank
        assert _error(W, found) <= (1 + 1e-3) * optimum + _slack(W)


@pytest.mark.parametrize("seed", range(6))
def test_gaussian_matrices_are_within_the_accuracy(seed):
    """The slowest case: no decay, the optimum from numpy; the estimate is of the right size."""
    W = torch.randn(160, 130, generator=_seeded(seed))
    values = np.linalg.svd(W.double().numpy(), compute_uv=False)
    found = _run(W, 8, seed=seed)
    optimum = math.sqrt((values[8:] ** 2).sum())

    assert found is not None
    assert _error(W, found) <= (1 + 1e-3) * optimum
    assert _error(W, found) <= (1 + 1.5 * found.excess) * optimum + _slack(W)


@pytest.mark.parametrize("accuracy", [0.1, 1e-2, 1e-4, 1e-6])
def test_accuracy_is_what_was_asked(accuracy):
    """A tighter accuracy costs more products and is met; a looser one costs no more."""
    values = SPECTRA["slow"]
    W = matrix_with_spectrum(values, 150, 120)
    found = _run(W, 6, accuracy)
    optimum = float(values[6:].square().sum().sqrt())

    assert found is not None
    assert _error(W, found) <= (1 + accuracy) * optimum
    assert found.excess <= accuracy


def test_factors_are_orthonormal_and_ordered():
    """U and V are orthonormal to rounding and the values descend, also in a steep spectrum."""
    for dtype in (torch.float32, torch.float64):
        W = matrix_with_spectrum(SPECTRA["fast"], 150, 120).to(dtype)
        found = _run(W, 40)
        eye = torch.eye(40, dtype=dtype)
        bound = 100 * torch.finfo(dtype).eps

        assert found is not None
        assert float((found.U.mT @ found.U - eye).abs().max()) < bound
        assert float((found.Vh @ found.Vh.mT - eye).abs().max()) < bound
        assert bool((found.s.diff() <= 0).all())


def test_values_agree_with_lapack_where_they_decay():
    """Of a geometric spectrum every leading value is found to six digits (scikit-learn's case)."""
    W = matrix_with_spectrum(SPECTRA["geometric"], 150, 120)
    found = _run(W, 10, accuracy=1e-8)

    assert found is not None
    assert torch.allclose(found.s, SPECTRA["geometric"][:10], rtol=1e-6)


def test_products_rather_than_vectors_agree():
    """U diag(s) Vh is LAPACK's truncation where a gap makes that unique (scikit-learn's case)."""
    W = matrix_with_spectrum(SPECTRA["step"], 130, 160, generator=_seeded(3))
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    found = _run(W, 10, accuracy=1e-6)

    assert found is not None
    expected = (U[:, :10] * s[:10]) @ Vh[:10]
    assert torch.allclose((found.U * found.s) @ found.Vh, expected, atol=1e-4)


def test_noise_under_the_signal_is_ignored():
    """Rank 5 under strong noise: one product would mix them, the iteration does not."""
    W = random_low_rank(150, 120, 5, dtype=torch.float64) + torch.randn(
        150, 120, dtype=torch.float64, generator=_seeded(4)
    )
    values = torch.linalg.svdvals(W)
    found = _run(W, 5, accuracy=1e-6)

    assert found is not None
    assert torch.allclose(found.s, values[:5], rtol=1e-6)


def test_transpose_gives_the_same_error():
    """W and Wᵀ are equally well approximated (scikit-learn's case)."""
    W = matrix_with_spectrum(SPECTRA["slow"][:60], 60, 300)
    tall, wide = _run(W.mT.contiguous(), 7), _run(W, 7)

    assert tall is not None
    assert wide is not None
    assert _error(W.mT, tall) == pytest.approx(_error(W, wide), rel=1e-3)


def test_many_steps_stay_finite():
    """Forty steps on a matrix of large entries lose nothing to overflow (scikit-learn's case)."""
    W = 1e6 * torch.rand(100, 80, generator=_seeded(5))
    space = GolubKahan(W, torch.randn(80, 16, generator=_seeded(6)), energy(W))
    for _ in range(80):
        if not space.exhausted or space.products == 0:
            space.advance()
    s = space.triplets(10)[1]

    assert space.exhausted
    assert torch.allclose(s, torch.linalg.svdvals(W)[:10], rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 5, 9, 20])
def test_low_rank_matrix_is_reproduced(rank):
    """Below, at and above the true rank 5; above it the rest is zeros with orthonormal vectors."""
    for shape in ((80, 60), (60, 80), (80, 80)):
        W = random_low_rank(*shape, 5)
        found = _run(W, rank)
        optimum = float(torch.linalg.svdvals(W.double())[rank:].norm())

        assert found is not None
        assert found.U.shape == (shape[0], rank)
        assert _error(W, found) <= (1 + 1e-3) * optimum + _slack(W)
        assert float((found.U.mT @ found.U - torch.eye(rank)).abs().max()) < 1e-5
        assert float((found.Vh @ found.Vh.mT - torch.eye(rank)).abs().max()) < 1e-5


@pytest.mark.parametrize("floor", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_tails_without_digits_are_measured(floor, monkeypatch):
    """Below 3·10⁻³ of ‖W‖_F the balance of float32 squares is noise, and the residual decides."""
    values = torch.where(i <= 6, 1.0, floor).double()
    W = matrix_with_spectrum(values, 150, 120).float()
    measured = []
    monkeypatch.setattr(
        randomized,
        "residual_energy",
        lambda *a: measured.append(residual_energy(*a)) or measured[-1],
    )
    found = _run(W, 6)
    tail = float(values[6:].square().sum())

    assert found is not None
    assert _error(W, found) <= (1 + 1e-3) * math.sqrt(tail) + _slack(W)
    assert bool(measured) == (tail < krylov_limit(values))


def krylov_limit(values):
    """The tail energy at which the balance is no longer trusted."""
    return (3e-3) ** 2 * float(values.square().sum())


def test_repeated_values_up_to_the_rank_are_all_found():
    """A block not narrower than the rank holds every copy of a repeated value."""
    values = torch.cat([torch.full((30,), 2.0), 0.5 * torch.rand(90, generator=_seeded(7))])
    values = values.double().sort(descending=True).values
    W = matrix_with_spectrum(values, 130, 120)
    found = _run(W, 30)

    assert found is not None
    assert torch.allclose(found.s, values[:30], rtol=1e-3)


def test_steps_that_run_out_give_none():
    """With one step there is nothing to compare with, so nothing is claimed."""
    assert _run(torch.randn(150, 120, generator=_seeded(8)), 8, steps=1) is None


def test_same_seed_same_bits_and_never_the_global_one():
    """The result depends on the generator alone, and torch's own stream is left where it was."""
    W = torch.randn(100, 90, generator=_seeded(9))
    before = torch.get_rng_state()
    one, two, other = _run(W, 5), _run(W, 5), _run(W, 5, seed=1)

    assert one is not None
    assert two is not None
    assert other is not None
    assert torch.equal(one.U, two.U)
    assert not torch.equal(one.U, other.U)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2, 0.05, 1e-3])
@pytest.mark.parametrize("spectrum", ["slow", "fast", "geometric", "step", "pairs"])
def test_smallest_rank_for_an_error(spectrum, share):
    """The tail of the answer is within what was allowed, and one triplet less would not be."""
    values = SPECTRA[spectrum]
    W = matrix_with_spectrum(values, 150, 120)
    total = float(values.square().sum())
    tails = total - values.square().cumsum(0)
    allowed = share**2 * total
    found = at_error(W, allowed, energy=total, accuracy=1e-3, generator=_seeded(), largest=120)

    assert found is not None
    rank = len(found.s)
    assert _error(W, found) ** 2 <= allowed * (1 + 1e-9)
    assert rank == 1 or float(tails[rank - 2]) > allowed * (1 - 4e-3)


def test_rank_that_grows_past_the_limit_gives_none():
    """Where the error needs a larger rank than is worth it, the attempt ends."""
    W = torch.randn(150, 120, dtype=torch.float64, generator=_seeded(10))
    total = energy(W)

    assert (
        at_error(W, 0.01 * total, energy=total, accuracy=1e-3, generator=_seeded(), largest=20)
        is None
    )


def test_error_below_the_matrix_s_own_rounding_gives_none():
    """A float32 matrix of rank 4 cannot be met to 10⁻⁹: the attempt says so and ends."""
    W = random_low_rank(150, 120, 4)
    total = energy(W)
    found = at_error(
        W, 1e-18 * total, energy=total, accuracy=1e-3, generator=_seeded(), largest=120
    )

    assert found is None


def test_ritz_values_never_exceed_the_singular_values():
    """Interlacing: the projected matrix's values approach those of W from below."""
    W = matrix_with_spectrum(SPECTRA["slow"], 150, 120)
    space = GolubKahan(W, torch.randn(120, 16, dtype=torch.float64, generator=_seeded()), 1.0)
    captured = []
    space.advance()
    for _ in range(6):
        space.advance()
        ritz = space.ritz()[:16]
        captured.append(float(ritz.sum()))

        assert bool((ritz <= SPECTRA["slow"][:16] ** 2 * (1 + 1e-12)).all())

    assert captured == sorted(captured)


def test_projected_matrix_is_the_matrix_in_its_bases():
    """Wᵀ·left = right·M after a product with Wᵀ, W·right = left·M after one with W."""
    W = matrix_with_spectrum(SPECTRA["slow"], 150, 120)
    space = GolubKahan(W, torch.randn(120, 16, dtype=torch.float64, generator=_seeded()), 1.0)
    space.advance()
    for _ in range(5):
        space.advance()
        A = W if space.forward else W.mT
        s = space.projected.shape[1]

        assert torch.allclose(
            A @ space.source.vectors[:, :s], space.target.vectors @ space.projected, atol=1e-12
        )


def test_remaining_needs_a_whole_step():
    """The gain of a step needs the values two products before, and as many as the rank."""
    progress = Progress((9, 9), torch.float64)
    progress.record(2, torch.tensor([1.0, 0.5]))
    progress.record(3, torch.tensor([1.5, 0.6]))

    assert progress.remaining(2) == math.inf
    progress.record(4, torch.tensor([1.6, 0.65]))
    assert progress.remaining(2) == pytest.approx(2 * 0.75)
    assert progress.remaining(3) == math.inf


def test_first_product_is_but_a_picture():
    """Its values come from a start that is not orthonormal: no step is measured from them."""
    progress = Progress((9, 9), torch.float64)
    for k in (1, 2, 3):
        progress.record(k, torch.tensor([1.0]))

    assert progress.remaining(1) == math.inf


def test_remaining_follows_the_geometric_series():
    """Two steps that gain 1 and 0.01: the series says 10⁻⁴/0.99, and twice that is the estimate."""
    progress = Progress((9, 9), torch.float64)
    for k, value in [(2, 1.0), (4, 2.0), (6, 2.01)]:
        progress.record(k, torch.tensor([value], dtype=torch.float64))

    assert progress.remaining(1) == pytest.approx(2 * 1e-4 / 0.99, rel=1e-6)


def test_remaining_is_not_hidden_by_what_converged():
    """A first value that gained 10 and then nothing says nothing of the second, which halves."""
    progress = Progress((9, 9), torch.float64)
    for k, values in [(2, [0.0, 1.0]), (4, [10.0, 1.4]), (6, [10.0, 1.6])]:
        progress.record(k, torch.tensor(values, dtype=torch.float64))

    assert progress.remaining(2) == pytest.approx(2 * 0.2, rel=1e-6)


@pytest.mark.parametrize(("spikes", "seed"), [(6, 1), (8, 0), (8, 3)])
def test_a_flat_bulk_under_spikes_is_within_the_accuracy(spikes, seed):
    """The spikes of a trained change converge at once; the noise that fills the rank does not."""
    rank, n = 16, 512
    U, V, noise = (torch.randn(n, k, generator=_seeded(seed + k)) for k in (spikes, spikes + 1, n))
    W = U @ V[:, :spikes].mT / (U.norm() * spikes**0.5) + 0.05 * noise / n
    found = _run(W, rank)
    optimum = torch.linalg.svdvals(W.double())[rank:].square().sum().sqrt()

    assert found is not None
    assert _error(W, found) <= (1 + 1e-3) * optimum


def test_converged_values_are_not_counted():
    """In float32 a change of 10⁻⁸ of σ₁² is rounding, and no gain."""
    progress = Progress((9, 9), torch.float32)
    for k in range(2, 6):
        progress.record(k, torch.tensor([1.0 + 1e-8 * k, 1e-6 * k], dtype=torch.float64))

    assert progress.remaining(2) == pytest.approx(2 * 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_product_is_the_product(dtype):
    """The kernel chosen for narrow blocks gives W·X and (XᵀW)ᵀ to rounding, in every layout."""
    W = torch.randn(70, 50, dtype=dtype, generator=_seeded())
    X = torch.randn(50, 16, dtype=dtype, generator=_seeded(1))
    Y = torch.randn(70, 16, dtype=dtype, generator=_seeded(2))
    eps = torch.finfo(dtype).eps

    for narrow in (X, X.mT.contiguous().mT):
        assert torch.allclose(product(W, narrow), W @ narrow, atol=200 * eps)
    for narrow in (Y, Y.mT.contiguous().mT):
        assert torch.allclose(product(narrow.mT, W), narrow.mT @ W, atol=200 * eps)


def test_product_falls_back_without_onednn(monkeypatch):
    """Where oneDNN is not built in, the default kernel answers."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    W = torch.randn(20, 10, generator=_seeded())

    assert torch.equal(product(W, W.mT), W @ W.mT)


@pytest.mark.parametrize(
    ("rank", "width"),
    [(1, 16), (8, 16), (9, 16), (10, 32), (16, 32), (64, 64), (65, 80), (128, 128)],
)
def test_block_width(rank, width):
    """The rank and a few columns more, in multiples of 16, and never more than W has."""
    assert block_width(rank, (4096, 4096)) == width
    assert block_width(rank, (4096, 12)) == min(width, 12)


def test_residual_energy_is_the_residual():
    """Row blocks, uneven ones too, add up to ‖W − U diag(s) Vh‖_F²."""
    W = torch.randn(300, 40, generator=_seeded())
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    measured = residual_energy(W, U[:, :5], s[:5], Vh[:5])

    assert measured == pytest.approx(float(s[5:].double().square().sum()), rel=1e-5)
