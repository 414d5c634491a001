"""How large a matrix is: its energy, and the power of two that brings it near one.

Knows tensors only.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 2**16
"""Entries squared at once in float64: 512 KiB stay in the cache, and in whatever order a dot
product of so many adds, its rounding is below 4·10⁻¹² of a norm."""


RUN, RUN_ROUNDING = 128, 8e-6
"""Squares added in float32, and what that may take off: (128 + 4)·2⁻²⁴ and a hair."""

TINY = 1e-20
"""What squares below float32's smallest take off a sum above this is below 10⁻¹² of it."""


def energy(W: Float[Tensor, "*shape"]) -> float:
    """Returns ‖W‖_F², summed in float64; Inf or 0 only where float64 holds no such square.

    Cost: one pass over W, a tenth of the time of torch's own float64 norm; half a MiB.

    >>> energy(torch.full((4, 4), 1e30)) == 16 * energy(torch.tensor(1e30))
    True
    """
    flat = (W if W.is_contiguous() else W.mT).reshape(-1)  # the order of a sum is free
    wide = (chunk.double() for chunk in flat.split(CHUNK))
    return float(torch.stack([torch.dot(chunk, chunk) for chunk in wide]).sum())


def energy_from_above(W: Float[Tensor, "*shape"]) -> float:
    """Returns a bound on ‖W‖_F² of at most 1.00001 times it; Inf or NaN where W is not finite.

    Of float32 the squares are added in float32 over runs of 128, which loses less than 8·10⁻⁶ of
    them, and the runs in float64: a quarter of the time of `energy`, which computes it where
    float32 does not hold the squares, or W is float64.

    >>> W = torch.full((4, 4), 0.1)
    >>> energy(W) <= energy_from_above(W) <= 1.00001 * energy(W)
    True
    """
    flat = W.reshape(-1)
    if W.dtype == torch.float32 and (whole := len(flat) // RUN * RUN):
        runs = torch.linalg.vector_norm(flat[:whole].view(-1, RUN), dim=1).double()
        found = float(torch.dot(runs, runs))
        if TINY < found < math.inf:
            rest = energy(flat[whole:]) if whole < len(flat) else 0.0
            return (found + rest) * (1 + RUN_ROUNDING)
    return energy(flat)


def power_of_two_scaled(W: Tensor) -> tuple[Tensor, int]:
    """Returns W·2⁻ᵉ with its largest entry in [½, 1), and e. Exact, short of underflow."""
    low, high = torch.aminmax(W)
    _, exponent = math.frexp(max(-float(low), float(high)))
    return unscaled(W, -exponent), exponent


def unscaled(tensor: Tensor, exponent: int) -> Tensor:
    """Returns tensor·2ᵉ, in two steps: 2¹⁴⁰ alone is no float32."""
    half = exponent // 2
    return tensor * 2.0**half * 2.0 ** (exponent - half) if exponent else tensor
