"""A matrix as a product: B·A, and the pivoted form with fewer numbers at the same rank.

Knows tensors only. How good a product is, `residual` measures.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from threadpoolctl import threadpool_limits
from torch import Tensor

from eckart.errors import NonFiniteError, RankError, ShapeError
from eckart.linalg.arrays import Array, as_tensor
from eckart.linalg.blocks import row_blocks
from eckart.linalg.exact import TruncatedSVD, exact_svd, singular_values
from eckart.linalg.metric import Root
from eckart.linalg.norms import energy
from eckart.linalg.products import product
from eckart.linalg.spectrum import Spectrum
from eckart.linalg.truncated import truncated_svd


@dataclass(frozen=True, slots=True)
class Factors:
    """W ≈ B·A, with B m×r (the output side) and A r×n (the input side).

    >>> f = factorize(torch.diag(torch.tensor([4.0, 1.0, 0.0])), rank=1)
    >>> f.rank, f.shape, f.parameters
    (1, (3, 3), 6)
    """

    B: Float[Tensor, "m r"]
    A: Float[Tensor, "r n"]

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ShapeError(
                f"B {tuple(self.B.shape)} and A {tuple(self.A.shape)} do not multiply: "
                "B is m×r and A is r×n with the same r."
            )

    @property
    def rank(self) -> int:
        """r, the inner dimension."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the product."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def parameters(self) -> int:
        """r(m + n)."""
        return self.B.numel() + self.A.numel()

    def to(self, dtype: torch.dtype) -> "Factors":
        """Returns the same factors in another dtype, rounded."""
        return Factors(self.B.to(dtype), self.A.to(dtype))

    def padded(self, rank: int) -> "Factors":
        """Returns the same product with a larger r: columns and rows of zeros are added.

        >>> Factors(torch.ones(3, 1), torch.ones(1, 2)).padded(4).rank
        4
        """
        if rank < self.rank:
            raise RankError(f"rank {self.rank} cannot be padded to {rank}: choose no less.")
        more = rank - self.rank
        return Factors(
            torch.nn.functional.pad(self.B, (0, more)),
            torch.nn.functional.pad(self.A, (0, 0, 0, more)),
        )

    def product(self) -> Float[Tensor, "m n"]:
        """Returns the m×n product in the factors' dtype."""
        return self.B @ self.A

    def rows(self, start: int, stop: int) -> Float[Tensor, "k n"]:
        """Returns rows start … stop − 1 of the product, in float64."""
        return self.B[start:stop].double() @ self.A.double()

    def subtract_from(self, rows: Float[Tensor, "k n"], start: int) -> None:
        """Takes rows start … start + k − 1 of the product out of `rows`, in place."""
        rows.addmm_(self.B[start : start + len(rows)], self.A, alpha=-1)

    def apply(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        """Returns B(Ax), without ever forming B·A."""
        return (x @ self.A.mT) @ self.B.mT

    def apply_transposed(self, y: Float[Tensor, "... m"]) -> Float[Tensor, "... n"]:
        """Returns Aᵀ(Bᵀy)."""
        return (y @ self.B) @ self.A


@dataclass(frozen=True, slots=True)
class PivotedFactors:
    """W' with W'[perm] = [A; K·A]: r pivot rows of W', and the others as combinations of them.

    A rank-r m×n matrix has r(m + n − r) degrees of freedom; this form stores just those (plus
    the permutation), so it has no break-even rank. Its rounding error is about 3.5 times that of
    `Factors` in the same dtype.
    """

    A: Float[Tensor, "r n"]
    K: Float[Tensor, "k r"]  # k = m − r
    perm: Int[Tensor, " m"]  # int64

    def __post_init__(self) -> None:
        (r, _), (k, width) = self.A.shape, self.K.shape
        if width != r or len(self.perm) != r + k:
            raise ShapeError(
                f"A {tuple(self.A.shape)}, K {tuple(self.K.shape)} and {len(self.perm)} rows do "
                "not fit: A is r×n, K is (m − r)×r, perm has m entries."
            )
        if not torch.equal(self.perm.sort().values, torch.arange(r + k, device=self.perm.device)):
            raise ShapeError("perm is not a permutation of the rows.")

    @property
    def rank(self) -> int:
        """r, the inner dimension."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the product."""
        return len(self.perm), self.A.shape[1]

    @property
    def parameters(self) -> int:
        """r(m + n − r); `perm` counts in bytes, not here."""
        return self.A.numel() + self.K.numel()

    def to(self, dtype: torch.dtype) -> "PivotedFactors":
        """Returns the same factors in another dtype, rounded."""
        return PivotedFactors(self.A.to(dtype), self.K.to(dtype), self.perm)

    def product(self) -> Float[Tensor, "m n"]:
        """Returns the m×n product in the factors' dtype."""
        return torch.cat([self.A, self.K @ self.A])[self.perm.argsort()]

    def rows(self, start: int, stop: int) -> Float[Tensor, "k n"]:
        """Returns rows start … stop − 1 of the product, in float64."""
        place = self.perm.argsort()[start:stop]
        A = self.A.double()
        pivots = place < self.rank
        out = torch.empty(len(place), A.shape[1], dtype=torch.float64, device=A.device)
        out[pivots] = A[place[pivots]]
        out[~pivots] = self.K[place[~pivots] - self.rank].double() @ A
        return out

    def subtract_from(self, rows: Float[Tensor, "k n"], start: int) -> None:
        """Takes rows start … start + k − 1 of the product out of `rows`, in place."""
        rows -= self.rows(start, start + len(rows))

    def apply(self, x: Float[Tensor, "... n"]) -> Float[Tensor, "... m"]:
        """Returns W'x through A and K, without ever forming W'."""
        h = x @ self.A.mT
        return torch.cat([h, h @ self.K.mT], dim=-1)[..., self.perm.argsort()]

    def apply_transposed(self, y: Float[Tensor, "... m"]) -> Float[Tensor, "... n"]:
        """Returns W'ᵀy."""
        y = y[..., self.perm]
        return (y[..., : self.rank] + y[..., self.rank :] @ self.K) @ self.A


def split(svd: TruncatedSVD, *, balanced: bool = True) -> Factors:
    """Returns B, A with B·A = U diag(s) Vh.

    Balanced: √s to each side, so both factors have the same norm and half precision holds
    them equally well. Otherwise B = U diag(s) and A = Vh, as in the textbook.
    """
    if not balanced:
        return Factors(svd.U * svd.s, svd.Vh)
    root = svd.s.sqrt()
    return Factors(svd.U * root, root[:, None] * svd.Vh)


def from_short_side(
    W: Float[Tensor, "m n"],
    vectors: Float[Tensor, "r k"],
    values: Float[Tensor, " r"],
    dtype: torch.dtype,
) -> Factors:
    """Returns balanced B, A from the leading singular vectors of the shorter side, as rows.

    m ≤ n: B = U√s, A = √s⁻¹ UᵀW. m > n: A = √s Vᵀ, B = W V √s⁻¹. For the given vectors the other
    factor is optimal, so that slices are nested and optimal at every rank. Computed in `dtype`.
    Cost: 2mnr flops; peak a block of W in that dtype, and the factors.

    >>> W = torch.diag(torch.tensor([4.0, 1.0]))
    >>> f = from_short_side(W, torch.tensor([[1.0, 0.0]]), torch.tensor([4.0]), torch.float64)
    >>> f.product().tolist()
    [[4.0, 0.0], [0.0, 0.0]]
    """
    vectors = vectors.to(dtype)
    root = values.to(dtype).sqrt()[:, None]
    inverse = torch.where(root > 0, 1 / root, 0.0)
    if W.shape[0] > W.shape[1]:
        return Factors(_times(W, (vectors * inverse).mT.contiguous()), vectors * root)
    return Factors((vectors * root).mT, inverse * _transposed_times(W, vectors))


def from_weighted_side(
    W: Float[Tensor, "m n"], vectors: Float[Tensor, "r k"], root: Root, dtype: torch.dtype
) -> Factors:
    """Returns balanced B, A from singular vectors of M = LᵀWR, of its shorter side, as rows.

    `root` is that side's, S. m ≤ n: B = L⁻ᵀU, A = (LU)ᵀW, so that LᵀBAR = UUᵀM. m > n: A = VᵀR⁻¹,
    B = W(RV), so that LᵀBAR = MVVᵀ. Either is the nearest to W of its rank in the metric (Eckart
    & Young, 1936, for M), whatever the root, and slices are nested. The columns of B and the rows
    of A are scaled to equal norms. The root is applied in float64, the rest computed in `dtype`.
    Cost: 2mnr + 2k²r flops; peak a block of W in that dtype, the root, and the factors.

    >>> from eckart.linalg.metric import damped_root
    >>> W, S = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 9.0]])
    >>> root = damped_root(S, 0.0)
    >>> f = from_weighted_side(W, torch.tensor([[0.0, 1.0]]), root, torch.float64)
    >>> f.product().tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    X = vectors.mT.double()
    near, dual = root.times(X).mT.to(dtype), root.inverse_transposed_times(X).mT.to(dtype)
    if W.shape[0] > W.shape[1]:
        B, A = _times(W, near.mT.contiguous()), dual
    else:
        B, A = dual.mT, _transposed_times(W, near)
    widths, heights = torch.linalg.vector_norm(B, dim=0), torch.linalg.vector_norm(A, dim=1)
    scale = torch.where((widths > 0) & (heights > 0), (heights / widths).sqrt(), 1.0)
    return Factors(B * scale, A / scale[:, None])


def _times(W: Float[Tensor, "m n"], right: Float[Tensor, "n r"]) -> Float[Tensor, "m r"]:
    if W.dtype == right.dtype:
        return product(W, right)
    return torch.cat([rows @ right for _, rows in row_blocks(W, right.dtype)])


def _transposed_times(W: Float[Tensor, "m n"], left: Float[Tensor, "r m"]) -> Float[Tensor, "r n"]:
    if W.dtype == left.dtype:
        return product(left, W)
    A = left.new_zeros(len(left), W.shape[1])
    for start, rows in row_blocks(W, left.dtype):
        A.addmm_(left[:, start : start + len(rows)], rows)
    return A


def factorize(
    W: Array,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    balanced: bool = True,
    name: str = "matrix",
) -> Factors:
    """Returns B (m×r) and A (r×n) with W ≈ B·A, the best such product of its rank.

    Exactly one of `rank`, `energy` (the fraction of ‖W‖_F² to keep) and `error` (the largest
    relative error ‖W − BA‖_F/‖W‖_F) chooses r. The factors have W's dtype and device.
    Errors and cost: see `truncated_svd`.

    >>> from eckart.linalg.matrices import random_low_rank
    >>> W = random_low_rank(10, 10, 2)
    >>> f = factorize(W, rank=2, balanced=False)
    >>> torch.allclose(f.B @ f.A, W, atol=1e-5), W.numel(), f.parameters
    (True, 100, 40)
    """
    dtype = as_tensor(W, name).dtype
    svd = truncated_svd(W, rank=rank, energy=energy, error=error, name=name)
    factors = split(svd, balanced=balanced).to(dtype)
    if not bool(torch.isfinite(factors.B).all() & torch.isfinite(factors.A).all()):
        raise NonFiniteError(
            f"the factors of {name} overflow {str(dtype).removeprefix('torch.')}: take balanced "
            "ones, or convert the matrix to float32."
        )
    return factors


def pivot(factors: Factors) -> PivotedFactors:
    """Returns the same product in pivoted form (up to rounding).

    Pivot rows by column-pivoted QR of Bᵀ: Bᵀ P = Q [R₁ R₂], K = R₂ᵀ R₁⁻ᵀ and the pivot rows are
    B_piv·A (PIFA's storage; we factor the m×r B, never the m×n product). Where B is rank
    deficient the columns of K beyond its rank are zero. Computed in float64; cost 2mr² flops.

    >>> from eckart.linalg.matrices import random_low_rank
    >>> p = pivot(factorize(random_low_rank(10, 10, 2), rank=2))
    >>> p.parameters, p.A.shape, p.K.shape
    (36, torch.Size([2, 10]), torch.Size([8, 2]))
    """
    from scipy.linalg import qr  # a tenth of a second that few commands need

    B, A = factors.B.double(), factors.A.double()
    m, r = B.shape
    if r > m:
        raise ShapeError(f"B is {m}×{r}: the pivoted form needs at least as many rows as columns.")
    with threadpool_limits(torch.get_num_threads(), user_api="blas"):
        found = qr(B.mT.cpu().numpy(), mode="r", pivoting=True)
    R, order = cast("tuple[Any, Any]", found)
    R, perm = torch.from_numpy(R).to(B.device), torch.from_numpy(order).long().to(B.device)
    diagonal = R.diagonal().abs()
    q = int((diagonal > diagonal[0] * max(m, r) * torch.finfo(torch.float64).eps).sum())
    K = B.new_zeros(m - r, r)
    K[:, :q] = torch.linalg.solve_triangular(R[:q, :q], R[:q, r:], upper=True).mT
    return PivotedFactors(B[perm[:r]] @ A, K, perm).to(factors.B.dtype)


def recompress(
    factors: Factors,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    name: str = "product",
) -> TruncatedSVD:
    """Returns the truncated SVD of B·A without forming the product.

    QR of B and of Aᵀ, then the exact SVD of the small core R_B R_Aᵀ, in float64. The best
    approximation of B·A at its rank. Cost: 4(m + n)r² + O(r³) flops; never m×n memory.

    >>> f = Factors(torch.ones(6, 3), torch.ones(3, 4))
    >>> svd = recompress(f, error=1e-6)
    >>> svd.rank, round(float(svd.s[0]), 4)
    (1, 14.6969)
    """
    (Qb, Rb), (Qa, Ra) = (torch.linalg.qr(side.double()) for side in (factors.B, factors.A.mT))
    core = Rb @ Ra.mT
    if rank is None and energy is None and error is None:
        svd = exact_svd(core, name)
    else:
        svd = truncated_svd(core, rank=rank, energy=energy, error=error, method="exact", name=name)
    dtype = torch.promote_types(factors.B.dtype, torch.float32)
    known = svd.s if svd.values is None else svd.values
    return TruncatedSVD(
        (Qb @ svd.U).to(dtype),
        svd.s.to(dtype),
        (svd.Vh @ Qa.mT).to(dtype),
        svd.energy,
        "core",
        values=_with_zeros(known, factors.shape),
    )


def product_spectrum(factors: Factors, name: str = "product") -> Spectrum:
    """Returns all singular values of B·A without forming the product, nor any vector.

    Those of the core of `recompress`, in a fifth of its time.

    >>> product_spectrum(Factors(torch.ones(6, 3), torch.ones(3, 4))).values.round(decimals=4)
    tensor([14.6969, 0.0000, 0.0000, 0.0000], dtype=torch.float64)
    """
    core = _core(factors)
    values = _with_zeros(singular_values(core, name), factors.shape)
    return Spectrum(factors.shape, values, energy(core))


def product_energy(factors: Factors) -> float:
    """Returns ‖B·A‖_F² without forming the product: the energy of the core of `recompress`.

    >>> product_energy(Factors(torch.ones(6, 3), torch.ones(3, 4)))  # 24 entries of 3
    216.0...
    """
    return energy(_core(factors))


def _core(factors: Factors) -> Float[Tensor, "p q"]:
    """R_B R_Aᵀ, in float64."""
    Rb, Ra = (torch.linalg.qr(side.double(), mode="r").R for side in (factors.B, factors.A.mT))
    return Rb @ Ra.mT


def _with_zeros(known: Tensor, shape: tuple[int, int]) -> Tensor:
    """All values of a product, of which those of its core are known: it has no others but 0."""
    return torch.cat([known, known.new_zeros(min(shape) - len(known))])
