"""Does an output keep its promise? Everything is recomputed from the files.

Knows the formats and the certificate; must not know how the output was made.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from eckart.assemble.certification import Accounts, count_totals
from eckart.assemble.measurement import Measured, bias_of, count, measure
from eckart.certificate import (
    Certificate,
    FactoredEntry,
    MatrixRecord,
    read_certificate,
)
from eckart.checkpoint.documents import canonical_json, read_json
from eckart.checkpoint.header import TensorInfo, file_sha256
from eckart.checkpoint.opening import open_checkpoint, open_source
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source
from eckart.checkpoint.writer import CERTIFICATE
from eckart.errors import CheckpointError, EckartError, PromiseError
from eckart.formats import dense, factored
from eckart.formats.factored import module_of
from eckart.linalg.arrays import check_finite

ROUNDING = 1e-9
"""A recomputed figure may exceed the reported one by this share: sums on another machine …"""

NOISE = 64 * torch.finfo(torch.float64).eps
"""… and by this share of what was compared, where the difference itself is rounding."""

OPTIMAL = 1e-5
"""By how much a reported error may be below the optimum, which was computed in float32."""

DENSE = "dense: "


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at, and what was found."""

    name: str
    held: bool
    detail: str


def verify_output(
    out: Path, against: Path | None = None, *, allow_pickle: bool = False
) -> list[Check]:
    """Returns the checks of an output folder; those that failed have `held` False.

    Always: the certificate's own digest, the files (none missing, none added, sizes and SHA-256),
    that its claims agree with each other and with the tensors' names, shapes and finiteness, what
    is counted of the output, and that no error is reported below the optimum. With `against`, the
    source: its fingerprint, that each of its tensors is accounted for, the relative error of
    every changed matrix, Wx + b against B(Ax) + b on seeded inputs, what is counted of both, and
    that every other tensor is identical to the byte. Raises PromiseError where the output cannot
    even be read, CheckpointError where `out` or `against` is not what it should be.
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
    checks += [_check_config(out, certificate), _check_tensors(written, certificate)]
    if not checks[-1].held:
        return checks
    checks += [_check_output_counts(written, certificate), _check_optima(certificate)]
    if against is None:
        return checks
    source = open_source(against, allow_pickle=allow_pickle)
    digests = {name: source.digest(name) for name in source.tensors}
    if source.fingerprint(digests) != certificate.source.fingerprint:
        raise CheckpointError(
            f"{printable(against)} is not the checkpoint that {printable(out)} was made from "
            f"({printable(certificate.source.name)}): its weights differ."
        )
    checks.append(_check_accounts(source, certificate))
    if not checks[-1].held:
        return checks
    return [*checks, *_checks_against(written, source, certificate, digests)]


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
    rows = [*certificate.matrices, *certificate.copied, *certificate.tied]
    faults = [
        f"{name} stands there twice"
        for name, n in Counter(row.name for row in rows).items()
        if n > 1
    ]
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


def _open_written(out: Path) -> Source:
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
    for record in certificate.matrices:
        if certificate.kind == "dense":
            expected.add(record.name)
        else:
            entry = certificate.entry(record)
            expected |= set(factored.layout(record.name, entry, "F32"))
            faults += _faults_of(written, record.name, entry)
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


def _faults_of(written: Source, name: str, entry: FactoredEntry) -> list[str]:
    try:
        factored.check(written, name, entry)
        for product in factored.products(written, name, entry):
            for part, tensor in factored.encode(name, entry, product).items():
                if tensor.is_floating_point():
                    check_finite(tensor, part)
    except EckartError as error:
        return [str(error)]
    return []


def _check_output_counts(written: Source, certificate: Certificate) -> Check:
    """What is said of the output's size, without the source: of each matrix, and in all."""
    faults = [
        f"{record.name} holds {found[0]} parameters in {found[1]} bytes"
        for record in certificate.matrices
        if (found := _stored(written, record, certificate))
        != (record.parameters[1], record.bytes[1])
    ]
    totals, accounts = certificate.totals, _accounts(certificate)
    recounted = count_totals(written, written, certificate.matrices, accounts)
    if recounted.model_parameters[1] != totals.model_parameters[1]:
        faults.append(f"the model has {recounted.model_parameters[1]} parameters")
    if recounted.tensor_bytes[1] != totals.tensor_bytes[1]:
        faults.append(f"the tensors have {recounted.tensor_bytes[1]} bytes")
    if recounted.targeted_parameters != totals.targeted_parameters:
        faults.append("the targeted parameters are others")
    return _check("output", faults, f"{totals.tensor_bytes[1]:,} bytes of tensors, as counted")


def _stored(written: Source, record: MatrixRecord, certificate: Certificate) -> tuple[int, int]:
    """Parameters and bytes of a changed tensor, from the output's headers."""
    if certificate.kind == "dense":
        info = written.tensors[record.name]
        return info.parameters, info.nbytes
    parts = factored.layout(record.name, certificate.entry(record), "F32")
    infos = {name: written.tensors[name] for name in parts}
    perm = f".{factored.PERM}"
    return (
        sum(info.parameters for name, info in infos.items() if not name.endswith(perm)),
        sum(info.nbytes for info in infos.values()),
    )


def _check_optima(certificate: Certificate) -> Check:
    """No product of rank r is nearer than the optimum (Eckart & Young, 1936)."""
    faults = [
        f"{record.name} claims an error of {record.relative_error:.6g}, below the optimum "
        f"{record.optimum:.6g}"
        for record in certificate.matrices
        if record.optimum is not None and record.relative_error < record.optimum - OPTIMAL
    ]
    return _check("optima", faults, "no error is claimed below what its rank allows")


def _check_accounts(source: Source, certificate: Certificate) -> Check:
    """Every tensor of the source is mentioned, and no other."""
    mentioned = {row.name for row in [*certificate.copied, *certificate.tied]}
    for name, entry in _entries(source, certificate).items():
        parts = factored.layout(name, entry, "F32") if certificate.kind == "dense" else ()
        mentioned |= {name, *parts}
    faults = [f"{name} is not accounted for" for name in sorted(source.tensors.keys() - mentioned)]
    faults += [f"{name} is not in the source" for name in sorted(mentioned - source.tensors.keys())]
    return _check("accounts", faults, f"{len(source.tensors)} tensors of the source, each once")


def _entries(source: Source, certificate: Certificate) -> dict[str, FactoredEntry]:
    """What is factored, by tensor: in the output, or, where that is dense, in its source."""
    if certificate.kind == "factored":
        return {record.name: certificate.entry(record) for record in certificate.matrices}
    known = read_certificate(source.path)
    if {r.name for r in known.matrices} != {record.name for record in certificate.matrices}:
        raise CheckpointError(f"{printable(source.path)} does not say what was factored in it.")
    return {record.name: known.entry(record) for record in known.matrices}


def _checks_against(
    written: Source, source: Source, certificate: Certificate, digests: Mapping[str, str]
) -> Iterator[Check]:
    entries = _entries(source, certificate)
    factors, matrices = (written, source) if certificate.kind == "factored" else (source, written)
    for record in certificate.matrices:
        entry = entries[record.name]
        yield _check_matrix(
            record, _measured(matrices, factors, record.name, entry, certificate.seed)
        )
    yield _check_copies(written, source, _stored_names(certificate), digests)
    faults = [
        f"{record.name} {fault}"
        for record in certificate.matrices
        for fault in _miscounted(record, matrices, factors, entries[record.name])
    ]
    accounts = _accounts(certificate)
    if count_totals(source, written, certificate.matrices, accounts) != certificate.totals:
        faults.append("the totals are others")
    yield _check("counts", faults, "parameters and bytes, of each matrix and in all")


def _accounts(certificate: Certificate) -> Accounts:
    """What the certificate says became of the source's tensors."""
    copied = {row.name: row.reason for row in certificate.copied}
    left = {name for name, reason in copied.items() if reason.startswith(DENSE)}
    targeted = left | {record.name for record in certificate.matrices}
    tied = {row.name: row.to for row in certificate.tied}
    return Accounts(certificate.factored, copied, targeted, tied)


def _measured(
    matrices: Source, factors: Source, name: str, entry: FactoredEntry, seed: int
) -> Measured:
    matrix = factored.matrix_of(entry)
    pairs = (
        (matrix.load(matrices, name, index), factored.decode(factors, name, entry, index))
        for index in range(matrix.count)
    )
    bias = bias_of(matrices, f"{module_of(name)}.bias", matrix)
    return measure(pairs, bias, seed=seed, name=name)


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


def _check_matrix(record: MatrixRecord, found: Measured) -> Check:
    """‖W − BA‖_F/‖W‖_F, and Wx + b against B(Ax) + b, hold what the certificate says."""
    outputs, promised = found.outputs, record.output_error
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
    return _check(
        record.name,
        faults,
        f"error {found.relative_error:.3g}, outputs differ by {outputs.max:.3g} at most",
    )


def _check_copies(
    written: Source, source: Source, names: Mapping[str, str], digests: Mapping[str, str]
) -> Check:
    faults: list[str] = []
    for original, stored in names.items():
        if original not in source.tensors:
            faults.append(f"{original} is not in the source")
        elif (
            not _same(written.tensors[stored], source.tensors[original])
            or written.digest(stored) != digests[original]
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
