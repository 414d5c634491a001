"""Does an output keep its promise? Everything is recomputed from the files.

Knows the formats and the certificate; must not know how the output was made.
"""

from collections.abc import Iterator
from pathlib import Path

from eckart.certificate import Certificate, read_certificate
from eckart.checkpoint.opening import open_checkpoint, open_source
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source
from eckart.errors import CheckpointError, PromiseError
from eckart.execute import Progress, Silent, Workers, workers_for
from eckart.verification.against import check_accounts, checks_against, digests_of
from eckart.verification.alone import (
    check_claims,
    check_config,
    check_files,
    check_optima,
    check_output_counts,
    check_tensors,
)
from eckart.verification.check import Check

__all__ = ["Check", "check_files", "verify_output"]


def verify_output(
    out: Path,
    against: Path | None = None,
    *,
    workers: int | None = None,
    allow_pickle: bool = False,
    watch: Progress | None = None,
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
        checks.append(check_claims(certificate))
    if not checks[-1].held:
        return checks
    written = _open_written(out)
    checks += [check_config(out, certificate), check_tensors(written, certificate)]
    if not checks[-1].held:
        return checks
    checks += [check_output_counts(written, certificate), check_optima(certificate)]
    if against is None:
        return checks
    source = open_source(against, allow_pickle=allow_pickle)
    count = workers_for([record.shape for record in certificate.matrices], workers, None)
    with Workers(count, watch or Silent()) as crew:
        return [*checks, *_against(written, source, certificate, crew)]


def _against(
    written: Source, source: Source, certificate: Certificate, crew: Workers
) -> Iterator[Check]:
    digests = digests_of(source, source.tensors, crew)
    if source.fingerprint(digests) != certificate.source.fingerprint:
        raise CheckpointError(
            f"{printable(source.path)} is not the checkpoint that {printable(written.path)} was "
            f"made from ({printable(certificate.source.name)}): its weights differ."
        )
    accounts = check_accounts(source, certificate)
    yield accounts
    if accounts.held:
        yield from checks_against(written, source, certificate, digests, crew)


def _read_written(out: Path) -> Certificate:
    """The certificate of a folder that is there: whatever is wrong with it breaks the promise."""
    if not out.is_dir():
        raise CheckpointError(f"{printable(out)} is not a folder: check the path.")
    try:
        return read_certificate(out)
    except CheckpointError as error:
        raise PromiseError(str(error)) from None


def _open_written(out: Path) -> Source:
    try:
        return open_checkpoint(out)
    except CheckpointError as error:
        raise PromiseError(str(error)) from None
