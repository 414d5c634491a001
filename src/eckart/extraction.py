"""The stages of an extraction: compare, decompose what differs, choose, write the adapter.

Knows the order of things; the stages between are those of a compression, over a difference.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from eckart.accounting import Fates, check_losses
from eckart.allocate import BELOW_FLOOR, Choice, Keep, Size, Terms, one_rank, paying_rank
from eckart.arrangement import is_dequantized
from eckart.assemble.adapters import adapter_assembly, certify_adapter
from eckart.assemble.job import Job
from eckart.assemble.measurement import item_of
from eckart.brief import Brief
from eckart.certificate import Certificate, FactoredEntry
from eckart.checkpoint.delta import Delta
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source
from eckart.checkpoint.statistics import Statistics
from eckart.comparison import Changes
from eckart.compression import check_model
from eckart.consumers import Consumer
from eckart.decompose.request import on_threads
from eckart.decompose.work import Work
from eckart.errors import InputError, LossError, PromiseError, UsageError
from eckart.execute import Progress, Task, Workers
from eckart.formats.forms import check_largest, form_remarks
from eckart.inspection import Inspector, evidence, together
from eckart.linalg.matrices import named_generator
from eckart.linalg.rounding import SignalRank, signal_rank
from eckart.matrix import Matrix
from eckart.pairing import compare, weighed
from eckart.planning import Targets, is_in_nats, nothing_known, width_remarks

STRANGERS = 0.1
"""Of the base, in the tuned model: with less they are two models that were trained apart."""


def compare_all(tuned: Source, base: Source, workers: Workers) -> Changes:
    """Reads both, tensor by tensor; InputError if nothing differs."""
    changes = compare(tuned, base, workers)
    if not changes.changed and not changes.added:
        raise InputError(
            f"there is nothing to extract: {printable(tuned.path)} and {printable(base.path)} hold "
            "the same weights."
        )
    if changes.common < STRANGERS:
        raise InputError(
            f"{printable(base.path)} is not the base of {printable(tuned.path)}: names and shapes "
            f"fit, but {max(changes.common, 0.0):.1%} of its weights are found in there, and of a "
            "base it is about all. Give the one it was tuned from."
        )
    return changes


def adapter_targets(
    brief: Brief,
    changes: Changes,
    fates: Fates,
    delta: Delta,
    *,
    ranks: Mapping[str, int],
    statistics: Statistics | None = None,
) -> Targets:
    """Returns the matrices that differ, as a policy sees them; factors in the tuned dtype.

    In the metric of the `statistics`, which have these matrices' names, where they know them.
    `ranks` are those that were found in them.
    """
    tuned, dtype, consumer = changes.tuned.tensors, brief.dtype, brief.consumer
    dtypes = {
        name: dtype or (HALF if is_dequantized(name, changes.tuned) else tuned[name].dtype)
        for name in fates.matrices
    }
    items = {
        name: item_of(tuned[name], matrix, dtypes[name]) for name, matrix in fates.matrices.items()
    }
    items |= {name: replace(items[name], known_rank=rank) for name, rank in ranks.items()}
    in_nats = statistics is not None and is_in_nats(items, statistics)
    if statistics is not None and not in_nats:
        items = {name: replace(item, energy=changes.changed[name]) for name, item in items.items()}
    rest = sum(tuned[name].nbytes for name in fates.whole) + consumer.extra_bytes(len(items))
    terms = Terms("ba", brief.align, rest, additive=True, in_nats=in_nats)
    brief.policy.check(items, terms)
    matrices = fates.matrices
    return Targets(delta, brief.policy, terms, dtype, matrices, items, {}, {}, dtypes, statistics)


def for_consumer(targets: Targets, consumer: Consumer) -> Targets:
    """Returns the targets with the one rank that a budget allows where a consumer takes no more.

    UsageError where a rank is above what it takes.
    """
    if consumer.uniform:
        policy = one_rank(targets.policy, targets.items, targets.terms)
        targets = replace(targets, policy=policy)
    if targets.policy.name == "rank":  # else only the spectra tell
        check_largest(consumer, {name: one.rank for name, one in targets.requests.items()})
    return targets


def statistics_beside(
    statistics: Statistics | None, changes: Changes, fates: Fates
) -> Statistics | None:
    """Returns statistics of the tuned model under the names of what differs.

    CheckpointError where they are of another model, or of none of these matrices.
    """
    if statistics is None:
        return None
    check_model(statistics, changes.tuned, changes.fingerprints()[0])
    return known_beside(statistics, changes, fates)


def known_beside(statistics: Statistics, changes: Changes, fates: Fates) -> Statistics:
    """Returns the same of whatever model they are of: as far as headers tell."""
    found = weighed(statistics, changes.tuned, fates.matrices)
    if fates.matrices and not found.names:
        raise nothing_known(statistics)
    return found


def warn_of_losses(changes: Changes, fates: Fates, watch: Progress) -> None:
    """Says at once what will be refused in the end, unless it is accepted."""
    try:
        check_losses(changes, fates.lost)
    except LossError as error:
        watch.note(f"{error} The matrices are decomposed meanwhile, and kept.")


SHOWN = 3
"""Names in a remark: enough to see which kind they are."""

HALF = "BF16"
"""Of the factors, where the tuned model is stored in 8-bit floats."""


@dataclass(frozen=True, slots=True)
class Ranker:
    """Finds the rank above rounding of what was added to one matrix."""

    tuned: Source
    base: Source
    seed: int

    def __call__(self, name: str, matrix: Matrix) -> SignalRank:
        """Reads both; see `eckart.signal_rank` for cost and memory, `together` for a stack."""
        found: list[SignalRank] = []
        for index in range(matrix.count):
            label = f"{name}[{index}]" if matrix.is_stack else name
            W, W0 = (matrix.load(source, name, index) for source in (self.tuned, self.base))
            generator = named_generator(self.seed, label)
            with on_threads(matrix.shape, None):
                found.append(signal_rank(W, W0, generator=generator, name=label))
        return together(found)


def signal_ranks(
    changes: Changes, fates: Fates, seed: int, workers: Workers
) -> dict[str, SignalRank]:
    """Returns the rank above rounding of what was added to each matrix."""
    for name in fates.matrices:
        if is_dequantized(name, changes.tuned):
            raise InputError(
                f"{printable(name)} is stored in 8-bit floats, whose rounding --rank auto does not "
                "know: choose --rank R, --energy or --error."
            )
    sight = Inspector(changes.tuned, changes.base, seed, full=False)
    tasks = [
        Task(name, (name, matrix), sight.seconds(matrix)) for name, matrix in fates.matrices.items()
    ]
    return dict(workers.map(Ranker(changes.tuned, changes.base, seed), tasks, "finding ranks"))


def inspection_peaks(changes: Changes, fates: Fates) -> dict[str, int]:
    """Returns the most bytes that finding a rank may take, by matrix."""
    sight = Inspector(changes.tuned, changes.base, 0, full=False)
    return {name: sight.peak_bytes(name, matrix) for name, matrix in fates.matrices.items()}


def write_adapter(
    work: Work,
    choices: Mapping[str, Choice],
    targets: Targets,
    job: Job,
    workers: Workers,
    *,
    changes: Changes,
    fates: Fates,
    found: Mapping[str, SignalRank],
    accept_loss: bool,
    brief: Brief,
) -> Certificate:
    """Refuses what would be lost, else writes the adapter, measures it, and certifies it."""
    choices = {  # nothing above rounding is nothing lost: a rank of 0, with its error
        name: replace(choice, rank=0) if choice.reason == BELOW_FLOOR else choice
        for name, choice in choices.items()
    }
    failed = {
        name: f"{choice.reason.removeprefix('dense: ')}" if choice.rank is None else ""
        for name, choice in choices.items()
        if not choice.rank
    }
    _check_promise(choices, targets)
    fates = fates.without(failed)
    if not accept_loss:
        check_losses(changes, fates.lost)
    delta = targets.source
    assert isinstance(delta, Delta)
    if not any(choice.rank for choice in choices.values()):
        if isinstance(targets.policy, (Keep, Size)) and not all(failed.values()):
            raise UsageError(
                f"--{targets.policy.name} {targets.policy.value} leaves no matrix a rank, and "
                f"{brief.consumer.title} loads no adapter without one: raise it."
            )
        raise InputError(
            f"no matrix of {printable(changes.tuned.path)} differs in a way that a LoRA holds, and "
            f"{brief.consumer.title} loads no adapter without one: copy the tensors that changed "
            "instead."
        )
    check_largest(brief.consumer, {name: choice.rank or 0 for name, choice in choices.items()})
    assembly = adapter_assembly(
        delta,
        fates.matrices,
        choices,
        work.done,
        targets.dtypes,
        whole=fates.whole,
        consumer=brief.consumer,
        component=brief.component,
    )
    filler, files = assembly.begin(job)
    tasks = [Task(name, (order,), order.seconds) for name, order in assembly.orders.items()]
    filled = [one for _, one in workers.map(filler, tasks, "writing")]
    files.sync()
    assembly.write_configuration(job)
    job.source.check_unchanged()
    return certify_adapter(
        job,
        changes,
        assembly,
        filled,
        matrices=fates.matrices,
        decompositions=work.done,
        evidence={name: evidence(one) for name, one in found.items()},
        lost=fates.lost,
        remarks=[
            *remarks_of(changes, fates, assembly.entries),
            *metric_remarks(targets),
            *_below_floor(found),
            *form_remarks(assembly.form, assembly.entries, job.options),
        ],
    )


def remarks_of(changes: Changes, fates: Fates, entries: Mapping[str, FactoredEntry]) -> list[str]:
    """Returns what a reader of the numbers should know."""
    remarks: list[str] = []
    large = [
        name
        for name, entry in entries.items()
        if entry.rank > paying_rank(fates.matrices[name].shape, "ba")
    ]
    if large:
        remarks.append(
            f"{len(large)} of the matrices take more parameters as factors than as they are: what "
            "was added to them is not of low rank. Choose a smaller rank, or keep the tuned model."
        )
    grown = [name for name in fates.whole if name in changes.grown]
    if grown:
        rows = changes.tuned.tensors[grown[0]].shape[0]
        remarks.append(
            f"{len(grown)} tables have more rows than the base's: before the adapter is loaded, "
            f"call resize_token_embeddings({rows}) on the base."
        )
    if any(name.endswith(".bias") for name in fates.whole):
        remarks.append(
            "PEFT loads whole biases into the base itself: disabling the adapter does not bring "
            "the base's own back."
        )
    gone = [name for name in changes.base.tensors if name not in changes.tuned.tensors]
    if gone:
        some = ", ".join(printable(name) for name in gone[:3])
        remarks.append(f"{len(gone)} tensors of the base are not in the tuned model: {some}, …")
    return remarks


def metric_remarks(targets: Targets) -> list[str]:
    """Returns what statistics leave in doubt, and what is approximated without any."""
    statistics, policy = targets.statistics, targets.policy
    if statistics is None:
        return []
    names = [name for name in targets.requests if targets.is_weighted(name)]
    remarks = width_remarks(statistics, names)
    unknown = {row.name: row.reason for row in statistics.document.left_out}
    if unknown:
        remarks.append(
            f"{len(unknown)} of {len(targets.items)} matrices are approximated in the Frobenius "
            f"norm: {_some(f'{printable(name)} ({why})' for name, why in unknown.items())}"
        )
    if policy.is_budget and not targets.terms.in_nats:
        remarks.append(
            "not every matrix has the loss's curvature, so that nothing tells what each costs in "
            f"nats: --{policy.name} counts each change by its energy, as without statistics, and "
            "the metric weighs only what lies within a matrix."
        )
    return remarks


def _some(words: Iterable[str]) -> str:
    """The first few of them."""
    words = [*words]
    return ", ".join(words[:SHOWN]) + (", …" if len(words) > SHOWN else "")


def _below_floor(found: Mapping[str, SignalRank]) -> list[str]:
    """What rounding may hide, by name."""
    names = [name for name, one in found.items() if one.below_floor]
    if not names:
        return []
    some = _some(f"{printable(name)} (rank {found[name].rank})" for name in names)
    return [
        f"{len(names)} of {len(found)} changes reach below the rounding floor, which may hide part "
        f"of their rank: {some}"
    ]


def _check_promise(choices: Mapping[str, Choice], targets: Targets) -> None:
    """An error that no rank keeps, as rounded, is no reason to lose a matrix."""
    for name, choice in choices.items():
        if choice.rank is None and choice.reason.startswith("dense: rounded"):
            raise PromiseError(
                f"what was added to {printable(name)} cannot be stored within the "
                f"{targets.policy.name} asked: rounded to {targets.dtypes[name]}, no rank is near "
                "enough. Add --dtype float32, or allow more."
            )
