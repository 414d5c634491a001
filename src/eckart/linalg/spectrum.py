"""Singular values, and the questions one asks of them.

Knows numbers only; how they were computed is the business of `exact` and `randomized`.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.errors import RankError, ShapeError, UsageError

LOST_DIGITS = 3e-3
"""Below this share of ‖W‖_F the balance energy − Σσ² of float32 values is noise
(Yu, Gu & Li, 2018, §3: the difference loses all digits near √ε)."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a matrix, possibly only the leading ones.

    `energy` is ‖W‖_F² of the whole matrix, so the tail of a partial spectrum is
    energy − Σσ² (Pythagoras); below 3·10⁻³ of ‖W‖_F that difference has lost its
    digits, and `relative_error` refuses.

    >>> s = Spectrum((4, 4), torch.tensor([4.0, 3.0, 2.0, 1.0]), energy=30.0)
    >>> s.rank_at_energy(25 / 30), round(s.relative_error(2), 4), s.break_even
    (2, 0.4082, 1)
    """

    shape: tuple[int, int]
    values: Float[Tensor, " k"]  # descending, float64, on the CPU
    energy: float  # ‖W‖_F²

    def __post_init__(self) -> None:
        values = self.values.detach().to("cpu", torch.float64)
        object.__setattr__(self, "values", values)
        if not 1 <= len(values) <= min(self.shape):
            raise ShapeError(
                f"a {self.shape[0]}×{self.shape[1]} matrix has at most {min(self.shape)} singular "
                f"values and at least one; got {len(values)}."
            )
        finite = bool(torch.isfinite(values).all())
        if not finite or bool((values < 0).any()) or bool((values.diff() > 0).any()):
            raise ShapeError("singular values must be finite, non-negative and descending.")
        if not math.isfinite(self.energy) or self.energy < 0:
            raise ShapeError(f"energy must be finite and not negative; got {self.energy}.")
        if self.energy == 0 < float(values[0]):
            raise ShapeError(
                f"energy is 0, but σ₁ is {float(values[0]):.3g}: its square is too small for "
                "float64. Scale the matrix up."
            )

    @property
    def complete(self) -> bool:
        """Whether every singular value is known."""
        return len(self.values) == min(self.shape)

    @property
    def break_even(self) -> int:
        """⌊(mn − 1)/(m + n)⌋: the largest rank at which B and A hold fewer numbers than W."""
        return break_even_rank(self.shape)

    def tail_energy(self, rank: int) -> float:
        """Σ_{i>rank} σᵢ²; for a partial spectrum energy − Σ_{i≤rank} σᵢ², never below zero."""
        if not 0 <= rank <= len(self.values):
            raise RankError(
                f"rank {rank} is out of range: {len(self.values)} singular values are known."
            )
        if self.complete:
            return float(self.tails[rank])
        return max(self.energy - float(self._heads[rank]), 0.0)

    def relative_error(self, rank: int) -> float:
        """‖W − W_r‖_F / ‖W‖_F of the best rank-`rank` approximation (Eckart & Young, 1936)."""
        if self.energy == 0:
            return 0.0
        error = math.sqrt(self.tail_energy(rank) / self.energy)
        if not self.complete and error < LOST_DIGITS:
            raise RankError(
                f"the error at rank {rank} is below {LOST_DIGITS:.0e}, where a partial spectrum "
                "cannot tell it: compute all values, or measure the residual."
            )
        return min(error, 1.0)

    def rank_at_energy(self, fraction: float) -> int:
        """The smallest rank that keeps `fraction` of the energy, to within float64 rounding."""
        if not 0 < fraction <= 1:
            raise UsageError(f"energy {fraction} is out of range: choose above 0, up to 1.")
        rounding = 4 * torch.finfo(torch.float64).eps
        return self._smallest((1 - fraction + rounding) * self.energy)

    def rank_at_error(self, error: float) -> int:
        """The smallest rank whose relative error is at most `error`."""
        if not 0 <= error < 1:
            raise UsageError(f"error {error} is out of range: choose from 0 to below 1.")
        return self._smallest(error**2 * self.energy * (1 + 1e-12))

    @property
    def effective_rank(self) -> float:
        """exp(−Σ pᵢ ln pᵢ) with pᵢ = σᵢ/Σσ (Roy & Vetterli, 2007); needs every value."""
        if not self.complete:
            raise RankError("the effective rank needs every singular value; this spectrum is cut.")
        total = float(self.values.sum())
        if total == 0:
            return 0.0
        p = self.values / total
        return float(torch.exp(-torch.xlogy(p, p).sum()))

    @property
    def stable_rank(self) -> float:
        """‖W‖_F² / σ₁²."""
        top = float(self.values[0])
        return self.energy / top**2 if top > 0 else 0.0

    def _smallest(self, tail: float) -> int:
        """The smallest rank whose tail energy is at most `tail`."""
        if not self.complete and tail < LOST_DIGITS**2 * self.energy:
            raise RankError(
                f"an error below {LOST_DIGITS:.0e} is more than a partial spectrum can tell: "
                "compute all values."
            )
        enough = (self.tails <= tail).nonzero()
        if len(enough) == 0:
            raise RankError(
                f"the {len(self.values)} values known do not reach that far: compute more of them."
            )
        return int(enough[0])

    @cached_property
    def _heads(self) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.float64), self.values.square().cumsum(0)])

    @cached_property
    def tails(self) -> Tensor:
        """The tail energy at each rank 0 … k, summed from the small end, where the digits are."""
        if not self.complete:
            return (self.energy - self._heads).clamp(min=0)
        squares = self.values.square().flip(0).cumsum(0).flip(0)
        return torch.cat([squares, torch.zeros(1, dtype=torch.float64)])


def break_even_rank(shape: tuple[int, int]) -> int:
    """Returns ⌊(mn − 1)/(m + n)⌋, the largest rank with r(m + n) < mn.

    >>> break_even_rank((10, 10)), break_even_rank((512, 512)), break_even_rank((1, 7))
    (4, 255, 0)
    """
    m, n = shape
    return (m * n - 1) // (m + n)
