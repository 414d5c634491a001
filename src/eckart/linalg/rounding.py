"""The rank that stands above the rounding of a stored number format.

numpy's rule asks what float arithmetic could have produced; a bfloat16 checkpoint has rounding
noise 2¹⁶ times larger. Here the noise is drawn (the twin), the change is freed of it
(`unrounding`), and what is then left is asked whether it is noise.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.errors import ShapeError
from eckart.linalg.arrays import Array, as_matrix
from eckart.linalg.exact import TruncatedSVD
from eckart.linalg.gram import short_side_svd
from eckart.linalg.residual import power_norm
from eckart.linalg.truncated import prefers_exact, truncated_svd
from eckart.linalg.unrounding import BLOCK_ENTRIES, remainder, unrounded

NOISE_MARGIN = 1.1
"""Heuristic: ten power steps find ‖N‖₂ of a noise matrix to a few per cent, from below."""

FLOOR = 1.4
"""Heuristic, measured: where σ_r is 2τ, it is un-rounded to 1.8τ at least; where it is τ/2, to
0.65τ at most. Harmonics, and noise that got in, stay below τ."""

GAP = 1.5
"""Heuristic: a component of 2τ is above twice the noise of rounding at its full size, while a
spectrum that runs on through the floor has no gap there."""

NOISE_SHARE = 0.87
"""Heuristic, measured: of the 2-norm that independent entries would have, the remainder has 0.79
at most where the whole change was named, 0.95 at least where a component was not."""

TOLERANCE = 1 / 50
"""Un-rounding ends at this share of τ."""

FIRST_RANK = 80

GROWTH = 4
"""Beyond rank 80 and 320 all singular values are about as cheap as another try."""

UNROUNDED = 128
"""Up to so many components are un-rounded. More are taken as measured: 32 steps of 6mnq flops
would cost more than all singular values."""


@dataclass(frozen=True, slots=True)
class SignalRank:
    """The rank of tuned − base above rounding, with the evidence for it."""

    rank: int
    bound: int  # how many singular values of the delta stand out of its own noise
    threshold: float  # τ = 1.1·‖N‖₂ of the rounding twin
    share: float  # of the entries, those that round to the stored bits at `rank`
    below_floor: bool  # something changed, and rounding may hide part of its rank
    weakest: float  # σ_rank of the change before it was rounded, as estimated


def signal_rank(
    tuned: Array,
    base: Array | None = None,
    *,
    generator: torch.Generator | None = None,
    name: str = "matrix",
) -> SignalRank:
    """Returns the rank of `tuned` − `base` that rounding to tuned's dtype cannot explain.

    1. Twin: N_ij = ±ulp(tuned_ij)/√12 with random signs, τ = 1.1·‖N‖₂. (Rounding noise is not
       homogeneous, so a Marchenko–Pastur edge with one variance is off by up to 2×.)
    2. Candidates: the components of the delta that stand out of its own noise. (Not of τ: the
       base lies on the rounding grid, so of a small change most is swallowed, and with it the
       noise: of σ = 2τ a delta of width 2048 shows 0.4τ, above noise of 0.13τ.)
    3. `unrounded` estimates the change that was rounded. Its components of 1.4τ and more count.
    4. Replay: tuned − round(base + change) is asked for what is missing. If its 2-norm is above
       that of independent entries, or no gap follows the last component, `below_floor` says so:
       rounding may hide part of the rank.

    Measured on merged Gaussian LoRAs of rank 1, 2, 8 and 64 in bfloat16 and float16, width 256 to
    4096, square and 1:3, on a Gaussian, a Student-t and a row- and column-scaled base: with
    σ_r ≥ 2τ every rank was exact and not below the floor, with σ_r ≤ τ/2 every one was below it,
    and between them every rank that was not below it was exact.

    Without `base` the rank of `tuned` itself. Up to 128 components are un-rounded; where more
    stand out, they are counted as measured, and only the gap tells. Cost: a truncated SVD of rank
    80, and up to 32 passes over the two matrices; all singular values where more than 320 stand
    out. Peak about 12 bytes per entry and the SVD's.

    >>> from eckart.linalg.matrices import random_low_rank
    >>> g = torch.Generator().manual_seed(1)
    >>> base = torch.randn(96, 80, generator=g).bfloat16()
    >>> tuned = (base.float() + 0.1 * random_low_rank(96, 80, 2)).bfloat16()
    >>> found = signal_rank(tuned, base)
    >>> found.rank, found.below_floor
    (2, False)
    """
    tuned = as_matrix(tuned, name)
    origin = torch.zeros_like(tuned) if base is None else as_matrix(base, f"the base of {name}")
    if origin.shape != tuned.shape:
        raise ShapeError(
            f"{name} is {tuple(tuned.shape)}, its base {tuple(origin.shape)}: "
            "a delta needs equal shapes."
        )
    generator = generator or torch.Generator().manual_seed(0)
    wide = torch.float32 if tuned.dtype.itemsize == 2 else torch.float64
    delta = tuned.to(wide) - origin.to(wide)
    tau, largest = _twin(tuned, generator)
    found, following = _outstanding(delta, largest, name)
    few = found.rank <= UNROUNDED
    if few:
        found = unrounded(tuned, origin, found, TOLERANCE * tau)
    strong = found.truncate(int((found.s >= FLOOR * tau).sum()))
    if strong.rank < found.rank:
        following = float(found.s[strong.rank])
        strong = unrounded(tuned, origin, strong, TOLERANCE * tau) if few else strong
    R = remainder(tuned, origin, strong)
    weakest = float(strong.s[-1]) if strong.rank else 0.0
    apart = strong.rank > 0 and weakest >= GAP * following
    explained = apart and (not few or _noise_like(R, generator))
    return SignalRank(
        rank=strong.rank,
        bound=found.rank,
        threshold=tau,
        share=1 - int(torch.count_nonzero(R)) / R.numel(),
        below_floor=bool(delta.any()) and not explained,
        weakest=weakest,
    )


def ulp(W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """Returns the spacing of W's own number format at each entry, in float64.

    2ᵉ·ε, where 2ᵉ is what is left of w without its sign and mantissa; never below the subnormal
    step, which is 0's.
    """
    finfo = torch.finfo(W.dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[W.dtype.itemsize]
    exponent_bits = torch.tensor(torch.inf, dtype=W.dtype, device=W.device).view(integer)
    power = (W.contiguous().view(integer) & exponent_bits).view(W.dtype).double()
    return (power * finfo.eps).clamp_(min=finfo.tiny * finfo.eps)


def _twin(tuned: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """τ = 1.1·‖N‖₂, and 1.1 times the bound on it that the energies of N give.

    N_ij = ±ulp(tuned_ij)/√12 with random signs: the energy of what is uniform in ±½ulp, and so
    the norm; but the part of a single large entry is not left to luck: what it may be off by,
    ½ulp, is below FLOOR·τ. In units of the largest ulp, so that float32 holds it at any scale.
    """
    unit = float(ulp(torch.stack(torch.aminmax(tuned))[None]).max())
    draw = torch.randint(0, 2, tuned.shape, dtype=torch.int8, generator=generator)
    N = draw.to(tuned.device, torch.float32).mul_(2).sub_(1)
    step = max(1, BLOCK_ENTRIES // tuned.shape[1])
    for noise, rows in zip(N.split(step), tuned.split(step), strict=True):
        noise.mul_(ulp(rows) / (unit * math.sqrt(12)))
    scale = NOISE_MARGIN * unit
    norm = max(_norm(N, generator), 1 / 3)  # ½ < FLOOR·NOISE_MARGIN/3
    return scale * norm, scale * float(_noise_norm(*_energies(N)))


def _norm(W: Tensor, generator: torch.Generator) -> float:
    x = torch.randn(W.shape[1], dtype=W.dtype, generator=generator).to(W.device)
    return power_norm(lambda x: W @ x, lambda y: W.mT @ y, x, iterations=10)


def _noise_norm(rows: Float[Tensor, "m ..."], columns: Float[Tensor, "n ..."]) -> Tensor:
    """√(largest row energy) + √(largest column energy): the 2-norm of independent entries.

    A bound on its expectation but for a term of the largest entry (Bandeira & van Handel, 2016),
    and close where the energies are even: 1.1 times the norm of a Gaussian base's twin, up to 2
    times that of one with heavy rows.
    """
    return rows.amax(0).sqrt() + columns.amax(0).sqrt()


def _energies(W: Float[Tensor, "m n"]) -> tuple[Float[Tensor, " m"], Float[Tensor, " n"]]:
    """The energies of the rows and of the columns, in float64."""
    rows: list[Tensor] = []
    columns = torch.zeros(W.shape[1], dtype=torch.float64, device=W.device)
    for block in W.split(max(1, BLOCK_ENTRIES // W.shape[1])):
        squares = block.double().square()
        rows.append(squares.sum(1))
        columns += squares.sum(0)
    return torch.cat(rows), columns


def _noise_like(R: Tensor, generator: torch.Generator) -> bool:
    """Whether the 2-norm of R is that of independent entries: no component is left in it."""
    return _norm(R, generator) <= NOISE_SHARE * float(_noise_norm(*_energies(R)))


def _outstanding(delta: Tensor, largest: float, name: str) -> tuple[TruncatedSVD, float]:
    """The triplets of delta that stand out of its noise, and the singular value after them."""
    k, rank, energies = min(delta.shape), FIRST_RANK, _energies(delta)
    while True:
        svd = _leading(delta, min(rank, k), name)
        bound = _bound(svd, energies, largest)
        if bound < svd.rank or svd.rank == k:
            following = float(svd.s[bound]) if bound < svd.rank else 0.0
            return svd.truncate(bound), following
        rank *= GROWTH


def _bound(svd: TruncatedSVD, energies: tuple[Tensor, Tensor], largest: float) -> int:
    """How many triplets stand out: the last of them is the last above the noise.

    That is NOISE_MARGIN times what independent entries of the energies from it on would have, or
    `largest`, more than which no rounding has. The first counts only in the first quarter of the
    spectrum (further on noise stands out of what is left of itself), and only where the energies
    have not lost their digits.
    """
    s, k = svd.s.double(), min(svd.shape)
    rest: list[Tensor] = []
    for whole, vectors in zip(energies, (svd.U, svd.Vh.mT), strict=True):
        parts = (vectors * svd.s).double().square_()
        rounding = 8 * torch.finfo(svd.s.dtype).eps * float(whole.max())
        rest.append((whole[:, None] - parts.cumsum(1)).clamp_(min=rounding))
    above = s > NOISE_MARGIN * _noise_norm(*rest)
    above[k // 4 :] = False
    places = (above | (s > largest)).nonzero()
    return int(places.max()) + 1 if len(places) else 0


def _leading(delta: Tensor, rank: int, name: str) -> TruncatedSVD:
    """At least `rank` triplets: all of them where that is cheap, by the vectors of one side."""
    if not prefers_exact((delta.shape[0], delta.shape[1]), rank):
        return truncated_svd(delta, rank=rank, name=name)
    short = short_side_svd(delta, name)
    X, s = short.vectors.to(delta.dtype), short.values.to(delta.dtype)
    inverse = torch.where(s > 0, 1 / s, 0.0)
    if delta.shape[0] <= delta.shape[1]:
        return TruncatedSVD(X, s, inverse[:, None] * (X.mT @ delta), short.energy, short.method)
    return TruncatedSVD((delta @ X) * inverse, s, X.mT, short.energy, short.method)
