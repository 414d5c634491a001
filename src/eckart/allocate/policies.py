"""The rank policies: each a frozen value with a check, a limit and a choice."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from eckart.allocate.budget import Menu, bisect, fill
from eckart.allocate.cost import Choice, Form, Shape, break_even, cost, paying_rank
from eckart.errors import UsageError
from eckart.linalg.spectrum import Spectrum


class RankPolicy(Protocol):
    """How ranks are chosen."""

    name: ClassVar[str]

    @property
    def value(self) -> float:
        """The number the user gave."""
        ...

    @property
    def allowed(self) -> float | None:
        """The largest relative error of any factored matrix, None if nothing is promised of it."""
        ...

    def limit(self, shape: Shape, form: Form) -> int:
        """Returns the largest rank that could be wanted of this shape; 0 if it is copied."""
        ...

    def refusal(self, shape: Shape, form: Form) -> str:
        """Returns why a matrix whose limit is 0 is copied."""
        ...

    def check(self, shapes: Mapping[str, Shape], form: Form) -> None:
        """Raises UsageError where the shapes alone show that no ranks can do it."""
        ...

    def choose(
        self, spectra: Mapping[str, Spectrum], dense: Mapping[str, Shape], form: Form
    ) -> dict[str, Choice]:
        """Returns a choice per spectrum; `dense` are the targeted matrices already copied."""
        ...


@dataclass(frozen=True, slots=True)
class FixedRank:
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

    def limit(self, shape: Shape, form: Form) -> int:
        """The rank itself, if it pays."""
        return self.value if self.value <= paying_rank(shape, form) else 0

    def refusal(self, shape: Shape, form: Form) -> str:
        """Rank against break-even."""
        asked, largest = f"dense: rank {self.value} does not pay", min(shape)
        clamped = f" (clamped to {largest})" if self.value > largest else ""
        return f"{asked}{clamped}, {break_even(shape, form)}"

    def check(self, shapes: Mapping[str, Shape], form: Form) -> None:
        """Any shapes will do: what does not pay is copied."""

    def choose(
        self, spectra: Mapping[str, Spectrum], dense: Mapping[str, Shape], form: Form
    ) -> dict[str, Choice]:
        """Every matrix takes the rank."""
        return {name: Choice(self.value) for name in spectra}


@dataclass(frozen=True, slots=True)
class _AnyRankThatPays:
    """What the policies share that may want any rank: the number given, and how far it can go."""

    value: float

    def limit(self, shape: Shape, form: Form) -> int:
        """Any rank that pays."""
        return paying_rank(shape, form)

    def refusal(self, shape: Shape, form: Form) -> str:
        """No rank pays."""
        return f"dense: no rank pays, {break_even(shape, form)}"


@dataclass(frozen=True, slots=True)
class Energy(_AnyRankThatPays):
    """Per matrix, the smallest rank that keeps a fraction of ‖W‖_F²."""

    name: ClassVar[str] = "energy"

    def __post_init__(self) -> None:
        if not 0 < self.value <= 1:
            raise UsageError(f"--energy {self.value} is out of range: choose above 0, up to 1.")

    @property
    def allowed(self) -> float:
        """√(1 − energy)."""
        return math.sqrt(1 - self.value)

    def check(self, shapes: Mapping[str, Shape], form: Form) -> None:
        """Any shapes will do: what does not pay is copied."""

    def choose(
        self, spectra: Mapping[str, Spectrum], dense: Mapping[str, Shape], form: Form
    ) -> dict[str, Choice]:
        """The smallest sufficient rank, if it pays."""
        return {
            name: _if_it_pays(spectrum, spectrum.rank_at_energy(self.value), form)
            for name, spectrum in spectra.items()
        }


@dataclass(frozen=True, slots=True)
class RelativeError(_AnyRankThatPays):
    """Per matrix, the smallest rank with ‖W − BA‖_F ≤ error·‖W‖_F."""

    name: ClassVar[str] = "error"

    def __post_init__(self) -> None:
        if not 0 <= self.value < 1:
            raise UsageError(f"--error {self.value} is out of range: choose from 0 to below 1.")

    @property
    def allowed(self) -> float:
        """The error itself."""
        return self.value

    def check(self, shapes: Mapping[str, Shape], form: Form) -> None:
        """Any shapes will do: what does not pay is copied."""

    def choose(
        self, spectra: Mapping[str, Spectrum], dense: Mapping[str, Shape], form: Form
    ) -> dict[str, Choice]:
        """The smallest sufficient rank, if it pays."""
        return {
            name: _if_it_pays(spectrum, spectrum.rank_at_error(self.value), form)
            for name, spectrum in spectra.items()
        }


@dataclass(frozen=True, slots=True)
class Keep(_AnyRankThatPays):
    """A global budget: parameters after / before, over all targeted matrices.

    Keeping component i of a matrix is worth mn·σᵢ²/‖W‖_F² (what a matrix loses counts in
    proportion to its size) and costs parameters; *dense* is among the choices. One Lagrange
    multiplier, bisected, then a greedy fill of what is left. Never above the budget.
    """

    name: ClassVar[str] = "keep"

    def __post_init__(self) -> None:
        if not 0 < self.value <= 1:
            raise UsageError(f"--keep {self.value} is out of range: choose above 0, up to 1.")

    @property
    def allowed(self) -> None:
        """Nothing is promised of a single matrix."""
        return None

    def check(self, shapes: Mapping[str, Shape], form: Form) -> None:
        """Rank 1 everywhere must be within the budget."""
        total = sum(m * n for m, n in shapes.values())
        least = sum(min(cost((m, n), 1, form), m * n) for m, n in shapes.values())
        self._reach(least, total)

    def choose(
        self, spectra: Mapping[str, Spectrum], dense: Mapping[str, Shape], form: Form
    ) -> dict[str, Choice]:
        """The ranks that keep the most worth within the budget."""
        fixed = sum(m * n for m, n in dense.values())
        total = fixed + sum(math.prod(spectrum.shape) for spectrum in spectra.values())
        menus = {name: Menu.of(spectrum, form) for name, spectrum in spectra.items()}
        self._reach(fixed + sum(int(menu.costs[0]) for menu in menus.values()), total)
        budget = math.floor(self.value * total) - fixed
        picks = fill(menus, bisect(menus, budget), budget)
        return {name: menus[name].choice(pick) for name, pick in picks.items()}

    def _reach(self, least: int, total: int) -> None:
        if least > math.floor(self.value * total):
            raise UsageError(
                f"--keep {self.value} cannot be reached: rank 1 everywhere keeps "
                f"{least / total:.4f} of the targeted parameters. Choose more than that."
            )


POLICIES: dict[str, Callable[[Any], RankPolicy]] = {
    policy.name: policy for policy in (FixedRank, Energy, RelativeError, Keep)
}


def _if_it_pays(spectrum: Spectrum, rank: int, form: Form) -> Choice:
    if rank > paying_rank(spectrum.shape, form):
        return Choice(None, f"dense: needs rank {rank}, {break_even(spectrum.shape, form)}")
    return Choice(max(rank, 1))
