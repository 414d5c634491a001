"""The dense format: every factored tensor multiplied out under its original name.

What any loader reads; the way back from format 1.
"""

from collections.abc import Container, Iterator

import torch
from torch import Tensor

from eckart.certificate import FactoredEntry
from eckart.checkpoint.header import DTYPES
from eckart.checkpoint.source import Source
from eckart.checkpoint.tensor_file import TensorLayout
from eckart.formats import factored

ROWS = 4096


def layout(name: str, entry: FactoredEntry, dtype: str) -> dict[str, TensorLayout]:
    """Returns the one tensor that stands for the factors."""
    return {name: TensorLayout.of(dtype, entry.shape)}


def encode(source: Source, name: str, entry: FactoredEntry, dtype: str) -> Iterator[Tensor]:
    """Yields what is stored of each matrix W' = BA: multiplied in float64 and rounded once."""
    matrix = factored.matrix_of(entry)
    for product in factored.products(source, name, entry):
        m, _ = product.shape
        rows = [product.rows(start, start + ROWS).to(DTYPES[dtype]) for start in range(0, m, ROWS)]
        yield matrix.restore(torch.cat(rows))


def dense_name(name: str, modules: Container[str]) -> str | None:
    """Returns the original name of a stored tensor, or None for a part of a factored matrix."""
    for suffix in (".A.weight", ".B.weight", ".K.weight", ".perm", ".weight", ""):
        if name.endswith(suffix) and name.removesuffix(suffix) in modules:
            return None
    X = name.removesuffix(".B.bias")
    return f"{X}.bias" if name.endswith(".B.bias") and X in modules else name
