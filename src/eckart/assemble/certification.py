"""The certificate over everything that stands in the staged folder."""

import math
import platform
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import msgspec
import torch

from eckart.assemble.filling import Filled
from eckart.assemble.job import Job
from eckart.certificate import (
    Certificate,
    FactoredEntry,
    FileRecord,
    Kind,
    Loss,
    MatrixRecord,
    Row,
    Run,
    SourceRecord,
    StatisticsRecord,
    TiedRow,
    Totals,
)
from eckart.checkpoint.hashing import file_digest
from eckart.checkpoint.header import TensorInfo
from eckart.checkpoint.opening import open_checkpoint
from eckart.checkpoint.paths import write_file
from eckart.checkpoint.source import Source
from eckart.checkpoint.writer import CERTIFICATE
from eckart.formats.factored import PERM


@dataclass(frozen=True, slots=True)
class Accounts:
    """What became of every tensor of the source, and what a reader should know of it."""

    entries: Mapping[str, FactoredEntry]
    copied: Mapping[str, str]  # name → why
    targeted: Collection[str]
    tied: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def certify(
    job: Job, kind: Kind, accounts: Accounts, filled: Iterable[Filled], loss: Loss
) -> Certificate:
    """Writes eckart.json over everything that stands in the staged folder.

    `loss` is what was measured of it; what the matrices predict is added here.
    """
    source, written, filled = job.source, open_checkpoint(job.staged), [*filled]
    records = sorted((one.record for one in filled if one.record), key=lambda record: record.name)
    digests = {one.name: one.source_digest for one in filled if one.source_digest}
    certificate = Certificate(
        kind=kind,
        source=SourceRecord(name=source.name, fingerprint=source.fingerprint(digests)),
        statistics=statistics_record(job),
        options=job.options,
        versions=versions(),
        files=file_records(job.staged),
        matrices=records,
        copied=[Row(name=name, reason=why) for name, why in sorted(accounts.copied.items())],
        tied=[TiedRow(name=name, to=to) for name, to in sorted(accounts.tied.items())],
        factored=dict(accounts.entries),
        loss=msgspec.structs.replace(loss, predicted=predicted_loss(records)),
        totals=count_totals(source, written, records, accounts),
        remarks=[*accounts.remarks],
        run=run_of(job),
    )
    write_file(job.staged / CERTIFICATE, certificate.encode())
    return certificate


def predicted_loss(records: Iterable[MatrixRecord]) -> float | None:
    """Returns the sum of what the matrices lose, in nats per token; None if one of them says not.

    Second order, one matrix at a time: near the start it holds, and understates what follows.
    """
    losses = [record.loss for record in records]
    known = [loss for loss in losses if loss is not None]
    return math.fsum(known) if known and len(known) == len(losses) else None


def statistics_record(job: Job) -> StatisticsRecord | None:
    """Returns which statistics made the metric."""
    if job.statistics is None:
        return None
    folder = job.statistics.folder
    return StatisticsRecord(
        name=folder.resolve().name, digest=job.statistics.digest, tokens=job.statistics.tokens
    )


def file_records(
    staged: Path, hashed: Mapping[str, str] = MappingProxyType({})
) -> dict[str, FileRecord]:
    """Returns every file of a folder, by its path in it. Cost: hashes those that are not yet."""
    files = {str(path.relative_to(staged)): path for path in staged.rglob("*") if path.is_file()}
    return {
        name: FileRecord(bytes=path.stat().st_size, blake3=hashed.get(name) or file_digest(path))
        for name, path in sorted(files.items())
    }


def run_of(job: Job) -> Run:
    """Returns what may differ between two equal runs."""
    return Run(
        seconds=round(time.monotonic() - job.began, 3),
        started=job.started.isoformat(timespec="seconds"),
        workers=job.workers,
        source_files={file: stamp.bytes for file, stamp in job.source.stamps.items()},
    )


def count_totals(
    source: Source, written: Source, records: list[MatrixRecord], accounts: Accounts
) -> Totals:
    """Returns what both checkpoints hold: the targeted matrices, the model, the bytes."""
    changed = {record.name for record in records}
    left = sum(source.tensors[name].parameters for name in {*accounts.targeted} - changed)
    before = left + sum(record.parameters[0] for record in records)
    after = left + sum(record.parameters[1] for record in records)
    return Totals(
        targeted_parameters=(before, after),
        model_parameters=(_parameters(source, accounts), _parameters(written, accounts)),
        tensor_bytes=(
            sum(i.nbytes for name, i in source.tensors.items() if name not in accounts.tied),
            sum(info.nbytes for info in written.tensors.values()),
        ),
        keep=after / before if before else 1.0,
    )


def _parameters(checkpoint: Source, accounts: Accounts) -> int:
    return sum(
        info.parameters
        for name, info in checkpoint.tensors.items()
        if name not in accounts.tied and not _is_permutation(name, info)
    )


def _is_permutation(name: str, info: TensorInfo) -> bool:
    """Permutations count in bytes only."""
    return name.endswith(f".{PERM}") and info.dtype == "I64"


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    packages = ("eckart", "torch", "numpy", "scipy", "safetensors")
    return {
        **{package: version(package) for package in packages},
        "python": platform.python_version(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }
