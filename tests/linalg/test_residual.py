"""How far a product is from its matrix: by row blocks, on inputs, and in the 2-norm."""

import math

import pytest
import torch

from eckart.errors import ShapeError
from eckart.linalg import blocks
from eckart.linalg.factors import Factors, factorize, pivot
from eckart.linalg.matrices import matrix_with_spectrum
from eckart.linalg.residual import (
    compare,
    energies,
    output_difference,
    relative_error,
    residual_norm,
    rounded_up,
)


def _seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def W():
    """A 12×9 matrix with σ = 4, 3, 2, 1."""
    return matrix_with_spectrum(torch.tensor([4.0, 3.0, 2.0, 1.0]), 12, 9)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_error_is_the_closed_form(W, rank):
    """Best factors miss exactly what the other values hold."""
    tail = math.sqrt(sum(s * s for s in (4, 3, 2, 1)[rank:]) / 30)

    assert relative_error(W, factorize(W, rank=rank)) == pytest.approx(tail, rel=1e-10)
    assert relative_error(W, pivot(factorize(W, rank=rank))) == pytest.approx(tail, rel=1e-10)


@pytest.mark.parametrize("entries", [1, 9, 10, 40, 108, 10_000])
def test_blocks_of_any_size_give_the_same_error(W, entries, monkeypatch):
    """One row at a time, an uneven last block and one block for all agree."""
    for product in (factorize(W, rank=2), pivot(factorize(W, rank=2))):
        whole = relative_error(W, product)
        monkeypatch.setattr(blocks, "BLOCK_ENTRIES", entries)

        assert relative_error(W, product) == pytest.approx(whole, rel=1e-13)
        monkeypatch.undo()


def test_blocks_are_no_larger_than_asked(W, monkeypatch):
    """No more rows are formed at once than the block size holds."""
    monkeypatch.setattr(blocks, "BLOCK_ENTRIES", 40)
    asked, subtract = [], Factors.subtract_from

    def watched(self, rows, start):
        asked.append((start, len(rows)))
        subtract(self, rows, start)

    monkeypatch.setattr(Factors, "subtract_from", watched)
    relative_error(W, factorize(W, rank=1))

    assert asked == [(0, 4), (4, 4), (8, 4)]


def test_matrix_itself_is_not_changed(W):
    """Products are taken out of a copy, also where W is float64 already."""
    before, factors = W.clone(), factorize(W, rank=2)
    relative_error(W, factors)
    output_difference(W, factors, generator=_seeded())

    assert torch.equal(W, before)


def test_energies_add_up_over_a_stack(W):
    """The error of a stack is that of the matrices below one another."""
    parts = [W, 2 * W[:5], W[3:4].to(torch.float16)]
    factors = [factorize(part, rank=1) for part in parts]
    pairs = [energies(part, f) for part, f in zip(parts, factors, strict=True)]
    missed, total = (sum(each) for each in zip(*pairs, strict=True))
    stack = torch.cat([part.double() for part in parts])
    products = torch.cat([f.rows(0, f.shape[0]) for f in factors])
    error = float((stack - products).norm() / stack.norm())

    assert error <= rounded_up(missed, total) <= error * (1 + 1e-10)


@pytest.mark.parametrize("power", [-200, -150, 0, 150, 200])
def test_energies_are_those_of_the_matrix_at_its_own_scale(W, power):
    """Scaling inside is undone: 0 or Inf only where float64 holds no such square."""
    factors = factorize(W, rank=2)
    side = 10.0**power
    missed, total = energies(W * side, Factors(factors.B * side, factors.A))

    assert missed == pytest.approx(5 * side * side, rel=1e-9)
    assert total == pytest.approx(30 * side * side, rel=1e-9)


@pytest.mark.parametrize("entry", [1.7e308, 5e-324])
def test_extreme_entries_are_measured(entry):
    """The largest and the smallest float64 have an error, if no energy."""
    W = torch.tensor([[entry, 0.0], [0.0, -entry]], dtype=torch.float64)
    half = Factors(W[:, :1], torch.tensor([[1.0, 0.0]], dtype=torch.float64))

    assert relative_error(W, half) == pytest.approx(0.5**0.5, rel=1e-10)
    assert energies(W, half) in {(math.inf, math.inf), (0.0, 0.0)}


def test_error_is_rounded_up():
    """√(missed/total) and an allowance; 0 and Inf where there is nothing to divide."""
    assert 0.5 < rounded_up(1.0, 4.0) < 0.5 * (1 + 1e-10)
    assert rounded_up(0.0, 4.0) == rounded_up(0.0, 0.0) == 0.0
    assert (
        rounded_up(1.0, 0.0) == rounded_up(math.nan, 4.0) == rounded_up(math.inf, 4.0) == math.inf
    )


def test_zero_matrix_is_met_exactly_or_infinitely_missed():
    """A zero matrix leaves no relative error in between."""
    zero, one = torch.zeros(3, 2), torch.ones(3, 1)

    assert relative_error(zero, Factors(one * 0, one[:1] @ torch.ones(1, 2))) == 0.0
    assert relative_error(zero, Factors(one, torch.ones(1, 2))) == math.inf


def test_exact_product_has_error_zero():
    """Where every entry is met to the bit, nothing is added."""
    B, A = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[1.0, 3.0]])

    assert relative_error(B @ A, Factors(B, A)) == 0.0


def test_missing_everything_is_an_error_of_one():
    """A product of zeros misses the whole matrix."""
    W = torch.ones(3, 2)

    assert relative_error(W, Factors(W[:, :1] * 0, W[:1])) == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-160, 1e160, 1e200, 1e300])
def test_error_does_not_depend_on_the_scale(W, scale):
    """Entries whose squares leave float64 are measured like any others."""
    factors = factorize(W, rank=2)
    root = math.sqrt(scale)
    scaled = Factors(factors.B * root, factors.A * root)

    assert relative_error(W * scale, scaled) == pytest.approx(math.sqrt(5 / 30), rel=1e-9)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_product_that_is_not_finite_misses_infinitely(W, bad):
    """Factors that overflowed when they were cast have error Inf, never NaN."""
    factors = factorize(W, rank=2)
    factors.B[3, 1] = bad

    assert relative_error(W, factors) == math.inf


def test_error_is_that_of_the_factors_as_stored(W, true_error):
    """Half precision factors are measured, not the ones they were rounded from."""
    rounded = factorize(W, rank=4).to(torch.float16)
    error = relative_error(W, rounded)

    assert 1e-5 < error < 1e-3
    assert error == pytest.approx(true_error(W, rounded.B, rounded.A), rel=1e-9)


def test_what_is_no_matrix_is_refused_by_name():
    """The error carries the name of the matrix."""
    with pytest.raises(ShapeError, match="layer"):
        relative_error(torch.ones(3), Factors(torch.ones(3, 1), torch.ones(1, 1)), "layer")


def test_output_difference_of_exact_factors_is_rounding(W):
    """At the rank of W, with and without a bias, the outputs agree."""
    factors, bias = factorize(W, rank=4), torch.randn(12, generator=_seeded())
    for b in (None, bias):
        found = output_difference(W, factors, b, generator=_seeded())

        assert found.relative < 1e-14
        assert found.max < 1e-13


def test_output_difference_is_that_of_the_outputs(W):
    """The largest and the relative difference of Wx + b and B(Ax) + b on seeded inputs."""
    factors, b = factorize(W, rank=2), torch.linspace(-3, 3, 12, dtype=torch.float64)
    x = torch.randn(5, 9, dtype=torch.float64, generator=_seeded(7))
    y, short = x @ W.mT + b, x @ factors.product().mT + b
    found = output_difference(W, factors, b, generator=_seeded(7), samples=5)

    assert found.max == pytest.approx(float((y - short).abs().max()), rel=1e-12)
    assert found.relative == pytest.approx(float((y - short).norm() / y.norm()), rel=1e-12)


def test_bias_enlarges_outputs_not_their_difference(W):
    """The same b on both sides leaves the difference, and lowers its share."""
    factors = factorize(W, rank=2)
    plain = output_difference(W, factors, generator=_seeded())
    shifted = output_difference(W, factors, torch.full((12,), 100.0), generator=_seeded())

    assert shifted.max == pytest.approx(plain.max, rel=1e-9)
    assert shifted.relative < plain.relative / 10


def test_output_difference_repeats_with_its_seed(W):
    """Equal seeds give equal numbers, other seeds others."""
    factors = factorize(W, rank=2)
    one, two, other = (output_difference(W, factors, generator=_seeded(s)) for s in (1, 1, 2))

    assert one == two
    assert one != other


def test_output_difference_of_zero_outputs():
    """No output and no difference is 0; a difference where there is no output is Inf."""
    zero = torch.zeros(3, 2)
    none = output_difference(zero, Factors(zero[:, :1], zero[:1]), generator=_seeded())
    some = output_difference(zero, Factors(zero[:, :1] + 1, zero[:1] + 1), generator=_seeded())

    assert (none.max, none.relative) == (0.0, 0.0)
    assert some.relative == math.inf


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (64, 5)])
def test_residual_norm_is_the_next_singular_value(shape):
    """‖W − W_r‖₂ = σ_{r+1}: found from below, closely where the gap is wide."""
    W = matrix_with_spectrum(2.0 ** -torch.arange(5).double(), *shape)
    for rank in (1, 2, 4):
        found = residual_norm(W, factorize(W, rank=rank), generator=_seeded())

        assert 0.999 * 2.0**-rank <= found <= 2.0**-rank * (1 + 1e-12)


def test_residual_norm_is_never_above_the_true_one():
    """On residuals without a gap it stays below the 2-norm, and within a tenth of it."""
    for seed in range(10):
        W = torch.randn(40, 30, dtype=torch.float64, generator=_seeded(seed))
        B, A = torch.randn(40, 2, dtype=torch.float64), torch.randn(2, 30, dtype=torch.float64)
        for product in (Factors(B, A), pivot(Factors(B, A))):
            true = float(torch.linalg.matrix_norm(W - product.product(), 2))
            found = residual_norm(W, product, generator=_seeded(seed))

            assert 0.9 * true <= found <= true * (1 + 1e-12)


def test_residual_norm_of_an_exact_product_is_zero():
    """Nothing left over is 0, not NaN."""
    B, A = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 3.0]])

    assert residual_norm(B @ A, Factors(B, A), generator=_seeded()) == 0.0


def test_residual_norm_repeats_with_its_seed(W):
    """Equal seeds give equal numbers."""
    factors = factorize(W, rank=2)

    assert residual_norm(W, factors, generator=_seeded(4)) == residual_norm(
        W, factors, generator=_seeded(4)
    )


def test_one_pass_finds_what_two_do(W):
    """`compare` is `energies` and `output_difference`, with the same inputs, to the bit."""
    product, bias = factorize(W, rank=2), torch.arange(12.0)
    found = compare(W, product, bias, generator=_seeded())

    assert (found.missed, found.total) == energies(W, product)
    assert found.outputs == output_difference(W, product, bias, generator=_seeded())
