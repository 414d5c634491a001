"""An adapter: what it tells of itself, and what it does, against the model and the base.

Knows the format and the certificate; must not know how the adapter was made.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from eckart.assemble.adapters import adapter_totals, change_error
from eckart.assemble.filling import product_seconds
from eckart.assemble.measurement import Measured, count, measure
from eckart.certificate import Certificate, FactoredEntry
from eckart.checkpoint.delta import Delta
from eckart.checkpoint.documents import canonical_json, read_json
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source
from eckart.checkpoint.statistics import Statistics
from eckart.checkpoint.tensor_file import TensorLayout
from eckart.comparison import Changes
from eckart.decompose.request import on_threads
from eckart.decompose.weighting import Metrics, metric_kind
from eckart.errors import CheckpointError, EckartError
from eckart.execute import Task, Workers
from eckart.formats import peft
from eckart.formats.factored import matrix_of
from eckart.formats.forms import AdapterForm, form_of
from eckart.linalg.arrays import check_finite
from eckart.matrix import Matrix
from eckart.pairing import alike, compare, weighed
from eckart.verification.against import check_matrix
from eckart.verification.alone import check_optima, metric_faults
from eckart.verification.check import Check

CLOSE = 1e-9
"""Of a share: sums in another order."""

LOSS_ROUNDING = 1e-5
"""Of a loss that stems from the float32 values of a decomposition."""


def checks_alone(out: Path, written: Source, certificate: Certificate) -> Iterator[Check]:
    """Yields what an adapter's folder tells of itself."""
    yield check_claims(certificate)
    yield check_configuration(out, certificate, [row.name for row in certificate.stored_whole])
    factored = entries_of(certificate)
    others = {peft.whole_name(row.name, factored) for row in certificate.stored_whole}
    if _has_tied_head(written, others):
        others.add(peft.TIED_HEAD)
    tensors = check_tensors(written, certificate, others)
    yield tensors
    if tensors.held:
        yield check_output(written, certificate)
        yield check_optima(certificate)


def checks_against_pair(
    written: Source,
    tuned: Source,
    base: Source,
    certificate: Certificate,
    workers: Workers,
    *,
    statistics: Statistics | None = None,
) -> Iterator[Check]:
    """Yields what it does: every figure computed again from both models and the written file."""
    tuned, base = alike(tuned, base)
    changes = compare(tuned, base, workers)
    ours, theirs = changes.fingerprints()
    for source, found, known in (
        (tuned, ours, certificate.source),
        (base, theirs, certificate.base),
    ):
        if known is None or found != known.fingerprint:
            raise CheckpointError(
                f"{printable(source.path)} is not what {printable(written.path)} was made from "
                f"({printable(known.name if known else '')}): its weights differ."
            )
    accounts = _check_accounts(changes, certificate)
    yield accounts
    if not accounts.held:
        return
    entries = entries_of(certificate)
    if statistics is not None:
        shapes = {row.name: Matrix(row.shape, row.orientation) for row in certificate.matrices}
        statistics = weighed(statistics, tuned, shapes)
        yield _check_metrics(changes.delta(), statistics, certificate, workers)
    tasks = [Task(name, (name, entry), product_seconds(entry)) for name, entry in entries.items()]
    form = form_of(certificate, entries)
    unit = _Measurer(changes.delta(), written, certificate.seed, form, statistics)
    measured = dict(workers.map(unit, tasks, "measuring"))
    for record in certificate.matrices:
        if record.rank:
            yield check_matrix(record, measured[record.name])
    yield _check_whole(written, changes, certificate)
    yield _check_change(changes, certificate)
    yield _check_counts(written, tuned, certificate)


@dataclass(frozen=True, slots=True)
class _Measurer:
    """Measures what stands for one difference."""

    delta: Delta
    written: Source
    seed: int
    form: AdapterForm
    statistics: Statistics | None = None

    def __call__(self, name: str, entry: FactoredEntry) -> Measured:
        """Returns its errors. Peak memory: one matrix."""
        matrix = matrix_of(entry)
        pairs = (
            (matrix.load(self.delta, name, i), self.form.decode(self.written, name, entry, i))
            for i in range(matrix.count)
        )
        with on_threads(matrix.shape, None):
            metrics = Metrics(self.statistics, name)
            return measure(pairs, None, metrics, seed=self.seed, name=name)


@dataclass(frozen=True, slots=True)
class _Weigher:
    """Measures what it costs to leave a difference out."""

    delta: Delta
    statistics: Statistics

    def __call__(self, name: str, matrix: Matrix) -> float:
        """Returns the nats per token, to second order. Peak memory: one matrix and its roots."""
        metrics, found = Metrics(self.statistics, name), list[float]()
        with on_threads(matrix.shape, None):
            for index in range(matrix.count):
                metric = metrics(index)
                assert metric is not None, name
                found.append(metric.energy(matrix.load(self.delta, name, index)) / 2)
        return math.fsum(found)


def check_claims(certificate: Certificate) -> Check:
    """What the certificate says in two places is the same: no tensor twice, one rank a matrix."""
    names = _rows(certificate)
    faults = [f"{name} stands there twice" for name, n in Counter(names).items() if n > 1]
    if not isinstance(certificate.options.get("seed"), int):
        faults.append("it names no seed")
    faults += [
        f"{row.name} has rank 0, and an error below 1"
        for row in certificate.matrices
        if not row.rank and row.relative_error != 1
    ]
    described = {peft.module_of(row.name): row.rank for row in certificate.matrices if row.rank}
    stored = {X: entry.rank for X, entry in certificate.factored.items()}
    wrong = described.items() ^ stored.items()
    faults += [f"{X} is described in two ways, or not at all" for X in sorted(dict(wrong))]
    if certificate.kind == "adapter" and certificate.change is None:
        faults.append("it says nothing of the change")
    faults += metric_faults(certificate)
    return Check.of("claims", faults, "they agree with each other")


def _has_tied_head(written: Source, whole: set[str]) -> bool:
    """Whether a whole embedding stands there once more, for the output head that is tied to it."""
    tables = [name for name in whole if name.endswith("embed_tokens.weight")]
    return (
        peft.TIED_HEAD in written.tensors
        and len(tables) == 1
        and written.tensors[tables[0]].nbytes == written.tensors[peft.TIED_HEAD].nbytes
        and written.digest(tables[0]) == written.digest(peft.TIED_HEAD)
    )


def _rows(certificate: Certificate) -> list[str]:
    rows = [*certificate.matrices, *certificate.stored_whole, *certificate.lost, *certificate.tied]
    return [*(row.name for row in rows), *certificate.unchanged]


def check_configuration(
    out: Path, certificate: Certificate, whole: Sequence[str], *, has_lora_bias: bool = False
) -> Check:
    """adapter_config.json says what the certificate says, of whatever base and task it names, and
    whether its output head is tied. Other consumers' forms have no such file."""
    entries, faults = entries_of(certificate), list[str]()
    if (form := form_of(certificate, entries)).is_peft:
        try:
            stated = read_json(out / peft.CONFIG)
        except CheckpointError as error:
            return Check.of("config", [str(error)], "")
        promised = form.configuration(
            entries,
            base=stated.get("base_model_name_or_path"),
            task=stated.get("task_type"),
            whole=whole,
            has_lora_bias=has_lora_bias,
            is_tied=stated.get("ensure_weight_tying") is True,
        )
        if canonical_json(stated) != canonical_json(promised):
            faults.append(f"{peft.CONFIG} says something else than the certificate")
    return Check.of("config", faults, f"{len(certificate.factored)} modules named")


def entries_of(certificate: Certificate) -> dict[str, FactoredEntry]:
    """Returns how each tensor that has a product is stored."""
    return {row.name: certificate.entry(row) for row in certificate.matrices if row.rank}


def check_tensors(written: Source, certificate: Certificate, others: set[str]) -> Check:
    """Every product that the certificate accounts for is there, finite, and so are the others."""
    faults, expected, entries = list[str](), {*others}, entries_of(certificate)
    form = form_of(certificate, entries)
    for name, entry in entries.items():
        first = written.tensors.get(form.part_names(name, entry)[0])
        places = form.layout(name, entry, first.dtype if first else "F32")
        expected |= places.keys()
        faults += _faults(written, places)
    here = sorted(others & written.tensors.keys())
    faults += [fault for name in here for fault in _not_finite(written, name)]
    faults += [f"{name} is missing" for name in sorted(expected - written.tensors.keys())]
    faults += [f"{name} is not accounted for" for name in sorted(written.tensors.keys() - expected)]
    return Check.of("tensors", faults, f"{len(written.tensors)} tensors, all accounted for")


def _faults(written: Source, places: dict[str, TensorLayout]) -> Iterable[str]:
    for name, place in places.items():
        found = written.tensors.get(name)
        if found is None:
            continue
        if (found.dtype, found.shape) != (place.dtype, place.shape):
            yield f"{name} is {found.dtype} {[*found.shape]}, not {place.dtype} {[*place.shape]}"
            continue
        yield from _not_finite(written, name)


def _not_finite(written: Source, name: str) -> Iterable[str]:
    try:
        check_finite(written.load(name), name)
    except EckartError as error:
        yield str(error)


def check_output(written: Source, certificate: Certificate) -> Check:
    """What is said of the adapter's size, from its headers."""
    totals = adapter_totals(written.tensors, written.tensors, certificate.matrices)
    claimed = certificate.totals
    faults = [
        f"{what} is {found}, not {said}"
        for what, found, said in (
            ("parameters", totals.model_parameters[1], claimed.model_parameters[1]),
            ("bytes", totals.tensor_bytes[1], claimed.tensor_bytes[1]),
            ("targeted", totals.targeted_parameters, claimed.targeted_parameters),
        )
        if found != said
    ]
    return Check.of("output", faults, f"{claimed.tensor_bytes[1]:,} bytes of tensors, as counted")


def _check_accounts(changes: Changes, certificate: Certificate) -> Check:
    """Every tensor of the tuned model has one row, and the right one."""
    rows, there = _rows(certificate), changes.tuned.tensors
    faults = [f"{name} is not mentioned" for name in sorted(there.keys() - {*rows})]
    faults += [f"{name} is in neither model" for name in sorted({*rows} - there.keys())]
    said, found = {*certificate.unchanged}, {*changes.unchanged}
    faults += [f"{name} did change" for name in sorted(said - found)]
    faults += [f"{name} did not change" for name in sorted((found & {*rows}) - said)]
    return Check.of("accounts", faults, f"{len(rows)} tensors of the model, each in one row")


def _check_whole(written: Source, changes: Changes, certificate: Certificate) -> Check:
    factored = entries_of(certificate)
    names = [row.name for row in certificate.stored_whole]
    faults = [
        f"{name} differs from the tuned model's"
        for name in names
        if written.digest(peft.whole_name(name, factored)) != changes.compared[name].digests[0]
    ]
    return Check.of("whole", faults, f"{len(names)} tensors stored whole, as tuned")


def _check_change(changes: Changes, certificate: Certificate) -> Check:
    """The shares of the change, of each tensor and in all."""
    energies, total = {**changes.changed, **changes.added}, changes.energy or 1.0
    rows = [*certificate.matrices, *certificate.stored_whole, *certificate.lost]
    faults = [
        f"{row.name} has {energies[row.name] / total:.6g} of the change, not {row.energy_share}"
        for row in rows
        if not _near(energies[row.name] / total, row.energy_share)
    ]
    claimed = certificate.change
    lost = [row.energy_share for row in certificate.lost]
    if claimed and not (
        _near(claimed.relative_error, change_error(certificate.matrices, lost))
        and _near(claimed.lost, sum(lost))
        and _near(claimed.factored, sum(row.energy_share or 0 for row in certificate.matrices))
        and _near(claimed.stored_whole, sum(row.energy_share for row in certificate.stored_whole))
        and math.isclose(claimed.energy, changes.energy, rel_tol=CLOSE)
    ):
        faults.append("the sums over all tensors are others")
    carried = f"{1 - claimed.relative_error**2:.4%} of the change is carried" if claimed else ""
    return Check.of("change", faults, carried)


def _check_counts(written: Source, tuned: Source, certificate: Certificate) -> Check:
    entries, faults = entries_of(certificate), list[str]()
    form = form_of(certificate, entries)
    for record in certificate.matrices:
        info = tuned.tensors[record.name]
        found = ((info.parameters, 0), (info.nbytes, 0))
        if entry := entries.get(record.name):
            dtype = written.tensors[form.part_names(record.name, entry)[0]].dtype
            found = count(info, form.stored(entry), dtype)
        if found != (record.parameters, record.bytes):
            faults.append(f"{record.name} has other counts")
    if adapter_totals(tuned.tensors, written.tensors, certificate.matrices) != certificate.totals:
        faults.append("the totals are others")
    return Check.of("counts", faults, "parameters and bytes, of each matrix and in all")


def _check_metrics(
    delta: Delta, statistics: Statistics, certificate: Certificate, workers: Workers
) -> Check:
    """What the statistics know is in their metric, and what is left out costs what they say."""
    weighted = [row for row in certificate.matrices if row.rank or row.metric != "frobenius"]
    faults = [
        f"{row.name} is in the metric of {row.metric}, not of {kind}"
        for row in weighted
        if row.metric != (kind := metric_kind(statistics, row.name))
    ]
    dropped = {row.name: row for row in weighted if not row.rank and row.loss is not None}
    if not faults:
        matrices = {name: Matrix(row.shape, row.orientation) for name, row in dropped.items()}
        tasks = [Task(name, (name, matrix), 0.0) for name, matrix in matrices.items()]
        found = dict(workers.map(_Weigher(delta, statistics), tasks, "measuring"))
        faults += [
            f"{name} costs {loss:.6g} nats per token without a rank, certified {dropped[name].loss}"
            for name, loss in found.items()
            if not math.isclose(loss, dropped[name].loss or 0.0, rel_tol=LOSS_ROUNDING)
        ]
    return Check.of("metrics", faults, f"{len(statistics.names)} matrices that statistics know")


def _near(found: float, said: float | None) -> bool:
    return said is not None and abs(found - said) <= CLOSE
