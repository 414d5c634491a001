"""Spectra in, ranks out. Pure: knows no files and no tensors but singular values.

A policy sees all matrices at once, so a global budget and a per-matrix rule are one kind of thing.
"""

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from eckart.certificate import FactorForm as Form
from eckart.errors import UsageError
from eckart.linalg.spectrum import Spectrum

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Choice:
    """A rank, or None and the reason why the matrix is copied as it is."""

    rank: int | None
    reason: str = ""


def cost(shape: Shape, rank: int, form: Form) -> int:
    """Returns the parameters of a factored matrix: r(m + n), or r(m + n − r) if pivoted."""
    m, n = shape
    return rank * (m + n - (rank if form == "pivoted" else 0))


def paying_rank(shape: Shape, form: Form) -> int:
    """Returns the largest rank that holds fewer parameters than the dense matrix; 0 if none.

    >>> paying_rank((512, 512), "ba"), paying_rank((512, 512), "pivoted")
    (255, 511)
    """
    m, n = shape
    return (m * n - 1) // (m + n) if form == "ba" else min(m, n) - 1


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
        return f"{asked}{clamped}, {_break_even(shape, form)}"

    def check(self, shapes: Mapping[str, Shape], form: Form) -> None:
        """Any shapes will do: what does not pay is copied."""

    def choose(
        self, spectra: Mapping[str, Spectrum], dense: Mapping[str, Shape], form: Form
    ) -> dict[str, Choice]:
        """Every matrix takes the rank."""
        return {name: Choice(self.value) for name in spectra}


@dataclass(frozen=True, slots=True)
class Energy:
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

    def limit(self, shape: Shape, form: Form) -> int:
        """Any rank that pays."""
        return paying_rank(shape, form)

    def refusal(self, shape: Shape, form: Form) -> str:
        """No rank pays."""
        return f"dense: no rank pays, {_break_even(shape, form)}"

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
class RelativeError:
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

    def limit(self, shape: Shape, form: Form) -> int:
        """Any rank that pays."""
        return paying_rank(shape, form)

    def refusal(self, shape: Shape, form: Form) -> str:
        """No rank pays."""
        return f"dense: no rank pays, {_break_even(shape, form)}"

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
class Keep:
    """A global budget: parameters after / before, over all targeted matrices.

    Keeping component i of a matrix is worth mn·σᵢ²/‖W‖_F² (what a matrix loses counts in
    proportion to its size) and costs parameters; *dense* is among the choices. One Lagrange
    multiplier, bisected, then a greedy fill of what is left. Never above the budget.
    """

    name: ClassVar[str] = "keep"
    value: float

    def __post_init__(self) -> None:
        if not 0 < self.value <= 1:
            raise UsageError(f"--keep {self.value} is out of range: choose above 0, up to 1.")

    @property
    def allowed(self) -> None:
        """Nothing is promised of a single matrix."""
        return None

    def limit(self, shape: Shape, form: Form) -> int:
        """Any rank that pays."""
        return paying_rank(shape, form)

    def refusal(self, shape: Shape, form: Form) -> str:
        """No rank pays."""
        return f"dense: no rank pays, {_break_even(shape, form)}"

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
        menus = {name: _Menu.of(spectrum, form) for name, spectrum in spectra.items()}
        self._reach(fixed + sum(int(menu.costs[0]) for menu in menus.values()), total)
        budget = math.floor(self.value * total) - fixed
        picks = _fill(menus, _bisect(menus, budget), budget)
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


@dataclass(frozen=True, slots=True)
class _Menu:
    """The choices of one matrix: ranks 1, 2, … and, last, dense."""

    costs: npt.NDArray[np.float64]
    worths: npt.NDArray[np.float64]

    @classmethod
    def of(cls, spectrum: Spectrum, form: Form) -> "_Menu":
        m, n = spectrum.shape
        ranks = range(1, min(paying_rank(spectrum.shape, form), len(spectrum.values)) + 1)
        costs = [cost(spectrum.shape, rank, form) for rank in ranks]
        share = spectrum.values.square().numpy() / (spectrum.energy or 1.0)
        if spectrum.energy == 0:  # any rank keeps all of a zero matrix
            share[0] = 1.0
        worths = m * n * np.cumsum(share)[: len(ranks)]
        return cls(np.array([*costs, m * n], float), np.array([*worths, m * n], float))

    def best(self, multiplier: float) -> int:
        return int(np.argmax(self.worths - multiplier * self.costs))

    def choice(self, pick: int) -> Choice:
        if pick == len(self.costs) - 1:
            return Choice(None, "dense: the better use of the budget")
        return Choice(pick + 1)


def _bisect(menus: Mapping[str, _Menu], budget: int) -> dict[str, int]:
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


def _fill(menus: Mapping[str, _Menu], picks: dict[str, int], budget: int) -> dict[str, int]:
    """Spends what the multiplier left, one rank at a time, the best worth per parameter first."""
    left = budget - sum(menus[name].costs[pick] for name, pick in picks.items())
    picks = dict(picks)

    def offer(name: str) -> tuple[float, str, float] | None:
        menu, pick = menus[name], picks[name]
        if pick + 1 >= len(menu.costs):
            return None
        price = menu.costs[pick + 1] - menu.costs[pick]
        return -(menu.worths[pick + 1] - menu.worths[pick]) / max(price, 1.0), name, price

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


def _if_it_pays(spectrum: Spectrum, rank: int, form: Form) -> Choice:
    if rank > paying_rank(spectrum.shape, form):
        return Choice(None, f"dense: needs rank {rank}, {_break_even(spectrum.shape, form)}")
    return Choice(max(rank, 1))


def _break_even(shape: Shape, form: Form) -> str:
    return f"break-even is {paying_rank(shape, form)} of {min(shape)}"
