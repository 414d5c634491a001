"""The numerical rank of a matrix, or of a product that is never formed, by numpy's rule."""

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.errors import ShapeError, UsageError
from eckart.linalg.arrays import Array, as_tensor, check_finite
from eckart.linalg.exact import singular_values
from eckart.linalg.factors import Factors, product_spectrum


def matrix_rank(
    W: Array, *, rtol: float | None = None, atol: float | None = None, name: str = "matrix"
) -> int | list[object]:
    """Returns the number of singular values above max(atol, σ₁·rtol); numpy's rule.

    `rtol` defaults to max(m, n)·ε of the dtype computed in (float32 for half precision, whose
    entries are then taken at their word: for the rank above their rounding noise use
    `signal_rank`); `atol` alone switches it off, as numpy's `tol` does. A vector has rank 1, or
    0 if it is zero. A batch (…, m, n) gives nested lists of ranks, one per matrix. The
    comparison is strict: a value exactly at the threshold does not count, so the zero matrix has
    rank 0.

    Cost: the singular values, about 4mn·min(m, n)/3 flops.

    >>> from eckart.linalg.matrices import random_low_rank
    >>> W = random_low_rank(10, 10, 2)
    >>> matrix_rank(W), matrix_rank(torch.stack([W, W + torch.eye(10)]))
    (2, [2, 10])
    """
    tensor = as_tensor(W, name)
    if tensor.numel() == 0:
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}: an empty matrix has no rank.")
    check_finite(tensor, name)
    for option, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not 0 <= value < float("inf"):
            raise UsageError(f"{option} {value} is out of range: choose a finite number from 0.")
    if tensor.ndim < 2:
        return int(bool((tensor != 0).any()))
    return _ranks(tensor, rtol, atol, name)


def _ranks(tensor: Tensor, rtol: float | None, atol: float | None, name: str) -> int | list[object]:
    if tensor.ndim > 2:
        return [_ranks(part, rtol, atol, f"{name}[{i}]") for i, part in enumerate(tensor)]
    return numerical_rank(
        singular_values(tensor, name), (tensor.shape[0], tensor.shape[1]), rtol=rtol, atol=atol
    )


def numerical_rank(
    values: Float[Tensor, " k"],
    shape: tuple[int, int],
    *,
    rtol: float | None = None,
    atol: float | None = None,
) -> int:
    """Returns numpy's rank of an m×n matrix from its singular values, in the dtype they came in."""
    if rtol is None:
        rtol = max(shape) * torch.finfo(values.dtype).eps if atol is None else 0.0
    return int((values > max(atol or 0.0, float(values[0]) * rtol)).sum())


def product_rank(factors: Factors, name: str = "product") -> int:
    """Returns the numerical rank of B·A as the numbers are given, without forming the product.

    The singular values above max(m, n)·ε·Σ_k ‖b_k‖‖a_k‖, over the columns of B and rows of A, with
    float64's ε, in which the product of any stored factors is known. numpy's rule (`matrix_rank`)
    has σ₁ in the place of the sum: but where terms cancel, rounding is of the size of the terms,
    and may be all there is. Cost: that of `product_spectrum`.

    >>> B, A = torch.ones(6, 1), torch.ones(1, 4)
    >>> twice = Factors(torch.cat([B, B], 1), torch.cat([A, A]))
    >>> nothing = Factors(torch.cat([B, -B], 1), torch.cat([A, A]))
    >>> product_rank(twice), product_rank(nothing), product_rank(Factors(B, A).padded(3))
    (1, 0, 1)
    """
    values = product_spectrum(factors, name).values.double()
    widths = torch.linalg.vector_norm(factors.B.double(), dim=0)
    terms = float(widths @ torch.linalg.vector_norm(factors.A.double(), dim=1))
    rounding = max(factors.shape) * torch.finfo(torch.float64).eps * terms
    return numerical_rank(values, factors.shape, atol=rounding)
