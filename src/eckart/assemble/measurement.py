"""The figures of a changed tensor: its matrices against the product, as both are stored."""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from torch import Tensor

from eckart.allocate import Item, paying_rank
from eckart.certificate import FactoredEntry, OutputError
from eckart.checkpoint.header import DTYPES, TensorInfo
from eckart.checkpoint.source import Source
from eckart.formats import factored
from eckart.formats.factored import Product
from eckart.linalg.matrices import named_generator
from eckart.linalg.metric import Metric, MetricName
from eckart.linalg.residual import compare, energies, rounded_up, weighted_energies
from eckart.linalg.spectrum import Spectrum
from eckart.matrix import Matrix

TAIL_POINTS = 64


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found over all matrices of a tensor."""

    relative_error: float
    outputs: OutputError
    weighted: "Weighted | None" = None  # None: in no other metric


@dataclass(frozen=True, slots=True)
class Weighted:
    """The same in the metric that a tensor was decomposed in."""

    metric: MetricName
    relative_error: float  # ‖Lᵀ(W − BA)R‖_F/‖LᵀWR‖_F
    loss: float | None  # half the square of the first, where it is in nats per token


Metrics = Callable[[int], Metric | None]
"""The metric of each matrix of a tensor."""


def unweighted(_: int) -> None:
    """Returns that there is no other metric than the Frobenius norm."""


def measure(
    pairs: Iterable[tuple[Tensor, Product]],
    bias: Tensor | None,
    metrics: Metrics = unweighted,
    *,
    seed: int,
    name: str,
) -> Measured:
    """Returns ‖W − BA‖_F/‖W‖_F, and how Wx + b and B(Ax) + b differ on seeded inputs.

    Over the matrices of a tensor, one after the other; the bias is that of a single one. With
    `metrics`, their error in those too.
    """
    generator = named_generator(seed, f"outputs of {name}")
    missed = total = largest = output_missed = count = 0.0
    kinds, away, size = set[MetricName](), 0.0, 0.0
    for index, (W, product) in enumerate(pairs):
        found = compare(W, product, bias, generator=generator, name=name)
        missed, total = missed + found.missed, total + found.total
        largest = max(largest, found.outputs.max)
        output_missed, count = output_missed + found.outputs.relative**2, count + 1
        if metric := metrics(index):
            part, whole = weighted_energies(W, product, metric)
            kinds.add(metric.kind)
            away, size = away + part, size + whole
    return Measured(
        rounded_up(missed, total),
        OutputError(max=largest, relative=math.sqrt(output_missed / count)),
        _weighted(kinds, away, size),
    )


def _weighted(kinds: Collection[MetricName], missed: float, total: float) -> Weighted | None:
    if not kinds:
        return None
    (kind,) = kinds  # of one tensor
    return Weighted(kind, rounded_up(missed, total), None if kind == "inputs" else missed / 2)


def measure_error(
    pairs: Iterable[tuple[Tensor, Product]], name: str, metrics: Metrics = unweighted
) -> float:
    """Returns ‖W − BA‖_F/‖W‖_F over the matrices of a tensor, or the same in their metrics."""
    missed = total = 0.0
    for index, (W, product) in enumerate(pairs):
        metric = metrics(index)
        if metric is None:
            away, size = energies(W, product, name)
        else:
            away, size = weighted_energies(W, product, metric)
        missed, total = missed + away, total + size
    return rounded_up(missed, total)


def bias_of(source: Source, bias: str, matrix: Matrix) -> Tensor | None:
    """Returns the bias of that name, where there is one that fits the matrix."""
    info = source.tensors.get(bias)
    if info is None or info.shape != matrix.shape[:1] or matrix.is_stack:
        return None
    return source.load(bias)


def item_of(info: TensorInfo, matrix: Matrix, dtype: str) -> Item:
    """Returns a targeted tensor as a budget sees it, its factors in `dtype`."""
    dense, stored = DTYPES[info.dtype].itemsize, DTYPES[dtype].itemsize
    return Item(matrix.shape, matrix.count, dense, stored)


def count(
    info: TensorInfo, entry: FactoredEntry, dtype: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the parameters and the bytes, each of the dense tensor and of its factors."""
    item = item_of(info, factored.matrix_of(entry), dtype)
    return (
        (item.dense_parameters, item.parameters(entry.rank, entry.form)),
        (item.dense_bytes, item.bytes(entry.rank, entry.form)),
    )


def tail(spectrum: Spectrum, rank: int) -> list[tuple[int, float]]:
    """Returns the remaining share of the energy at no more than 64 ranks, log-spaced.

    The chosen and the break-even rank are among them.
    """
    known = len(spectrum.values)
    marks = {rank, paying_rank(spectrum.shape, "ba")} & set(range(1, known + 1))
    count = TAIL_POINTS - len(marks)
    spread = {round(known ** (i / (count - 1))) for i in range(count)}
    total = spectrum.energy or 1.0
    return [(r, spectrum.tail_energy(r) / total) for r in sorted(marks | spread)]
