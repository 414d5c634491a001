"""A base with an adapter folded in: every sum computed again from both.

Knows the formats and the certificate; must not know how the output was made.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from eckart.assemble.adapter_certification import applied_totals
from eckart.assemble.application import (
    THREADS,
    Add,
    AddBias,
    Replace,
    bias_sum,
    orders_of,
    rounding,
    sums_of,
)
from eckart.certificate import Certificate, MatrixRecord
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source
from eckart.errors import CheckpointError
from eckart.execute import Task, Workers
from eckart.formats.adapters import Adapter
from eckart.linalg.factors import product_energy
from eckart.linalg.residual import rounded_up
from eckart.linalg.threads import computing_on
from eckart.verification.against import ROUNDING, digests_of
from eckart.verification.check import Check

NOISE = 1e-6
"""Of the addition: float32 sums in another order."""


@dataclass(frozen=True, slots=True)
class _Measurer:
    """Measures one sum again."""

    base: Source
    adapter: Source
    written: Source
    sign: int

    def __call__(self, order: Add) -> float:
        """Returns ‖W' − (W + s·BA)‖/‖s·BA‖ of the tensor as it is stored."""
        missed, total, start = 0.0, 0.0, 0
        with computing_on(THREADS):
            for sums in sums_of(self.base, self.adapter, order, self.sign):
                for rows, exact in sums:
                    found = self.written.entries(order.name, start, start + rows.numel())
                    missed += rounding(exact, found.view_as(rows), order.name)
                    start += rows.numel()
                total += product_energy(sums.addition)
        return rounded_up(missed, total)


def check_applied(out: Path, written: Source, certificate: Certificate) -> Iterator[Check]:
    """Yields what the output in `out` tells of itself: every tensor is accounted for."""
    rows = [*certificate.matrices, *certificate.copied, *certificate.refitted]
    names = [row.name for row in rows]
    faults = [f"{name} is missing" for name in sorted({*names} - written.tensors.keys())]
    faults += [f"{name} is not accounted for" for name in sorted(written.tensors.keys() - {*names})]
    faults += [f"{name} stands there twice" for name in sorted({*names}) if names.count(name) > 1]
    yield Check.of("tensors", faults, f"{len(written.tensors)} tensors, all accounted for")
    infos = [*written.tensors.values()]
    found = sum(i.parameters for i in infos), sum(i.nbytes for i in infos)
    totals = certificate.totals
    said = totals.model_parameters[1], totals.tensor_bytes[1]
    faults = [] if found == said else [f"{found[0]} parameters in {found[1]} bytes"]
    yield Check.of("output", faults, f"{said[1]:,} bytes of tensors, as counted")


def checks_against_sum(
    written: Source, adapter: Adapter, base: Source, certificate: Certificate, workers: Workers
) -> Iterator[Check]:
    """Yields a check of every sum, and of the copies."""
    digests = digests_of(base, base.tensors, workers)
    for source, found, known in (
        (base, base.fingerprint(digests), certificate.source),
        (adapter.source, adapter.source.fingerprint(), certificate.adapter),
    ):
        if known is None or found != known.fingerprint:
            raise CheckpointError(
                f"{printable(source.path)} is not what {printable(written.path)} was made from "
                f"({printable(known.name if known else '')}): its weights differ."
            )
    sign = -1 if certificate.options.get("subtract") else 1
    orders, layout = orders_of(base, adapter, subtract=sign < 0)
    sums_there = {name for name, order in orders.items() if isinstance(order, Add)}
    yield _check_names(written, certificate, sums_there, {*layout})
    unit = _Measurer(base, adapter.source, written, sign)
    tasks = [
        Task(name, (order,), order.seconds)
        for name, order in orders.items()
        if isinstance(order, Add)
    ]
    measured = dict(workers.map(unit, tasks, "measuring"))
    for record in certificate.matrices:
        yield _check_sum(record, measured[record.name])
    faults: list[str] = []
    for name, order in orders.items():
        if isinstance(order, AddBias):
            again = bias_sum(base.load(name), order.part, adapter.source, sign)
            if not again.equal(written.load(name)):
                faults.append(f"{name} is not the sum")
        elif isinstance(order, Replace) and _differs(written, name, adapter, order.stored):
            faults.append(f"{name} differs from the adapter's")
    yield Check.of("others", faults, f"{len(certificate.refitted)} tensors as the adapter says")
    names = [row.name for row in certificate.copied]
    copies = digests_of(written, names, workers)
    faults = [f"{name} differs from the base's" for name in names if copies[name] != digests[name]]
    yield Check.of("copies", faults, f"{len(names)} tensors identical to the base, byte for byte")
    yield _check_counts(written, base, certificate)


def _check_counts(written: Source, base: Source, certificate: Certificate) -> Check:
    """Parameters and bytes of every sum, and of both models."""
    faults = [
        f"{record.name} has other counts"
        for record in certificate.matrices
        if (info := base.tensors.get(record.name)) is None
        or record.parameters != (info.parameters, info.parameters)
        or record.bytes != (info.nbytes, info.nbytes)
    ]
    if applied_totals(base, written, certificate.matrices) != certificate.totals:
        faults.append("the totals are others")
    return Check.of("counts", faults, "parameters and bytes, of each sum and in all")


def _differs(written: Source, name: str, adapter: Adapter, stored: str) -> bool:
    return written.digest(name) != adapter.source.digest(stored)


def _check_names(
    written: Source, certificate: Certificate, added_to: set[str], expected: set[str]
) -> Check:
    faults = [f"{name} is missing" for name in sorted(expected - written.tensors.keys())]
    faults += [f"{name} was added" for name in sorted(written.tensors.keys() - expected)]
    wrong = {record.name for record in certificate.matrices} ^ added_to
    faults += [f"{name} is wrongly said to be a sum, or not" for name in sorted(wrong)]
    return Check.of("accounts", faults, f"{len(expected)} tensors, each in one row")


def _check_sum(record: MatrixRecord, found: float) -> Check:
    held = found <= record.relative_error * (1 + ROUNDING) + NOISE
    faults = [] if held else [f"rounding {found:.6g} of it, certified {record.relative_error:.6g}"]
    return Check.of(record.name, faults, f"rounding took {found:.3g} of what was added")
