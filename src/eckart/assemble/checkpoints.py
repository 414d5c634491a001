"""Whole checkpoints: what is to be laid out, and the order that fills each tensor."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from eckart.allocate import Choice
from eckart.assemble.filling import Copy, Factor, Filler, Multiply, Order
from eckart.assemble.job import Job
from eckart.certificate import FactoredEntry
from eckart.checkpoint.source import Source
from eckart.checkpoint.tensor_file import TensorFiles, TensorLayout, lay_out_checkpoint
from eckart.decompose import Decomposition
from eckart.decompose.fit import Fit
from eckart.errors import InputError
from eckart.formats import dense, factored
from eckart.matrix import FactorForm, Matrix


@dataclass(frozen=True, slots=True)
class Assembly:
    """An output as planned: every tensor's layout, and an order for each tensor of the source."""

    entries: Mapping[str, FactoredEntry]  # by module, of the output
    layout: Mapping[str, TensorLayout]
    orders: Mapping[str, Order]

    @property
    def bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(place.nbytes for place in self.layout.values())

    def begin(self, job: Job) -> tuple[Filler, TensorFiles]:
        """Lays the files out in the staged folder; returns the unit that fills them, and them."""
        files = lay_out_checkpoint(job.staged, self.layout, job.shard_bytes)
        filler = Filler(
            job.source,
            job.source,
            files,
            self.layout,
            job.seed,
            job.threads,
            statistics=job.statistics,
        )
        return filler, files


def factored_assembly(
    source: Source,
    matrices: Mapping[str, Matrix],
    choices: Mapping[str, Choice],
    decompositions: Mapping[str, Decomposition],
    *,
    fits: Mapping[str, Fit] = MappingProxyType({}),
    left_out: Iterable[str] = (),
    dtype: str | None = None,
) -> Assembly:
    """Returns the plan of a factored checkpoint (format 1).

    `choices` are the targeted tensors; every other one is copied, but for those `left_out`. What
    has a fit takes its factors from there.
    Factors take the tensor's own dtype unless `dtype` names another.
    """
    entries = {
        factored.module_of(name): entry_of(matrices[name], choice.rank, choice.form)
        for name, choice in choices.items()
        if choice.rank is not None
    }
    layout: dict[str, TensorLayout] = {}
    orders: dict[str, Order] = {}
    for name, info in source.tensors.items():
        X = factored.module_of(name)
        if name in choices and choices[name].rank is not None:
            stored = dtype or info.dtype
            layout |= factored.layout(name, entries[X], stored, info.dtype)
            orders[name] = Factor(name, entries[X], decompositions[name], stored, fits.get(name))
        elif name not in left_out:
            stored = factored.stored_name(name, entries)
            layout[stored] = TensorLayout(info.dtype, info.shape, info.nbytes)
            orders[name] = Copy(name, stored, info.nbytes)
    return Assembly(dict(sorted(entries.items())), layout, orders)


def dense_assembly(source: Source, factors: Mapping[str, FactoredEntry]) -> Assembly:
    """Returns the plan of the dense checkpoint of a factored one; `factors` by tensor."""
    modules = {factored.module_of(name) for name in factors}
    layout: dict[str, TensorLayout] = {}
    orders: dict[str, Order] = {}
    for name, info in source.tensors.items():
        if name in factors:
            layout |= dense.layout(name, factors[name], info.dtype)  # the guard keeps it
            orders[name] = Multiply(name, factors[name], info.dtype)
        elif (original := dense.dense_name(name, modules)) is not None:
            layout[original] = TensorLayout(info.dtype, info.shape, info.nbytes)
            orders[name] = Copy(name, original, info.nbytes)
    return Assembly({}, layout, orders)


def check_names(source: Source, matrices: Iterable[str]) -> None:
    """Raises InputError where a factor of one of the matrices would take another tensor's name.

    Of either form: the way back (`dense.dense_name`) goes by names alone.
    """
    for name in matrices:
        taken = factored.names(name) - {name}
        if clash := taken & source.tensors.keys():
            raise InputError(
                f"the source already holds a tensor called {min(clash)}, which a factor of {name} "
                "needs: leave that matrix out with --exclude."
            )


def entry_of(matrix: Matrix, rank: int, form: FactorForm = "ba") -> FactoredEntry:
    """Returns what a loader must know of a matrix in factors."""
    return FactoredEntry(rank=rank, form=form, shape=matrix.stored, orientation=matrix.orientation)
