"""A global budget: one multiplier over the menus of all matrices, then a greedy fill."""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eckart.allocate.item import Choice, Item, Terms
from eckart.linalg.spectrum import Spectrum

NOTHING = 1e-12
"""A share of the energy that is only float32's rounding: a relative error of 10⁻⁶."""

Price = Callable[[Item, int | None], int]
"""What a rank of an item costs, in the unit of the budget; None is dense."""


@dataclass(frozen=True, slots=True)
class Menu:
    """The choices of one matrix: some ranks, rising, and, last, dense (not in an adapter)."""

    ranks: npt.NDArray[np.int64]
    costs: npt.NDArray[np.float64]
    worths: npt.NDArray[np.float64]

    @classmethod
    def of(cls, item: Item, spectrum: Spectrum, terms: Terms, price: Price) -> "Menu":
        """Returns what each rank that pays costs, and is worth: mn·Σ_{i≤r} σᵢ²/‖W‖_F².

        In nats it is worth Σ_{i≤r} σᵢ²/2. A tail below `NOTHING` is worth nothing, so that an
        exactly low-rank matrix is factored whatever the budget.
        """
        if terms.additive:
            return cls._additive(item, spectrum, terms, price)
        largest, dense = min(terms.largest(item), len(spectrum.values)), price(item, None)
        paying = [r for r in range(terms.align, largest + 1, terms.align) if price(item, r) < dense]
        ranks = np.array(paying, int)  # a wide dtype or a permutation may cost more than it saves
        lost = spectrum.tails.numpy()[ranks] / (spectrum.energy or 1.0)
        whole = spectrum.energy / 2 if terms.in_nats else item.dense_parameters
        worths = whole * (1 - np.where(lost > NOTHING, lost, 0.0))
        costs = [price(item, int(rank)) for rank in ranks]
        return cls(ranks, np.array([*costs, dense], float), np.append(worths, whole))

    @classmethod
    def _additive(cls, item: Item, spectrum: Spectrum, terms: Terms, price: Price) -> "Menu":
        """Σ_{i≤r} σᵢ² for every rank from 0, and for the largest, whatever `align` says.

        Where spectra are in metrics that do not compare, their shares of the change's energy.
        """
        largest = min(terms.largest(item), len(spectrum.values))
        ranks = np.array([0, *range(terms.align, largest, terms.align), largest], int)
        costs = [0, *(price(item, int(rank)) for rank in ranks[1:])]
        worths = spectrum.energy - spectrum.tails.numpy()[ranks]
        if item.energy is not None:
            worths *= item.energy / (spectrum.energy or 1.0)
        return cls(ranks, np.array(costs, float), worths)

    def scaled(self, factor: float) -> "Menu":
        """Returns the same choices, worth more or less."""
        return Menu(self.ranks, self.costs, self.worths * factor)

    def from_rank(self, rank: float) -> "Menu":
        """Returns the choices from a rank on, dense among them."""
        first = int(np.searchsorted(self.ranks, rank))
        return Menu(self.ranks[first:], self.costs[first:], self.worths[first:])

    def losing(self, losses: npt.NDArray[np.float64]) -> "Menu":
        """Returns the same choices with what each of the ranks loses; dense loses nothing."""
        return Menu(self.ranks, self.costs, np.append(-losses, 0.0))

    def best(self, multiplier: float) -> int:
        """Returns the pick that is worth most after paying; the cheapest of equals."""
        return int(np.argmax(self.worths - multiplier * self.costs))

    def choice(self, pick: int, terms: Terms) -> Choice:
        """Returns what a pick means."""
        if pick == len(self.ranks):
            return Choice(None, "dense: the better use of the budget")
        return terms.choice(int(self.ranks[pick]))

    @property
    def least(self) -> float:
        """The cost of the cheapest pick."""
        return float(self.costs.min())


def spend(menus: Mapping[str, Menu], budget: int, terms: Terms) -> dict[str, Choice]:
    """Returns the choices that keep the most worth within the budget."""
    picks = fill(menus, bisect(menus, budget), budget)
    return {name: menus[name].choice(pick, terms) for name, pick in picks.items()}


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
        return {name: int(np.argmin(menu.costs)) for name, menu in menus.items()}
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(picks(middle)) > budget else (low, middle)
    return picks(high)


def fill(menus: Mapping[str, Menu], picks: dict[str, int], budget: int) -> dict[str, int]:
    """Spends what the multiplier left, one rank at a time, the best worth per unit first.

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
