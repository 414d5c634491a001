"""How far a product is from its matrix: measured, never predicted."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.linalg.arrays import Array, as_matrix, measured_matrix
from eckart.linalg.blocks import row_blocks
from eckart.linalg.metric import Metric
from eckart.linalg.norms import energy, unscaled

SUMS = 1e-11
"""What float64 rounding may take off a root of a quotient of two energies (`norms.CHUNK`)."""


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

    def subtract_from(self, rows: Tensor, start: int) -> None:
        """Takes rows start … start + len(rows) − 1 out of `rows`, in place."""
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

    The root of the quotient of the two `energies`, `rounded_up`. Entries whose squares leave
    float64 are scaled by a power of two first.

    >>> from eckart.linalg.factors import factorize
    >>> W = torch.diag(torch.tensor([4.0, 3.0]))
    >>> round(relative_error(W, factorize(W, rank=1)), 6)
    0.6
    """
    W, largest = measured_matrix(W, name)
    return rounded_up(*_energies(W, product, _shift(largest)))


def energies(W: Array, product: Product, name: str = "matrix") -> tuple[float, float]:
    """Returns ‖W − BA‖_F² and ‖W‖_F², which add up over the matrices of a stack.

    Everything in float64 from the numbers as stored, by row blocks that stay in the cache. (Float32
    products with their rounding bound γ_r·‖|B||A|‖ added would be quicker, by half at most, only
    up to ranks near 200: beyond, the bound is above 10⁻⁴ of the error. Up to there the product is
    not what takes the time.)
    Cost: 2mnr flops; peak a block of 8 MiB and the factors in float64.

    >>> from eckart.linalg.factors import factorize
    >>> W = torch.diag(torch.tensor([4.0, 3.0]))
    >>> missed, total = energies(W, factorize(W, rank=1))
    >>> round(missed, 6), total
    (9.0, 25.0)
    """
    W, largest = measured_matrix(W, name)
    shift = _shift(largest)
    return _unscaled(_energies(W, product, shift), shift)


def weighted_energies(W: Array, product: Product, metric: Metric) -> tuple[float, float]:
    """Returns ‖Lᵀ(W − BA)R‖_F² and ‖LᵀWR‖_F², which add up over the matrices of a stack.

    Half the first is the loss of the product in nats per token, where the metric has curvature.
    In float64 from the numbers as stored. Cost: 2mnr + 2(m²n + mn²) flops; peak three float64
    copies of W, and the factors.

    >>> from eckart.linalg.factors import factorize
    >>> W, C = torch.diag(torch.tensor([4.0, 3.0])), torch.diag(torch.tensor([1.0, 9.0]))
    >>> metric = Metric.of(C, input_damping=0.0)
    >>> weighted_energies(W, factorize(W, rank=1), metric)
    (81.0, 97.0)
    """
    E = as_matrix(W).double().clone()
    total = metric.energy(E)
    product.to(torch.float64).subtract_from(E, 0)
    return metric.energy(E), total


def _unscaled(energies: tuple[float, float], shift: int) -> tuple[float, float]:
    missed, total = (each * 2.0**-shift * 2.0**-shift for each in energies)
    return missed, total


def rounded_up(missed: float, total: float) -> float:
    """Returns the relative error √(missed/total), never below the true one.

    An allowance for the rounding of the sums and of every dot product is added. 0 where nothing
    is missed, Inf where a zero matrix is, or where an energy is beyond float64.
    """
    if total == 0 or not math.isfinite(missed) or math.isinf(total):  # NaN: Inf in a factor times 0
        return 0.0 if missed == 0 else math.inf
    eps = torch.finfo(torch.float64).eps
    return math.sqrt(missed / total) * (1 + SUMS) + (0.0 if missed == 0 else 4 * eps)


def _energies(
    W: Tensor, product: Product, shift: int, look: Callable[[Tensor], None] = lambda _: None
) -> tuple[float, float]:
    """‖W − BA‖_F² and ‖W‖_F², both of the matrices times 2ˢ; `look` sees every block of rows."""
    missed, total, product = 0.0, 0.0, product.to(torch.float64)
    for start, rows in row_blocks(W, torch.float64):
        look(rows)
        total += energy(unscaled(rows, shift))
        product.subtract_from(rows, start)
        missed += energy(unscaled(rows, shift))
    return missed, total


def _shift(largest: float) -> int:
    """0, or the power of two that brings W to where float64 can square it; itself a float64."""
    _, exponent = math.frexp(largest)
    return -max(-1000, min(exponent, 1000)) if abs(exponent) > 400 else 0


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
    arithmetic's. Cost: `samples` products with W, by row blocks; peak a block of 8 MiB and the
    factors in float64.
    """
    W = as_matrix(W)
    x = _inputs(W, generator, samples)
    y = torch.cat([x @ rows.mT for _, rows in row_blocks(W, torch.float64)], dim=1)
    return _difference(x, y, product, bias)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A matrix against its product: the energies, and the outputs."""

    missed: float  # ‖W − BA‖_F²
    total: float  # ‖W‖_F²
    outputs: OutputDifference


def compare(
    W: Array,
    product: Product,
    bias: Float[Tensor, " m"] | None = None,
    *,
    generator: torch.Generator,
    samples: int = 16,
    name: str = "matrix",
) -> Comparison:
    """Returns `energies` and `output_difference`, from one pass over W.

    >>> from eckart.linalg.factors import factorize
    >>> W = torch.diag(torch.tensor([4.0, 3.0]))
    >>> found = compare(W, factorize(W, rank=1), generator=torch.Generator().manual_seed(0))
    >>> round(found.missed, 6), found.total, found.outputs.relative < 1
    (9.0, 25.0, True)
    """
    W, largest = measured_matrix(W, name)
    x, shift, y = _inputs(W, generator, samples), _shift(largest), list[Tensor]()
    found = _energies(W, product, shift, lambda rows: y.append(x @ rows.mT))
    missed, total = _unscaled(found, shift)
    return Comparison(missed, total, _difference(x, torch.cat(y, dim=1), product, bias))


def _inputs(W: Tensor, generator: torch.Generator, samples: int) -> Tensor:
    draw = torch.randn(samples, W.shape[1], dtype=torch.float64, generator=generator)
    return draw.to(W.device)


def _difference(x: Tensor, Wx: Tensor, product: Product, bias: Tensor | None) -> OutputDifference:
    b = torch.zeros(Wx.shape[1], dtype=torch.float64) if bias is None else bias.double()
    b = b.to(Wx.device)
    y = Wx + b
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
        y = forward(x / torch.linalg.vector_norm(x, dtype=torch.float64))
        norm = float(torch.linalg.vector_norm(y, dtype=torch.float64))
        if norm == 0:
            return 0.0
        x = backward(y / norm)  # at unit length, so that no scale of E overflows
    return norm
