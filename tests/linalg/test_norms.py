"""The energy of a matrix and its power-of-two scale, at every size of its entries."""

import math
from fractions import Fraction

import pytest
import torch

from eckart.linalg import norms
from eckart.linalg.norms import energy, energy_from_above, power_of_two_scaled, unscaled


def test_energy_is_the_sum_of_squares(known):
    """Every family in every dtype, against exact rational arithmetic."""
    squares = sum(Fraction(w) ** 2 for w in known.W.double().flatten().tolist())

    assert energy(known.W) == pytest.approx(float(squares), rel=1e-14, abs=1e-320)
    assert energy(known.W.mT) == pytest.approx(float(squares), rel=1e-14, abs=1e-320)


@pytest.mark.parametrize("value", [0.1, 1.0, 3.3e-3])
def test_energy_keeps_its_digits_on_any_length(value):
    """Equal entries, whose rounding all goes one way, in and beyond one chunk."""
    for shape in ((1,), (1, 1), (3, 43), (1, norms.CHUNK), (2, norms.CHUNK + 1)):
        W = torch.full(shape, value)
        exact = Fraction(float(W.flatten()[0])) ** 2 * W.numel()

        assert energy(W) == pytest.approx(float(exact), rel=8e-12)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_energy_of_entries_whose_squares_leave_float32(stored):
    """‖W‖_F² is right where a float32 sum of squares would be infinite or zero."""
    for value in (1e30, 1e-30):
        W = torch.full((4, 4), value, dtype=stored)

        assert energy(W) == pytest.approx(16 * float(W[0, 0]) ** 2, rel=1e-14)


def test_energy_beyond_float64_is_infinite():
    """1e400 is no float64: Inf, not an error."""
    assert energy(torch.full((2, 2), 1e200, dtype=torch.float64)) == math.inf


def test_energy_of_a_strided_matrix():
    """A view that is contiguous in neither order has the energy of its copy."""
    W = torch.arange(60.0).view(6, 10)[::2, 1::3]

    assert energy(W) == float(W.square().sum())


@pytest.mark.parametrize("value", [0.1, 3.3e-3, 1e-12, 1e-25, 1e-40, 1e18, 1e30])
@pytest.mark.parametrize("shape", [(1,), (127,), (128,), (3, 43), (2, 128), (700, 301)])
def test_an_energy_from_above_is_one(value, shape):
    """Equal entries, whose rounding all goes one way, and Gaussian ones, at any size."""
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    for W in (torch.full(shape, value), value * draw, (value * draw).double()):
        assert energy(W) <= energy_from_above(W) <= 1.00001 * energy(W)


@pytest.mark.parametrize("place", [0, 127, 128, 299])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_energy_from_above_shows_what_is_not_finite(place, value):
    """In a run, and in what is left over."""
    W = torch.ones(300)
    W[place] = value

    assert not math.isfinite(energy_from_above(W))


def test_scaling_by_powers_of_two_is_exact():
    """W·2⁻ᵉ has its largest entry in [½, 1), and multiplying back gives the same bits."""
    for factor in (1.0, 0.5, 3e38, 1e-30, 1e-42, 1.4e-45):
        W = torch.tensor([[factor, -factor / 4], [0.0, factor / 2]])
        scaled, exponent = power_of_two_scaled(W)

        assert 0.5 <= float(scaled.abs().max()) < 1
        assert torch.equal(unscaled(scaled, exponent), W)
