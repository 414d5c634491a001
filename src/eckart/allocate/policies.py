"""The rank policies of single matrices: each a frozen value with a check, a limit and a choice."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from eckart.allocate.item import Choice, Item, Terms
from eckart.errors import UsageError
from eckart.linalg.spectrum import Spectrum


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


BELOW_FLOOR = "dense: nothing in it is above rounding"


def _if_it_pays(item: Item, rank: int, terms: Terms) -> Choice:
    aligned = terms.within(item, terms.aligned(rank))
    if aligned > terms.largest(item):
        return Choice(None, f"dense: needs rank {rank}, {terms.break_even(item)}")
    return terms.choice(aligned)
