"""A tensor as it would be written in factors, multiplied out, without writing it.

Knows orders; must not know what the product is tried on.
"""

import torch
from torch import Tensor

from eckart.assemble.filling import Factor, product_of
from eckart.checkpoint.source import Source
from eckart.checkpoint.statistics import Statistics
from eckart.decompose.request import on_threads
from eckart.decompose.weighting import Metrics
from eckart.formats.factored import matrix_of
from eckart.matrix import Matrix


def multiplied(
    order: Factor, source: Source, statistics: Statistics | None, threads: int | None
) -> Tensor:
    """Returns the products of the rounded factors, in float64, shaped as the tensor is stored."""
    matrix, metrics = matrix_of(order.entry), Metrics(statistics, order.name)
    given, parts = order.fit or order.decomposition, list[Tensor]()
    with on_threads(matrix.shape, threads):
        for index in range(matrix.count):
            W = matrix.load(source, order.name, index)
            product = product_of(given, W, order.entry, order.dtype, index, metrics(index))
            parts.append(product.rows(0, matrix.shape[0]))
    return restored(matrix, parts)


def restored(matrix: Matrix, parts: list[Tensor]) -> Tensor:
    """Returns the matrices of a tensor as it is stored."""
    tensors = [matrix.restore(part) for part in parts]
    return torch.cat(tensors) if matrix.is_stack else tensors[0]
