"""The stages of a compression, one after the other, over one work folder.

Knows the order of things and what stays behind when one of them fails.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from eckart import allocate
from eckart.allocate import Budget, Choice
from eckart.allocate.budget import NOTHING
from eckart.assemble.certification import Accounts, certify, versions
from eckart.assemble.checkpoints import Assembly, factored_assembly
from eckart.assemble.job import Job
from eckart.assemble.multiplying import restored
from eckart.assemble.sidecars import write_sidecars
from eckart.certificate import Certificate, Kind, Loss
from eckart.checkpoint.lock import locked
from eckart.checkpoint.opening import open_checkpoint
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source
from eckart.checkpoint.statistics import Statistics
from eckart.checkpoint.writer import OutputRun, check_space
from eckart.decompose import Decomposer
from eckart.decompose.request import seconds_for, threads_for
from eckart.decompose.work import PARTS, Work, identity_of, open_work
from eckart.errors import (
    CheckpointError,
    EckartError,
    LossError,
    PromiseError,
    ResourceError,
    StorageError,
)
from eckart.execute import Progress, Task, Workers
from eckart.formats import factored
from eckart.formats.factored import quantization_config
from eckart.planning import Targets
from eckart.selection import Selection
from eckart.trial import Trial
from eckart.verification.against import digests_of

WORTH_KEEPING = 10.0
"""Seconds of decomposing after which the parts outlive an error of the input."""

CLOSE = 0.995
"""A result this near to the budget needs no explanation."""


def check_room(targets: Targets, out: Path, work: Path | None, *, fits: bool = False) -> None:
    """Raises StorageError unless the parts and the output have room, each where it will be.

    With a text there may be `fits` beside the parts.
    """
    output = targets.output_bytes
    parts = targets.work_bytes + (targets.fits_bytes if fits else 0)
    if work is None:
        check_space(out, output + parts, "the run")
    else:
        check_space(work, parts, "the work folder")
        check_space(out, output, "the output")


@contextmanager
def work_folder(run: OutputRun, named: Path | None, job: Job, targets: Targets) -> Generator[Work]:
    """Yields the open work: in the run's own folder, or in the named one under its own lock.

    When the run fails it decides what stays: whatever took long, so that it can go on.
    """
    identity = identity_of(
        job.source,
        seed=job.seed,
        threads=job.threads,
        device=str(job.options["device"]),
        versions=versions(),
        statistics=job.statistics,
    )
    folder, began = named or run.folder, time.monotonic()
    with locked(named) if named else nullcontext():
        run.keep = (run.folder / PARTS).exists()  # of an earlier run: not ours to throw away
        work = open_work(folder, job.source, identity, targets.requests)
        try:
            yield work
        except BaseException as error:
            lasting = not isinstance(error, EckartError) or isinstance(
                error, (StorageError, ResourceError, LossError)
            )
            long = time.monotonic() - began > WORTH_KEEPING
            run.keep = run.keep or (bool(work.done) and named is None and (lasting or long))
            if work.done and (run.keep or named):
                error.add_note(
                    f"{len(work.done)} of {len(targets.requests)} matrices are done and kept in "
                    f"{printable(folder)}: run the same command again to go on, or delete it."
                )
            raise


def check_statistics(job: Job, workers: Workers) -> Job:
    """Returns the job, its source hashed; CheckpointError if the statistics are another model's.

    Only the weights tell: they are read once more than without statistics, and hashed once.
    """
    source, statistics = job.source, job.statistics
    if statistics is None:
        return job
    digests = digests_of(source, source.tensors, workers)
    check_model(statistics, source, source.fingerprint(digests))
    hashed = replace(source, known=digests)
    source.check_unchanged()
    return replace(job, source=hashed)


def check_model(statistics: Statistics, source: Source, fingerprint: str) -> None:
    """Raises CheckpointError unless the statistics are of the model with that fingerprint."""
    if fingerprint != statistics.fingerprint:
        raise CheckpointError(
            f"the statistics in {printable(statistics.folder)} are of another model "
            f"({printable(statistics.document.model.name)}) than {printable(source.path)}, or of "
            "other weights: calibrate this one."
        )


def decompose_all(work: Work, targets: Targets, job: Job, workers: Workers) -> None:
    """Decomposes what no kept part serves; every result is in the journal when it is counted."""
    missing = work.missing(targets.requests)
    _say_what_is_kept(work, [*missing], len(targets.requests), workers.watch)
    device = str(job.options["device"])
    unit = Decomposer(job.source, work.digest, job.seed, device, job.threads, job.statistics)
    parts, tasks = work.parts(missing), list[Task]()
    for name, request in missing.items():
        matrix = targets.matrices[name]
        threads = job.threads or threads_for(matrix.shape)
        arguments = (name, matrix, request, parts[name])
        seconds = seconds_for(matrix, request, threads, weighted=targets.is_weighted(name))
        tasks.append(Task(name, arguments, seconds))
    for _, result in workers.map(unit, tasks, "decomposing"):
        work.record(result)
    job.source.check_unchanged()


def write_factored(  # noqa: PLR0917 what was decomposed, chosen and asked, and who does it
    work: Work,
    selection: Selection,
    targets: Targets,
    job: Job,
    workers: Workers,
    trial: Trial | None = None,
) -> Certificate:
    """Lays the files out, fills them, measures what was written, and certifies it."""
    choices = selection.choices
    assembly = factored_assembly(
        job.source,
        targets.matrices,
        choices,
        work.done,
        fits=selection.fits,
        left_out=targets.tied.keys(),
        dtype=targets.dtype,
    )
    dense = {name: choice.reason for name, choice in choices.items() if choice.rank is None}
    accounts = Accounts(
        assembly.entries,
        {**targets.copied, **dense},
        choices.keys(),
        targets.tied,
        (*targets.remarks, *_shortfall(assembly, choices, targets, work)),
    )
    config: dict[str, object] = {"quantization_config": quantization_config(assembly.entries)}

    def loss() -> Loss:
        if trial is None:
            return Loss()
        found = trial.outcome(_written_matrices(job, targets, assembly))
        measured = trial.rise(found)
        _check_loss(targets, measured)
        return Loss(
            measured=measured,
            divergence=found.divergence,
            tokens=trial.tokens,
            allocation=selection.name,
            candidates=selection.divergences,
            drift=selection.drift,
        )

    return write_assembly(assembly, "factored", accounts, config, job, workers, loss)


def write_assembly(  # noqa: PLR0917 an output, and what is said of it
    assembly: Assembly,
    kind: Kind,
    accounts: Accounts,
    config: dict[str, object],
    job: Job,
    workers: Workers,
    loss: Callable[[], Loss] = Loss,
) -> Certificate:
    """Fills the staged folder as planned, in any order, and writes the certificate over it."""
    filler, files = assembly.begin(job)
    tasks = [Task(name, (order,), order.seconds) for name, order in assembly.orders.items()]
    filled = [one for _, one in workers.map(filler, tasks, "writing")]
    files.sync()
    write_sidecars(job, config)
    job.source.check_unchanged()
    return certify(job, kind, accounts, filled, loss())


def _check_loss(targets: Targets, measured: float | None) -> None:
    """Raises PromiseError where what was written loses more than was asked."""
    policy = targets.policy
    if isinstance(policy, allocate.Loss) and measured is not None and measured > policy.value:
        raise PromiseError(
            f"what was written loses {measured:.6g} nats per token, and --loss {policy.value} was "
            "asked, though it was measured to lose no more before: please report it."
        )


def _written_matrices(
    job: Job, targets: Targets, assembly: Assembly
) -> Iterator[tuple[str, Tensor]]:
    """The products as they stand in the staged files, each as its tensor was stored."""
    written = open_checkpoint(job.staged)
    for name, matrix in targets.matrices.items():
        if entry := assembly.entries.get(factored.module_of(name)):
            products = factored.products(written, name, entry)
            parts = [product.rows(0, matrix.shape[0]) for product in products]
            yield name, restored(matrix, parts)


def _say_what_is_kept(work: Work, missing: Sequence[str], count: int, watch: Progress) -> None:
    if work.damaged:
        watch.note(f"{len(work.damaged)} kept parts are damaged, and are made again")
    if again := sum(name in work.done for name in missing):
        watch.note(f"{again} matrices were kept up to a smaller rank, and are made again")
    if kept := count - len(missing):
        watch.note(f"{kept} of {count} matrices are done already")


def _shortfall(
    assembly: Assembly, choices: Mapping[str, Choice], targets: Targets, work: Work
) -> list[str]:
    """Why a budget is not used up, where it is not."""
    if not isinstance(targets.policy, Budget):
        return []
    spent, asked = _spent(assembly, choices, targets)
    if spent >= CLOSE * asked:
        return []
    exact = all(
        choice.rank is None
        or work.done[name].spectrum.tail_energy(choice.rank)
        <= NOTHING * work.done[name].spectrum.energy
        for name, choice in choices.items()
    )
    why = (
        "every matrix is exact to rounding, and more would gain nothing"
        if exact
        else "the next rank of any matrix would exceed it"
    )
    return [f"{spent / asked:.1%} of the budget is used: {why}."]


def _spent(
    assembly: Assembly, choices: Mapping[str, Choice], targets: Targets
) -> tuple[float, float]:
    """What the output takes of the budget, and the budget, in its unit."""
    if targets.policy.name == "size":
        return assembly.bytes, float(targets.policy.value)
    parts = [
        item.dense_parameters
        if (choice := choices[name]).rank is None
        else item.parameters(choice.rank, choice.form)
        for name, item in targets.items.items()
    ]
    total = sum(item.dense_parameters for item in targets.items.values())
    return sum(parts), float(targets.policy.value) * total
