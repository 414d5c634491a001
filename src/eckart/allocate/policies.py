"""The rank policies: each a frozen value with a check, a limit and a choice."""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from eckart.allocate.budget import Menu, spend
from eckart.allocate.item import Choice, Item, Terms
from eckart.errors import UsageError
from eckart.linalg.spectrum import Spectrum
from eckart.matrix import FactorForm


@dataclass(frozen=True, slots=True)
class RankPolicy(ABC):
    """How ranks are chosen: from the sizes of all targeted matrices, and the spectra of some."""

    name: ClassVar[str]
    value: float | str  # what the user gave

    @property
    @abstractmethod
    def allowed(self) -> float | None:
        """The largest relative error of any factored matrix, None if nothing is promised of it."""

    @property
    def is_budget(self) -> bool:
        """Whether the number is for all matrices together, so that forms compete."""
        return False

    def limit(self, item: Item, terms: Terms) -> int:
        """Returns the largest rank that could be wanted of this item; 0 if it is copied."""
        return terms.largest(item)

    def refusal(self, item: Item, terms: Terms) -> str:
        """Returns why an item whose limit is 0 is copied."""
        return f"dense: no rank pays, {terms.break_even(item)}"

    @abstractmethod
    def check(self, items: Mapping[str, Item], terms: Terms) -> None:
        """Raises UsageError where the sizes alone show that no ranks can do it."""

    @abstractmethod
    def choose(
        self, items: Mapping[str, Item], spectra: Mapping[str, Spectrum], terms: Terms
    ) -> dict[str, Choice]:
        """Returns a choice per spectrum; the other items are copied whatever is chosen."""


@dataclass(frozen=True, slots=True)
class FixedRank(RankPolicy):
    """The same rank for every matrix, where it pays."""

    name: ClassVar[str] = "rank"
    value: int

    def __post_init__(self) -> None:
        if not isinstance(self.value, int) or self.value < 1:
            raise UsageError(f"--rank {self.value} is out of range: choose a whole number from 1.")

    @property
    def allowed(self) -> None:
        """Nothing is promised of a single matrix."""
        return None

    def limit(self, item: Item, terms: Terms) -> int:
        """The rank itself, if it pays."""
        rank = terms.within(item, self.value)
        return rank if rank <= terms.largest(item) else 0

    def refusal(self, item: Item, terms: Terms) -> str:
        """Rank against break-even."""
        asked, largest = f"dense: rank {self.value} does not pay", min(item.shape)
        clamped = f" (clamped to {largest})" if self.value > largest else ""
        return f"{asked}{clamped}, {terms.break_even(item)}"

    def check(self, items: Mapping[str, Item], terms: Terms) -> None:
        """The rank must be a multiple of `align`."""
        if self.value % terms.align:
            raise UsageError(f"--rank {self.value} is no multiple of --align {terms.align}.")

    def choose(
        self, items: Mapping[str, Item], spectra: Mapping[str, Spectrum], terms: Terms
    ) -> dict[str, Choice]:
        """Every matrix takes the rank."""
        return {name: terms.choice(terms.within(items[name], self.value)) for name in spectra}


@dataclass(frozen=True, slots=True)
class AutoRank(RankPolicy):
    """Every matrix takes the rank that was found in it, above rounding: `Item.known_rank`."""

    name: ClassVar[str] = "rank"
    value: str = "auto"

    @property
    def allowed(self) -> None:
        """Nothing is promised of a single matrix."""
        return None

    def limit(self, item: Item, terms: Terms) -> int:
        """The rank that was found; 0 if it is all rounding."""
        return 0 if item.barred else item.known_rank or 0

    def refusal(self, item: Item, terms: Terms) -> str:
        """Why rank 0."""
        return BELOW_FLOOR

    def check(self, items: Mapping[str, Item], terms: Terms) -> None:
        """Any sizes will do, but the rank that is there is a multiple of 1 only."""
        if terms.align > 1:
            raise UsageError(
                f"--rank auto takes the rank that is there, whatever it is a multiple of: leave "
                f"--align {terms.align} out, or choose --rank R."
            )

    def choose(
        self, items: Mapping[str, Item], spectra: Mapping[str, Spectrum], terms: Terms
    ) -> dict[str, Choice]:
        """Every matrix takes its own."""
        return {name: terms.choice(items[name].known_rank or 0) for name in spectra}


@dataclass(frozen=True, slots=True)
class Energy(RankPolicy):
    """Per matrix, the smallest rank that keeps a fraction of ‖W‖_F²."""

    name: ClassVar[str] = "energy"
    value: float

    def __post_init__(self) -> None:
        if not 0 < self.value <= 1:
            raise UsageError(f"--energy {self.value} is out of range: choose above 0, up to 1.")

    @property
    def allowed(self) -> float:
        """√(1 − energy)."""
        return math.sqrt(1 - self.value)

    def check(self, items: Mapping[str, Item], terms: Terms) -> None:
        """Any sizes will do: what does not pay is copied."""

    def choose(
        self, items: Mapping[str, Item], spectra: Mapping[str, Spectrum], terms: Terms
    ) -> dict[str, Choice]:
        """The smallest sufficient rank, if it pays."""
        return {
            name: _if_it_pays(items[name], spectrum.rank_at_energy(self.value), terms)
            for name, spectrum in spectra.items()
        }


@dataclass(frozen=True, slots=True)
class RelativeError(RankPolicy):
    """Per matrix, the smallest rank with ‖W − BA‖_F ≤ error·‖W‖_F."""

    name: ClassVar[str] = "error"
    value: float

    def __post_init__(self) -> None:
        if not 0 <= self.value < 1:
            raise UsageError(f"--error {self.value} is out of range: choose from 0 to below 1.")

    @property
    def allowed(self) -> float:
        """The error itself."""
        return self.value

    def check(self, items: Mapping[str, Item], terms: Terms) -> None:
        """Any sizes will do: what does not pay is copied."""

    def choose(
        self, items: Mapping[str, Item], spectra: Mapping[str, Spectrum], terms: Terms
    ) -> dict[str, Choice]:
        """The smallest sufficient rank, if it pays."""
        return {
            name: _if_it_pays(items[name], spectrum.rank_at_error(self.value), terms)
            for name, spectrum in spectra.items()
        }


@dataclass(frozen=True, slots=True)
class Budget(RankPolicy):
    """A global budget over all targeted matrices, in some unit.

    Keeping component i of a matrix is worth σᵢ²/2 nats per token where the metric has the loss's
    curvature, else mn·σᵢ²/‖W‖_F² (what a matrix loses counts in proportion to its size), and costs
    its unit; *dense* is among the choices. What was added to a matrix is worth its energy, σᵢ²
    (in nats twice what it is worth), and *nothing* is among the choices; in metrics without the
    curvature, σᵢ²/Σσ² of the change's plain energy. One Lagrange multiplier, bisected, then a
    greedy fill of what is left. Never above the budget.
    """

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
    def budget(self, items: Mapping[str, Item], terms: Terms) -> int:
        """Returns what the targeted matrices may cost, all together."""

    @abstractmethod
    def price(self, item: Item, rank: int | None, terms: Terms) -> int:
        """Returns what an item costs at a rank, or dense."""

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

        def price(item: Item, rank: int | None) -> int:
            return self.price(item, rank, terms)

        menus = {
            name: Menu.of(items[name], spectrum, terms, price) for name, spectrum in spectra.items()
        }
        if terms.additive or terms.in_nats:  # to worths of the size that the others have
            energy = sum(spectrum.energy for spectrum in spectra.values())
            menus = {
                name: menu.scaled(_total(items) / (energy or 1.0)) for name, menu in menus.items()
            }
        others = [item for name, item in items.items() if name not in spectra]
        fixed = 0 if terms.additive else sum(price(item, None) for item in others)
        left = self.budget(items, terms) - fixed
        least = sum(int(menu.least) for menu in menus.values())
        if least > left:
            raise self.unreachable(fixed + least, items, terms)
        return menus, left

    def same_price(self, item: Item, rank: int, terms: Terms, form: FactorForm) -> int:
        """Returns the largest rank in one form that costs no more than `rank` does in `terms`."""
        planned, fixed = self.price(item, rank, terms), replace(terms, form=form)
        ranks = range(terms.align, min(item.shape) + 1, terms.align)
        fitting = bisect_right(ranks, planned, key=lambda r: self.price(item, r, fixed))
        return ranks[fitting - 1] if fitting else 0


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
        return item.dense_parameters if rank is None else item.parameters(rank, terms.form)

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


BELOW_FLOOR = "dense: nothing in it is above rounding"

POLICIES: dict[str, Callable[[Any], RankPolicy]] = {
    policy.name: policy for policy in (FixedRank, Energy, RelativeError, Keep, Size)
}


def _total(items: Mapping[str, Item]) -> int:
    return sum(item.dense_parameters for item in items.values())


def _if_it_pays(item: Item, rank: int, terms: Terms) -> Choice:
    aligned = terms.within(item, terms.aligned(rank))
    if aligned > terms.largest(item):
        return Choice(None, f"dense: needs rank {rank}, {terms.break_even(item)}")
    return terms.choice(aligned)
