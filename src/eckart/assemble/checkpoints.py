"""Whole checkpoints: factored (format 1), and dense again."""

from collections.abc import Iterable, Mapping

import torch

from eckart.allocate import Choice
from eckart.assemble.certification import certify
from eckart.assemble.job import Job
from eckart.assemble.measurement import measure_dense, measure_factored
from eckart.assemble.promises import rounded_product
from eckart.assemble.sidecars import write_sidecars
from eckart.certificate import Certificate, FactoredEntry, FactorForm
from eckart.checkpoint.source import Checkpoint
from eckart.checkpoint.tensor_file import TensorFiles, TensorLayout
from eckart.decompose import Decomposition
from eckart.errors import InputError, PromiseError
from eckart.formats import dense, factored
from eckart.linalg.arrays import check_finite


def assemble_factored(
    job: Job,
    choices: Mapping[str, Choice],
    copied: Mapping[str, str],
    decompositions: Mapping[str, Decomposition],
    *,
    form: FactorForm,
    dtype: str | None = None,
) -> Certificate:
    """Writes a factored checkpoint (format 1) into the staged folder and returns its certificate.

    `choices` are the targeted matrices, `copied` the reasons of all other tensors. Factors take
    the matrix's own dtype unless `dtype` names another.
    """
    source = job.source
    entries = {
        factored.module_of(name): _entry(source, name, choice.rank, form)
        for name, choice in choices.items()
        if choice.rank is not None
    }
    file = TensorFiles(job.staged, _factored_layout(source, entries, dtype), job.shard_bytes)
    for name in source.tensors:
        X = factored.module_of(name)
        if name.endswith(".weight") and X in entries:
            _write_factors(file, source, decompositions[name], entries[X], dtype)
        else:
            file.write(factored.stored_name(name, entries), source.raw(name))
    file.close()
    write_sidecars(job, {"quantization_config": factored.quantization_config(entries)})
    records = list(measure_factored(job, entries, decompositions))
    reasons = {name: choice.reason for name, choice in choices.items() if choice.rank is None}
    return certify(
        job,
        kind="factored",
        entries=entries,
        records=records,
        copied={**copied, **reasons},
        targeted=set(choices),
    )


def check_names(source: Checkpoint, matrices: Iterable[str], form: FactorForm) -> None:
    """Raises InputError where a factor of one of the matrices would take another tensor's name."""
    for name in matrices:
        X, entry = factored.module_of(name), _entry(source, name, 1, form)
        taken = {*factored.layout(X, entry, "F32")} - {name}
        if f"{X}.bias" in source.tensors:
            taken |= {factored.stored_name(f"{X}.bias", {X: entry})} - {f"{X}.bias"}
        if clash := taken & source.tensors.keys():
            raise InputError(
                f"the source already holds a tensor called {min(clash)}, which a factor of {X} "
                "needs: leave that matrix out with --exclude."
            )


def assemble_dense(job: Job, certificate: Certificate) -> Certificate:
    """Writes the dense checkpoint of a factored one, and returns its certificate."""
    source, entries = job.source, certificate.factored
    dtypes = {X: source.tensors[f"{X}.weight"].dtype for X in entries}  # the guard keeps it
    layout: dict[str, TensorLayout] = {}
    names: dict[str, str] = {}
    for name, info in source.tensors.items():
        if (original := dense.dense_name(name, entries)) is not None:
            names[name] = original
            layout[original] = TensorLayout(info.dtype, info.shape, info.nbytes)
    for X, entry in entries.items():
        layout |= dense.layout(X, entry, dtypes[X])
    file = TensorFiles(job.staged, layout, job.shard_bytes)
    for name, original in names.items():
        file.write(original, source.raw(name))
    for X, entry in entries.items():
        file.write(f"{X}.weight", dense.encode(source, X, entry, dtypes[X]))
    file.close()
    write_sidecars(job, {"quantization_config": None})
    records = list(measure_dense(job, entries))
    copied = dict.fromkeys(names, "not factored")
    return certify(
        job,
        kind="dense",
        entries={},
        records=records,
        copied=copied,
        targeted={record.name for record in records},
    )


def _entry(source: Checkpoint, name: str, rank: int, form: FactorForm) -> FactoredEntry:
    m, n = source.tensors[name].shape
    return FactoredEntry(rank=rank, form=form, shape=(m, n), orientation="out_in")


def _factored_layout(
    source: Checkpoint, entries: Mapping[str, FactoredEntry], dtype: str | None
) -> dict[str, TensorLayout]:
    layout: dict[str, TensorLayout] = {}
    for name, info in source.tensors.items():
        X = factored.module_of(name)
        if name.endswith(".weight") and X in entries:
            layout |= factored.layout(X, entries[X], dtype or info.dtype, info.dtype)
        else:
            stored = factored.stored_name(name, entries)
            layout[stored] = TensorLayout(info.dtype, info.shape, info.nbytes)
    return layout


def _write_factors(
    file: TensorFiles,
    source: Checkpoint,
    decomposition: Decomposition,
    entry: FactoredEntry,
    dtype: str | None,
) -> None:
    name = decomposition.name
    target = dtype or source.tensors[name].dtype
    product = rounded_product(decomposition, source.load(name), entry.rank, entry.form, target)
    for part, tensor in factored.encode(factored.module_of(name), product).items():
        if tensor.is_floating_point() and len(tensor):
            _check_overflow(tensor, part)
        file.write(part, tensor)


def _check_overflow(tensor: torch.Tensor, name: str) -> None:
    try:
        check_finite(tensor, name)
    except InputError as error:
        raise PromiseError(
            f"{error} The factors overflow {tensor.dtype}: add --dtype float32."
        ) from None
