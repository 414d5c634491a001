"""Does an output keep its promise? Everything is recomputed from the files.

Knows the formats and the certificate; must not know how the output was made.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from eckart.certificate import (
    Certificate,
    FactoredEntry,
    MatrixRecord,
    read_certificate,
)
from eckart.checkpoint.documents import canonical_json, read_json
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import (
    Checkpoint,
    Source,
    TensorInfo,
    file_sha256,
    open_checkpoint,
)
from eckart.checkpoint.writer import CERTIFICATE
from eckart.errors import CheckpointError, EckartError, PromiseError
from eckart.formats import dense, factored
from eckart.linalg.arrays import check_finite
from eckart.linalg.matrices import named_generator
from eckart.linalg.residual import Product, output_difference, relative_error

ROUNDING = 1e-9
"""A recomputed figure may exceed the reported one by this share: sums on another machine."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at, and what was found."""

    name: str
    held: bool
    detail: str


def verify_output(out: Path, against: Path | None = None) -> list[Check]:
    """Returns the checks of an output folder; those that failed have `held` False.

    Always: the certificate's own digest, the files (none missing, none added, sizes and SHA-256),
    the tensors' names, shapes and finiteness. With `against`, the source: its fingerprint, the
    relative error of every factored matrix, Wx + b against B(Ax) + b on seeded inputs, and that
    every other tensor is identical to the byte. Raises PromiseError where the output cannot even
    be read, CheckpointError where `out` or `against` is not what it should be.
    """
    certificate = _read_written(out)
    checks = [
        Check("certificate", held=True, detail="its digest holds"),
        check_files(out, certificate),
    ]
    if not checks[-1].held:
        return checks
    written = _open_written(out)
    checks.append(_check_config(out, certificate))
    checks.append(_check_tensors(written, certificate))
    if against is None or not checks[-1].held:
        return checks
    source = open_checkpoint(against)
    if source.fingerprint() != certificate.source.fingerprint:
        raise CheckpointError(
            f"{against} is not the checkpoint that {out} was made from "
            f"({certificate.source.name}): its weights differ."
        )
    return [*checks, *_checks_against(written, source, certificate)]


def check_files(out: Path, certificate: Certificate) -> Check:
    """Every file is there, none was added, sizes and SHA-256 are as certified."""
    found = {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()}
    expected = {*certificate.files, CERTIFICATE}
    faults = [f"{name} is missing" for name in sorted(expected - found)]
    faults += [f"{name} was added" for name in sorted(found - expected)]
    for name in sorted(found & set(certificate.files)):
        record = certificate.files[name]
        if (out / name).stat().st_size != record.bytes:
            faults.append(f"{name} has another size")
        elif file_sha256(out / name) != record.sha256:
            faults.append(f"{name} was changed")
    return _check("files", faults, f"{len(expected)} files, every SHA-256 as certified")


def _read_written(out: Path) -> Certificate:
    """The certificate of a folder that is there: whatever is wrong with it breaks the promise."""
    if not out.is_dir():
        raise CheckpointError(f"{printable(out)} is not a folder: check the path.")
    try:
        return read_certificate(out)
    except CheckpointError as error:
        raise PromiseError(str(error)) from None


def _open_written(out: Path) -> Checkpoint:
    try:
        return open_checkpoint(out)
    except CheckpointError as error:
        raise PromiseError(str(error)) from None


def _check_config(out: Path, certificate: Certificate) -> Check:
    faults: list[str] = []
    if certificate.kind == "factored" and (out / "config.json").exists():
        stated = read_json(out / "config.json").get("quantization_config")
        promised = factored.quantization_config(certificate.factored)
        if canonical_json(stated) != canonical_json(promised):
            faults.append("config.json names other factored matrices than the certificate")
    return _check("config", faults, f"{len(certificate.factored)} factored matrices named")


def _check_tensors(written: Source, certificate: Certificate) -> Check:
    """Every tensor that the certificate accounts for is there, finite, and no other."""
    expected = set(_stored_names(certificate).values())
    faults: list[str] = []
    if certificate.kind == "dense":
        expected |= {record.name for record in certificate.matrices}
    for X, entry in certificate.factored.items():
        expected |= set(factored.layout(X, entry, "F32"))
        faults += _faults_of(written, X, entry)
    faults += [f"{name} is missing" for name in sorted(expected - set(written.tensors))]
    faults += [f"{name} is not accounted for" for name in sorted(set(written.tensors) - expected)]
    return _check("tensors", faults, f"{len(written.tensors)} tensors, all accounted for")


def _stored_names(certificate: Certificate) -> dict[str, str]:
    """Where each copied tensor of the source stands in the output."""
    names = [row.name for row in certificate.copied]
    if certificate.kind == "factored":
        return {name: factored.stored_name(name, certificate.factored) for name in names}
    modules = {factored.module_of(record.name) for record in certificate.matrices}
    return {name: dense.dense_name(name, modules) or name for name in names}


def _faults_of(written: Source, X: str, entry: FactoredEntry) -> list[str]:
    try:
        product = factored.decode(written, X, entry)
        for part, tensor in factored.encode(X, product).items():
            if tensor.is_floating_point() and len(tensor):
                check_finite(tensor, part)
    except EckartError as error:
        return [str(error)]
    return []


def _checks_against(
    written: Checkpoint, source: Checkpoint, certificate: Certificate
) -> Iterator[Check]:
    seed = certificate.seed
    factors, matrices, entries = written, source, certificate.factored
    if certificate.kind == "dense":  # the factors are the source's
        factors, matrices, entries = source, written, read_certificate(source.folder).factored
    for record in certificate.matrices:
        X = factored.module_of(record.name)
        product = factored.decode(factors, X, entries[X])
        b = matrices.load(f"{X}.bias") if f"{X}.bias" in matrices.tensors else None
        yield _check_matrix(matrices.load(record.name), product, b, record, seed)
    yield _check_copies(written, source, _stored_names(certificate))


def _check_matrix(
    W: torch.Tensor, product: Product, bias: torch.Tensor | None, record: MatrixRecord, seed: int
) -> Check:
    """‖W − BA‖_F/‖W‖_F, and Wx + b against B(Ax) + b, hold what the certificate says."""
    error = relative_error(W, product, record.name)
    generator = named_generator(seed, f"outputs of {record.name}")
    outputs = output_difference(W, product, bias, generator=generator)
    faults: list[str] = []
    for what, found, promised in (
        ("relative error", error, record.relative_error),
        ("output difference", outputs.max, record.output_error.max),
        ("relative output difference", outputs.relative, record.output_error.relative),
    ):
        if not found <= promised * (1 + ROUNDING):
            faults.append(f"{what} {found:.6g}, certified {promised:.6g}")
    return _check(
        record.name,
        faults,
        f"error {error:.3g}, outputs differ by {outputs.max:.3g} at most",
    )


def _check_copies(written: Source, source: Source, names: dict[str, str]) -> Check:
    faults: list[str] = []
    for original, stored in names.items():
        if original not in source.tensors:
            faults.append(f"{original} is not in the source")
        elif not _same(written.tensors[stored], source.tensors[original]) or not torch.equal(
            written.load(stored).view(torch.uint8), source.load(original).view(torch.uint8)
        ):
            faults.append(f"{stored} differs from {original} in the source")
    return _check("copies", faults, f"{len(names)} tensors identical to the source, byte for byte")


def _same(a: TensorInfo, b: TensorInfo) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape)


def _check(name: str, faults: list[str], detail: str) -> Check:
    if not faults:
        return Check(name, held=True, detail=detail)
    more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
    return Check(name, held=False, detail="; ".join(faults[:3]) + more)
