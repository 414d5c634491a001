"""The metric of each matrix, from the statistics that were named; none is the Frobenius norm.

Knows statistics and tensors; must not know what is done in the metric.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch

from eckart.checkpoint.statistics import Curvature, Statistics
from eckart.errors import CheckpointError
from eckart.linalg.metric import CURVATURE_DAMPING, INPUT_DAMPING, Metric, MetricName
from eckart.matrix import Matrix


def metric_of(
    statistics: Statistics | None,
    name: str,
    index: int = 0,
    *,
    device: torch.device | str = "cpu",
) -> Metric | None:
    """Returns the metric of one matrix of a tensor; None without statistics of it.

    FactorizationError where the text never used the matrix. Cost: reads and hashes C and G, and a
    Cholesky factorization of each in float64.
    """
    if statistics is None or name not in statistics.document.matrices:
        return None
    C, G = statistics.inputs(name, index), statistics.curvature(name, index)
    return Metric.of(C.to(device), None if G is None else G.to(device), name=name)


def metric_kind(statistics: Statistics | None, name: str) -> MetricName | Literal["frobenius"]:
    """Returns what the metric of a tensor's matrices is called."""
    if statistics is None or name not in statistics.document.matrices:
        return "frobenius"
    kinds: dict[Curvature, MetricName] = {
        "full": "curvature",
        "diagonal": "diagonal curvature",
        "none": "inputs",
    }
    return kinds[statistics.document.matrices[name].curvature]


@dataclass
class Metrics:
    """The metrics of one tensor's matrices, one after the other: the last one is kept."""

    statistics: Statistics | None
    name: str
    _last: dict[int, Metric | None] = field(default_factory=dict[int, "Metric | None"])

    def __call__(self, index: int) -> Metric | None:
        """Returns the metric of one matrix; see `metric_of`."""
        if index not in self._last:
            self._last = {index: metric_of(self.statistics, self.name, index)}
        return self._last[index]


def damping_of(statistics: Statistics | None) -> str:
    """Returns what a decomposition depends on besides the statistics themselves."""
    if statistics is None:
        return "frobenius"
    return f"C + {INPUT_DAMPING:g} mean, G + {CURVATURE_DAMPING:g} mean"


def check_shape(statistics: Statistics, name: str, matrix: Matrix) -> None:
    """Raises CheckpointError unless the statistics of that name are of such a matrix."""
    known = statistics.document.matrices[name]
    if (known.shape, known.count) != (matrix.shape, matrix.count):
        raise CheckpointError(
            f"the statistics of {name} are of {known.count} matrices of {known.shape}, and it has "
            f"{matrix.count} of {matrix.shape}: calibrate this model."
        )
