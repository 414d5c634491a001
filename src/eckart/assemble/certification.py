"""The certificate over everything that stands in the staged folder."""

import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Literal

import torch

from eckart.assemble.job import Job
from eckart.certificate import (
    Certificate,
    FactoredEntry,
    FileRecord,
    MatrixRecord,
    Row,
    Run,
    SourceRecord,
    Totals,
)
from eckart.checkpoint.header import file_sha256
from eckart.checkpoint.paths import write_file
from eckart.checkpoint.source import Checkpoint, open_checkpoint
from eckart.checkpoint.writer import CERTIFICATE


def certify(
    job: Job,
    *,
    kind: Literal["factored", "dense"],
    entries: Mapping[str, FactoredEntry],
    records: list[MatrixRecord],
    copied: Mapping[str, str],
    targeted: set[str],
) -> Certificate:
    """Writes eckart.json over everything that stands in the staged folder."""
    source = job.source
    written = open_checkpoint(job.staged)
    files = sorted(path for path in job.staged.rglob("*") if path.is_file())
    certificate = Certificate(
        kind=kind,
        source=SourceRecord(name=source.folder.resolve().name, fingerprint=source.fingerprint()),
        options=job.options,
        versions=versions(),
        files={
            str(path.relative_to(job.staged)): FileRecord(
                bytes=path.stat().st_size, sha256=file_sha256(path)
            )
            for path in files
        },
        matrices=records,
        copied=[Row(name=name, reason=reason) for name, reason in sorted(copied.items())],
        factored=dict(entries),
        totals=count_totals(source, written, records, targeted),
        run=Run(
            seconds=round(time.monotonic() - job.began, 3),
            started=job.started.isoformat(timespec="seconds"),
            workers=1,
            source_files={file: (source.folder / file).stat().st_size for file in source.files},
        ),
    )
    write_file(job.staged / CERTIFICATE, certificate.encode())
    return certificate


def count_totals(
    source: Checkpoint, written: Checkpoint, records: list[MatrixRecord], targeted: set[str]
) -> Totals:
    """Returns what both checkpoints hold: the targeted matrices, the model, the bytes."""
    changed = {record.name for record in records}
    left = sum(source.tensors[name].parameters for name in targeted - changed)
    before = left + sum(record.parameters[0] for record in records)
    after = left + sum(record.parameters[1] for record in records)
    return Totals(
        targeted_parameters=(before, after),
        model_parameters=(_parameters(source), _parameters(written)),
        tensor_bytes=(
            sum(info.nbytes for info in source.tensors.values()),
            sum(info.nbytes for info in written.tensors.values()),
        ),
        keep=after / before if before else 1.0,
    )


def _parameters(checkpoint: Checkpoint) -> int:
    """Entries of all tensors but permutations, which count in bytes only."""
    return sum(
        info.parameters for name, info in checkpoint.tensors.items() if not name.endswith(".perm")
    )


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    packages = ("eckart", "torch", "numpy", "scipy", "safetensors")
    return {
        **{package: version(package) for package in packages},
        "python": platform.python_version(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }
