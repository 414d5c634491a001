"""How far a product is from its matrix: measured, never predicted."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.linalg.arrays import Array, as_matrix
from eckart.linalg.norms import unscaled

ROW_BLOCK_ENTRIES = 2**22
"""Rows are compared in blocks of about this many float64 entries (32 MiB)."""


@runtime_checkable
class Product(Protocol):
    """Anything that stands for an m×n matrix: `Factors`, `PivotedFactors`."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Returns rows start … stop − 1, in float64."""
        ...

    def apply(self, x: Tensor) -> Tensor:
        """Returns the product with each row of x."""
        ...

    def apply_transposed(self, y: Tensor) -> Tensor:
        """Returns the transposed product with each row of y."""
        ...

    def to(self, dtype: torch.dtype) -> "Product":
        """Returns the same product in another dtype."""
        ...


def relative_error(W: Array, product: Product, name: str = "matrix") -> float:
    """Returns ‖W − BA‖_F / ‖W‖_F of the factors as they are, rounded up.

    Row blocks in float64, so the figure is never below the true error: an allowance for the
    rounding of this very sum is added. 0 for a zero matrix met exactly, Inf if it is missed.
    Cost: one product in float64, 2mnr flops; peak two row blocks.

    >>> from eckart.linalg.factors import factorize
    >>> W = torch.diag(torch.tensor([4.0, 3.0]))
    >>> round(relative_error(W, factorize(W, rank=1)), 6)
    0.6
    """
    W = as_matrix(W, name)
    m, n = W.shape
    step, shift = max(1, ROW_BLOCK_ENTRIES // n), _shift(W)
    missed, total = 0.0, 0.0
    for start in range(0, m, step):
        rows = W[start : start + step].double()
        difference = rows - product.rows(start, start + step)
        missed += float(unscaled(difference, shift).square().sum())
        total += float(unscaled(rows, shift).square().sum())
    if total == 0 or not math.isfinite(missed):  # NaN: Inf in a factor times 0
        return 0.0 if missed == 0 else math.inf
    # 1e-12 covers the float64 sums (≤ ~40 roundings deep), the other term each dot product.
    eps = torch.finfo(torch.float64).eps
    return math.sqrt(missed / total) * (1 + 1e-12) + (0.0 if missed == 0 else 4 * eps)


def _shift(W: Tensor) -> int:
    """0, or the power of two that brings W to where float64 can square it."""
    low, high = torch.aminmax(W)
    _, exponent = math.frexp(max(-float(low), float(high)))
    return -exponent if abs(exponent) > 400 else 0


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """y = Wx + b against y' = B(Ax) + b on the same inputs."""

    max: float  # largest |y − y'|
    relative: float  # ‖y − y'‖_F / ‖y‖_F


def output_difference(
    W: Array,
    product: Product,
    bias: Float[Tensor, " m"] | None = None,
    *,
    generator: torch.Generator,
    samples: int = 16,
) -> OutputDifference:
    """Returns how much Wx + b and B(Ax) + b differ on `samples` Gaussian inputs.

    Computed in float64 from the numbers as stored, so the difference is the factors', not the
    arithmetic's. Cost: `samples` products with W.
    """
    W = as_matrix(W)
    x = torch.randn(samples, W.shape[1], dtype=torch.float64, generator=generator)
    x = x.to(W.device)
    b = torch.zeros(W.shape[0], dtype=torch.float64) if bias is None else bias.double()
    b = b.to(W.device)
    y = x @ W.double().mT + b
    difference = y - (product.to(torch.float64).apply(x) + b)
    norm = float(torch.linalg.vector_norm(y))
    missed = float(torch.linalg.vector_norm(difference))
    relative = missed / norm if norm else (0.0 if missed == 0 else math.inf)
    return OutputDifference(float(difference.abs().max()), relative)


def residual_norm(
    W: Array, product: Product, *, generator: torch.Generator, iterations: int = 20
) -> float:
    """Returns an estimate of ‖W − BA‖₂ from below, by the power method, never forming W − BA.

    The idea of fbpca's `diffsnorm`; Dixon (1983) bounds the chance that it is far too small.
    Computed in float64. Cost: 2·iterations products with W, and a float64 copy of it.
    """
    W, exact = as_matrix(W).double(), product.to(torch.float64)
    x = torch.randn(W.shape[1], dtype=torch.float64, generator=generator).to(W.device)
    return power_norm(
        lambda x: W @ x - exact.apply(x),
        lambda y: W.mT @ y - exact.apply_transposed(y),
        x,
        iterations,
    )


def power_norm(
    forward: Callable[[Tensor], Tensor],
    backward: Callable[[Tensor], Tensor],
    x: Float[Tensor, " n"],
    iterations: int,
) -> float:
    """Returns ‖E‖₂ from below: `iterations` power steps on EᵀE, starting from x."""
    norm = 0.0
    for _ in range(iterations):
        y = forward(x / torch.linalg.vector_norm(x))
        norm = float(torch.linalg.vector_norm(y))
        if norm == 0:
            return 0.0
        x = backward(y)
    return norm
