"""Orthonormal bases of tall blocks, from matrix products instead of LAPACK's Householder QR.

Knows tensors only. The Krylov iteration in `randomized` lives on it.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.linalg.products import product

NEAR_IDENTITY = 0.1
"""A first CholeskyQR pass whose Gram matrix is this far from I has failed: Householder takes over.
(Yamamoto et al., 2015, Lemma 3.1 needs ‖QᵀQ − I‖ < 1/2 or so for the second pass to be sound.)"""


class Basis:
    """Orthonormal columns that grow by blocks, stored as rows so that a block is contiguous."""

    def __init__(self, length: int, like: Tensor) -> None:
        self._rows = like.new_empty(0, length)
        self.count = 0
        self.newest = 0

    @property
    def vectors(self) -> Float[Tensor, "n k"]:
        """All columns."""
        return self._rows[: self.count].mT

    @property
    def block(self) -> Float[Tensor, "n b"]:
        """The columns of the last block."""
        return self._rows[self.count - self.newest : self.count].mT

    def append(self, Q: Float[Tensor, "n b"]) -> None:
        """Adds the columns of Q."""
        start, self.newest = self.count, Q.shape[1]
        self.count += self.newest
        if self.count > len(self._rows):
            rows = self._rows.new_empty(2 * self.count, Q.shape[0])
            rows[:start] = self._rows[:start]
            self._rows = rows
        self._rows[start : self.count].mT.copy_(Q)


def orthonormalize(
    Z: Float[Tensor, "m b"], noise: float = 0.0
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "k b"]]:
    """Returns Q with orthonormal columns and R with Z = Q R.

    CholeskyQR2 (Yamamoto, Nakatsukasa, Yanagisawa & Fukaya, 2015, Algorithm 2): ZᵀZ = RᵀR,
    Q = Z R⁻¹, twice. Three departures: the passes are in float64 (for float32 that is the mixed
    precision of Yamazaki, Tomov & Dongarra, 2015, whose loss is κ²·ε₆₄), so the second is left
    out where R says that one is enough; else its Gram matrix checks the first; and where check
    or Cholesky fails, Householder QR and an SVD of R take over, which drop the directions whose
    singular value is at most `noise`: then k < b.

    Guarantee: ‖QᵀQ − I‖ of the order of ε, whatever Z. Cost: 3mb² to 6mb² flops in float64.

    >>> Z = torch.tensor([[3.0, 1.0], [4.0, 2.0], [0.0, 2.0]])
    >>> Q, R = orthonormalize(Z)
    >>> bool(torch.dist(Q @ R, Z) < 1e-6), bool(torch.dist(Q.mT @ Q, torch.eye(2)) < 1e-6)
    (True, True)
    """
    Q, _, R = extend(Basis(len(Z), Z), Z, noise)
    return Q, R


def extend(
    basis: Basis, Z: Float[Tensor, "m b"], noise: float = 0.0
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "q b"], Float[Tensor, "k b"]]:
    """Returns Q, C, R with Z = basis·C + Q R and Q orthonormal and orthogonal to the basis.

    Block Gram–Schmidt in two passes around those of CholeskyQR2 (twice is enough: Giraud, Langou
    & Rozložník, 2005). The first takes out the newest block only, all that a Golub–Kahan product
    holds in exact arithmetic; the second the whole basis, which is what rounding left. A third
    follows where the check says that two were not enough. Directions of Z that lie in the basis
    to within `noise` give nothing new: k < b, and k = 0 where all of Z does.
    Cost: 4mqb + 4mb² flops and those of `orthonormalize`.
    """
    if basis.count == len(Z):
        return Z[:, :0], basis.vectors.mT @ Z, Z.new_zeros(0, Z.shape[1])
    near = product(basis.block.mT, Z)
    C = torch.cat([Z.new_zeros(basis.count - basis.newest, Z.shape[1]), near])
    Q, R, sound = _first_pass(_without(Z, basis.block, near), noise)
    Q, R = Q[:, : len(Z) - basis.count], R[: len(Z) - basis.count]
    for _ in range(3 if len(R) else 0):
        far = product(basis.vectors.mT, Q)
        C, Q = C + far @ R, _without(Q, basis.vectors, far)
        if sound and float(torch.linalg.matrix_norm(far)) ** 2 <= torch.finfo(Z.dtype).eps:
            break  # taking it out changed QᵀQ by less than ε
        found = cholesky_qr(Q, near_identity=True)
        Q, again = householder_qr(Q) if found is None else (found[0], found[1].to(Z.dtype))
        R = again @ R
        if found is not None:
            break
    return Q, C, R


def _without(Z: Tensor, basis: Tensor, C: Tensor) -> Tensor:
    """Z − basis·C, stored as rows, as the basis is."""
    return (Z.mT - product(C.mT, basis.mT)).mT


def cholesky_qr(
    Z: Float[Tensor, "m b"], *, near_identity: bool = False
) -> tuple[Float[Tensor, "m b"], Float[Tensor, "b b"]] | None:
    """Returns Q = Z R⁻¹ and R (float64) with ZᵀZ = RᵀR, or None where that has no meaning.

    One pass in float64: ‖QᵀQ − I‖ ~ ε₆₄·κ(Z)². `near_identity` asks that ZᵀZ is I to within 0.1,
    which is how a second pass checks the first. Solved, not multiplied by an inverse, so that
    Q R = Z to rounding whatever κ.
    """
    wide = Z.double()
    gram = wide.mT @ wide
    if near_identity and bool((gram - torch.eye(len(gram)).to(gram)).abs().max() > NEAR_IDENTITY):
        return None
    R, failure = torch.linalg.cholesky_ex(gram, upper=True)
    if bool(failure) or not bool(torch.isfinite(R).all()):
        return None
    return torch.linalg.solve_triangular(R, wide, upper=True, left=False).to(Z.dtype), R


def householder_qr(
    Z: Float[Tensor, "m b"], noise: float = 0.0
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "k b"]]:
    """Returns Q, R with Z = Q R to within `noise`: directions not above it are dropped.

    LAPACK's geqrf, then R = X diag(s) Yᵀ in float64 decides which columns of Q X stay; with
    `noise` = 0 all do, whatever the rank of Z.
    """
    Q, R = torch.linalg.qr(Z)
    X, s, _ = torch.linalg.svd(R.double(), full_matrices=False)
    X = X[:, : int((s >= noise).sum())]
    return Q @ X.to(Z.dtype), (X.mT @ R.double()).to(Z.dtype)


def _first_pass(Z: Tensor, noise: float) -> tuple[Tensor, Tensor, bool]:
    """Q, R and whether one pass was enough; by Householder where some of Z is `noise`.

    The diagonal of R bounds σ_min(Z) from above, and tells it in kind; hence the margin of 2.
    """
    size = float(torch.linalg.matrix_norm(Z))
    if size <= noise:
        return Z[:, :0], Z.new_zeros(0, Z.shape[1]), True
    found = cholesky_qr(Z)
    least = 0.0 if found is None else float(found[1].diagonal().min())
    if found is None or least <= noise:
        return *householder_qr(Z, noise), False
    digits = (torch.finfo(Z.dtype).eps / torch.finfo(torch.float64).eps) ** 0.5
    return found[0], found[1].to(Z.dtype), 2 * size <= digits * least
