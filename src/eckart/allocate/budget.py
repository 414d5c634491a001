"""A global budget: one multiplier over the menus of all matrices, then a greedy fill."""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eckart.allocate.cost import Choice, Form, cost, paying_rank
from eckart.linalg.spectrum import Spectrum

NOTHING = 1e-12
"""A share of the energy that is only float32's rounding: a relative error of 10⁻⁶."""


@dataclass(frozen=True, slots=True)
class Menu:
    """The choices of one matrix: ranks 1, 2, … and, last, dense."""

    costs: npt.NDArray[np.float64]
    worths: npt.NDArray[np.float64]

    @classmethod
    def of(cls, spectrum: Spectrum, form: Form) -> "Menu":
        """Returns what each rank that pays costs, and is worth: mn·Σ_{i≤r} σᵢ²/‖W‖_F².

        A tail below `NOTHING` is worth nothing, so that an exactly low-rank matrix is factored
        whatever the budget.
        """
        m, n = spectrum.shape
        ranks = range(1, min(paying_rank(spectrum.shape, form), len(spectrum.values)) + 1)
        costs = [cost(spectrum.shape, rank, form) for rank in ranks]
        lost = np.array([spectrum.tail_energy(rank) for rank in ranks]) / (spectrum.energy or 1.0)
        worths = m * n * (1 - np.where(lost > NOTHING, lost, 0.0))
        return cls(np.array([*costs, m * n], float), np.array([*worths, m * n], float))

    def best(self, multiplier: float) -> int:
        """Returns the pick that is worth most after paying; the cheapest of equals."""
        return int(np.argmax(self.worths - multiplier * self.costs))

    def choice(self, pick: int) -> Choice:
        """Returns what a pick means."""
        if pick == len(self.costs) - 1:
            return Choice(None, "dense: the better use of the budget")
        return Choice(pick + 1)


def bisect(menus: Mapping[str, Menu], budget: int) -> dict[str, int]:
    """The best picks of the smallest multiplier whose cost is within the budget."""

    def picks(multiplier: float) -> dict[str, int]:
        return {name: menu.best(multiplier) for name, menu in menus.items()}

    def spent(chosen: Mapping[str, int]) -> float:
        return sum(menus[name].costs[pick] for name, pick in chosen.items())

    if spent(picks(0.0)) <= budget:
        return picks(0.0)
    low, high = 0.0, 1.0
    while spent(picks(high)) > budget and high < 1e18:
        low, high = high, 4 * high
    if spent(picks(high)) > budget:
        return dict.fromkeys(menus, 0)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(picks(middle)) > budget else (low, middle)
    return picks(high)


def fill(menus: Mapping[str, Menu], picks: dict[str, int], budget: int) -> dict[str, int]:
    """Spends what the multiplier left, one rank at a time, the best worth per parameter first.

    Nothing is spent where nothing is gained, so an exact answer may stay well below the budget.
    """
    left = budget - sum(menus[name].costs[pick] for name, pick in picks.items())
    picks = dict(picks)

    def offer(name: str) -> tuple[float, str, float] | None:
        menu, pick = menus[name], picks[name]
        if pick + 1 >= len(menu.costs):
            return None
        price = menu.costs[pick + 1] - menu.costs[pick]
        gain = menu.worths[pick + 1] - menu.worths[pick]
        return (-gain / max(price, 1.0), name, price) if gain > 0 else None

    heap = [found for name in sorted(menus) if (found := offer(name))]
    heapq.heapify(heap)
    while heap:
        _, name, price = heapq.heappop(heap)
        if price > left:
            continue
        left -= price
        picks[name] += 1
        if following := offer(name):
            heapq.heappush(heap, following)
    return picks
