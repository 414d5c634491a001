"""The rank that stands above the rounding of a stored number format.

numpy's rule asks what float arithmetic could have produced; a bfloat16 checkpoint has rounding
noise 2¹⁶ times larger. Here the noise is drawn (the twin) and the answer checked (the replay).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.errors import ShapeError
from eckart.linalg.arrays import Array, as_matrix
from eckart.linalg.exact import TruncatedSVD, exact_svd
from eckart.linalg.residual import power_norm
from eckart.linalg.truncated import truncated_svd

NOISE_MARGIN = 1.1
"""Heuristic: ten power steps find ‖N‖₂ of a noise matrix to a few per cent, from below."""

REPLAY_ROWS = 256
FIRST_RANK = 64


@dataclass(frozen=True, slots=True)
class SignalRank:
    """The rank of tuned − base above rounding, with the evidence for it."""

    rank: int
    bound: int  # how many singular values exceed `threshold`: an upper bound
    threshold: float  # τ = 1.1·‖N‖₂ of the rounding twin
    share: float  # of the replayed entries, those that round to the stored bits at `rank`
    below_floor: bool  # something changed, but σ_rank < 2τ: rounding hides the rank


def signal_rank(
    tuned: Array,
    base: Array | None = None,
    *,
    generator: torch.Generator | None = None,
    name: str = "matrix",
) -> SignalRank:
    """Returns the rank of `tuned` − `base` that rounding to tuned's dtype cannot explain.

    1. Twin: N_ij uniform in ±½ulp(tuned_ij), τ = 1.1·‖N‖₂; the σ of the delta above τ are an
       upper bound r̄. (Rounding noise is not homogeneous, so a Marchenko–Pastur edge with one
       variance is off by up to 2×.)
    2. Replay: the base already lies on the rounding grid, so the rounding of a small delta is
       partly coherent and the twin overstates. On 256 seeded rows, for q = 0 … r̄, count the
       entries where round(base + Δ_q) equals tuned bit for bit; the rank is the q with the
       largest share.

    Without `base` the rank of `tuned` itself. Where σ_rank < 2τ nothing can be told apart, and
    `below_floor` says so. Cost: a truncated SVD of rank 64, or all of it where r̄ is larger.

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
    tau = _noise_norm(tuned, generator)
    svd = _above(delta, tau, name)
    bound = int((svd.s > tau).sum())
    shares = _replay(tuned, origin.to(wide), svd.truncate(bound), generator)
    rank = int(shares.argmax())
    strength = float(svd.s[rank - 1]) if rank else (0.0 if bool(delta.any()) else float("inf"))
    return SignalRank(rank, bound, tau, float(shares[rank]), below_floor=strength < 2 * tau)


def ulp(W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """Returns the spacing of W's own number format at each entry, in float64.

    2ᵉ⁻¹·ε for |w| = f·2ᵉ, f in [½, 1); never below the subnormal step, which is 0's.
    """
    finfo = torch.finfo(W.dtype)
    _, exponent = torch.frexp(W.double())
    eps = torch.where(W == 0, 0.0, finfo.eps).double()  # frexp(0) is 0·2⁰
    return torch.ldexp(eps, exponent - 1).clamp(min=finfo.tiny * finfo.eps)


def _noise_norm(tuned: Tensor, generator: torch.Generator) -> float:
    uniform = torch.rand(tuned.shape, dtype=torch.float32, generator=generator).to(tuned.device)
    N = (uniform - 0.5) * ulp(tuned)
    x = torch.randn(N.shape[1], dtype=torch.float64, generator=generator).to(N.device)
    return NOISE_MARGIN * power_norm(lambda x: N @ x, lambda y: N.mT @ y, x, iterations=10)


def _above(delta: Tensor, tau: float, name: str) -> TruncatedSVD:
    """The singular triplets of delta above tau, and at least one below (or all of them)."""
    if min(delta.shape) // 4 > FIRST_RANK:
        svd = truncated_svd(delta, rank=FIRST_RANK, name=name)
        if float(svd.s[-1]) <= tau:
            return svd
    return exact_svd(delta, name)


def _replay(
    tuned: Tensor, base: Tensor, svd: TruncatedSVD, generator: torch.Generator
) -> Float[Tensor, " q"]:
    """The share of entries that round to tuned's bits, for each rank 0 … len(svd.s)."""
    rows = torch.randperm(len(tuned), generator=generator)[:REPLAY_ROWS].sort().values
    rows = rows.to(tuned.device)
    target, guess = tuned[rows], base[rows]
    shares = [(guess.to(tuned.dtype) == target).double().mean()]
    left = svd.U[rows] * svd.s
    for q in range(svd.rank):
        guess = guess + left[:, q : q + 1] * svd.Vh[q]
        shares.append((guess.to(tuned.dtype) == target).double().mean())
    return torch.stack(shares).cpu()
