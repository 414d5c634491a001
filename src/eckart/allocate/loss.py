"""A loss that is allowed, and the most that can be saved for it.

Pure, as the policies are; who measures a loss is the caller's business.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from eckart.allocate.budget import Menu
from eckart.allocate.budgets import Priced, parameters_of
from eckart.allocate.item import Choice, Item, Terms
from eckart.errors import UsageError
from eckart.linalg.spectrum import Spectrum

TRIES = 16
"""Choices that are measured at most: each halves what is left in doubt, as a rule."""

CLOSE = 0.98
"""Of the loss allowed: a choice that loses so much is as good as the best."""

WIDEST = 2.0**80
"""How far a multiplier is looked for from where it is predicted, either way."""

Picks = dict[str, int]


@dataclass(frozen=True, slots=True)
class Loss(Priced):
    """As few parameters as a loss in nats per token allows, over all targeted matrices.

    By prediction: Σ ½σᵢ² of all that is cut. The promise is kept by measuring: see `most_saving`.
    """

    name: ClassVar[str] = "loss"

    def __post_init__(self) -> None:
        if not 0 < self.value < math.inf:
            raise UsageError(
                f"--loss {self.value} is out of range: choose a finite number of nats above 0."
            )

    def price(self, item: Item, rank: int | None, terms: Terms) -> int:
        """Parameters."""
        return parameters_of(item, rank, terms)

    def check(self, items: Mapping[str, Item], terms: Terms) -> None:
        """Only in nats can a loss be predicted."""
        if not terms.in_nats:
            raise UsageError(
                f"--loss {self.value} is in nats per token, which --statistics with curvature "
                "tell: eckart calibrate MODEL --text FILE -o S, then give S."
            )

    def menus(
        self, items: Mapping[str, Item], spectra: Mapping[str, Spectrum], terms: Terms
    ) -> dict[str, Menu]:
        """Returns the choices of every spectrum's matrix, worth what they are predicted to lose."""
        return {
            name: menu.losing(spectra[name].tails.numpy()[menu.ranks] / 2)
            for name, menu in self.menus_of(items, spectra, terms).items()
        }

    def choose(
        self, items: Mapping[str, Item], spectra: Mapping[str, Spectrum], terms: Terms
    ) -> dict[str, Choice]:
        """The cheapest ranks that are predicted to lose no more, by one multiplier."""
        menus = self.menus(items, spectra, terms)
        picks = most_saving(menus, self.value, lambda picks: predicted(menus, picks), tries=200)
        return {name: menus[name].choice(pick, terms) for name, pick in picks.items()}


def predicted(menus: Mapping[str, Menu], picks: Mapping[str, int]) -> float:
    """Returns the sum of what the picks lose."""
    return -math.fsum(float(menus[name].worths[pick]) for name, pick in picks.items())


@dataclass
class _Search:
    """Picks along the multiplier: those known to be within what is allowed, and those beyond."""

    menus: Mapping[str, Menu]
    allowed: float
    measure: Callable[[Picks], float]
    known: dict[tuple[int, ...], float] = field(default_factory=dict[tuple[int, ...], float])

    def picks(self, multiplier: float) -> Picks:
        return {name: menu.best(multiplier) for name, menu in self.menus.items()}

    def loss(self, multiplier: float) -> float:
        picks = self.picks(multiplier)
        place = tuple(picks.values())
        if place not in self.known:
            self.known[place] = self.measure(picks)
        return self.known[place]

    def within(self, multiplier: float) -> bool:
        return self.loss(multiplier) <= self.allowed

    def done(self, low: float, tries: int) -> bool:
        """Whether looking further is not worth it."""
        near = low > 0 and self.loss(low) >= CLOSE * self.allowed
        return near or len(self.known) >= tries


def most_saving(
    menus: Mapping[str, Menu],
    allowed: float,
    measure: Callable[[Picks], float],
    *,
    start: float | None = None,
    tries: int = TRIES,
) -> Picks:
    """Returns the picks of the largest multiplier that was found to lose no more than is allowed.

    At a multiplier λ every matrix takes the pick that loses least after λ times its price is added;
    at 0 all are dense, and nothing is lost. What the picks lose is asked of `measure`, at most
    `tries` times: from `start` (or from where it is predicted) up or down until it is between two
    multipliers, then halfway between them, by ratio. (A measured loss need not rise with λ: what
    is returned was measured, what lies beyond may not have been.)
    """
    search = _Search(menus, allowed, measure)
    low, high = 0.0, math.inf
    middle = first = start or _predicted_multiplier(menus, allowed)
    while first / WIDEST < middle < first * WIDEST:
        low, high = (middle, high) if search.within(middle) else (low, middle)
        if search.done(low, tries) or search.picks(low) == search.picks(high):
            break
        middle = 2 * low if math.isinf(high) else high / 2 if low == 0 else math.sqrt(low * high)
        if not low < middle < high:
            break
    return search.picks(low)


def _predicted_multiplier(menus: Mapping[str, Menu], allowed: float) -> float:
    """The largest at which the picks lose no more than is allowed, or are the cheapest."""

    def picks(multiplier: float) -> Picks:
        return {name: menu.best(multiplier) for name, menu in menus.items()}

    def within(multiplier: float) -> bool:
        return predicted(menus, picks(multiplier)) <= allowed

    low, high, cheapest = 0.0, 1e-30, picks(math.inf)
    while within(high) and picks(high) != cheapest:
        low, high = high, 4 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low or high
