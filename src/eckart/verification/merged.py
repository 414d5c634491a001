"""A resized adapter, or a sum of several, against what it was made from.

Knows the format and the certificate; must not know how the adapter was made.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eckart.assemble.adapter_certification import merged_totals
from eckart.assemble.recombination import Sum, bias_of_sum, counts_of, missed_energy, sums_of
from eckart.certificate import Certificate, FactoredEntry, MatrixRecord
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source
from eckart.errors import CheckpointError, PromiseError
from eckart.execute import Task, Workers
from eckart.formats import peft
from eckart.formats.adapters import Adapter
from eckart.formats.forms import AdapterForm, form_of
from eckart.linalg.factors import product_energy
from eckart.linalg.residual import rounded_up
from eckart.verification.adapter import (
    check_claims,
    check_configuration,
    check_output,
    check_tensors,
    entries_of,
)
from eckart.verification.against import NOISE, ROUNDING
from eckart.verification.alone import check_optima
from eckart.verification.check import Check


@dataclass(frozen=True, slots=True)
class _Measurer:
    """Measures one product against the exact sum again."""

    written: Source
    form: AdapterForm

    def __call__(self, one: Sum, entry: FactoredEntry) -> float:
        """Returns ‖sum − B'A'‖/‖sum‖, over all matrices of a stack."""
        missed = total = 0.0
        for index in range(one.count):
            exact = one.factors(index)
            kept = self.form.decode(self.written, one.name, entry, index)
            missed, total = missed + missed_energy(exact, kept), total + product_energy(exact)
        return rounded_up(missed, total)


def checks_alone(out: Path, written: Source, certificate: Certificate) -> Iterator[Check]:
    """Yields what the folder tells of itself."""
    yield check_claims(certificate)
    whole = [row.name for row in certificate.copied]
    biases = [name for name in written.tensors if name.endswith(".lora_B.bias")]
    yield check_configuration(out, certificate, whole, has_lora_bias=bool(biases))
    factored = entries_of(certificate)
    wholes = {peft.whole_name(name, factored) for name in whole}
    tensors = check_tensors(written, certificate, {*wholes, *biases})
    yield tensors
    if tensors.held:
        yield check_output(written, certificate)
        yield check_optima(certificate)


def checks_against_adapters(
    written: Source, adapters: Sequence[Adapter], certificate: Certificate, workers: Workers
) -> Iterator[Check]:
    """Yields a check of every sum, and of what was stored whole."""
    if len(adapters) != len(certificate.merged):
        raise CheckpointError(
            f"{printable(written.path)} was made from {len(certificate.merged)} adapters: give "
            "--against once for each, in their order."
        )
    for adapter, known in zip(adapters, certificate.merged, strict=True):
        if adapter.source.fingerprint() != known.fingerprint:
            raise CheckpointError(
                f"{printable(adapter.source.path)} is not what {printable(written.path)} was made "
                f"from ({printable(known.name)}): its weights differ, or the order."
            )
    sums = sums_of(adapters, _weights(certificate))
    rows = [row.name for row in certificate.matrices]
    faults = [f"{name} is not mentioned" for name in sorted(sums.keys() - {*rows})]
    faults += [f"{name} is in no adapter" for name in sorted({*rows} - sums.keys())]
    accounts = Check.of("accounts", faults, f"{len(rows)} modules of the adapters, each in one row")
    yield accounts
    if not accounts.held:
        return
    tasks = [
        Task(row.name, (sums[row.name], certificate.entry(row)), sums[row.name].seconds)
        for row in certificate.matrices
        if row.rank
    ]
    form = form_of(certificate, entries_of(certificate))
    measured = dict(workers.map(_Measurer(written, form), tasks, "measuring"))
    for row in certificate.matrices:
        if row.rank:
            yield _check_sum(row, measured[row.name])
    faults = [
        f"{name} differs from the adapter's"
        for name, given in adapters[0].whole.items()
        if (stored := peft.whole_name(name, entries_of(certificate))) not in written.tensors
        or written.digest(stored) != adapters[0].source.digest(given)
    ]
    for name, one in sums.items():
        bias = peft.bias_name(name)
        if one.bias_bytes(None) and bias not in written.tensors:
            faults.append(f"{bias} is missing")
        elif bias in written.tensors:
            stored = written.load(bias)
            if not stored.equal(bias_of_sum(one).to(stored.dtype)):
                faults.append(f"{bias} is not the sum")
    yield Check.of("others", faults, "what is no product is as the adapters have it")
    yield _check_counts(written, adapters, sums, certificate)


def _check_counts(
    written: Source,
    adapters: Sequence[Adapter],
    sums: Mapping[str, Sum],
    certificate: Certificate,
) -> Check:
    """Parameters and bytes of every module, and of all adapters."""
    entries = entries_of(certificate)
    form, faults = form_of(certificate, entries), list[str]()
    for record in certificate.matrices:
        one, entry = sums[record.name], entries.get(record.name)
        stored, dtype = 0, one.dtype
        if entry is not None:
            stored = form.stored(entry).rank
            dtype = written.tensors[form.part_names(record.name, entry)[0]].dtype
        if (record.parameters, record.bytes) != counts_of(one, stored, dtype):
            faults.append(f"{record.name} has other counts")
    totals = merged_totals(adapters, written.tensors, certificate.matrices)
    if totals != certificate.totals:
        faults.append("the totals are others")
    return Check.of("counts", faults, "parameters and bytes, of each module and in all")


def _weights(certificate: Certificate) -> list[float]:
    given = certificate.options.get("weights")
    try:
        weights = [float(weight) for weight in given] if isinstance(given, list) else []
    except ValueError:
        weights = []
    if len(weights) != len(certificate.merged):
        raise PromiseError("its certificate does not say how the adapters were weighted.")
    return weights


def _check_sum(record: MatrixRecord, found: float) -> Check:
    held = found <= record.relative_error * (1 + ROUNDING) + NOISE
    faults = [] if held else [f"error {found:.6g}, certified {record.relative_error:.6g}"]
    return Check.of(record.name, faults, f"error {found:.3g} of the exact sum")
