"""The change behind rounded weights: what rounding swallowed is back, what it added is gone."""

import pytest
import torch

from eckart.linalg import unrounding
from eckart.linalg.exact import exact_svd
from eckart.linalg.matrices import matrix_with_spectrum, named_generator
from eckart.linalg.unrounding import remainder, unrounded


def _case(m, n, values, stored=torch.bfloat16):
    """A Gaussian base, a change of the given singular values, and their rounded sum."""
    generator = named_generator(0, f"{m} {n}")
    base = torch.randn(m, n, generator=generator).to(stored)
    X = matrix_with_spectrum(torch.tensor(values), m, n, generator=generator)
    return base, X, (base.double() + X).to(stored)


def _delta(tuned, base, rank):
    wide = torch.float32 if tuned.dtype.itemsize == 2 else torch.float64
    return exact_svd(tuned.to(wide) - base.to(wide)).truncate(rank)


def _product(svd):
    return (svd.U * svd.s).double() @ svd.Vh.double()


@pytest.mark.parametrize(
    ("stored", "size"), [(torch.bfloat16, 0.08), (torch.float16, 0.01), (torch.float32, 1.2e-6)]
)
@pytest.mark.parametrize("shape", [(90, 80), (40, 200), (200, 40)])
def test_change_that_rounding_swallowed_comes_back(shape, stored, size):
    """The singular values of the change are known to a tenth, where the delta holds far less."""
    base, X, tuned = _case(*shape, [1.3 * size, size], stored)
    start = _delta(tuned, base, 2)
    found = unrounded(tuned, base, start, 1e-3 * size)

    assert float(start.s[1]) < 0.85 * size
    assert found.s.tolist() == pytest.approx([1.3 * size, size], rel=0.1)
    assert float((_product(found) - X).norm()) < 0.3 * float(X.norm())


def test_harmonics_vanish():
    """Further singular values that only repeat a change are explained by it, and shrink."""
    base, _, tuned = _case(200, 160, [8.0])
    start = _delta(tuned, base, 3)
    found = unrounded(tuned, base, start, 1e-3)

    assert float(found.s[0]) == pytest.approx(8.0, rel=0.01)
    assert bool((found.s[1:] < 0.7 * start.s[1:]).all())


def test_vectors_stay_orthonormal_and_values_ordered():
    """The result is an SVD like the one it began from."""
    base, _, tuned = _case(60, 50, [0.6, 0.4, 0.3])
    found = unrounded(tuned, base, _delta(tuned, base, 3), 1e-4)
    eye = torch.eye(3)

    assert torch.allclose(found.U.mT @ found.U, eye, atol=1e-5)
    assert torch.allclose(found.Vh @ found.Vh.mT, eye, atol=1e-5)
    assert bool((found.s.diff() <= 0).all())


def test_change_that_was_not_rounded_is_left_alone():
    """Where base + change is stored exactly the first step moves nothing."""
    base, u, v = torch.zeros(6, 5), torch.arange(1.0, 7.0), torch.arange(1.0, 6.0)
    tuned = torch.outer(u, v)
    start = _delta(tuned, base, 1)
    found = unrounded(tuned, base, start, 0.0)

    assert torch.allclose(_product(found), tuned.double(), atol=1e-6)
    assert float(remainder(tuned, base, found).abs().max()) < 1e-5


def test_no_components_need_no_step():
    """Of rank 0 there is nothing to un-round, and the remainder is the delta."""
    base, _, tuned = _case(12, 10, [0.4])
    start = _delta(tuned, base, 0)

    assert unrounded(tuned, base, start, 0.0) is start
    assert torch.equal(remainder(tuned, base, start), tuned.float() - base.float())


def test_all_components_may_be_asked_for():
    """2q columns of the core may be more than the matrix has."""
    base, _, tuned = _case(12, 10, [0.4] * 10)
    found = unrounded(tuned, base, _delta(tuned, base, 10), 1e-3)

    assert found.rank == 10
    assert float(remainder(tuned, base, found).abs().max()) == 0.0


@pytest.mark.parametrize("entries", [1, 350, 2**18])
def test_blocks_of_any_size_give_the_same_change(entries, monkeypatch):
    """One row at a time, an uneven last block and one block for all agree to rounding."""
    base, _, tuned = _case(30, 24, [0.2])
    start = _delta(tuned, base, 1)
    expected, R = unrounded(tuned, base, start, 1e-3), remainder(tuned, base, start)
    monkeypatch.setattr(unrounding, "BLOCK_ENTRIES", entries)

    assert torch.allclose(unrounded(tuned, base, start, 1e-3).s, expected.s, rtol=1e-2)
    assert float((remainder(tuned, base, start) - R).abs().max()) < 1e-2


def test_steps_end_when_nothing_moves_or_after_the_last(monkeypatch):
    """A wide tolerance takes one step, none at all as many as allowed."""
    base, _, tuned = _case(90, 80, [0.2])
    steps, step = [], unrounding._step
    monkeypatch.setattr(unrounding, "_step", lambda *a: steps.append(1) or step(*a))
    unrounded(tuned, base, _delta(tuned, base, 1), 10.0)
    one = len(steps)
    unrounded(tuned, base, _delta(tuned, base, 1), 0.0)

    assert (one, len(steps)) == (1, 1 + unrounding.STEPS)


def test_overflow_of_the_stored_format_saturates():
    """A change that leads beyond the largest float16 leaves a finite remainder."""
    base = torch.full((4, 3), 65000.0, dtype=torch.float16)
    start = exact_svd(torch.full((4, 3), 1000.0))
    R = remainder(base, base, start)

    assert torch.equal(R, (base - torch.finfo(torch.float16).max).float())
    assert bool(torch.isfinite(unrounded(base, base, start.truncate(1), 0.0).s).all())


def test_inputs_are_not_changed():
    """Neither matrix nor the triplets to start from are written to."""
    base, _, tuned = _case(30, 20, [0.4])
    start = _delta(tuned, base, 1)
    before = [part.clone() for part in (base, tuned, start.U, start.s, start.Vh)]
    unrounded(tuned, base, start, 0.0)

    for part, copy in zip((base, tuned, start.U, start.s, start.Vh), before, strict=True):
        assert torch.equal(part, copy)
