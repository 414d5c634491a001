"""Ways to spend one budget: which of them serves the model best, only the model can tell.

Pure, as the policies are: menus and measured points in, choices out.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eckart.allocate.budget import Menu, spend
from eckart.allocate.item import Choice, Terms
from eckart.linalg.spectrum import Spectrum

SHARES = (0.05, 0.15, 0.25, 0.4, 0.55, 0.7, 0.85)
"""Of a matrix's own cost: where its loss is measured, besides rank 0."""

LEAST = 1e-12
"""Nats that are no more than rounding."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What the model loses with one matrix at one rank, and what was predicted of it."""

    rank: int
    predicted: float
    measured: float


def candidates(
    menus: Mapping[str, Menu], budget: int, terms: Terms
) -> dict[str, dict[str, Choice]]:
    """Returns the choices of every rule that stays within the budget, by the rule's name.

    "global": all worth is compared (`spend`). "uniform": every matrix has the rank that its own
    share of the budget allows. "floor": global, but no matrix below half its uniform rank: worths
    are those of a second-order picture, which strong truncation leaves.
    """
    found = {"global": spend(menus, budget, terms)}
    picks = uniform(menus, budget)
    if picks is None:
        return found
    least = {
        name: menus[name].from_rank(_rank(menus[name], pick) / 2) for name, pick in picks.items()
    }
    return {
        **found,
        "floor": spend(least, budget, terms),
        "uniform": {name: menus[name].choice(pick, terms) for name, pick in picks.items()},
    }


def uniform(menus: Mapping[str, Menu], budget: int) -> dict[str, int] | None:
    """Returns every menu's largest pick for an equal share of its dense cost; None if one has none.

    Dense only where the share is the whole.
    """
    share = budget / (sum(float(menu.costs[-1]) for menu in menus.values()) or 1.0)
    picks = dict[str, int]()
    for name, menu in menus.items():
        fitting = np.flatnonzero(menu.costs <= share * menu.costs[-1])
        if len(fitting) == 0:
            return None
        picks[name] = int(fitting[-1])
    return picks


def probe_ranks(menu: Menu) -> list[int]:
    """Returns the ranks at which a matrix is to be measured, 0 first: see `SHARES`."""
    places = np.searchsorted(menu.costs[:-1], np.array(SHARES) * menu.costs[-1], side="right") - 1
    return sorted({0, *(int(menu.ranks[place]) for place in places if place >= 0)})


def losing(
    menus: Mapping[str, Menu],
    spectra: Mapping[str, Spectrum],
    probes: Mapping[str, list[Probe]],
) -> dict[str, Menu]:
    """Returns the choices, worth what they lose by predicted curves that measurement corrected.

    L(r) = ½ Σ_{i>r} σᵢ² · exp(what log(measured/predicted) is at r), between the probes by linear
    interpolation. The losses are of one matrix at a time, and add up.
    """
    return {
        name: menu.losing(corrected(spectra[name], probes[name], menu.ranks))
        for name, menu in menus.items()
    }


def measured(
    menus: Mapping[str, Menu],
    spectra: Mapping[str, Spectrum],
    probes: Mapping[str, list[Probe]],
    budget: int,
    terms: Terms,
) -> dict[str, Choice]:
    """Returns the choices that lose least within the budget, by the curves of `losing`."""
    return spend(losing(menus, spectra, probes), budget, terms)


def corrected(
    spectrum: Spectrum, probes: list[Probe], ranks: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Returns what each of the ranks loses; never less at a smaller one."""
    logs = [np.log(max(p.measured, LEAST) / max(p.predicted, LEAST)) for p in probes]
    ratios = np.interp(ranks, [p.rank for p in probes], logs)
    losses = spectrum.tails.numpy()[ranks] / 2 * np.exp(ratios)
    return np.maximum.accumulate(losses[::-1])[::-1]


def _rank(menu: Menu, pick: int) -> int:
    """Of a pick; of dense, the largest rank there is."""
    return int(menu.ranks[min(pick, len(menu.ranks) - 1)]) if len(menu.ranks) else 0
