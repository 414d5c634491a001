"""A block Krylov space that grows product by product, and the estimate of what is still to come.

Knows tensors; must not know files, nor what the space is grown for: that is `randomized`.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.linalg.orthogonal import Basis, extend
from eckart.linalg.products import product
from eckart.linalg.tridiagonal import Tridiagonal, one_thread

SAFETY = 2.0
"""Heuristic, measured on 107 spectra (polynomial, geometric, linear, steps, Gaussian, and up to 40
spikes over a flat bulk) at ranks 8 to 48: what was still missing was at most 2.1 times what the
gains say, and typically 0.7 times."""

TEST_COST = 4
"""s³ = mnb/4: there a test costs about half as much as a product."""


class GolubKahan:
    """Block Golub–Kahan bidiagonalization with full reorthogonalization.

    Golub, Luk & Overton (1981), from a random start: the bases span the Krylov spaces of Musco &
    Musco (2015, Algorithm 2), but every product also gives the projected matrix, so that no
    further pass over W is needed to know the Ritz values. Three departures: the random block only
    starts the left side and is no part of the right basis, to which it adds columns and hardly
    any energy; the projected matrix holds the coefficients as computed, not only the two blocks
    per column that exact arithmetic would leave; and directions of a block that are only rounding
    are dropped.
    """

    def __init__(self, W: Tensor, start: Float[Tensor, "n b"], energy: float) -> None:
        self.W = W
        self.noise = 4 * torch.finfo(W.dtype).eps * math.sqrt(energy)  # of a vanishing product
        m, n = W.shape
        self.right, self.left = Basis(n, W), Basis(m, W)
        self.start = start  # of columns that are nearly orthonormal, as n⁻½ × Gaussian ones are
        self.first = W.new_zeros(0, 0)  # what the first product made of it
        self.products = 0
        empty = torch.zeros(0, 0, dtype=torch.float64)
        self._projected = {True: empty, False: empty}
        self._reduction: tuple[int, Tridiagonal] | None = None

    @property
    def forward(self) -> bool:
        """Whether the last product was with W, and not with Wᵀ."""
        return self.products % 2 == 1

    @property
    def source(self) -> Basis:
        """The side that was multiplied last."""
        return self.right if self.forward else self.left

    @property
    def target(self) -> Basis:
        """The side that the last product reached."""
        return self.left if self.forward else self.right

    @property
    def exhausted(self) -> bool:
        """Whether the last product gave no new direction: the spaces are invariant."""
        return self.target.newest == 0

    @property
    def projected(self) -> Float[Tensor, "t s"]:
        """M with Wᵀ·left = right·M after a product with Wᵀ, W·right = left·M after a later one."""
        return self._projected[self.forward]

    def advance(self) -> None:
        """Multiplies the newest block and extends the other side's basis by the result."""
        self.products += 1
        X = self.source.block if self.products > 1 else self.start
        Z = product(self.W, X) if self.forward else product(X.mT, self.W).mT
        Q, C, R = extend(self.target, Z, self.noise)
        self.target.append(Q)
        if self.products == 1:
            self.first = R
            return
        old, column = self.projected, torch.cat([C, R])
        new = old.new_zeros(len(column), old.shape[1] + column.shape[1])
        new[: len(old), : old.shape[1]] = old
        new[:, old.shape[1] :] = column
        self._projected[self.forward] = new

    @property
    def worth_a_test(self) -> bool:
        """Whether the stop rule should be tested now: after every product, later every step.

        The Ritz values of s columns take some s³ flops at LAPACK's speed, a product 2mnb at that
        of matrix products, and a test pays if it saves a product every second time.
        """
        m, n = self.W.shape
        cheap = TEST_COST * self.source.count**3 <= m * n * self.source.newest
        return cheap or not self.forward

    def ritz(self) -> Float[Tensor, " s"]:
        """Returns the squared singular values of the projected matrix, descending.

        By its Gram matrix, whose rounding is below that of float32; for float64 by its SVD. After
        the first product a rough picture of them, from the start as if it were orthonormal.
        """
        M = self.projected if self.products > 1 else self.first.double().cpu()
        if self.W.dtype == torch.float64:
            from scipy.linalg import svdvals

            with one_thread():
                values = svdvals(M.numpy(), check_finite=False)
            return torch.from_numpy(values).square()
        return self._reduced(M).values().clamp(min=0)

    def triplets(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the leading min(rank, known) Ritz triplets U, s, Vh.

        From the Gram matrix MᵀM where that costs no digit of W's dtype, which is where
        ε₆₄·(σ₁/σ_r)² is below its ε; else from the SVD of M (always in float64).
        """
        M = self.projected
        squares, X = self._reduced(M).leading(rank)
        s = squares.clamp(min=0).sqrt()
        digits = torch.finfo(torch.float64).eps / torch.finfo(self.W.dtype).eps
        if float(s[-1]) ** 2 > digits * float(s[0]) ** 2:
            Y = M @ X / s
        else:
            from scipy.linalg import svd

            with one_thread():
                factors = svd(M.numpy(), full_matrices=False, check_finite=False)
            Y, s, Zh = (torch.from_numpy(factor) for factor in factors)
            Y, s, X = Y[:, :rank], s[:rank], Zh[:rank].mT
        reached = self.target.vectors @ Y.to(self.W)
        started = self.source.vectors @ X.to(self.W)
        U, V = (reached, started) if self.forward else (started, reached)
        return U, s.to(self.W), V.mT

    def _reduced(self, M: Float[Tensor, "t s"]) -> Tridiagonal:
        """MᵀM in tridiagonal form, computed once per product."""
        if self._reduction is None or self._reduction[0] != self.products:
            self._reduction = self.products, Tridiagonal(M.mT @ M)
        return self._reduction[1]


class Progress:
    """The squared Ritz values after each tested product, and what they say of the next ones."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.rounding = torch.finfo(dtype).eps * math.sqrt(max(shape))
        self._ritz: dict[int, Tensor] = {}

    def record(self, products: int, ritz: Float[Tensor, " s"]) -> None:
        """Keeps the values after so many products."""
        self._ritz[products] = ritz

    def remaining(self, rank: int) -> float:
        """Returns an estimate of the energy that further steps would still add to the top `rank`.

        Twice the smaller of the gain h of the last step (two products), and hρ/(1 − ρ), the
        geometric series that continues the gains of the last two steps, ρ their ratio. The series
        is that of the trailing values which say most: leading ones that stand out converge within
        a step, and their gains would hide how slowly those in the bulk follow. Inf while there are
        too few values to tell.
        """
        now = max(self._ritz)
        last, before = self._gains(now - 2, now, rank), self._gains(now - 4, now - 2, rank)
        if last is None:
            return math.inf
        estimate = float(last[0])
        if before is not None:
            series = torch.where(last < before, last * last / (before - last), math.inf)
            estimate = min(estimate, float(torch.where(last > 0, series, 0.0).max()))
        return SAFETY * estimate

    def _gains(self, old: int, new: int, rank: int) -> Float[Tensor, " rank"] | None:
        """Σ_{j≥i}(new − old) of the leading values, without those that have converged.

        In float32 a converged value still moves by some 10⁻⁶ of itself from product to product
        (sums of n terms, in another order), and σ₁² may be far more than the tail. One that moved
        by less than ε·√max(m, n) of itself is left out: the next product reduces what it lacks by
        (σ_tail/σᵢ)², to below ε·√max(m, n)·σ_tail². None where there are too few values; those
        after the first product are but a picture.
        """
        before = self._ritz.get(old)
        if old < 2 or before is None or len(before) < rank or len(self._ritz[new]) < rank:
            return None
        after = self._ritz[new][:rank]
        change = after - before[:rank]
        change = torch.where(change > self.rounding * after, change, 0.0)
        return change.flip(0).cumsum(0).flip(0)
