"""What is claimed of adapters that were added up or converted, and of a base with one in it."""

from collections.abc import Iterable, Mapping, Sequence

from eckart.allocate import Choice
from eckart.assemble.adapters import dropped
from eckart.assemble.application import AddBias, Order, Replace
from eckart.assemble.certification import file_records, run_of, versions
from eckart.assemble.filling import Copy, Filled
from eckart.assemble.job import Job
from eckart.assemble.recombination import Sum, entries_of
from eckart.certificate import (
    Certificate,
    Kind,
    MatrixRecord,
    Row,
    SourceRecord,
    TiedRow,
    Totals,
)
from eckart.checkpoint.header import TensorInfo, read_header
from eckart.checkpoint.opening import open_checkpoint
from eckart.checkpoint.paths import printable, write_file
from eckart.checkpoint.source import Source
from eckart.checkpoint.writer import CERTIFICATE
from eckart.formats import peft
from eckart.formats.adapters import Adapter
from eckart.formats.forms import AdapterForm

WHOLE = "stored whole in the adapter"
UNTOUCHED = "not in the adapter"
REPLACED = "as the adapter has it"
SUMMED = "a bias, with what the adapter adds to it"

MUCH = 0.1
"""Of an addition: more lost by rounding deserves a remark."""


def certify_merged(
    job: Job,
    adapters: Sequence[Adapter],
    sums: Mapping[str, Sum],
    choices: Mapping[str, Choice],
    filled: Iterable[Filled],
    *,
    kind: Kind,
    form: AdapterForm,
    remarks: Sequence[str] = (),
) -> Certificate:
    """Writes eckart.json over everything that stands in the staged folder."""
    entries = entries_of(sums, {name: choice.rank for name, choice in choices.items()})
    records = [one.record for one in filled if one.record]
    records += [
        dropped(sums[name].entry(0), sums[name].dtype, name, sums[name].parameters)
        for name, choice in choices.items()
        if not choice.rank
    ]
    records.sort(key=lambda record: record.name)
    sources = [
        SourceRecord(name=one.source.name, fingerprint=one.source.fingerprint()) for one in adapters
    ]
    certificate = Certificate(
        kind=kind,
        source=sources[0],
        merged=sources,
        options=job.options,
        versions=versions(),
        files=file_records(job.staged),
        matrices=records,
        copied=[Row(name=name, reason=WHOLE) for name in adapters[0].whole],
        factored={peft.module_of(name): entry for name, entry in entries.items()},
        totals=merged_totals(adapters, read_header(job.staged / form.weights), records),
        remarks=[*remarks],
        run=run_of(job),
    )
    write_file(job.staged / CERTIFICATE, certificate.encode())
    return certificate


def merged_totals(
    adapters: Sequence[Adapter], written: Mapping[str, TensorInfo], records: Iterable[MatrixRecord]
) -> Totals:
    """Returns what the given adapters and the one that was made of them hold."""
    before, after = (sum(record.parameters[side] for record in records) for side in (0, 1))
    given = [info for adapter in adapters for info in adapter.source.tensors.values()]
    made = [*written.values()]
    return Totals(
        targeted_parameters=(before, after),
        model_parameters=(_parameters(given), _parameters(made)),
        tensor_bytes=(_bytes(given), _bytes(made)),
        keep=after / before if before else 0.0,
    )


def certify_applied(
    job: Job,
    adapter: Adapter,
    orders: Mapping[str, Order],
    filled: Iterable[Filled],
    files: Mapping[str, str],
) -> Certificate:
    """Writes eckart.json over everything that stands in the staged folder."""
    base, filled = job.source, [*filled]
    digests = {one.name: one.source_digest for one in filled if one.source_digest}
    records = sorted((one.record for one in filled if one.record), key=lambda record: record.name)
    certificate = Certificate(
        kind="applied",
        source=SourceRecord(name=base.name, fingerprint=base.fingerprint(digests)),
        adapter=SourceRecord(name=adapter.source.name, fingerprint=adapter.source.fingerprint()),
        options=job.options,
        versions=versions(),
        files=file_records(job.staged, files),
        matrices=records,
        copied=[Row(name=n, reason=UNTOUCHED) for n, o in orders.items() if isinstance(o, Copy)],
        refitted=[
            Row(name=n, reason=REPLACED if isinstance(o, Replace) else SUMMED)
            for n, o in orders.items()
            if isinstance(o, Replace | AddBias)
        ],
        tied=[TiedRow(name=name, to=to) for name, to in sorted(base.tied.items())],
        factored={},
        totals=applied_totals(base, open_checkpoint(job.staged), records),
        remarks=_rounded_away(records),
        run=run_of(job),
    )
    write_file(job.staged / CERTIFICATE, certificate.encode())
    return certificate


def applied_totals(base: Source, written: Source, records: Iterable[MatrixRecord]) -> Totals:
    """Returns what a base holds without an adapter and with it; tied tensors count once."""
    targeted = sum(record.parameters[0] for record in records)
    ours, theirs = (
        [info for name, info in one.tensors.items() if name not in base.tied]
        for one in (base, written)
    )
    return Totals(
        targeted_parameters=(targeted, targeted),
        model_parameters=(_parameters(ours), _parameters(theirs)),
        tensor_bytes=(_bytes(ours), _bytes(theirs)),
        keep=1.0,
    )


def _rounded_away(records: Sequence[MatrixRecord]) -> list[str]:
    """Where the dtype of the base swallowed much of what was added."""
    large = [record for record in records if record.relative_error > MUCH]
    if not large:
        return []
    worst = max(large, key=lambda record: record.relative_error)
    return [
        f"rounding to {worst.dtype} took more than a tenth of what was added to {len(large)} of "
        f"{len(records)} tensors, {worst.relative_error:.0%} of it in {printable(worst.name)}: the "
        "addition is small beside the weights."
    ]


def _parameters(infos: Iterable[TensorInfo]) -> int:
    return sum(info.parameters for info in infos)


def _bytes(infos: Iterable[TensorInfo]) -> int:
    return sum(info.nbytes for info in infos)
