"""Does an output keep its promise? Everything is recomputed from the files.

Knows the formats and the certificate; must not know how the output was made.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from eckart.assemble.certification import count_totals
from eckart.assemble.measurement import count_matrix
from eckart.certificate import (
    Certificate,
    FactoredEntry,
    MatrixRecord,
    read_certificate,
)
from eckart.checkpoint.documents import canonical_json, read_json
from eckart.checkpoint.header import TensorInfo, file_sha256
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Checkpoint, Source, open_checkpoint
from eckart.checkpoint.writer import CERTIFICATE
from eckart.errors import CheckpointError, EckartError, PromiseError
from eckart.formats import dense, factored
from eckart.formats.factored import module_of
from eckart.linalg.arrays import check_finite
from eckart.linalg.matrices import named_generator
from eckart.linalg.residual import Product, output_difference, relative_error

ROUNDING = 1e-9
"""A recomputed figure may exceed the reported one by this share: sums on another machine …"""

NOISE = 64 * torch.finfo(torch.float64).eps
"""… and by this share of what was compared, where the difference itself is rounding."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at, and what was found."""

    name: str
    held: bool
    detail: str


def verify_output(out: Path, against: Path | None = None) -> list[Check]:
    """Returns the checks of an output folder; those that failed have `held` False.

    Always: the certificate's own digest, the files (none missing, none added, sizes and SHA-256),
    that its claims agree with each other, the tensors' names, shapes and finiteness. With
    `against`, the source: its fingerprint, that each of its tensors is accounted for, the
    relative error of every factored matrix, Wx + b against B(Ax) + b on seeded inputs, what is
    counted, and that every other tensor is identical to the byte. Raises PromiseError where the
    output cannot even be read, CheckpointError where `out` or `against` is not what it should be.
    """
    certificate = _read_written(out)
    checks = [
        Check("certificate", held=True, detail="its digest holds"),
        check_files(out, certificate),
    ]
    if checks[-1].held:
        checks.append(_check_claims(certificate))
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
    checks.append(_check_accounts(source, certificate))
    if not checks[-1].held:
        return checks
    return [*checks, *_checks_against(written, source, certificate)]


def check_files(out: Path, certificate: Certificate) -> Check:
    """Every file is there, none was added, sizes and SHA-256 are as certified."""
    paths = (path for path in out.rglob("*") if path.is_symlink() or not path.is_dir())
    found = {str(path.relative_to(out)) for path in paths}
    expected = {*certificate.files, CERTIFICATE}
    faults = [f"{name} is missing" for name in sorted(expected - found)]
    faults += [f"{name} was added" for name in sorted(found - expected)]
    for name in sorted(found & set(certificate.files)):
        record = certificate.files[name]
        if not (out / name).is_file():
            faults.append(f"{name} is not a regular file")
        elif (out / name).stat().st_size != record.bytes:
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


def _check_claims(certificate: Certificate) -> Check:
    """What the certificate says in two places is the same: no tensor twice, one rank a matrix."""
    names = [row.name for row in [*certificate.matrices, *certificate.copied]]
    faults = [f"{name} stands there twice" for name, n in Counter(names).items() if n > 1]
    if not isinstance(certificate.options.get("seed"), int):
        faults.append("it names no seed")
    if certificate.kind == "factored":
        described = {module_of(record.name): _entry(record) for record in certificate.matrices}
        wrong = described.items() ^ certificate.factored.items()
        faults += [f"{X} is described in two ways, or not at all" for X in sorted(dict(wrong))]
    elif certificate.factored or any(row.form != "dense" for row in certificate.matrices):
        faults.append("a dense checkpoint has no factored matrix")
    return _check("claims", faults, "they agree with each other")


def _entry(record: MatrixRecord) -> FactoredEntry | None:
    if record.form == "dense":
        return None
    return FactoredEntry(
        rank=record.rank, form=record.form, shape=record.shape, orientation=record.orientation
    )


def _open_written(out: Path) -> Checkpoint:
    try:
        return open_checkpoint(out)
    except CheckpointError as error:
        raise PromiseError(str(error)) from None


def _check_config(out: Path, certificate: Certificate) -> Check:
    faults: list[str] = []
    if certificate.kind == "factored" and (out / "config.json").exists():
        promised = factored.quantization_config(certificate.factored)
        try:
            stated = read_json(out / "config.json").get("quantization_config")
            if canonical_json(stated) != canonical_json(promised):
                faults.append("config.json names other factored matrices than the certificate")
        except CheckpointError as error:
            faults.append(str(error))
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
    modules = {module_of(record.name) for record in certificate.matrices}
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


def _check_accounts(source: Checkpoint, certificate: Certificate) -> Check:
    """Every tensor of the source is mentioned, and no other."""
    mentioned = {row.name for row in certificate.copied}
    for X, entry in _entries(source, certificate).items():
        parts = factored.layout(X, entry, "F32") if certificate.kind == "dense" else ()
        mentioned |= {f"{X}.weight", *parts}
    faults = [f"{name} is not accounted for" for name in sorted(source.tensors.keys() - mentioned)]
    faults += [f"{name} is not in the source" for name in sorted(mentioned - source.tensors.keys())]
    return _check("accounts", faults, f"{len(source.tensors)} tensors of the source, each once")


def _entries(source: Checkpoint, certificate: Certificate) -> dict[str, FactoredEntry]:
    """What is factored: in the output, or, where that is dense, in its source."""
    if certificate.kind == "factored":
        return certificate.factored
    entries = read_certificate(source.folder).factored
    if entries.keys() != {module_of(record.name) for record in certificate.matrices}:
        raise CheckpointError(f"{source.folder} does not say what was factored in it.")
    return entries


def _checks_against(
    written: Checkpoint, source: Checkpoint, certificate: Certificate
) -> Iterator[Check]:
    seed, entries = certificate.seed, _entries(source, certificate)
    factored_kind = certificate.kind == "factored"
    factors, matrices = (written, source) if factored_kind else (source, written)
    for record in certificate.matrices:
        X = module_of(record.name)
        product = factored.decode(factors, X, entries[X])
        b = matrices.load(f"{X}.bias") if f"{X}.bias" in matrices.tensors else None
        yield _check_matrix(matrices.load(record.name), product, b, record, seed)
    yield _check_copies(written, source, _stored_names(certificate))
    faults = [
        f"{record.name} {fault}"
        for record in certificate.matrices
        for fault in _miscounted(record, matrices, factors, entries[module_of(record.name)])
    ]
    left = {row.name for row in certificate.copied if row.reason.startswith("dense: ")}
    targeted = left | {record.name for record in certificate.matrices}
    if count_totals(source, written, certificate.matrices, targeted) != certificate.totals:
        faults.append("the totals are others")
    yield _check("counts", faults, "parameters and bytes, of each matrix and in all")


def _miscounted(
    record: MatrixRecord, matrices: Checkpoint, factors: Checkpoint, entry: FactoredEntry
) -> Iterator[str]:
    parameters, sizes = count_matrix(matrices, factors, module_of(record.name), entry)
    if record.form == "dense":
        parameters, sizes = parameters[::-1], sizes[::-1]
    if (parameters, sizes) != (record.parameters, record.bytes):
        yield f"holds {parameters[1]} parameters in {sizes[1]} bytes"
    info = matrices.tensors[record.name]
    if (info.dtype, info.shape, entry.rank) != (record.dtype, record.shape, record.rank):
        yield f"is {info.dtype} {list(info.shape)} of rank {entry.rank}"


def _check_matrix(
    W: torch.Tensor, product: Product, bias: torch.Tensor | None, record: MatrixRecord, seed: int
) -> Check:
    """‖W − BA‖_F/‖W‖_F, and Wx + b against B(Ax) + b, hold what the certificate says."""
    error = relative_error(W, product, record.name)
    generator = named_generator(seed, f"outputs of {record.name}")
    outputs = output_difference(W, product, bias, generator=generator)
    faults: list[str] = []
    size = outputs.max / outputs.relative if outputs.relative else 0.0  # of an output, about
    for what, found, promised, compared in (
        ("relative error", error, record.relative_error, 1.0),
        ("output difference", outputs.max, record.output_error.max, size),
        ("relative output difference", outputs.relative, record.output_error.relative, 1.0),
    ):
        if not found <= promised * (1 + ROUNDING) + NOISE * compared:
            faults.append(f"{what} {found:.6g}, certified {promised:.6g}")
    return _check(
        record.name,
        faults,
        f"error {error:.3g}, outputs differ by {outputs.max:.3g} at most",
    )


def _check_copies(written: Checkpoint, source: Checkpoint, names: dict[str, str]) -> Check:
    faults: list[str] = []
    for original, stored in names.items():
        if original not in source.tensors:
            faults.append(f"{original} is not in the source")
        elif not _same(written.tensors[stored], source.tensors[original]) or not torch.equal(
            written.raw(stored), source.raw(original)
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
