"""Adapters: what is to be laid out, the order that fills each tensor, and what is claimed of it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from eckart.allocate import Choice
from eckart.assemble.certification import (
    file_records,
    predicted_loss,
    run_of,
    statistics_record,
    versions,
)
from eckart.assemble.checkpoints import entry_of
from eckart.assemble.filling import Copy, Factor, Filled, Filler, Order
from eckart.assemble.job import Job
from eckart.certificate import (
    Certificate,
    Change,
    FactoredEntry,
    Loss,
    MatrixRecord,
    MetricName,
    ShareRow,
    SourceRecord,
    TiedRow,
    Totals,
)
from eckart.certificate import Delta as DeltaRecord
from eckart.checkpoint.delta import Delta
from eckart.checkpoint.documents import indented_json
from eckart.checkpoint.header import DTYPES, TensorInfo, read_header
from eckart.checkpoint.paths import write_file
from eckart.checkpoint.tensor_file import TensorFiles, TensorLayout, lay_out_file
from eckart.checkpoint.writer import CERTIFICATE
from eckart.comparison import Changes
from eckart.consumers import CONSUMERS, Consumer
from eckart.decompose import Decomposition
from eckart.decompose.weighting import metric_kind
from eckart.families import is_routed_expert, is_tied_to_head
from eckart.formats import peft
from eckart.formats.forms import AdapterForm
from eckart.matrix import Matrix

WHOLE = "as the tuned model has it"


@dataclass(frozen=True, slots=True)
class AdapterAssembly:
    """An adapter as planned: entries by tensor, every tensor's layout, and an order for each."""

    delta: Delta
    entries: Mapping[str, FactoredEntry]
    whole: Sequence[str]
    layout: Mapping[str, TensorLayout]
    orders: Mapping[str, Order]
    form: AdapterForm
    is_tied: bool  # a whole embedding stands for the output head too

    def begin(self, job: Job) -> tuple[Filler, TensorFiles]:
        """Lays the file out in the staged folder; returns the unit that fills it, and the file."""
        files = lay_out_file(job.staged / self.form.weights, self.layout)
        filler = Filler(
            self.delta,
            self.delta.tuned,
            files,
            self.layout,
            job.seed,
            job.threads,
            self.form,
            job.statistics,
        )
        return filler, files

    def write_configuration(self, job: Job) -> None:
        """Writes what the consumer reads beside the weights."""
        document = self.form.configuration(
            self.entries,
            base=str(self.delta.base.path),
            whole=self.whole,
            is_tied=self.is_tied,
        )
        if document is not None:
            write_file(job.staged / peft.CONFIG, indented_json(document))


def adapter_assembly(
    delta: Delta,
    matrices: Mapping[str, Matrix],
    choices: Mapping[str, Choice],
    decompositions: Mapping[str, Decomposition],
    dtypes: Mapping[str, str],
    *,
    whole: Sequence[str] = (),
    consumer: Consumer = CONSUMERS["peft"],
    component: str | None = None,
) -> AdapterAssembly:
    """Returns the plan of an adapter in a consumer's form; rank 0 leaves a module out."""
    ranks = {name: choice.rank for name, choice in sorted(choices.items()) if choice.rank}
    is_mixture = any(is_routed_expert(name) for name in delta.tuned.tensors)
    entries = {
        name: msgspec.structs.replace(
            entry_of(matrices[name], rank),
            module=peft.module_for(name, ranks, is_mixture=is_mixture),
        )
        for name, rank in ranks.items()
    }
    form = AdapterForm.of(consumer, entries, component)
    layout: dict[str, TensorLayout] = {}
    orders: dict[str, Order] = {}
    for name, entry in entries.items():
        layout |= form.layout(name, entry, dtypes[name])
        orders[name] = Factor(name, entry, decompositions[name], dtypes[name])
    for name in whole:
        info, stored = delta.tuned.tensors[name], peft.whole_name(name, entries)
        layout[stored] = TensorLayout(info.dtype, info.shape, info.nbytes)
        orders[name] = Copy(name, stored, info.nbytes)
    tied = [name for name in whole if is_tied_to_head(name, delta.tuned)]
    for name in tied:
        layout[peft.TIED_HEAD] = layout[peft.whole_name(name, entries)]
        orders[peft.TIED_HEAD] = Copy(name, peft.TIED_HEAD, delta.tuned.tensors[name].nbytes)
    return AdapterAssembly(delta, entries, whole, layout, orders, form, bool(tied))


def certify_adapter(
    job: Job,
    changes: Changes,
    assembly: AdapterAssembly,
    filled: Iterable[Filled],
    *,
    matrices: Mapping[str, Matrix],
    decompositions: Mapping[str, Decomposition],
    evidence: Mapping[str, DeltaRecord],
    lost: Mapping[str, str],
    remarks: Sequence[str] = (),
) -> Certificate:
    """Writes eckart.json over everything that stands in the staged folder."""
    energies, total = {**changes.changed, **changes.added}, changes.energy or 1.0
    shares = {name: energy / total for name, energy in energies.items()}
    records = [one.record for one in filled if one.record]
    for name in matrices.keys() - assembly.entries.keys() - lost.keys():
        info = changes.tuned.tensors[name]
        record = dropped(entry_of(matrices[name], 0), info.dtype, name, info.parameters)
        kind = metric_kind(job.statistics, name)
        records.append(_dropped_in(kind, record, decompositions.get(name)))
    records = [
        msgspec.structs.replace(
            record, energy_share=shares[record.name], delta=evidence.get(record.name)
        )
        for record in sorted(records, key=lambda record: record.name)
    ]
    tuned, base = changes.tuned, changes.base
    ours, theirs = changes.fingerprints()
    certificate = Certificate(
        kind="adapter",
        source=SourceRecord(name=tuned.name, fingerprint=ours),
        base=SourceRecord(name=base.name, fingerprint=theirs),
        statistics=statistics_record(job),
        options=job.options,
        versions=versions(),
        files=file_records(job.staged),
        matrices=records,
        copied=[],
        tied=[TiedRow(name=name, to=to) for name, to in sorted(tuned.tied.items())],
        stored_whole=[_share(name, WHOLE, shares) for name in sorted(assembly.whole)],
        lost=[_share(name, why, shares) for name, why in sorted(lost.items())],
        unchanged=sorted(changes.unchanged),
        factored={peft.module_of(name): entry for name, entry in assembly.entries.items()},
        loss=Loss(predicted=None if lost else predicted_loss(records)),
        totals=adapter_totals(
            tuned.tensors, read_header(job.staged / assembly.form.weights), records
        ),
        change=Change(
            energy=changes.energy,
            factored=math.fsum(shares[record.name] for record in records),
            stored_whole=math.fsum(shares[name] for name in assembly.whole),
            lost=math.fsum(shares[name] for name in lost),
            relative_error=change_error(records, [shares[name] for name in lost]),
        ),
        remarks=[*remarks],
        run=run_of(job),
    )
    write_file(job.staged / CERTIFICATE, certificate.encode())
    return certificate


def change_error(records: Iterable[MatrixRecord], lost: Iterable[float]) -> float:
    """Returns ‖(tuned − base) − carried‖_F / ‖tuned − base‖_F, from the errors of the parts."""
    missed = sum(record.relative_error**2 * (record.energy_share or 0.0) for record in records)
    return math.sqrt(missed + sum(lost))


def adapter_totals(
    tuned: Mapping[str, TensorInfo],
    adapter: Mapping[str, TensorInfo],
    records: Iterable[MatrixRecord],
) -> Totals:
    """Returns what the tuned model and the adapter hold."""
    before, after = (sum(record.parameters[side] for record in records) for side in (0, 1))
    ours, theirs = tuned.values(), adapter.values()
    return Totals(
        targeted_parameters=(before, after),
        model_parameters=(_parameters(ours), _parameters(theirs)),
        tensor_bytes=(_bytes(ours), _bytes(theirs)),
        keep=after / before if before else 0.0,
    )


def _parameters(infos: Iterable[TensorInfo]) -> int:
    return sum(info.parameters for info in infos)


def _bytes(infos: Iterable[TensorInfo]) -> int:
    return sum(info.nbytes for info in infos)


def dropped(entry: FactoredEntry, dtype: str, name: str, parameters: int) -> MatrixRecord:
    """Returns the record of a module to which a budget gave rank 0: all of it is cut off."""
    return MatrixRecord(
        name=name,
        shape=entry.shape,
        dtype=dtype,
        orientation=entry.orientation,
        rank=0,
        form="ba",
        parameters=(parameters, 0),
        bytes=(parameters * DTYPES[dtype].itemsize, 0),
        relative_error=1.0,
        excess_estimate=0.0,
        optimum=1.0,
        output_error=None,
        metric="frobenius",
        method="none",
        tail=[],
    )


def _dropped_in(
    kind: MetricName, record: MatrixRecord, known: Decomposition | None
) -> MatrixRecord:
    """The same in the metric: all of what it weighs is missed."""
    if known is None or kind == "frobenius":
        return record
    loss = None if kind == "inputs" else known.spectrum.energy / 2
    return msgspec.structs.replace(record, metric=kind, metric_error=1.0, loss=loss)


def _share(name: str, reason: str, shares: Mapping[str, float]) -> ShareRow:
    return ShareRow(name=name, reason=reason, energy_share=shares[name])
