"""A stored tensor read as matrices W (out × in), and factors shaped to be stored in its place.

Knows shapes; must not know which tensors are worth it, nor how they are factored.
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from eckart.checkpoint.source import Source

Orientation = Literal["out_in", "in_out"]
FactorForm = Literal["ba", "pivoted"]
Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Matrix:
    """How a tensor is read: `count` matrices of m×n.

    2-D: one matrix, as it stands, or transposed where `orientation` is "in_out" (GPT-2's Conv1D).
    3-D: a stack of experts, which share one rank. 4-D: a convolution, out × (in·kh·kw).

    >>> Matrix((768, 2304), "in_out").shape, Matrix((64, 3, 7, 7)).shape
    ((2304, 768), (64, 147))
    >>> Matrix((8, 96, 32)).count, Matrix((64, 3, 7, 7)).factors(5, "ba")
    (8, {'A.weight': (5, 3, 7, 7), 'B.weight': (64, 5, 1, 1)})
    """

    stored: tuple[int, ...]
    orientation: Orientation = "out_in"

    @property
    def is_stack(self) -> bool:
        """Whether the first dimension counts matrices."""
        return len(self.stored) == 3

    @property
    def count(self) -> int:
        """How many matrices share one rank."""
        return self.stored[0] if self.is_stack else 1

    @property
    def shape(self) -> Shape:
        """(m, n) of one of them."""
        first, *rest = self.stored[1:] if self.is_stack else self.stored
        m, n = first, math.prod(rest)
        return (m, n) if self.orientation == "out_in" else (n, m)

    def load(self, source: Source, name: str, index: int = 0) -> Tensor:
        """Returns one of the matrices, m×n, in memory of its own."""
        stop = index + 1 if self.is_stack else None
        return self.read(source.load(name, index, stop))

    def read(self, tensor: Tensor) -> Tensor:
        """Returns W of what is stored of one matrix."""
        m, n = self.shape
        sides = (m, n) if self.orientation == "out_in" else (n, m)
        W = tensor.reshape(sides)
        return W if self.orientation == "out_in" else W.mT

    def restore(self, W: Tensor) -> Tensor:
        """Returns what is stored of one matrix W: the inverse of `read`."""
        turned = W if self.orientation == "out_in" else W.mT
        return turned.reshape((1, *self.stored[1:]) if self.is_stack else self.stored)

    def factors(self, rank: int, form: FactorForm) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the factors as they are stored, by the end of their names."""
        (m, n), r = self.shape, rank
        parts = {"A.weight": (r, n)}
        if form == "ba":
            parts["B.weight"] = (m, r)
        else:
            parts |= {"K.weight": (m - r, r), "perm": (m,)}
        return {part: self.stored_shape(part, shape) for part, shape in parts.items()}

    def stored_shape(self, part: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The stored shape of a factor that is `shape` as a matrix (perm: as a vector)."""
        if self.is_stack:
            return (self.count, *shape)
        if len(self.stored) == 4 and part != "perm":
            rows, columns = shape
            return (rows, *self.stored[1:]) if part == "A.weight" else (rows, columns, 1, 1)
        return shape
