"""The singular value decomposition in full, by a ladder that is checked at every rung.

Knows tensors and LAPACK; must not know files. The truncated one is in `truncated`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from threadpoolctl import threadpool_limits
from torch import Tensor

from eckart.errors import FactorizationError, NonFiniteError
from eckart.linalg.arrays import Array, as_matrix, working_dtype
from eckart.linalg.norms import energy, power_of_two_scaled, unscaled
from eckart.linalg.spectrum import Spectrum

LAPACK_FAILURES = (torch.linalg.LinAlgError, np.linalg.LinAlgError)  # pyright: ignore[reportPrivateImportUsage]  # documented, not re-exported

LAPACK_ORDER = 23_170
"""gesdd asks for 4·min² + 7·min words of workspace in a 32-bit integer: from this order on it
overflows (LAPACK dgesdd.f; torch issues 190509, 188859)."""

LAPACK_ENTRIES = 2**31 - 1

RATIO = 50.0
"""LAPACK's own pass mark for its test ratios (TESTING/svd.in)."""


@dataclass(frozen=True, slots=True)
class TruncatedSVD:
    """The leading r singular triplets of a matrix: W ≈ U diag(s) Vh.

    `energy` is ‖W‖_F² of the whole matrix. `method` names the rung that gave the values
    ("gesdd", "gesdd64", "gesvd64", "tall", "krylov", …). `excess_estimate` is by how much, as an
    estimate, the relative error exceeds the Eckart–Young optimum at this rank (0.001 = 0.1 %);
    0 for an exact method.
    """

    U: Float[Tensor, "m r"]
    s: Float[Tensor, " r"]
    Vh: Float[Tensor, "r n"]
    energy: float
    method: str
    excess_estimate: float = 0.0
    values: Float[Tensor, " k"] | None = None  # every singular value known, where more than r are

    @property
    def rank(self) -> int:
        """The number of triplets kept."""
        return len(self.s)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix."""
        return self.U.shape[0], self.Vh.shape[1]

    @property
    def spectrum(self) -> Spectrum:
        """Every singular value known, with the energy of the whole matrix."""
        return Spectrum(self.shape, self.s if self.values is None else self.values, self.energy)

    def truncate(self, rank: int) -> "TruncatedSVD":
        """Returns the leading `rank` triplets; they are optimal at every rank."""
        known = self.s if self.values is None else self.values
        U, s, Vh = self.U[:, :rank], self.s[:rank], self.Vh[:rank]
        return replace(self, U=U, s=s, Vh=Vh, values=known)


@dataclass(frozen=True, slots=True)
class _Rung:
    method: str
    dtype: torch.dtype
    decompose: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def exact_svd(W: Array, name: str = "matrix") -> TruncatedSVD:
    """Returns all min(m, n) singular triplets of W, checked.

    The ladder: finite check, scaling by a power of two, gesdd in the working dtype, gesdd in
    float64, gesvd in float64 (scipy). A rung counts only if LAPACK's own test ratios
    (residual, orthogonality, order; TESTING/EIG/ddrvbd.f) stay below 50; else the next one is
    tried. The sign of each pair is fixed: the largest entry of a left vector is positive.

    A matrix of more than 2³¹ − 1 entries with a short side is reduced by a blocked QR first, so
    that LAPACK's 32-bit integers never see it; min(m, n) ≥ 23 170 is refused by name: use
    `truncated_svd`, whose randomized path has no such limit.

    Cost: about 4mn·min + 8·min³ flops at LAPACK's speed, plus 3 products for the check; peak
    about 9 times the bytes of W in float32.

    >>> svd = exact_svd(torch.diag(torch.tensor([3.0, 2.0, 0.0])))
    >>> svd.s.tolist(), svd.method
    ([3.0, 2.0, 0.0], 'gesdd')
    """
    W = as_matrix(W, name)
    return exact_svd_checked(W.to(working_dtype(W.dtype)), name)


def exact_svd_checked(W: Tensor, name: str) -> TruncatedSVD:
    """`exact_svd` of a finite matrix that is already in its working dtype."""
    m, n = W.shape
    if min(m, n) >= LAPACK_ORDER:
        raise FactorizationError(
            f"{name} ({m}×{n}) is beyond LAPACK: min(m, n) ≥ {LAPACK_ORDER} overflows its 32-bit "
            "workspace. Ask for a small rank, which takes the randomized path."
        )
    scaled, exponent = power_of_two_scaled(W)
    if m * n > LAPACK_ENTRIES:
        U, s, Vh, method = _tall_svd(scaled, name)
    else:
        U, s, Vh, method = _climb(scaled, name)
    U, Vh = fix_signs(U, Vh)
    return TruncatedSVD(U, rescaled(s, exponent, name), Vh, energy(W), method)


def singular_values(W: Array, name: str = "matrix") -> Float[Tensor, " k"]:
    """Returns all singular values of W, descending, in its working dtype.

    The same ladder as `exact_svd` without the vectors, so the check is Σσ² = ‖W‖_F² to rounding.
    Cost: about a third of `exact_svd`.
    """
    W = as_matrix(W, name)
    return singular_values_checked(W.to(working_dtype(W.dtype)), name)[0]


def singular_values_checked(W: Tensor, name: str) -> tuple[Float[Tensor, " k"], str]:
    """`singular_values` of a finite matrix in its working dtype, and the rung that gave them."""
    if min(W.shape) >= LAPACK_ORDER or W.numel() > LAPACK_ENTRIES:
        svd = exact_svd_checked(W, name)
        return svd.s, svd.method
    scaled, exponent = power_of_two_scaled(W)
    reasons: list[str] = []
    for rung in _value_rungs(scaled):
        try:
            s = rung.decompose(scaled.to(rung.dtype))[1]
        except LAPACK_FAILURES as error:
            reasons.append(f"{rung.method}: {error}")
            continue
        fault = _value_fault(scaled, s)
        if fault is None:
            return rescaled(s.to(scaled.dtype), exponent, name), rung.method
        reasons.append(f"{rung.method}: {fault}")
    raise FactorizationError(
        f"no singular values of {name} passed the check ({'; '.join(reasons)})."
    )


def rescaled(s: Tensor, exponent: int, name: str) -> Tensor:
    """Returns the singular values s·2ᵉ, or raises where the largest is beyond the dtype."""
    values = unscaled(s, exponent)
    if not bool(torch.isfinite(values[0])):
        raise NonFiniteError(
            f"the largest singular value of {name} overflows {s.dtype}: "
            "convert the matrix to float64, or scale it down."
        )
    return values


def _climb(W: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor, str]:
    reasons: list[str] = []
    for rung in _rungs(W):
        try:
            U, s, Vh = rung.decompose(W.to(rung.dtype))
        except LAPACK_FAILURES as error:
            reasons.append(f"{rung.method}: {error}")
            continue
        fault = svd_fault(W.to(rung.dtype), U, s, Vh)
        if fault is None:
            return U.to(W.dtype), s.to(W.dtype), Vh.to(W.dtype), rung.method
        reasons.append(f"{rung.method}: {fault}")
    raise FactorizationError(f"no SVD of {name} passed its check ({'; '.join(reasons)}).")


def _rungs(W: Tensor) -> list[_Rung]:
    def gesdd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        U, s, Vh = torch.linalg.svd(W, full_matrices=False)
        return U, s, Vh

    rungs = [_Rung("gesdd", W.dtype, gesdd)] if W.dtype != torch.float64 else []
    return [*rungs, _Rung("gesdd64", torch.float64, gesdd), _Rung("gesvd64", torch.float64, _gesvd)]


def _value_rungs(W: Tensor) -> list[_Rung]:
    def values(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return W, torch.linalg.svdvals(W), W

    rungs = [_Rung("gesdd", W.dtype, values)] if W.dtype != torch.float64 else []
    return [
        *rungs,
        _Rung("gesdd64", torch.float64, values),
        _Rung("gesvd64", torch.float64, _gesvd),
    ]


def _gesvd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The slow and sure one: QR iteration instead of divide and conquer."""
    from scipy.linalg import svd

    with threadpool_limits(torch.get_num_threads(), user_api="blas"):
        factors = svd(W.cpu().numpy(), full_matrices=False, lapack_driver="gesvd")
    U, s, Vh = (torch.from_numpy(factor).to(W.device) for factor in factors)
    return U, s, Vh


def _tall_svd(W: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor, str]:
    """SVD through a two-level QR (Demmel et al., 2012): blocks of rows, then their R factors."""
    if W.shape[0] < W.shape[1]:
        U, s, Vh, method = _tall_svd(W.T, name)
        return Vh.T, s, U.T, method
    m, n = W.shape
    rows = max(n, LAPACK_ENTRIES // (2 * n))
    if -(-m // rows) * n * n > LAPACK_ENTRIES:
        raise FactorizationError(f"{name} ({m}×{n}) is beyond LAPACK's 32-bit integers.")
    blocks = [torch.linalg.qr(block) for block in W.split(rows)]
    Q, R = torch.linalg.qr(torch.cat([block.R for block in blocks]))
    U, s, Vh, method = _climb(R, name)
    parts = (Q @ U).split([len(block.R) for block in blocks])
    return torch.cat([b.Q @ p for b, p in zip(blocks, parts, strict=True)]), s, Vh, f"tall-{method}"


def svd_fault(W: Tensor, U: Tensor, s: Tensor, Vh: Tensor) -> str | None:
    """Returns what is wrong with the thin SVD of W, or None: LAPACK's ratios R1 to R4."""
    if not bool(torch.isfinite(s).all() & torch.isfinite(U).all() & torch.isfinite(Vh).all()):
        return "non-finite factors"
    if bool((s < 0).any()) or bool((s.diff() > 0).any()):
        return "singular values out of order"
    ratios = svd_ratios(W, U, s, Vh)
    worst = max(ratios)
    return None if worst <= RATIO else f"test ratio {worst:.3g} above {RATIO:g}"


def svd_ratios(W: Tensor, U: Tensor, s: Tensor, Vh: Tensor) -> tuple[float, float, float]:
    """Returns LAPACK's test ratios: residual, and the orthogonality of U and of V.

    ‖W − U diag(s) Vh‖ / (‖W‖·max(m, n)·ε), ‖I − UᵀU‖ / (m·ε), ‖I − Vh Vhᵀ‖ / (n·ε), 1-norms
    (TESTING/EIG/dbdt01.f, dort01.f; the documentation's max(m, n), where the code divides by n).
    """
    m, n = W.shape
    ulp = torch.finfo(W.dtype).eps
    eye = torch.eye(len(s), dtype=W.dtype, device=W.device)
    norm, residual = _one_norm(W), _one_norm(W - (U * s) @ Vh)
    if norm == 0:
        first = 0.0 if residual == 0 else 1 / ulp
    else:
        first = residual / (norm * max(m, n) * ulp)
    return first, _one_norm(eye - U.mT @ U) / (m * ulp), _one_norm(eye - Vh @ Vh.mT) / (n * ulp)


def _one_norm(W: Tensor) -> float:
    return float(W.abs().sum(0, dtype=torch.float64).max())


def _value_fault(W: Tensor, s: Tensor) -> str | None:
    if not bool(torch.isfinite(s).all()):
        return "non-finite values"
    if bool((s < 0).any()) or bool((s.diff() > 0).any()):
        return "values out of order"
    total = energy(W)
    slack = RATIO * max(W.shape) * torch.finfo(W.dtype).eps * total
    return None if abs(energy(s) - total) <= slack else "Σσ² differs from ‖W‖_F²"


def fix_signs(U: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the same triplets with the largest entry of every left vector positive."""
    signs = column_signs(U)
    return U * signs, Vh * signs.mT


def column_signs(U: Float[Tensor, "m k"]) -> Float[Tensor, "1 k"]:
    """Returns the sign, 1 or −1, of the largest entry of every column."""
    top = U.gather(0, U.abs().argmax(0, keepdim=True))
    return torch.where(top < 0, -torch.ones_like(top), torch.ones_like(top))
