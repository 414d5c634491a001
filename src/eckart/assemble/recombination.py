"""A weighted sum of adapters as one adapter of less rank, without ever forming B·A.

The factors of all summands, side by side, are a product of their exact sum; QR of both and the SVD
of the small core give its singular values, and its best approximation at any rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch

from eckart.allocate import Choice, Item
from eckart.assemble.filling import Copy, Filled
from eckart.assemble.measurement import tail
from eckart.certificate import (
    FactoredEntry,
    MatrixRecord,
)
from eckart.checkpoint.header import DTYPES
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source
from eckart.checkpoint.tensor_file import TensorFiles, TensorLayout
from eckart.decompose.request import FLOPS, on_threads
from eckart.errors import CheckpointError
from eckart.formats import peft
from eckart.formats.adapters import Adapter, Part
from eckart.formats.forms import AdapterForm
from eckart.formats.pipelines import entry_of
from eckart.linalg.arrays import check_finite
from eckart.linalg.factors import Factors, product_energy, product_spectrum, recompress, split
from eckart.linalg.rank import product_rank
from eckart.linalg.residual import rounded_up
from eckart.linalg.spectrum import Spectrum


@dataclass(frozen=True, slots=True)
class Summand:
    """What one adapter contributes to a tensor: weight·scale·B·A."""

    source: Source
    part: Part
    weight: float

    def factors(self, index: int = 0) -> Factors:
        """Returns one product in float64, weight and scale in B."""
        found = self.part.one(index).load(self.source).to(torch.float64)
        return Factors(found.B * (self.weight * self.part.scale), found.A)


@dataclass(frozen=True, slots=True)
class Sum:
    """A tensor to which a weighted sum of adapters adds."""

    name: str
    summands: tuple[Summand, ...]
    shape: tuple[int, int]

    @property
    def rank(self) -> int:
        """At most."""
        return min(self.given, *self.shape)

    @property
    def given(self) -> int:
        """The rank of all factors side by side."""
        return sum(one.part.rank for one in self.summands)

    @property
    def count(self) -> int:
        """How many matrices share the rank: experts."""
        return self.summands[0].part.count

    @property
    def parameters(self) -> int:
        """Of the factors that are given."""
        return self.count * self.given * sum(self.shape)

    @property
    def seconds(self) -> float:
        """About how long a decomposition takes."""
        return 8 * self.count * sum(self.shape) * self.rank**2 / FLOPS

    @property
    def dtype(self) -> str:
        """As the first adapter stores its factors."""
        first = self.summands[0]
        return first.source.tensors[first.part.A].dtype

    def item(self, dtype: str | None) -> Item:
        """Returns it as a budget sees it, its factors in `dtype` or as they are."""
        size = DTYPES[self.dtype].itemsize
        return Item(self.shape, self.count, size, DTYPES[dtype or self.dtype].itemsize)

    def bias_bytes(self, dtype: str | None) -> int:
        """Returns what the bias takes, where there is one."""
        size = DTYPES[dtype or self.dtype].itemsize
        return size * self.shape[0] if any(one.part.bias for one in self.summands) else 0

    def factors(self, index: int = 0) -> Factors:
        """Returns the exact sum of one matrix: all factors, side by side."""
        found = [one.factors(index) for one in self.summands]
        return Factors(torch.cat([f.B for f in found], 1), torch.cat([f.A for f in found]))

    def entry(self, rank: int) -> FactoredEntry:
        """Returns how it is stored at a rank."""
        first = self.summands[0]
        return entry_of(first.part, first.source, rank)


def entries_of(
    sums: Mapping[str, Sum], ranks: Mapping[str, int | None]
) -> dict[str, FactoredEntry]:
    """Returns how each sum that is given a rank is stored."""
    kept = {name: rank for name, rank in ranks.items() if rank}
    is_mixture = any(s.part.is_parameter for one in sums.values() for s in one.summands)
    return {
        name: msgspec.structs.replace(
            sums[name].entry(rank), module=peft.module_for(name, kept, is_mixture=is_mixture)
        )
        for name, rank in kept.items()
    }


def _kind(part: Part) -> tuple[object, ...]:
    return part.shape, part.is_embedding, part.experts


def sums_of(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, Sum]:
    """Returns the tensors that any of the adapters adds to; CheckpointError where they disagree."""
    found: dict[str, list[Summand]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, part in adapter.parts.items():
            found.setdefault(name, []).append(Summand(adapter.source, part, weight))
    for name, summands in found.items():
        first = summands[0]
        for other in summands[1:]:
            if _kind(first.part) != _kind(other.part):
                raise CheckpointError(
                    f"{printable(name)} is {first.part.shape} in {printable(first.source.path)} "
                    f"and {other.part.shape} in {printable(other.source.path)}: they are adapters "
                    "for different models."
                )
    return {
        name: Sum(name, tuple(summands), summands[0].part.shape)
        for name, summands in sorted(found.items())
    }


@dataclass(frozen=True, slots=True)
class SpectrumOf:
    """Finds the singular values of one sum."""

    threads: int | None = None

    def __call__(self, one: Sum) -> Spectrum:
        """Cost: QR of both sides, the values of a core of the summed rank."""
        with on_threads(one.shape, self.threads):
            found = [product_spectrum(one.factors(i), one.name) for i in range(one.count)]
        return together(found)


@dataclass(frozen=True, slots=True)
class RankOf:
    """Finds the numerical rank of one sum."""

    threads: int | None = None

    def __call__(self, one: Sum) -> int:
        """Of experts, which share a rank, the largest. Cost: that of `SpectrumOf`."""
        with on_threads(one.shape, self.threads):
            return max(product_rank(one.factors(i), one.name) for i in range(one.count))


def together(spectra: Sequence[Spectrum]) -> Spectrum:
    """Returns the spectrum of matrices that share a rank: σᵢ = √(Σ over them of σᵢ²)."""
    if len(spectra) == 1:
        return spectra[0]
    squares = torch.stack([one.values.square() for one in spectra]).sum(0)
    return Spectrum(spectra[0].shape, squares.sqrt(), sum(one.energy for one in spectra))


@dataclass(frozen=True, slots=True)
class Recombine:
    """A sum to be written at a rank."""

    name: str
    sum: Sum
    entry: FactoredEntry
    dtype: str
    seconds: float
    exactly: bool = False  # the given factors with their scale in B, and no SVD


@dataclass(frozen=True, slots=True)
class SumBias:
    """What the adapters add to a bias, to be written as one."""

    name: str
    sum: Sum
    stored: str
    dtype: str
    seconds: float = 0.0


Order = Copy | Recombine | SumBias


@dataclass(frozen=True, slots=True)
class Recombiner:
    """Carries out one order."""

    first: Source
    files: TensorFiles
    form: AdapterForm
    threads: int | None = None

    def __call__(self, order: Order) -> Filled:
        """Computes, writes and measures. Peak memory: the factors, in float64."""
        if isinstance(order, Copy):
            offset = 0
            for piece in self.first.chunks(order.name):
                self.files.write(order.stored, piece, offset)
                offset += len(piece)
            return Filled(order.name, None)
        if isinstance(order, SumBias):
            bias = bias_of_sum(order.sum).to(DTYPES[order.dtype])
            check_finite(bias, order.stored)
            self.files.write(order.stored, bias)
            return Filled(order.name, None)
        with on_threads(order.sum.shape, self.threads):
            return self._recombine(order)

    def _recombine(self, order: Recombine) -> Filled:
        one, entry = order.sum, order.entry
        kept, spectra, missed, total = list[Factors](), list[Spectrum](), 0.0, 0.0
        for index in range(one.count):
            exact = one.factors(index)
            if order.exactly:
                best, size = exact, product_energy(exact)
            else:
                svd = recompress(exact, rank=entry.rank, name=order.name)
                best, size = split(svd), svd.energy
                spectra.append(svd.spectrum)
            kept.append(best.to(DTYPES[order.dtype]))
            missed, total = missed + missed_energy(exact, kept[-1]), total + size
        product = peft.stacked(kept) if len(entry.shape) == 3 else kept[0]
        for name, tensor in self.form.encode(order.name, entry, product).items():
            check_finite(tensor, name)
            self.files.write(name, tensor)
        stored, error = self.form.stored(entry).rank, rounded_up(missed, total)
        spectrum = together(spectra) if spectra else None
        return Filled(order.name, None, _record(order, stored, spectrum, error))


def counts_of(one: Sum, stored: int, dtype: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the parameters and the bytes, each of the given factors and of those at a rank."""
    given, after = one.parameters, one.count * stored * sum(one.shape)
    sizes = given * DTYPES[one.dtype].itemsize, after * DTYPES[dtype].itemsize
    return (given, after), sizes


def _record(order: Recombine, stored: int, spectrum: Spectrum | None, error: float) -> MatrixRecord:
    one, entry = order.sum, order.entry
    parameters, sizes = counts_of(one, stored, order.dtype)
    optimum = None
    if spectrum is not None:
        optimum = spectrum.relative_error(entry.rank) if spectrum.energy else 0.0
    return MatrixRecord(
        name=order.name,
        shape=entry.shape,
        dtype=order.dtype,
        orientation=entry.orientation,
        rank=entry.rank,
        form="ba",
        parameters=parameters,
        bytes=sizes,
        relative_error=error,
        excess_estimate=0.0,
        optimum=optimum,
        output_error=None,
        metric="frobenius",
        method="core" if spectrum else "copy",
        tail=tail(spectrum, entry.rank) if spectrum else [],
    )


def missed_energy(exact: Factors, kept: Factors) -> float:
    """Returns ‖BA − B'A'‖_F² from the factors alone, in float64: QR of both sides.

    Exactly 0 where the factors are the same, but for zeros beside them.
    """
    kept = kept.to(torch.float64)
    wide = exact.padded(max(exact.rank, kept.rank))
    if kept.B.equal(wide.B) and kept.A.equal(wide.A):
        return 0.0
    return product_energy(Factors(torch.cat([exact.B, -kept.B], 1), torch.cat([exact.A, kept.A])))


def bias_of_sum(one: Sum) -> torch.Tensor:
    """Returns what a sum adds to the bias of its layer, in float64."""
    terms = [
        s.weight * s.part.scale * s.source.load(s.part.bias).double()
        for s in one.summands
        if s.part.bias is not None
    ]
    return torch.stack(terms).sum(0)


def layout_of(
    sums: Mapping[str, Sum],
    choices: Mapping[str, Choice],
    adapter: Adapter,
    dtype: str | None,
    *,
    form: AdapterForm,
    exactly: bool,
) -> tuple[dict[str, TensorLayout], dict[str, Order]]:
    """Returns what is to be laid out, and the order that fills each tensor."""
    layout: dict[str, TensorLayout] = {}
    orders: dict[str, Order] = {}
    entries = entries_of(sums, {name: choice.rank for name, choice in choices.items()})
    for name, entry in entries.items():
        one = sums[name]
        stored = dtype or one.dtype
        layout |= form.layout(name, entry, stored)
        orders[name] = Recombine(name, one, entry, stored, 2 * one.seconds, exactly)
        if any(summand.part.bias for summand in one.summands):
            bias = peft.bias_name(name)
            layout[bias] = TensorLayout.of(stored, (one.shape[0],))
            orders[bias] = SumBias(bias, one, bias, stored)
    for name, given in adapter.whole.items():
        info, stored = adapter.source.tensors[given], peft.whole_name(name, entries)
        layout[stored] = TensorLayout(info.dtype, info.shape, info.nbytes)
        orders[name] = Copy(given, stored, info.nbytes)
    return layout, orders
