"""An output against its source: every tensor accounted for, every figure computed again."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from eckart.assemble.certification import count_totals
from eckart.assemble.filling import BYTES_PER_SECOND, product_seconds
from eckart.assemble.measurement import Measured, Weighted, bias_of, count, measure
from eckart.certificate import Certificate, FactoredEntry, MatrixRecord, read_certificate
from eckart.checkpoint.header import TensorInfo
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source
from eckart.checkpoint.statistics import Statistics
from eckart.comparison import Digester
from eckart.decompose.request import on_threads
from eckart.decompose.weighting import Metrics
from eckart.errors import CheckpointError
from eckart.execute import Task, Workers
from eckart.formats import factored
from eckart.formats.factored import module_of
from eckart.verification.alone import accounts_of, stored_names
from eckart.verification.check import Check

ROUNDING = 1e-9
"""A recomputed figure may exceed the reported one by this share: sums on another machine …"""

WEIGHTED_ROUNDING = 1e-6
"""In a metric, whose roots another machine rounds in other places."""

NOISE = 64 * torch.finfo(torch.float64).eps
"""… and by this share of what was compared, where the difference itself is rounding."""


@dataclass(frozen=True, slots=True)
class Measurer:
    """Measures one changed tensor again, from both files."""

    matrices: Source
    factors: Source
    seed: int
    statistics: Statistics | None = None

    def __call__(self, name: str, entry: FactoredEntry) -> Measured:
        """Returns its errors. Peak memory: one matrix."""
        matrix = factored.matrix_of(entry)
        pairs = (
            (
                matrix.load(self.matrices, name, index),
                factored.decode(self.factors, name, entry, index),
            )
            for index in range(matrix.count)
        )
        bias = bias_of(self.matrices, f"{module_of(name)}.bias", matrix)
        with on_threads(matrix.shape, None):
            metrics = Metrics(self.statistics, name)
            return measure(pairs, bias, metrics, seed=self.seed, name=name)


def digests_of(source: Source, names: Iterable[str], workers: Workers) -> dict[str, str]:
    """Returns the digest of each tensor."""
    tasks = [Task(name, (name,), source.tensors[name].nbytes / BYTES_PER_SECOND) for name in names]
    return dict(workers.map(Digester(source), tasks, "hashing"))


def check_accounts(source: Source, certificate: Certificate) -> Check:
    """Every tensor of the source is mentioned, and no other."""
    mentioned = {row.name for row in [*certificate.copied, *certificate.tied]}
    for name, entry in _entries(source, certificate).items():
        parts = factored.layout(name, entry, "F32") if certificate.kind == "dense" else ()
        mentioned |= {name, *parts}
    faults = [f"{name} is not accounted for" for name in sorted(source.tensors.keys() - mentioned)]
    faults += [f"{name} is not in the source" for name in sorted(mentioned - source.tensors.keys())]
    return Check.of("accounts", faults, f"{len(source.tensors)} tensors of the source, each once")


def _entries(source: Source, certificate: Certificate) -> dict[str, FactoredEntry]:
    """What is factored, by tensor: in the output, or, where that is dense, in its source."""
    if certificate.kind == "factored":
        return {record.name: certificate.entry(record) for record in certificate.matrices}
    known = read_certificate(source.path)
    if {r.name for r in known.matrices} != {record.name for record in certificate.matrices}:
        raise CheckpointError(f"{printable(source.path)} does not say what was factored in it.")
    return {record.name: known.entry(record) for record in known.matrices}


def checks_against(
    written: Source,
    source: Source,
    certificate: Certificate,
    digests: Mapping[str, str],
    workers: Workers,
    *,
    statistics: Statistics | None = None,
) -> Iterator[Check]:
    """Yields a check of every changed tensor, of the copies, and of what is counted."""
    entries = _entries(source, certificate)
    factors, matrices = (written, source) if certificate.kind == "factored" else (source, written)
    unit = Measurer(matrices, factors, certificate.seed, statistics)
    tasks = [Task(name, (name, entry), product_seconds(entry)) for name, entry in entries.items()]
    measured = dict(workers.map(unit, tasks, "measuring"))
    for record in certificate.matrices:
        yield check_matrix(record, measured[record.name])
    names = stored_names(certificate)
    there = [stored for stored in names.values() if stored in written.tensors]
    copies = digests_of(written, there, workers)
    yield _check_copies(written, source, names, (copies, digests))
    faults = [
        f"{record.name} {fault}"
        for record in certificate.matrices
        for fault in _miscounted(record, matrices, factors, entries[record.name])
    ]
    accounts = accounts_of(certificate)
    if count_totals(source, written, certificate.matrices, accounts) != certificate.totals:
        faults.append("the totals are others")
    yield Check.of("counts", faults, "parameters and bytes, of each matrix and in all")


def _miscounted(
    record: MatrixRecord, matrices: Source, factors: Source, entry: FactoredEntry
) -> Iterable[str]:
    info = matrices.tensors[record.name]
    dtype = factors.tensors[f"{module_of(record.name)}.A.weight"].dtype
    parameters, sizes = count(info, entry, dtype)
    if record.form == "dense":
        parameters, sizes = parameters[::-1], sizes[::-1]
    if (parameters, sizes) != (record.parameters, record.bytes):
        yield f"holds {parameters[1]} parameters in {sizes[1]} bytes"
    if (info.dtype, info.shape, entry.rank) != (record.dtype, record.shape, record.rank):
        yield f"is {info.dtype} {list(info.shape)} of rank {entry.rank}"


def check_matrix(record: MatrixRecord, found: Measured) -> Check:
    """‖W − BA‖_F/‖W‖_F, and Wx + b against B(Ax) + b, hold what the certificate says."""
    outputs, promised = found.outputs, record.output_error
    if promised is None:
        return Check.of(record.name, ["its certificate says nothing of its outputs"], "")
    size = outputs.max / outputs.relative if outputs.relative else 0.0  # of an output, about
    faults = [
        f"{what} {measured:.6g}, certified {claimed:.6g}"
        for what, measured, claimed, compared in (
            ("relative error", found.relative_error, record.relative_error, 1.0),
            ("output difference", outputs.max, promised.max, size),
            ("relative output difference", outputs.relative, promised.relative, 1.0),
        )
        if not measured <= claimed * (1 + ROUNDING) + NOISE * compared
    ]
    detail = f"error {found.relative_error:.3g}, outputs differ by {outputs.max:.3g} at most"
    if (weighted := found.weighted) is not None:
        faults += _weighted_faults(record, weighted)
        detail += f", in the metric of {weighted.metric} {weighted.relative_error:.3g}"
    return Check.of(record.name, faults, detail)


def _weighted_faults(record: MatrixRecord, found: Weighted) -> list[str]:
    """What is claimed in the metric, against what the statistics say of the written factors."""
    if record.metric != found.metric:
        return [f"its metric is that of {found.metric}, certified {record.metric}"]
    return [
        f"{what} {measured:.6g}, certified {claimed}"
        for what, measured, claimed in (
            ("error in the metric", found.relative_error, record.metric_error),
            ("loss", found.loss, record.loss),
        )
        if measured is not None
        and (claimed is None or not measured <= claimed * (1 + WEIGHTED_ROUNDING) + NOISE)
    ]


def _check_copies(
    written: Source,
    source: Source,
    names: Mapping[str, str],
    digests: tuple[Mapping[str, str], Mapping[str, str]],
) -> Check:
    faults: list[str] = []
    copies, originals = digests
    for original, stored in names.items():
        if original not in source.tensors:
            faults.append(f"{original} is not in the source")
        elif (
            not _same(written.tensors[stored], source.tensors[original])
            or copies[stored] != originals[original]
        ):
            faults.append(f"{stored} differs from {original} in the source")
    detail = f"{len(names)} tensors identical to the source, byte for byte"
    return Check.of("copies", faults, detail)


def _same(a: TensorInfo, b: TensorInfo) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape)
