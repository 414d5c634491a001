"""Builders that several test files share: matrices whose singular values are known."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from eckart.linalg.matrices import matrix_with_spectrum, named_generator

# One thread per worker: the matrices are small, and spinning threads cost more than they bring.
torch.set_num_threads(1)
threadpool_limits(1)

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Family:
    """A shape, the singular values on it, and the size of its largest entry."""

    m: int
    n: int
    values: Callable[[int], Tensor] | None  # None: Gaussian entries
    scale: Callable[[torch.finfo], float] = lambda _: 1.0


def _steps(k: int) -> Tensor:
    return torch.arange(1, k + 1, dtype=torch.float64)


FAMILIES = {
    "slow": Family(40, 30, lambda k: _steps(k) ** -0.5),
    "fast": Family(40, 30, lambda k: _steps(k) ** -2.0),
    "geometric": Family(30, 40, lambda k: 0.5 ** _steps(k)),
    "step": Family(32, 32, lambda k: torch.where(_steps(k) <= 5, 1.0, 1e-3).double()),
    "flat": Family(32, 24, lambda k: torch.ones(k, dtype=torch.float64)),
    "low rank": Family(36, 28, lambda k: (_steps(k) <= 5).double()),
    "gaussian": Family(40, 30, None),
    "tall": Family(300, 12, lambda k: _steps(k) ** -1.0),
    "wide": Family(12, 300, lambda k: _steps(k) ** -1.0),
    "one row": Family(1, 33, _steps),
    "one column": Family(33, 1, _steps),
    "one entry": Family(1, 1, _steps),
    "zero": Family(20, 16, lambda k: torch.zeros(k, dtype=torch.float64)),
    "repeated": Family(24, 32, lambda k: torch.ceil(_steps(k) / 3) ** -1.0),
    "huge": Family(32, 24, lambda k: _steps(k) ** -1.0, lambda f: min(1e30, f.max / 16)),
    "tiny": Family(32, 24, lambda k: _steps(k) ** -1.0, lambda f: max(1e-30, f.tiny * 16)),
    "subnormal": Family(32, 24, lambda k: _steps(k) ** -1.0, lambda f: f.tiny / 8),
}


@dataclass(frozen=True)
class KnownMatrix:
    """A matrix in some dtype, with the singular values it had before it was rounded to it."""

    W: Tensor
    values: Tensor  # descending, float64
    rounding: float  # ‖W − unrounded W‖_F

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.W.shape[0], self.W.shape[1]

    @property
    def norm(self) -> float:
        """‖W‖_F in float64."""
        return float(np.linalg.norm(self.W.double().numpy()))

    @property
    def ranks(self) -> list[int]:
        """1, 2, the middle and the full rank, where they exist."""
        k = min(self.shape)
        return sorted({1, min(2, k), max(1, k // 2), k})

    def optimum(self, rank: int) -> float:
        """The Eckart–Young error at `rank`: closed form, plus what rounding W can add to it."""
        return math.sqrt(float((self.values[rank:] ** 2).sum())) + self.rounding


def known_matrix(family: str, dtype: torch.dtype = torch.float64) -> KnownMatrix:
    """Returns a matrix of the family in `dtype`, the same one every time."""
    kind, generator = FAMILIES[family], named_generator(0, family)
    if kind.values is None:
        exact = torch.randn(kind.m, kind.n, dtype=torch.float64, generator=generator)
    else:
        values = kind.values(min(kind.m, kind.n))
        exact = matrix_with_spectrum(values, kind.m, kind.n, generator=generator)
    scale = kind.scale(torch.finfo(dtype)) / (float(exact.abs().max()) or 1.0)
    exact = exact * scale
    if kind.values is None:
        known = torch.from_numpy(np.linalg.svd(exact.numpy(), compute_uv=False))
    else:
        known = values * scale
    W = exact.to(dtype)
    return KnownMatrix(W, known, float((W.double() - exact).norm()))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """The name of each family in turn."""
    return request.param


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Each number format that is factored, in turn."""
    return DTYPES[request.param]


@pytest.fixture
def known(family: str, dtype: torch.dtype) -> KnownMatrix:
    """A matrix of each family in each dtype."""
    return known_matrix(family, dtype)


@pytest.fixture(name="known_matrix")
def _known_matrix() -> Callable[..., KnownMatrix]:
    """The builder itself: `known_matrix(family, dtype)`."""
    return known_matrix


@pytest.fixture
def true_error() -> Callable[..., float]:
    """‖W − B·A‖_F / ‖W‖_F by numpy, in long double: shares no code with the package."""

    def wide(matrix: Tensor) -> np.ndarray:
        return matrix.detach().double().numpy().astype(np.longdouble)

    def error(W: Tensor, *product: Tensor) -> float:
        exact = wide(W)
        missed = exact - reduce(np.matmul, [wide(factor) for factor in product])
        total = np.sqrt((exact**2).sum())
        return float(np.sqrt((missed**2).sum()) / total) if total else float(missed.any())

    return error
