"""The norm in which a matrix is approximated: weighted by its inputs and by the loss's curvature.

Knows tensors only; where the second moments come from is the business of others.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.errors import FactorizationError, ShapeError
from eckart.linalg.arrays import check_finite
from eckart.linalg.exact import LAPACK_FAILURES
from eckart.linalg.norms import energy

INPUT_DAMPING = 1e-4
"""Of the mean of diag C, added to it: a direction that no input took must not be free. Perplexities
on a small Llama are flat from 10⁻⁶ to 10⁻³."""

CURVATURE_DAMPING = 1e-3
"""Of the mean of diag G, added to it: flat from 10⁻⁵ to 10⁻², harmful from 10⁻¹ on."""

MetricName = Literal["inputs", "curvature", "diagonal curvature"]

PANEL = 512
"""Columns of a triangle multiplied at once: half the flops of the whole square."""


@dataclass(frozen=True, slots=True)
class Root:
    """A square root S of a second moment: S Sᵀ, which is positive definite.

    `factor` is a lower triangle, or, of a diagonal second moment, the vector of its roots.
    """

    factor: Float[Tensor, "k k"] | Float[Tensor, " k"]  # float64

    @property
    def order(self) -> int:
        """k, of the k×k root."""
        return len(self.factor)

    def times(self, X: Float[Tensor, "k c"]) -> Float[Tensor, "k c"]:
        """Returns S X."""
        S, X = self.factor, X.to(self.factor.dtype)
        if S.ndim == 1:
            return S[:, None] * X
        panels = range(0, len(S), PANEL)
        return torch.cat([S[i : i + PANEL, : i + PANEL] @ X[: i + PANEL] for i in panels])

    def transposed_times(self, X: Float[Tensor, "k c"]) -> Float[Tensor, "k c"]:
        """Returns Sᵀ X."""
        S, X = self.factor, X.to(self.factor.dtype)
        if S.ndim == 1:
            return S[:, None] * X
        return torch.cat([S[i:, i : i + PANEL].mT @ X[i:] for i in range(0, len(S), PANEL)])

    def inverse_transposed_times(self, X: Float[Tensor, "k c"]) -> Float[Tensor, "k c"]:
        """Returns S⁻ᵀ X."""
        S, X = self.factor, X.to(self.factor.dtype)
        if S.ndim == 1:
            return X / S[:, None]
        return torch.linalg.solve_triangular(S.mT, X, upper=True)

    def solved(self, X: Float[Tensor, "k c"]) -> Float[Tensor, "k c"]:
        """Returns (S Sᵀ)⁻¹ X."""
        S, X = self.factor, X.to(self.factor.dtype)
        return X / S.square()[:, None] if S.ndim == 1 else torch.cholesky_solve(X, S)


@dataclass(frozen=True, slots=True)
class Metric:
    """‖Lᵀ E R‖_F of an m×n matrix E, with damped G = L Lᵀ (m×m) and C = R Rᵀ (n×n).

    C = E[x xᵀ] is the second moment of the inputs, G = E[g gᵀ] that of g = ∂loss/∂y at the
    outputs, per token. With both, half the square is the loss that an error E of the weights
    costs, in nats per token: ½ tr(G E C Eᵀ), the Kronecker-factored second order (Martens & Grosse,
    2015). Without G it is ‖E C^½‖_F, the error of the outputs, in no unit of the loss.

    >>> C, G = torch.diag(torch.tensor([4.0, 1.0])), torch.tensor([9.0, 1.0])
    >>> metric = Metric.of(C, G, input_damping=0.0, curvature_damping=0.0)
    >>> metric.transformed(torch.ones(2, 2)).tolist(), metric.has_curvature
    ([[6.0, 3.0], [2.0, 1.0]], True)
    """

    inputs: Root  # R
    outputs: Root | None = None  # L; None: inputs alone

    @classmethod
    def of(
        cls,
        C: Float[Tensor, "..."],
        G: Float[Tensor, "..."] | None = None,
        *,
        input_damping: float = INPUT_DAMPING,
        curvature_damping: float = CURVATURE_DAMPING,
        name: str = "matrix",
    ) -> "Metric":
        """Returns the metric of second moments, full or diagonal; see `damped_root`."""
        R = damped_root(C, input_damping, f"the inputs of {name}")
        L = None if G is None else damped_root(G, curvature_damping, f"the curvature of {name}")
        return cls(R, L)

    @property
    def has_curvature(self) -> bool:
        """Whether half the square of the norm is in nats per token."""
        return self.outputs is not None

    @property
    def kind(self) -> MetricName:
        """What it is called: by what weighs the rows."""
        if self.outputs is None:
            return "inputs"
        return "curvature" if self.outputs.factor.ndim == 2 else "diagonal curvature"

    def transformed(self, E: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """Returns M = Lᵀ E R, in float64: its Frobenius norm is the metric's norm of E.

        Cost: m²n + mn² flops in float64; peak two copies of E in float64.
        """
        left = E if self.outputs is None else self.outputs.transposed_times(E)
        return self.inputs.transposed_times(left.mT).mT

    def energy(self, E: Float[Tensor, "m n"]) -> float:
        """Returns ‖Lᵀ E R‖_F², summed in float64."""
        return energy(self.transformed(E))

    def short_side(self, shape: tuple[int, int]) -> Root:
        """Returns the root of the shorter side: L where m ≤ n (I without curvature), else R."""
        m, n = shape
        if m > n:
            return self.inputs
        return self.outputs or Root(self.inputs.factor.new_ones(m))


def damped_root(S: Float[Tensor, "..."], damping: float, name: str = "a second moment") -> Root:
    """Returns a root of S + damping·mean(diag S)·I, for a symmetric S ≥ 0 that may be singular.

    By Cholesky, a tenth of the time of an eigendecomposition. Where rounding has made an
    eigenvalue negative by more than the damping, S = X Λ Xᵀ is taken with Λ ≥ 0 before it is
    damped, and its root made triangular by a QR of Λ^½ Xᵀ. A vector stands for a diagonal.
    FactorizationError where all of S is zero: no direction is known. Computed in float64. Cost:
    k³/3 flops, or about 12k³ in that case; peak 24k² bytes.

    >>> damped_root(torch.tensor([[4.0, 2.0], [2.0, 5.0]]), 0.0).factor.tolist()
    [[2.0, 0.0], [1.0, 2.0]]
    """
    check_finite(S, name)
    if S.ndim == 2 and S.shape[0] != S.shape[1]:
        raise ShapeError(f"{name} has shape {tuple(S.shape)}: a second moment is square.")
    wide = S.double()
    mean = float((wide if wide.ndim == 1 else wide.diagonal()).mean())
    if not mean > 0:
        raise FactorizationError(f"the second moment of {name} is zero: the text never used it")
    if wide.ndim == 1:
        return Root(_roots(wide, damping * mean))
    damped = wide.clone()
    damped.diagonal().add_(damping * mean)
    L, failed = torch.linalg.cholesky_ex(damped)
    return Root(_spectral_root(wide, damping * mean, name) if bool(failed) else L)


def _spectral_root(S: Float[Tensor, "k k"], shift: float, name: str) -> Float[Tensor, "k k"]:
    try:
        squares, X = torch.linalg.eigh(S)
    except LAPACK_FAILURES as error:
        raise FactorizationError(f"no root of the second moment of {name}: {error}") from None
    scaled = _roots(squares, shift)[:, None] * X.mT
    return torch.linalg.qr(scaled, mode="r").R.mT.contiguous()


def _roots(squares: Float[Tensor, " k"], shift: float) -> Float[Tensor, " k"]:
    """√(λ + shift), and never less than what float32 sums leave in the place of a zero."""
    rounding = float(squares.max()) * torch.finfo(torch.float32).eps
    return (squares.clamp(min=0) + shift).clamp(min=rounding).sqrt()
