"""What an output tells of itself: its files, its claims, its tensors, and what is counted of them.

Knows the formats and the certificate; must not know the source.
"""

from collections import Counter
from pathlib import Path

from eckart.assemble.certification import Accounts, count_totals, predicted_loss
from eckart.certificate import Certificate, FactoredEntry, MatrixRecord
from eckart.checkpoint.documents import canonical_json, read_json
from eckart.checkpoint.hashing import file_digest
from eckart.checkpoint.source import Source
from eckart.checkpoint.writer import CERTIFICATE
from eckart.errors import CheckpointError, EckartError
from eckart.formats import dense, factored
from eckart.formats.factored import module_of
from eckart.linalg.arrays import check_finite
from eckart.verification.check import Check

OPTIMAL = 1e-5
"""By how much a reported error may be below the optimum, which was computed in float32."""

DENSE = "dense: "


def check_files(out: Path, certificate: Certificate) -> Check:
    """Every file is there, none was added, sizes and digests are as certified."""
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
        elif file_digest(out / name) != record.blake3:
            faults.append(f"{name} was changed")
    return Check.of("files", faults, f"{len(expected)} files, every digest as certified")


def check_claims(certificate: Certificate) -> Check:
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
        faults += metric_faults(certificate)
    elif certificate.factored or any(row.form != "dense" for row in certificate.matrices):
        faults.append("a dense checkpoint has no factored matrix")
    return Check.of("claims", faults, "they agree with each other")


def metric_faults(certificate: Certificate) -> list[str]:
    """Returns where the metric of a matrix, its figures and the statistics contradict each other.

    What is lost altogether is in no matrix's loss: nothing is predicted then.
    """
    rows = certificate.matrices
    faults = [
        f"{row.name} does not say what it loses in its metric ({row.metric})"
        for row in rows
        if (row.metric_error is None) != (row.metric == "frobenius")
        or (row.loss is None) == row.metric.endswith("curvature")
    ]
    if certificate.statistics is None and any(row.metric != "frobenius" for row in rows):
        faults.append("it names no statistics")
    asked, measured = certificate.options.get("loss"), certificate.loss.measured
    if isinstance(asked, float) and not (measured is not None and measured <= asked):
        faults.append(f"it was to lose no more than {asked:.6g} nats, and says {measured}")
    if certificate.loss.predicted != (None if certificate.lost else predicted_loss(rows)):
        faults.append("the predicted loss is not the sum of its matrices'")
    return faults


def _entry(record: MatrixRecord) -> FactoredEntry | None:
    if record.form == "dense":
        return None
    return FactoredEntry(
        rank=record.rank, form=record.form, shape=record.shape, orientation=record.orientation
    )


def check_config(out: Path, certificate: Certificate) -> Check:
    """config.json, where there is one, names the factored matrices of the certificate."""
    faults: list[str] = []
    if certificate.kind == "factored" and (out / "config.json").exists():
        promised = factored.quantization_config(certificate.factored)
        try:
            stated = read_json(out / "config.json").get("quantization_config")
            if canonical_json(stated) != canonical_json(promised):
                faults.append("config.json names other factored matrices than the certificate")
        except CheckpointError as error:
            faults.append(str(error))
    return Check.of("config", faults, f"{len(certificate.factored)} factored matrices named")


def check_tensors(written: Source, certificate: Certificate) -> Check:
    """Every tensor that the certificate accounts for is there, finite, and no other."""
    expected = set(stored_names(certificate).values())
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
    return Check.of("tensors", faults, f"{len(written.tensors)} tensors, all accounted for")


def stored_names(certificate: Certificate) -> dict[str, str]:
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


def check_output_counts(written: Source, certificate: Certificate) -> Check:
    """What is said of the output's size, without the source: of each matrix, and in all."""
    faults = [
        f"{record.name} holds {found[0]} parameters in {found[1]} bytes"
        for record in certificate.matrices
        if (found := _stored(written, record, certificate))
        != (record.parameters[1], record.bytes[1])
    ]
    totals, accounts = certificate.totals, accounts_of(certificate)
    recounted = count_totals(written, written, certificate.matrices, accounts)
    if recounted.model_parameters[1] != totals.model_parameters[1]:
        faults.append(f"the model has {recounted.model_parameters[1]} parameters")
    if recounted.tensor_bytes[1] != totals.tensor_bytes[1]:
        faults.append(f"the tensors have {recounted.tensor_bytes[1]} bytes")
    if recounted.targeted_parameters != totals.targeted_parameters:
        faults.append("the targeted parameters are others")
    return Check.of("output", faults, f"{totals.tensor_bytes[1]:,} bytes of tensors, as counted")


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


def check_optima(certificate: Certificate) -> Check:
    """No product of rank r is nearer than the optimum (Eckart & Young, 1936), in its metric.

    That of M = LᵀWR bounds the error in the metric, and says nothing of the Frobenius norm's.
    """
    faults = [
        f"{record.name} claims an error of {error:.6g}, below the optimum {record.optimum:.6g}"
        for record in certificate.matrices
        if record.optimum is not None
        and (error := error_in_metric(record)) < record.optimum - OPTIMAL
    ]
    return Check.of("optima", faults, "no error is claimed below what its rank allows")


def error_in_metric(record: MatrixRecord) -> float:
    """Returns the relative error in the norm that the matrix was approximated in."""
    return record.relative_error if record.metric_error is None else record.metric_error


def accounts_of(certificate: Certificate) -> Accounts:
    """What the certificate says became of the source's tensors."""
    copied = {row.name: row.reason for row in certificate.copied}
    left = {name for name, reason in copied.items() if reason.startswith(DENSE)}
    targeted = left | {record.name for record in certificate.matrices}
    tied = {row.name: row.to for row in certificate.tied}
    return Accounts(certificate.factored, copied, targeted, tied)
