"""The truncated singular value decomposition: how much is asked, and which method answers.

Knows tensors; must not know files. The methods themselves are in `exact` and `randomized`.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.errors import FactorizationError, UsageError
from eckart.linalg import exact, norms
from eckart.linalg.arrays import Array, as_matrix, check_rank, working_dtype
from eckart.linalg.exact import TruncatedSVD, exact_svd_checked, fix_signs, rescaled
from eckart.linalg.randomized import MAX_STEPS, Found, at_error, at_rank

Method: TypeAlias = Literal["auto", "exact", "randomized"]

SMALL = 256
"""Up to this min(m, n) an exact SVD takes about as long as a randomized one."""

SHARE = 8
"""Above rank min(m, n)/8 the block Krylov spaces come near the whole space."""

LIMITLESS_STEPS = 4 * MAX_STEPS
"""How long to try where LAPACK cannot follow."""

FALLBACK_ENTRIES = 2**20
"""1024²: up to here an exact SVD is a matter of a quarter of a second and 70 MB."""

SAFE_EXPONENT = 32
"""Norms between 2⁻³² and 2³² need no scaling: no sum of squares is anywhere near the limits of
float32, and scaling would copy the matrix."""


@dataclass(frozen=True, slots=True)
class _Request:
    """What was asked: a rank, a share of the energy, or a relative error."""

    rank: int | None
    energy: float | None
    error: float | None
    accuracy: float
    method: str
    name: str

    def check(self, shape: tuple[int, int]) -> None:
        """Raises UsageError or RankError unless the request can be met."""
        asked = {"rank": self.rank, "energy": self.energy, "error": self.error}
        given = [key for key, value in asked.items() if value is not None]
        if len(given) != 1:
            raise UsageError(
                f"give exactly one of rank, energy and error for {self.name}; "
                f"got {' and '.join(given) or 'none of them'}."
            )
        if self.rank is not None:
            check_rank(self.rank, shape, self.name)
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy {self.energy} is out of range: choose above 0, up to 1.")
        if self.error is not None and not 0 <= self.error < 1:
            raise UsageError(f"error {self.error} is out of range: choose from 0 to below 1.")
        if not 0 < self.accuracy < 1:
            raise UsageError(f"accuracy {self.accuracy} is out of range: choose between 0 and 1.")
        if self.method not in ("auto", "exact", "randomized"):
            raise UsageError(f"method {self.method!r}: choose auto, exact or randomized.")

    @property
    def allowed(self) -> float | None:
        """The share of ‖W‖_F² that may be lost; None where a rank is asked."""
        if self.energy is not None:
            return 1 - self.energy
        return None if self.error is None else self.error**2


def truncated_svd(
    W: Array,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    accuracy: float = 1e-3,
    method: Method = "auto",
    generator: torch.Generator | None = None,
    name: str = "matrix",
) -> TruncatedSVD:
    """Returns the leading singular triplets of W: a given rank, or the fewest that suffice.

    Exactly one of `rank`, `energy` (the share of ‖W‖_F² to keep, in (0, 1]) and `error` (the
    relative error ‖W − U diag(s) Vh‖_F / ‖W‖_F to stay within, in [0, 1)).

    The optimum is the SVD, cut (Eckart & Young, 1936). `method="auto"` takes the exact one where
    it is cheap (`prefers_exact`: a rule on shape and rank only), elsewhere a randomized block
    Krylov method, which stops when it expects to be within `accuracy` of the optimal error
    (0.001 = 0.1 %); what it expects is `excess_estimate`. If 10 steps do not get there the exact
    method takes over, and the result's `method` says so ("krylov→gesdd"). Beyond LAPACK's 32-bit
    limits there is no exact method: 40 steps are allowed, then FactorizationError.

    Without a generator a new one with seed 0 is used, never the global one. The largest entry of
    every left vector is positive. The factors have W's device and working dtype (float64, else
    float32).

    Cost: about 4 to 12 products of W with a block of `rank` + 0 to 22 columns; peak a copy of W,
    where it is not float32 or float64 and row- or column-major, and some 8·(m + n)·rank entries.

    >>> W = torch.diag(torch.tensor([4.0, 3.0, 0.0]))
    >>> truncated_svd(W, rank=1).s.tolist(), truncated_svd(W, error=0.1).rank
    ([4.0], 2)
    """
    W = as_matrix(W, name)
    request = _Request(rank, energy, error, accuracy, method, name)
    request.check((W.shape[0], W.shape[1]))
    W = W.to(working_dtype(W.dtype))
    cheap = prefers_exact((W.shape[0], W.shape[1]), rank, request.allowed, W.dtype)
    if method == "exact" or (method == "auto" and cheap):
        return _cut(exact_svd_checked(W, name), request)
    return _randomized(W, request, generator or torch.Generator().manual_seed(0))


def prefers_exact(
    shape: tuple[int, int],
    rank: int | None = None,
    allowed: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> bool:
    """Returns whether "auto" means the exact method: a rule on the request, never the machine.

    With k = min(m, n): k ≤ 256, or rank > k/8, or an allowed share of the energy below (2ε)²,
    which only rounding could meet. Never where LAPACK cannot go. Where a share is asked the rank
    is not known yet; a randomized attempt ends when it passes k/8.

    >>> prefers_exact((256, 9999), 4), prefers_exact((4096, 4096), 512)
    (True, False)
    >>> prefers_exact((4096, 4096), 513), prefers_exact((30000, 30000), 9000)
    (True, False)
    """
    if beyond_lapack(shape):
        return False
    if allowed is not None and allowed <= (2 * torch.finfo(dtype).eps) ** 2:
        return True
    k = min(shape)
    return k <= SMALL or (rank is not None and SHARE * rank > k)


def tries_exact(shape: tuple[int, int], rank: int | None) -> bool:
    """Returns whether an exact SVD follows where the randomized method did not get there.

    Where a rank is asked not beyond `FALLBACK_ENTRIES`: there it would take up to 17 times the
    memory of the matrix, and the randomized method goes on instead, for up to 40 steps. A rule on
    the request only.
    """
    return not beyond_lapack(shape) and (rank is None or math.prod(shape) <= FALLBACK_ENTRIES)


def beyond_lapack(shape: tuple[int, int]) -> bool:
    """Returns whether min(m, n) ≥ 23 170 or mn > 2³¹ − 1: no LAPACK call on such a matrix."""
    return min(shape) >= exact.LAPACK_ORDER or math.prod(shape) > exact.LAPACK_ENTRIES


def _cut(svd: TruncatedSVD, request: _Request) -> TruncatedSVD:
    """The full SVD, cut where the request says. A zero matrix keeps one triplet."""
    rank = request.rank
    if request.energy is not None:
        rank = svd.spectrum.rank_at_energy(request.energy)
    elif request.error is not None:
        rank = svd.spectrum.rank_at_error(request.error)
    return svd if rank is None else svd.truncate(max(rank, 1))


def _randomized(W: Tensor, request: _Request, generator: torch.Generator) -> TruncatedSVD:
    """The randomized method on W or Wᵀ, whichever is row-major, and what follows if it fails."""
    transposed = not W.is_contiguous() and W.mT.is_contiguous()
    scaled, exponent, energy = _scaled((W.mT if transposed else W).contiguous())
    found = _find(scaled, energy, request, generator)
    if found is not None:
        U, Vh = (found.Vh.mT, found.U.mT) if transposed else (found.U, found.Vh)
        U, Vh = fix_signs(U, Vh)
        s = rescaled(found.s, exponent, request.name)
        return TruncatedSVD(U, s, Vh, math.ldexp(energy, 2 * exponent), "krylov", found.excess)
    if not tries_exact((W.shape[0], W.shape[1]), request.rank):
        raise FactorizationError(
            f"{request.name} ({W.shape[0]}×{W.shape[1]}) is too large for an exact SVD, and "
            f"{LIMITLESS_STEPS} steps of the randomized method did not come within "
            f"{request.accuracy:g} of the optimal error: ask for a smaller rank, or a larger "
            "accuracy."
        )
    svd = exact_svd_checked(W, request.name)
    return _cut(replace(svd, method=f"krylov→{svd.method}"), request)


def _find(W: Tensor, energy: float, request: _Request, generator: torch.Generator) -> Found | None:
    """The randomized method with the limits that the request and the shape set."""
    k, limitless = min(W.shape), not tries_exact((W.shape[0], W.shape[1]), request.rank)
    steps = LIMITLESS_STEPS if limitless else MAX_STEPS
    rank, allowed = request.rank, request.allowed
    if energy == 0:
        eye = torch.eye(max(W.shape), rank or 1, dtype=W.dtype, device=W.device)
        return Found(eye[: W.shape[0]], eye.new_zeros(rank or 1), eye[: W.shape[1]].mT, 0.0)
    if rank is not None or allowed is None:
        return at_rank(
            W,
            rank or k,
            energy=energy,
            accuracy=request.accuracy,
            generator=generator,
            steps=steps,
        )
    largest = k if limitless or request.method == "randomized" else k // SHARE
    return at_error(
        W,
        allowed * energy * (1 + 1e-12),  # as Spectrum.rank_at_error: a tie suffices
        energy=energy,
        accuracy=request.accuracy,
        generator=generator,
        largest=largest,
        steps=steps,
    )


def _scaled(W: Float[Tensor, "m n"]) -> tuple[Float[Tensor, "m n"], int, float]:
    """W·2⁻ᵉ, e and ‖W·2⁻ᵉ‖_F²: W itself and e = 0 unless its norms are extreme."""
    exponent, energy = 0, norms.energy(W)
    if not 4.0**-SAFE_EXPONENT < energy < 4.0**SAFE_EXPONENT:
        W, exponent = norms.power_of_two_scaled(W)
        energy = norms.energy(W)
    return W, exponent, energy
