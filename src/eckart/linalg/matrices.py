"""Matrices with a prescribed rank or spectrum, and the generators that make them repeatable."""

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.errors import ShapeError
from eckart.linalg.arrays import check_rank


def random_low_rank(
    m: int,
    n: int,
    rank: int,
    *,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "m n"]:
    """Returns an m×n matrix of the given rank: L·R, with Gaussian L (m×rank) and R (rank×n).

    Without a generator a new one with seed 0 is used, never the global one.

    >>> W = random_low_rank(10, 10, 2)
    >>> W.shape, int(torch.linalg.matrix_rank(W))
    (torch.Size([10, 10]), 2)
    """
    if m < 1 or n < 1:
        raise ShapeError(f"a {m}×{n} matrix is empty: both sides must be at least 1.")
    check_rank(rank, (m, n), "the random matrix")
    generator = generator or torch.Generator().manual_seed(0)
    L = torch.randn(m, rank, dtype=dtype, generator=generator, device=generator.device)
    R = torch.randn(rank, n, dtype=dtype, generator=generator, device=generator.device)
    return L @ R


def matrix_with_spectrum(
    values: Float[Tensor, " k"],
    m: int,
    n: int,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "m n"]:
    """Returns an m×n float64 matrix whose singular values are `values`, padded with zeros.

    U diag(σ) Vᵀ with U, V from the QR of Gaussian matrices (Stewart, 1980): the tests' and
    benchmarks' way to know the optimum in closed form. Cost: two QRs of k columns and a product.

    >>> W = matrix_with_spectrum(torch.tensor([3.0, 1.0]), 5, 4)
    >>> [round(float(s), 6) for s in torch.linalg.svdvals(W)]
    [3.0, 1.0, 0.0, 0.0]
    """
    k = check_rank(len(values), (m, n), "the matrix")
    generator = generator or torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(m, k, dtype=torch.float64, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=generator)).Q
    return (U * values.to(torch.float64)) @ V.mT


def named_generator(seed: int, name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a generator seeded from (seed, name) by SHA-256.

    Every matrix has its own, so order, workers and machines never change a result.
    """
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
