"""The dense format: every factored matrix multiplied out under its original name.

What any loader reads; the way back from format 1.
"""

from collections.abc import Container

import torch
from torch import Tensor

from eckart.certificate import FactoredEntry
from eckart.checkpoint.header import DTYPES
from eckart.checkpoint.source import Source
from eckart.checkpoint.tensor_file import TensorLayout
from eckart.formats import factored as format1

ROWS = 4096


def layout(X: str, entry: FactoredEntry, dtype: str) -> dict[str, TensorLayout]:
    """Returns the one tensor that stands for module X."""
    return {f"{X}.weight": TensorLayout.of(dtype, entry.shape)}


def encode(source: Source, X: str, entry: FactoredEntry, dtype: str) -> Tensor:
    """Returns W' = BA (or the pivoted product), multiplied in float64 and rounded once."""
    product = format1.decode(source, X, entry)
    m, _ = product.shape
    blocks = [product.rows(start, start + ROWS).to(DTYPES[dtype]) for start in range(0, m, ROWS)]
    return torch.cat(blocks)


def dense_name(name: str, modules: Container[str]) -> str | None:
    """Returns the original name of a stored tensor, or None for a part of a factored matrix."""
    for suffix in (".A.weight", ".B.weight", ".K.weight", ".perm", ".weight"):
        if name.endswith(suffix) and name.removesuffix(suffix) in modules:
            return None
    X = name.removesuffix(".B.bias")
    return f"{X}.bias" if name.endswith(".B.bias") and X in modules else name
