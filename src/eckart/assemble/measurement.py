"""The figures of every changed matrix, measured from the file as it was written."""

from collections.abc import Iterator, Mapping
from typing import TypedDict, Unpack

from eckart.allocate import cost, paying_rank
from eckart.assemble.job import Job
from eckart.certificate import FactoredEntry, Form, MatrixRecord, OutputError
from eckart.checkpoint.source import Checkpoint, open_checkpoint
from eckart.decompose import Decomposition
from eckart.formats import factored
from eckart.linalg.matrices import named_generator
from eckart.linalg.residual import output_difference, relative_error
from eckart.linalg.spectrum import Spectrum

TAIL_POINTS = 64


class _Figures(TypedDict):
    """The part of a record that depends on the kind of output."""

    form: Form
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    excess_estimate: float
    optimum: float | None
    method: str
    tail: list[tuple[int, float]]


def measure_factored(
    job: Job, entries: Mapping[str, FactoredEntry], decompositions: Mapping[str, Decomposition]
) -> Iterator[MatrixRecord]:
    """The figures of every factored matrix, from the file as it was written."""
    written = open_checkpoint(job.staged)
    for X, entry in sorted(entries.items()):
        known = decompositions[f"{X}.weight"]
        parameters, sizes = count_matrix(job.source, written, X, entry)
        spectrum = known.spectrum
        yield _record(
            job,
            X,
            entry,
            (written, job.source),
            form=entry.form,
            parameters=parameters,
            bytes=sizes,
            excess_estimate=known.excess_estimate,
            optimum=spectrum.relative_error(entry.rank) if spectrum.complete else None,
            method=known.method,
            tail=_tail(spectrum, entry.rank),
        )


def measure_dense(job: Job, entries: Mapping[str, FactoredEntry]) -> Iterator[MatrixRecord]:
    """What multiplying out and rounding to the dense dtype cost, from the written file."""
    written = open_checkpoint(job.staged)
    for X, entry in sorted(entries.items()):
        (dense, held), (dense_bytes, held_bytes) = count_matrix(written, job.source, X, entry)
        yield _record(
            job,
            X,
            entry,
            (job.source, written),
            form="dense",
            parameters=(held, dense),
            bytes=(held_bytes, dense_bytes),
            excess_estimate=0.0,
            optimum=None,
            method="product",
            tail=[],
        )


def count_matrix(
    matrices: Checkpoint, factors: Checkpoint, X: str, entry: FactoredEntry
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the parameters and the bytes, each of the matrix and of its factors."""
    dense, dtype = matrices.tensors[f"{X}.weight"], factors.tensors[f"{X}.A.weight"].dtype
    nbytes = sum(part.nbytes for part in factored.layout(X, entry, dtype).values())
    parameters = cost(entry.shape, entry.rank, entry.form)
    return (dense.parameters, parameters), (dense.nbytes, nbytes)


def _record(
    job: Job,
    X: str,
    entry: FactoredEntry,
    sides: tuple[Checkpoint, Checkpoint],
    **figures: Unpack[_Figures],
) -> MatrixRecord:
    """A row of the certificate: factors in the first checkpoint against W in the second."""
    factors, matrices = sides
    name = f"{X}.weight"
    W, product = matrices.load(name), factored.decode(factors, X, entry)
    bias = matrices.load(f"{X}.bias") if f"{X}.bias" in matrices.tensors else None
    generator = named_generator(job.seed, f"outputs of {name}")
    difference = output_difference(W, product, bias, generator=generator)
    return MatrixRecord(
        name=name,
        shape=entry.shape,
        dtype=matrices.tensors[name].dtype,
        orientation=entry.orientation,
        rank=entry.rank,
        relative_error=relative_error(W, product, name),
        output_error=OutputError(max=difference.max, relative=difference.relative),
        metric="frobenius",
        **figures,
    )


def _tail(spectrum: Spectrum, rank: int) -> list[tuple[int, float]]:
    """The remaining share of the energy at no more than 64 ranks."""
    known = len(spectrum.values)
    marks = {rank, paying_rank(spectrum.shape, "ba")} & set(range(1, known + 1))
    count = TAIL_POINTS - len(marks)
    spread = {round(known ** (i / (count - 1))) for i in range(count)}
    energy = spectrum.energy or 1.0
    return [(r, spectrum.tail_energy(r) / energy) for r in sorted(marks | spread)]
