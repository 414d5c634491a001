"""The rank policies of all matrices together: budgets, and what a choice costs."""

import math
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from eckart.allocate.budget import Menu, spend
from eckart.allocate.item import Choice, Item, Terms
from eckart.allocate.policies import RankPolicy
from eckart.errors import UsageError
from eckart.linalg.spectrum import Spectrum
from eckart.matrix import FactorForm


@dataclass(frozen=True, slots=True)
class Priced(RankPolicy):
    """A policy that weighs matrices against each other, each rank at its price."""

    value: float

    @property
    def is_budget(self) -> bool:
        """Forms compete under it."""
        return True

    @property
    def allowed(self) -> None:
        """Nothing is promised of a single matrix."""
        return None

    @abstractmethod
    def price(self, item: Item, rank: int | None, terms: Terms) -> int:
        """Returns what an item costs at a rank, or dense."""

    def menus_of(
        self, items: Mapping[str, Item], spectra: Mapping[str, Spectrum], terms: Terms
    ) -> dict[str, Menu]:
        """Returns the choices of every spectrum's matrix: see `Menu.of`."""

        def price(item: Item, rank: int | None) -> int:
            return self.price(item, rank, terms)

        return {
            name: Menu.of(items[name], spectrum, terms, price) for name, spectrum in spectra.items()
        }

    def same_price(self, item: Item, rank: int, terms: Terms, form: FactorForm) -> int:
        """Returns the largest rank in one form that costs no more than `rank` does in `terms`."""
        planned, fixed = self.price(item, rank, terms), replace(terms, form=form)
        ranks = range(terms.align, min(item.shape) + 1, terms.align)
        fitting = bisect_right(ranks, planned, key=lambda r: self.price(item, r, fixed))
        return ranks[fitting - 1] if fitting else 0


@dataclass(frozen=True, slots=True)
class Budget(Priced):
    """A global budget over all targeted matrices, in some unit.

    Keeping component i of a matrix is worth σᵢ²/2 nats per token where the metric has the loss's
    curvature, else mn·σᵢ²/‖W‖_F² (what a matrix loses counts in proportion to its size), and costs
    its unit; *dense* is among the choices. What was added to a matrix is worth its energy, σᵢ²
    (in nats twice what it is worth), and *nothing* is among the choices; in metrics without the
    curvature, σᵢ²/Σσ² of the change's plain energy. One Lagrange multiplier, bisected, then a
    greedy fill of what is left. Never above the budget.
    """

    @abstractmethod
    def budget(self, items: Mapping[str, Item], terms: Terms) -> int:
        """Returns what the targeted matrices may cost, all together."""

    @abstractmethod
    def unreachable(self, least: int, items: Mapping[str, Item], terms: Terms) -> UsageError:
        """Returns the error for a budget below the least that these matrices can cost."""

    def check(self, items: Mapping[str, Item], terms: Terms) -> None:
        """The smallest rank everywhere must be within the budget: 0 for an adapter."""
        least = (
            0
            if terms.additive
            else sum(
                min(self.price(item, None, terms), self.price(item, terms.align, terms))
                if terms.largest(item)
                else self.price(item, None, terms)
                for item in items.values()
            )
        )
        if least > self.budget(items, terms):
            raise self.unreachable(least, items, terms)

    def choose(
        self, items: Mapping[str, Item], spectra: Mapping[str, Spectrum], terms: Terms
    ) -> dict[str, Choice]:
        """The ranks that keep the most worth within the budget."""
        return spend(*self.menus(items, spectra, terms), terms)

    def menus(
        self, items: Mapping[str, Item], spectra: Mapping[str, Spectrum], terms: Terms
    ) -> tuple[dict[str, Menu], int]:
        """Returns the choices of every spectrum's matrix, and what they may cost all together."""
        menus = self.menus_of(items, spectra, terms)
        if terms.additive or terms.in_nats:  # to worths of the size that the others have
            energy = sum(spectrum.energy for spectrum in spectra.values())
            menus = {
                name: menu.scaled(_total(items) / (energy or 1.0)) for name, menu in menus.items()
            }
        others = [item for name, item in items.items() if name not in spectra]
        fixed = 0 if terms.additive else sum(self.price(item, None, terms) for item in others)
        left = self.budget(items, terms) - fixed
        least = sum(int(menu.least) for menu in menus.values())
        if least > left:
            raise self.unreachable(fixed + least, items, terms)
        return menus, left


@dataclass(frozen=True, slots=True)
class Keep(Budget):
    """Parameters after / before, over all targeted matrices."""

    name: ClassVar[str] = "keep"

    def __post_init__(self) -> None:
        if not 0 < self.value <= 1:
            raise UsageError(f"--keep {self.value} is out of range: choose above 0, up to 1.")

    def budget(self, items: Mapping[str, Item], terms: Terms) -> int:
        """The share of all targeted parameters."""
        return math.floor(self.value * _total(items))

    def price(self, item: Item, rank: int | None, terms: Terms) -> int:
        """Parameters."""
        return parameters_of(item, rank, terms)

    def unreachable(self, least: int, items: Mapping[str, Item], terms: Terms) -> UsageError:
        """What the least keeps."""
        return UsageError(
            f"--keep {self.value} cannot be reached: rank {terms.align} everywhere keeps "
            f"{math.ceil(1e4 * least / _total(items)) / 1e4:.4f} of the targeted parameters: "
            "choose at least that."
        )


@dataclass(frozen=True, slots=True)
class Size(Budget):
    """The bytes of all tensors of the output."""

    name: ClassVar[str] = "size"
    value: int

    def __post_init__(self) -> None:
        if not isinstance(self.value, int) or self.value < 1:
            raise UsageError(f"--size {self.value} is out of range: choose 1 byte or more.")

    def budget(self, items: Mapping[str, Item], terms: Terms) -> int:
        """What the tensors that are no matrices leave."""
        return self.value - terms.rest_bytes

    def price(self, item: Item, rank: int | None, terms: Terms) -> int:
        """Bytes."""
        return item.dense_bytes if rank is None else item.bytes(rank, terms.form)

    def unreachable(self, least: int, items: Mapping[str, Item], terms: Terms) -> UsageError:
        """What the least takes."""
        return UsageError(
            f"--size {self.value} cannot be reached: rank {terms.align} everywhere takes "
            f"{least + terms.rest_bytes} bytes, {terms.rest_bytes} of them for tensors that are "
            "not factored. Choose more than that."
        )


def parameters_of(item: Item, rank: int | None, terms: Terms) -> int:
    """Returns what an item holds at a rank, or dense."""
    return item.dense_parameters if rank is None else item.parameters(rank, terms.form)


def _total(items: Mapping[str, Item]) -> int:
    return sum(item.dense_parameters for item in items.values())
