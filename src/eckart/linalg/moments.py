"""Second moments summed block by block: Σ x xᵀ, or its diagonal, over the rows of many X.

Products in float32 (float64 where X is), sums in float64: a block is short, the text is long.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from eckart.errors import NonFiniteError

PANELS = 8
"""A symmetric product by its lower triangle, in so many bands: 9/16 of the work and memory."""

NARROWEST = 192
"""Columns of a band: below, the products are too thin to pay."""

BLOCK = 4096
"""Rows of one product in float32: its rounding is that of a sum of so many terms."""


class Moment(Protocol):
    """A sum over rows that grows, and is written down between two blocks."""

    @property
    def sums(self) -> Sequence[Tensor]:
        """The state, float64; what is written into these is what was summed."""
        ...

    def add(self, X: Tensor) -> None:
        """Adds the rows of X; NonFiniteError for NaN, Inf, or squares beyond float32."""
        ...

    def value(self, count: int) -> Tensor:
        """Returns the sum divided by `count`, float32."""
        ...


class SecondMoment:
    """Σ x xᵀ over rows x of n entries.

    Cost per row: 9/16·n² multiply-adds (n ≥ 1536; 5/8 at 768); memory: as much of n² in float64.

    >>> moment = SecondMoment(2)
    >>> moment.add(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> moment.value(2)
    tensor([[ 5.,  7.],
            [ 7., 10.]])
    """

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        self.n = n
        self._panels = [
            torch.zeros(end - start, end, dtype=torch.float64, device=device)
            for start, end in _bands(n)
        ]

    @property
    def sums(self) -> list[Tensor]:
        """The bands of the lower triangle."""
        return self._panels

    def add(self, X: Tensor) -> None:
        """Adds Σ x xᵀ of the rows of X."""
        X = _wide(X)
        for piece in X.split(BLOCK):
            for panel, (start, end) in zip(self._panels, _bands(self.n), strict=True):
                product = piece[:, start:end].mT @ piece[:, :end]
                _check(product.diagonal(start))
                panel.add_(product)

    def value(self, count: int) -> Tensor:
        """Returns the whole matrix, n×n, divided by `count`, exactly symmetric."""
        whole = torch.empty(self.n, self.n, dtype=torch.float32)
        for panel, (start, end) in zip(self._panels, _bands(self.n), strict=True):
            band = (panel / count).to("cpu", torch.float32)
            band[:, start:] = band[:, start:].tril() + band[:, start:].tril(-1).mT
            whole[start:end, :end] = band
            whole[:start, start:end] = band[:, :start].mT
        return whole


class DiagonalMoment:
    """The diagonal of Σ x xᵀ alone: n sums of squares.

    >>> moment = DiagonalMoment(2)
    >>> moment.add(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> moment.value(2)
    tensor([ 5., 10.])
    """

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(n, dtype=torch.float64, device=device)

    @property
    def sums(self) -> list[Tensor]:
        """The one vector."""
        return [self._sum]

    def add(self, X: Tensor) -> None:
        """Adds the squares of the rows of X."""
        squares = _wide(X).square().sum(0, dtype=torch.float64)
        _check(squares)
        self._sum.add_(squares)

    def value(self, count: int) -> Tensor:
        """Returns the diagonal divided by `count`."""
        return (self._sum / count).to("cpu", torch.float32)


class CrossMoment:
    """Σ x x'ᵀ over pairs of rows, x of one run and x' of another at the same place.

    Cost per pair: n² multiply-adds; memory: n² in float64.

    >>> moment = CrossMoment(2)
    >>> moment.add(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]]))
    >>> moment.value(1)
    tensor([[ 3.,  5.],
            [ 6., 10.]])
    """

    def __init__(self, n: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(n, n, dtype=torch.float64, device=device)

    def add(self, X: Tensor, Y: Tensor) -> None:
        """Adds Σ x yᵀ of the rows of X and of Y; what is not finite is the squares' to tell."""
        for x, y in zip(_wide(X).split(BLOCK), _wide(Y).split(BLOCK), strict=True):
            self._sum.add_(x.mT @ y)

    def value(self, count: int) -> Tensor:
        """Returns the sum divided by `count`, float32."""
        return (self._sum / count).to("cpu", torch.float32)


def moment_bytes(n: int, *, diagonal: bool) -> int:
    """Returns the bytes that a sum takes while it grows."""
    return 8 * (n if diagonal else sum((end - start) * end for start, end in _bands(n)))


def _bands(n: int) -> Iterator[tuple[int, int]]:
    count = max(1, min(PANELS, n // NARROWEST))
    for i in range(count):
        yield i * n // count, (i + 1) * n // count


def _wide(X: Tensor) -> Tensor:
    return X if X.dtype == torch.float64 else X.float()


def _check(squares: Tensor) -> None:
    """A NaN or Inf anywhere in a column is one in its square: looking there costs nothing."""
    if not bool(torch.isfinite(squares).all()):
        raise NonFiniteError("NaN or Inf")
