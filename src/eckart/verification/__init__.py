"""Does an output keep its promise? Everything is recomputed from the files.

Knows the formats and the certificate; must not know how the output was made.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from eckart.certificate import Certificate, Kind, read_certificate
from eckart.checkpoint.header import read_header
from eckart.checkpoint.opening import open_checkpoint, open_source
from eckart.checkpoint.paths import is_there, printable
from eckart.checkpoint.source import Checkpoint, Source
from eckart.checkpoint.statistics import Statistics, open_statistics
from eckart.checkpoint.writer import CERTIFICATE
from eckart.consumers import ConsumerName, consumer_of
from eckart.errors import CheckpointError, PromiseError, UsageError
from eckart.execute import Progress, Silent, Workers, workers_for
from eckart.formats.adapters import open_adapter
from eckart.formats.forms import form_of, promised_consumer
from eckart.formats.pipelines import addressed, holds_adapter, open_lora
from eckart.texts import Text
from eckart.verification import adapter, merged
from eckart.verification.adapter import checks_against_pair
from eckart.verification.against import check_accounts, checks_against, digests_of
from eckart.verification.alone import (
    check_claims,
    check_config,
    check_files,
    check_optima,
    check_output_counts,
    check_tensors,
)
from eckart.verification.applied import check_applied, checks_against_sum
from eckart.verification.check import Check
from eckart.verification.loaders import Fit, check_fits, fits_of
from eckart.verification.merged import checks_against_adapters
from eckart.verification.outputs import Roles, TextOptions, check_runs, checks_of_outputs

__all__ = ["Check", "Fit", "TextOptions", "check_files", "lint", "verify_output"]


@dataclass(frozen=True, slots=True)
class _Request:
    """What an output is to be held against, and by how many workers."""

    out: Path
    certificate: Certificate
    against: Sequence[Path]
    base: Path | None
    allow_pickle: bool
    workers: int | None
    watch: Progress
    statistics: Path | None

    def crew(self) -> Workers:
        shapes = [record.shape for record in self.certificate.matrices]
        return Workers(workers_for(shapes, self.workers, None), self.watch)

    def source(self, path: Path) -> Source:
        return open_source(path, allow_pickle=self.allow_pickle)


def verify_output(
    out: Path,
    against: Sequence[Path] = (),
    *,
    base: Path | None = None,
    statistics: Path | None = None,
    consumers: Sequence[str] = (),
    text: TextOptions | None = None,
    workers: int | None = None,
    allow_pickle: bool = False,
    watch: Progress | None = None,
) -> list[Check]:
    """Returns the checks of an output folder; those that failed have `held` False.

    Always: the certificate's own digest, the files (none missing, none added, sizes and digests),
    that its claims agree with each other and with the tensors' names, shapes and finiteness, what
    is counted of the output, and that no error is reported below the optimum. With `against`, what
    it was made from: the fingerprint, that each tensor is accounted for, the relative error of
    every changed matrix, Wx + b against B(Ax) + b on seeded inputs, what is counted of both, and
    that every other tensor is identical to the byte; with the `statistics` that it was made with,
    also the error and the loss of every matrix in their metric. A model with an adapter in it is
    held against that adapter and its `base`, an adapter against the tuned model and the `base`, a
    merged one against the adapters in their order. With `text`, too, the same inputs through the
    output and through what it was made from, in rows that are measured and fail only where logits
    are not finite: perplexity, KL, agreement, the largest difference; of an adapter against the
    size of the change. Raises PromiseError where the output cannot even be read, CheckpointError
    where what it is held against is not what it should be, InputError for a text that cannot be
    used.
    """
    asked: list[ConsumerName] = [consumer_of(name).name for name in consumers]
    options = text or TextOptions()
    if asked and holds_adapter(out) and not is_there(out / CERTIFICATE):
        if options.is_given:
            raise UsageError(f"eckart did not write {printable(out)}: leave the text out.")
        fits = lint(out)
        return [check_fits(fits, name) for name in asked]
    certificate = _read_written(out)
    checks = [
        Check("certificate", held=True, detail="its digest holds"),
        check_files(out, certificate),
    ]
    if not checks[-1].held:
        return checks
    request = _Request(
        out,
        certificate,
        against,
        base,
        allow_pickle,
        workers,
        watch or Silent(),
        statistics,
    )
    _check_request(request)
    inputs = _open_text(request, options)
    checks += _checks_of_files(request, asked)
    if inputs is not None and all(check.held for check in checks):
        roles = Roles(out, request.against[0], base)
        checks += checks_of_outputs(
            certificate, roles, inputs, options, allow_pickle=allow_pickle, watch=request.watch
        )
    return checks


def _checks_of_files(request: _Request, asked: Sequence[ConsumerName]) -> Iterator[Check]:
    """What the files tell alone, where they can be loaded, and what they were made from."""
    certificate = request.certificate
    alone, held_against = KINDS[certificate.kind]
    written = _open_written(request)
    for check in alone(request.out, written, certificate):
        yield check
        if not check.held:
            return
    if asked or certificate.kind in ADAPTERS:
        fits, promised = lint(request.out), promised_consumer(certificate).name
        yield check_fits(fits, promised)
        yield from (check_fits(fits, name) for name in asked if name != promised)
    if request.against:
        yield from held_against(request, written)


def _open_text(request: _Request, options: TextOptions) -> Text | None:
    """The text, refused before any work where it cannot be used, or where there is no model."""
    if not options.is_given:
        return None
    if not request.against:
        raise UsageError(
            f"a text is run through two models: give --against, what {printable(request.out)} was "
            "made from."
        )
    roles = Roles(request.out, request.against[0], request.base)
    check_runs(request.certificate, roles)
    is_adapted = request.certificate.kind == "applied"
    return options.open(roles.base if is_adapted and roles.base else roles.source)


def lint(path: Path) -> list[Fit]:
    """Returns who loads an adapter as it stands, and what to set there; no certificate is needed.

    Judged by the consumers' rules from headers and configuration; those that no test of ours runs
    are marked. Raises CheckpointError where it is no adapter, or is not understood.
    """
    return fits_of(open_lora(path))


def _check_request(request: _Request) -> None:
    """Each kind of output is held against as much as it was made from."""
    kind, out, base = request.certificate.kind, printable(request.out), request.base
    other = {"adapter": "the model it was extracted from", "applied": "the adapter in it"}.get(kind)
    if other is None and base is not None:
        raise UsageError(f"{out} has no base: leave --base out.")
    if other is not None and bool(request.against) != (base is not None):
        missing = f"--against, {other}" if base else "--base, too"
        raise UsageError(f"{out} was made from two things: give {missing}.")
    if request.statistics is not None:
        if request.certificate.statistics is None or not request.against:
            why = "was made without statistics" if request.against else "needs --against, too"
            raise UsageError(f"{out} {why}: leave --statistics out, or give both.")
        _open_known(request)
    if kind != "merged" and len(request.against) > 1:
        raise UsageError(f"{out} was not merged: give --against once.")


def _open_known(request: _Request) -> Statistics | None:
    """The statistics that were named, which must be those that the output was made with."""
    if request.statistics is None:
        return None
    statistics, known = open_statistics(request.statistics), request.certificate.statistics
    if known is None or statistics.digest != known.digest:
        raise CheckpointError(
            f"{printable(request.statistics)} does not hold the statistics that "
            f"{printable(request.out)} was made with ({printable(known.name if known else '')})."
        )
    return statistics


def _checkpoint_alone(out: Path, written: Source, certificate: Certificate) -> Iterator[Check]:
    yield check_claims(certificate)
    yield check_config(out, certificate)
    yield check_tensors(written, certificate)
    yield check_output_counts(written, certificate)
    yield check_optima(certificate)


def _adapter_against(request: _Request, written: Source) -> Iterator[Check]:
    assert request.base is not None
    tuned, base = request.source(request.against[0]), request.source(request.base)
    statistics = _open_known(request)
    with request.crew() as crew:
        yield from checks_against_pair(
            written, tuned, base, request.certificate, crew, statistics=statistics
        )


def _applied_against(request: _Request, written: Source) -> Iterator[Check]:
    assert request.base is not None
    part, base = open_adapter(request.against[0]), request.source(request.base)
    with request.crew() as crew:
        yield from checks_against_sum(written, part, base, request.certificate, crew)


def _merged_against(request: _Request, written: Source) -> Iterator[Check]:
    certificate = request.certificate
    reader, listed = promised_consumer(certificate), [*certificate.factored]
    component = certificate.options.get("component")
    adapters = [
        addressed(open_lora(path, listed), reader, None if component is None else str(component))
        for path in request.against
    ]
    with request.crew() as crew:
        yield from checks_against_adapters(written, adapters, request.certificate, crew)


def _checkpoint_against(request: _Request, written: Source) -> Iterator[Check]:
    statistics, source = _open_known(request), request.source(request.against[0])
    with request.crew() as crew:
        yield from _against(written, source, request.certificate, crew, statistics=statistics)


Alone = Callable[[Path, Source, Certificate], Iterator[Check]]
Against = Callable[[_Request, Source], Iterator[Check]]

KINDS: dict[Kind, tuple[Alone, Against]] = {
    "factored": (_checkpoint_alone, _checkpoint_against),
    "dense": (_checkpoint_alone, _checkpoint_against),
    "adapter": (adapter.checks_alone, _adapter_against),
    "applied": (check_applied, _applied_against),
    "merged": (merged.checks_alone, _merged_against),
    "converted": (merged.checks_alone, _merged_against),
}

ADAPTERS: tuple[Kind, ...] = ("adapter", "merged", "converted")


def _against(
    written: Source,
    source: Source,
    certificate: Certificate,
    crew: Workers,
    *,
    statistics: Statistics | None,
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
        yield from checks_against(
            written, source, certificate, digests, crew, statistics=statistics
        )


def _read_written(out: Path) -> Certificate:
    """The certificate of a folder that is there: whatever is wrong with it breaks the promise."""
    if holds_adapter(out) and not is_there(out / CERTIFICATE):
        raise PromiseError(
            f"{printable(out)} is an adapter without {CERTIFICATE}: nothing is certified of it, so "
            "nothing can be proved. Add --for CONSUMER to ask only whether it loads there."
        )
    if not out.is_dir():
        raise CheckpointError(f"{printable(out)} is not a folder: check the path.")
    try:
        return read_certificate(out)
    except CheckpointError as error:
        raise PromiseError(str(error)) from None


def _open_written(request: _Request) -> Source:
    try:
        if request.certificate.kind in ADAPTERS:
            form = form_of(request.certificate, adapter.entries_of(request.certificate))
            return Checkpoint(request.out, read_header(request.out / form.weights))
        return open_checkpoint(request.out)
    except CheckpointError as error:
        raise PromiseError(str(error)) from None
