"""One tensor of the output at a time: copied, factored or multiplied out, into its place.

A unit of work that any process can be handed. What is reported of a tensor is measured from the
bytes that were written, read back.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from eckart.assemble.measurement import Measured, bias_of, count, measure, tail
from eckart.certificate import FactoredEntry, MatrixRecord
from eckart.checkpoint.hashing import Hash, bytes_of
from eckart.checkpoint.header import DTYPES, TensorInfo
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Checkpoint, Source
from eckart.checkpoint.statistics import Statistics
from eckart.checkpoint.tensor_file import TensorFiles, TensorLayout
from eckart.decompose import Decomposition
from eckart.decompose.fit import Approximation, Fit
from eckart.decompose.request import FLOPS, on_threads, threads_for
from eckart.decompose.weighting import Metrics
from eckart.errors import CheckpointError, NonFiniteError, PromiseError
from eckart.formats import Format, dense, factored, peft
from eckart.formats.factored import Product
from eckart.formats.forms import AdapterForm
from eckart.linalg.arrays import check_finite
from eckart.linalg.factors import pivot
from eckart.linalg.metric import Metric
from eckart.matrix import Matrix

BYTES_PER_SECOND = 1e9
WIDE = ("F64", "F32")


@dataclass(frozen=True, slots=True)
class Copy:
    """A tensor whose bytes go into the output as they are, under the name `stored`."""

    name: str
    stored: str
    nbytes: int

    @property
    def seconds(self) -> float:
        """About how long it takes."""
        return 2 * self.nbytes / BYTES_PER_SECOND


@dataclass(frozen=True, slots=True)
class Factor:
    """A tensor to be written as factors in `dtype`."""

    name: str
    entry: FactoredEntry
    decomposition: Decomposition
    dtype: str
    fit: Fit | None = None  # where the factors are not those that the decomposition gives

    @property
    def seconds(self) -> float:
        """About how long it takes: one product to make the factors, one to measure them."""
        return product_seconds(self.entry)


@dataclass(frozen=True, slots=True)
class Multiply:
    """A factored tensor to be written dense in `dtype`."""

    name: str
    entry: FactoredEntry
    dtype: str

    @property
    def seconds(self) -> float:
        """About how long it takes."""
        return product_seconds(self.entry)


Order = Copy | Factor | Multiply


@dataclass(frozen=True, slots=True)
class Filled:
    """What became of a tensor: the digest of its bytes in the source, and its figures."""

    name: str
    source_digest: str | None
    record: MatrixRecord | None = None


@dataclass(frozen=True, slots=True)
class Filler:
    """Carries out one order.

    What is factored comes from `source`, what is copied and what a record says of its tensor from
    `stored`: the two differ where the source is a difference.
    """

    source: Source
    stored: Source
    files: TensorFiles
    layout: Mapping[str, TensorLayout]
    seed: int
    threads: int | None = None
    form: AdapterForm | None = None  # of an addition
    statistics: Statistics | None = None  # what the parts were decomposed with

    @property
    def format(self) -> Format:
        """How factors are stored."""
        return self.form or factored

    def __call__(self, order: Order) -> Filled:
        """Reads, writes, reads back and measures. Peak memory: one matrix, and two copies of it."""
        if isinstance(order, Copy):
            return self._copy(order)
        with on_threads(factored.matrix_of(order.entry).shape, self.threads):
            return self._factor(order) if isinstance(order, Factor) else self._multiply(order)

    def _copy(self, order: Copy) -> Filled:
        seen, offset = Hash(), 0
        for piece in self.stored.chunks(order.name):
            seen.update(bytes_of(piece))
            self.files.write(order.stored, piece, offset)
            offset += len(piece)
        return Filled(order.name, seen.hexdigest())

    def _factor(self, order: Factor) -> Filled:
        name, entry, known = order.name, order.entry, order.decomposition
        matrix, form = factored.matrix_of(entry), self.format
        told, seen = self.source.known.get(name), Hash()
        together = matrix.is_stack and self.form is not None  # its B lies across the experts
        written, given = self._written(form.layout(name, entry, order.dtype)), order.fit or known
        metrics = Metrics(self.statistics, name)

        def pairs() -> Iterator[tuple[Tensor, Product]]:
            made: list[Product] = []
            for index in range(matrix.count):
                stored = self.source.load(name, index, index + 1 if matrix.is_stack else None)
                if told is None:
                    seen.update(bytes_of(stored))
                W = matrix.read(stored)
                made.append(product_of(given, W, entry, order.dtype, index, metrics(index)))
                if not together:
                    self._write(order, made.pop(), index)
                    yield W, form.decode(written, name, entry, index)
            if together:
                self._write(order, peft.stacked(made), 0)
                for index in range(matrix.count):
                    W = matrix.load(self.source, name, index)
                    yield W, form.decode(written, name, entry, index)

        bias = self._bias(name, matrix)
        measured = measure(pairs(), bias, metrics, seed=self.seed, name=name)
        if (told or seen.hexdigest()) != known.source_digest:
            raise CheckpointError(
                f"{printable(name)} in {printable(self.source.path)} is not what it was when it "
                "was decomposed: the file was changed meanwhile. Start again when it is complete."
            )
        return Filled(name, known.source_digest, self._record(order, measured))

    def _bias(self, name: str, matrix: Matrix) -> Tensor | None:
        """What stands beside a product where it is used: beside an addition, nothing."""
        if self.form is not None:
            return None
        return bias_of(self.source, f"{factored.module_of(name)}.bias", matrix)

    def _write(self, order: Factor, product: Product, index: int) -> None:
        """Puts the factors of one matrix in their places."""
        parts = self.format.encode(order.name, order.entry, product)
        for part, tensor in parts.items():
            if tensor.is_floating_point():
                _check_overflow(tensor, part)
            self.files.write(part, tensor, index * tensor.numel() * tensor.itemsize)

    def _record(self, order: Factor, measured: Measured) -> MatrixRecord:
        info, entry, known = self.stored.tensors[order.name], order.entry, order.decomposition
        stored = self.form.stored(entry) if self.form else entry
        parameters, sizes = count(info, stored, order.dtype)
        optimum = known.spectrum.relative_error(entry.rank) if known.all_values else None
        weighted = measured.weighted
        return MatrixRecord(
            name=order.name,
            shape=entry.shape,
            dtype=info.dtype,
            orientation=entry.orientation,
            rank=entry.rank,
            form=entry.form,
            parameters=parameters,
            bytes=sizes,
            relative_error=measured.relative_error,
            excess_estimate=(order.fit or known).excess_estimate,
            optimum=optimum,
            output_error=measured.outputs,
            metric=weighted.metric if weighted else "frobenius",
            metric_error=weighted and weighted.relative_error,
            loss=weighted and weighted.loss,
            method=known.method if order.fit is None else order.fit.method,
            tail=tail(known.spectrum, entry.rank),
        )

    def _multiply(self, order: Multiply) -> Filled:
        name, entry = order.name, order.entry
        matrix, offset = factored.matrix_of(entry), 0
        for stored in dense.encode(self.source, name, entry, order.dtype):
            self.files.write(name, stored, offset)
            offset += stored.numel() * stored.itemsize
        written = self._written({name})
        pairs = (
            (matrix.load(written, name, index), factored.decode(self.source, name, entry, index))
            for index in range(matrix.count)
        )
        X = factored.module_of(name)
        bias = bias_of(self.source, factored.stored_name(f"{X}.bias", {X: entry}), matrix)
        measured = measure(pairs, bias, seed=self.seed, name=name)
        held_dtype = self.source.tensors[f"{X}.A.weight"].dtype
        (full, held), (full_bytes, held_bytes) = count(written.tensors[name], entry, held_dtype)
        record = MatrixRecord(
            name=name,
            shape=entry.shape,
            dtype=order.dtype,
            orientation=entry.orientation,
            rank=entry.rank,
            form="dense",
            parameters=(held, full),
            bytes=(held_bytes, full_bytes),
            relative_error=measured.relative_error,
            excess_estimate=0.0,
            optimum=None,
            output_error=measured.outputs,
            metric="frobenius",
            method="product",
            tail=[],
        )
        return Filled(name, None, record)

    def _written(self, names: Iterable[str]) -> Checkpoint:
        """Some of the tensors of the staged files, as they stand there."""
        tensors: dict[str, TensorInfo] = {}
        for name in names:
            place, layout = self.files.places[name], self.layout[name]
            tensors[name] = TensorInfo(
                layout.shape, layout.dtype, place.file, place.begin, place.end
            )
        return Checkpoint(self.files.folder, tensors)


def product_of(  # noqa: PLR0917 one matrix of a tensor, and how it is written
    approximation: Approximation,
    W: Tensor,
    entry: FactoredEntry,
    dtype: str,
    index: int = 0,
    metric: Metric | None = None,
) -> Product:
    """Returns the factors of one matrix as they are written: rounded to `dtype`."""
    pivoted = entry.form == "pivoted"
    wide = dtype in WIDE or pivoted
    factors = approximation.factors(W, entry.rank, index, metric=metric, wide=wide)
    return (pivot(factors) if pivoted else factors).to(DTYPES[dtype])


def product_seconds(entry: FactoredEntry) -> float:
    """Returns about how long it takes to make factors, or to measure them."""
    matrix: Matrix = factored.matrix_of(entry)
    m, n = matrix.shape
    flops = 8 * m * n * entry.rank * matrix.count
    return flops / (FLOPS * threads_for(matrix.shape)) + 8 * m * n / BYTES_PER_SECOND


def _check_overflow(tensor: Tensor, name: str) -> None:
    try:
        check_finite(tensor, name)
    except NonFiniteError as error:
        raise PromiseError(
            f"{error} The factors overflow {tensor.dtype}: add --dtype float32."
        ) from None
