"""Ways to spend one budget, and curves that measurement has corrected."""

import math

import numpy as np
import pytest
import torch

from eckart.allocate import Item, Keep, Terms
from eckart.allocate.candidates import SHARES, Probe, candidates, corrected, measured, probe_ranks
from eckart.linalg.spectrum import Spectrum

FORMS = ("ba", "pivoted")
SHAPES = [(64, 48), (48, 64), (56, 56)]


def spectrum(shape: tuple[int, int], scale: float, decay: float) -> Spectrum:
    values = scale * torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -decay
    return Spectrum(shape, values, float(values.square().sum()))


SPECTRA = {
    f"m{i}": spectrum(shape, 10.0 ** (i - 1), 0.3 + 0.4 * i) for i, shape in enumerate(SHAPES)
}
ITEMS = {name: Item(known.shape) for name, known in SPECTRA.items()}


def menus(keep: float, form: str):
    return Keep(keep).menus(ITEMS, SPECTRA, Terms(form, in_nats=True))  # type: ignore[arg-type]


def spent(choices, form: str) -> int:
    return sum(
        ITEMS[name].dense_parameters
        if choice.rank is None
        else ITEMS[name].parameters(choice.rank, form)
        for name, choice in choices.items()
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8, 0.95])
def test_every_candidate_is_within_the_budget(keep, form):
    """And each is what its name says: equal shares, at least half of them, or neither."""
    found, left = menus(keep, form)
    rules = candidates(found, left, Terms(form))

    assert list(rules) == ["global", "floor", "uniform"]
    for choices in rules.values():
        assert choices.keys() == ITEMS.keys()
        assert 0 < spent(choices, form) <= left
    for name, choice in rules["uniform"].items():
        item = ITEMS[name]
        assert item.parameters(choice.rank, form) <= keep * item.dense_parameters
        assert item.parameters(choice.rank + 1, form) > keep * item.dense_parameters
        low = rules["floor"][name].rank
        assert low is None or low >= choice.rank / 2
    if keep == 0.2:
        assert min(choice.rank or 99 for choice in rules["global"].values()) == 1


def test_a_budget_below_uniform_ranks_has_one_candidate():
    """Where an equal share does not even buy rank 1 of each matrix."""
    items = {"small": Item((4, 4)), "large": Item((400, 400))}
    spectra = {name: spectrum(item.shape, 1.0, 1.0) for name, item in items.items()}
    found, left = Keep(0.02).menus(items, spectra, Terms())

    assert list(candidates(found, left, Terms())) == ["global"]


@pytest.mark.parametrize("form", FORMS)
def test_probes_are_at_shares_of_the_cost_and_at_nothing(form):
    """The largest rank within each share, and rank 0 first."""
    found, _ = menus(0.9, form)
    for name, menu in found.items():
        ranks, item = probe_ranks(menu), ITEMS[name]

        assert ranks[0] == 0
        assert len(ranks) == 1 + len(SHARES)
        for rank, share in zip(ranks[1:], SHARES, strict=True):
            assert item.parameters(rank, form) <= share * item.dense_parameters
            assert item.parameters(rank + 1, form) > share * item.dense_parameters


def test_a_curve_goes_through_what_was_measured():
    """Between the probes the ratio is interpolated, beyond them it stays; no rise with the rank."""
    known = spectrum((48, 48), 1.0, 0.5)
    ratios = {0: 0.5, 10: 2.0, 30: 4.0}
    probes = [
        Probe(rank, known.tail_energy(rank) / 2, known.tail_energy(rank) / 2 * ratio)
        for rank, ratio in ratios.items()
    ]
    ranks = np.arange(1, 48)
    losses = corrected(known, probes, ranks)

    def loss(rank: int, ratio: float) -> float:
        return known.tail_energy(rank) / 2 * ratio

    assert losses[29] == pytest.approx(loss(30, 4.0))
    assert losses[19] == pytest.approx(loss(20, math.sqrt(8.0)))
    assert losses[39] == pytest.approx(loss(40, 4.0))
    assert (np.diff(losses) <= 0).all()


def test_a_matrix_that_hurts_more_than_predicted_gets_more():
    """The same spectra: the one whose measured losses are ten times the predicted keeps more."""
    items = {"a": Item((48, 48)), "b": Item((48, 48))}
    spectra = {name: spectrum((48, 48), 1.0, 0.5) for name in items}
    terms = Terms("pivoted", in_nats=True)
    found, left = Keep(0.5).menus(items, spectra, terms)
    probes = {
        name: [Probe(r, t, factor * t) for r in (0, 10, 20) if (t := spectra[name].tail_energy(r))]
        for name, factor in (("a", 1.0), ("b", 10.0))
    }
    plain = measured(found, spectra, {"a": probes["a"], "b": probes["a"]}, left, terms)
    chosen = measured(found, spectra, probes, left, terms)

    assert abs(plain["a"].rank - plain["b"].rank) <= 1
    assert chosen["b"].rank is None or chosen["b"].rank > chosen["a"].rank + 5
