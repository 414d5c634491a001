"""The use cases, a few lines each: the stages of the house in order, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eckart.accounting import check_kinds, fates_of
from eckart.allocate import AutoRank, Form, RankPolicy
from eckart.application import check_base, write_applied
from eckart.assemble.application import orders_of
from eckart.assemble.certification import Accounts, versions
from eckart.assemble.checkpoints import dense_assembly
from eckart.assemble.job import Job
from eckart.assemble.recombination import sums_of
from eckart.certificate import (
    Certificate,
    InspectionReport,
    Options,
    Row,
    SourceRecord,
    read_certificate,
)
from eckart.checkpoint.opening import open_checkpoint
from eckart.checkpoint.paths import printable
from eckart.checkpoint.tensor_file import SHARD_BYTES
from eckart.checkpoint.writer import check_output, check_space, new_output
from eckart.compression import (
    check_room,
    choose,
    decompose_all,
    work_folder,
    write_assembly,
    write_factored,
)
from eckart.errors import CheckpointError, UsageError
from eckart.execute import Progress, Silent, Task, Workers, workers_for
from eckart.extraction import (
    adapter_targets,
    compare_all,
    inspection_peaks,
    open_pair,
    signal_ranks,
    warn_of_losses,
    write_adapter,
)
from eckart.families import matrices
from eckart.formats.adapters import open_adapter
from eckart.inspection import Inspector, summary
from eckart.linalg.rounding import SignalRank
from eckart.merging import check_mergeable, choose_ranks, weights_of, write_merged
from eckart.planning import (
    Targets,
    check_align,
    check_device,
    expert_remarks,
    find_targets,
    open_dense,
    policy_of,
    resources_for,
    spread,
    stored_dtype,
    with_base,
)
from eckart.verification import Check, check_files, verify_output

PathLike = str | Path


@dataclass(frozen=True, slots=True)
class PlannedMatrix:
    """What `compress` would do with one matrix, from headers alone."""

    name: str
    shape: tuple[int, ...]
    ranks: tuple[int, int]  # the smallest and the largest possible; (0, 0) if copied
    parameters: tuple[int, int]  # before, and after at the largest rank
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What `compress` would do: every matrix with its range of ranks, every other with why."""

    matrices: list[PlannedMatrix]
    copied: dict[str, str]
    remarks: list[str]


def plan(
    path: PathLike,
    policy: RankPolicy,
    *,
    out: PathLike | None = None,
    form: Form = "ba",
    align: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    device: str = "cpu",
    workers: int | None = None,
    threads: int | None = None,
    allow_pickle: bool = False,
    force: bool = False,
) -> Plan:
    """Returns what `compress` would do, from headers alone; writes nothing.

    Refuses whatever `compress` would refuse before it reads a weight.
    """
    check_device(device)
    targets = find_targets(
        Path(path),
        policy,
        form=form,
        align=align,
        include=include,
        exclude=exclude,
        dtype=dtype,
        allow_pickle=allow_pickle,
    )
    resources_for(targets, workers=workers, threads=threads)
    if out is not None:
        check_output(Path(out), inputs=[targets.source.path], force=force)
    return Plan(
        [_planned(name, targets) for name in targets.items],
        {**targets.copied, **{name: f"tied to {to}" for name, to in targets.tied.items()}},
        targets.remarks,
    )


def compress(
    path: PathLike,
    out: PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    keep: float | None = None,
    size: int | None = None,
    form: Form = "ba",
    align: int = 1,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    workers: int | None = None,
    threads: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    work: PathLike | None = None,
    keep_work: bool = False,
    allow_pickle: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Certificate:
    """Factors the matrices of a checkpoint, writes it in format 1, and returns its certificate.

    Exactly one of `rank`, `energy`, `error`, `keep` and `size` chooses the ranks. A matrix that
    does not pay is copied, and the certificate says so. `out` appears whole or not at all. A run
    that was stopped goes on where it was when it is called again; with `work` (a folder) or
    `keep_work` its decompositions stay, and serve another budget in seconds.

    Cost: one SVD per matrix (a randomized one for small `rank`). Peak memory: the largest matrix
    and its SVD, times the workers. Raises UsageError (options, output exists), InputError (the
    checkpoint), BusyError and StaleError (the work folder), StorageError, ResourceError.
    """
    policy = policy_of(rank=rank, energy=energy, error=error, keep=keep, size=size)
    check_device(device)
    targets = find_targets(
        Path(path),
        policy,
        form=form,
        align=align,
        include=include,
        exclude=exclude,
        dtype=dtype,
        allow_pickle=allow_pickle,
    )
    count = resources_for(targets, workers=workers, threads=threads)
    source, target, named = targets.source, Path(out), Path(work) if work else None
    check_output(target, inputs=[source.path], force=force)
    check_room(targets, target, named)
    options: Options = {
        policy.name: policy.value,
        "form": form,
        "align": align,
        "include": [*include],
        "exclude": [*exclude],
        "dtype": dtype,
        "seed": seed,
        "device": device,
        "threads": threads,
    }
    with new_output(target, inputs=[source.path], force=force) as run:
        job = Job(source, run.staged, seed, options, shard_bytes, threads, count)
        with (
            work_folder(run, named, job, targets) as work_done,
            Workers(count, progress or Silent()) as crew,
        ):
            decompose_all(work_done, targets, job, crew)
            choices = choose(work_done, targets, job, crew)
            certificate = write_factored(work_done, choices, targets, job, crew)
        run.keep = keep_work and named is None
    return certificate


def densify(
    path: PathLike,
    out: PathLike,
    *,
    workers: int | None = None,
    threads: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    progress: Progress | None = None,
) -> Certificate:
    """Multiplies a factored checkpoint out into a dense one that any loader reads."""
    folder, target = Path(path), Path(out)
    known = read_certificate(folder)
    if known.kind != "factored":
        raise CheckpointError(f"{printable(folder)} is not factored: there is nothing to do.")
    if not (files := check_files(folder, known)).held:
        raise CheckpointError(f"{printable(folder)} is damaged: {files.detail}.")
    source = open_checkpoint(folder)
    factors = {record.name: known.entry(record) for record in known.matrices}
    assembly = dense_assembly(source, factors)
    copied = {name: "not factored" for name in assembly.orders if name not in factors}
    count = workers_for([entry.shape for entry in factors.values()], workers, threads)
    with new_output(target, inputs=[folder], force=force) as run:
        options: Options = {"seed": 0, "threads": threads}
        job = Job(source, run.staged, 0, options, shard_bytes, threads, count)
        accounts = Accounts({}, copied, factors.keys())
        config: dict[str, object] = {"quantization_config": None}
        with Workers(count, progress or Silent()) as crew:
            return write_assembly(assembly, "dense", accounts, config, job, crew)


def extract(
    tuned: PathLike,
    base: PathLike,
    out: PathLike,
    *,
    rank: int | str | None = None,
    energy: float | None = None,
    error: float | None = None,
    keep: float | None = None,
    size: int | None = None,
    align: int = 1,
    store_whole: Sequence[str] = (),
    accept_loss: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    workers: int | None = None,
    threads: int | None = None,
    work: PathLike | None = None,
    keep_work: bool = False,
    allow_pickle: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Certificate:
    """Writes tuned − base as a LoRA adapter in PEFT's format, and returns its certificate.

    Exactly one of `rank`, `energy`, `error`, `keep` (against the parameters of the changed
    matrices) and `size` (bytes of the adapter's tensors) chooses the ranks, which only min(m, n)
    limits; under a budget rank 0 leaves a module out. `rank="auto"` is the rank of each change
    above the rounding of the tuned model's dtype: see `eckart.signal_rank`. Tensors that do not
    differ cost nothing. Every one that differs is factored, stored whole (`store_whole`: norms,
    biases, embeddings) or named as lost; more than a thousandth of the change's energy lost is a
    LossError, unless `accept_loss`, and nothing is written but the work folder, from which the
    next run goes on.

    Cost: both models read twice, and an SVD of each matrix that differs. Peak memory: the largest
    matrix and its SVD, times the workers. Raises InputError (not a pair, nothing to extract), and
    what `compress` raises.
    """
    policy = policy_of(rank=rank, energy=energy, error=error, keep=keep, size=size)
    check_device(device)
    check_kinds(store_whole)
    check_align(align)
    stored = stored_dtype(dtype)
    model, origin = open_pair(Path(tuned), Path(base), allow_pickle=allow_pickle)
    inputs, target, named = [model.path, origin.path], Path(out), Path(work) if work else None
    check_output(target, inputs=inputs, force=force)
    options: Options = {
        policy.name: policy.value,
        "for": "peft",
        "align": align,
        "store_whole": [*store_whole],
        "accept_loss": accept_loss,
        "include": [*include],
        "exclude": [*exclude],
        "dtype": dtype,
        "seed": seed,
        "device": device,
        "threads": threads,
    }
    shapes = [info.shape for info in model.tensors.values() if len(info.shape) > 1]
    count = workers_for(shapes, workers, threads)
    with Workers(count, progress or Silent()) as crew:
        changes = compare_all(model, origin, crew)
        fates = fates_of(changes, store_whole=store_whole, include=include, exclude=exclude)
        delta = changes.delta()
        if not accept_loss:
            warn_of_losses(changes, fates, crew.watch)
        ranks: dict[str, SignalRank] = {}
        if isinstance(policy, AutoRank):
            peaks = inspection_peaks(changes, fates)
            crew.count = spread(peaks, fates.matrices, workers=workers, threads=threads)
            ranks = signal_ranks(changes, fates, seed, crew)
        targets = adapter_targets(
            changes, fates, delta, policy, align=align, dtype=stored, found=ranks
        )
        crew.count = resources_for(targets, workers=workers, threads=threads)
        check_room(targets, target, named)
        with new_output(target, inputs=inputs, force=force) as run:
            job = Job(delta, run.staged, seed, options, threads=threads, workers=crew.count)
            with work_folder(run, named, job, targets) as work_done:
                decompose_all(work_done, targets, job, crew)
                choices = choose(work_done, targets, job, crew)
                certificate = write_adapter(
                    work_done,
                    choices,
                    targets,
                    job,
                    crew,
                    changes=changes,
                    fates=fates,
                    found=ranks,
                    accept_loss=accept_loss,
                )
            run.keep = keep_work and named is None
    return certificate


def apply(
    adapter: PathLike,
    base: PathLike,
    out: PathLike,
    *,
    subtract: bool = False,
    other_base: bool = False,
    workers: int | None = None,
    threads: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    allow_pickle: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Certificate:
    """Folds a LoRA adapter into a base, W + s·B·A, or takes one out with `subtract`.

    Any adapter in PEFT's format whose every field is understood: lora_alpha, rank_pattern,
    alpha_pattern, rsLoRA, biases, modules_to_save. Computed in float32 and rounded once to the
    base's dtype; the certificate says what share of the addition that rounding took. An adapter
    that eckart extracted from another base is refused, unless `other_base`. Cost: the base read
    and written once, and hashed. Peak memory: the largest matrix, twice, times the workers. Raises
    CheckpointError where the adapter is for another model.
    """
    origin, folder, target = (
        open_dense(Path(base), allow_pickle=allow_pickle),
        Path(adapter),
        Path(out),
    )
    parts, inputs = open_adapter(folder), [origin.path, folder]
    check_output(target, inputs=inputs, force=force)
    orders, layout = orders_of(origin, parts, subtract=subtract)
    check_space(target, sum(place.nbytes for place in layout.values()), "the output")
    count = workers_for([one.shape for one in parts.parts.values()], workers, threads)
    options: Options = {
        "subtract": subtract,
        "other_base": other_base,
        "seed": 0,
        "threads": threads,
    }
    with (
        new_output(target, inputs=inputs, force=force) as run,
        Workers(count, progress or Silent()) as crew,
    ):
        job = Job(origin, run.staged, 0, options, shard_bytes, threads, count)
        certificate = write_applied(parts, orders, layout, job, crew)
        if not subtract and not other_base:
            check_base(folder, certificate.source.fingerprint, origin)
    return certificate


def resize(
    adapter: PathLike,
    out: PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    keep: float | None = None,
    size: int | None = None,
    align: int = 1,
    dtype: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Certificate:
    """Writes a LoRA adapter with other ranks: the best approximation of each B·A at its rank.

    `keep` counts against the adapter's own parameters; `error=0` keeps all that is there. No base
    is needed, and B·A is never formed: QR of both factors and the SVD of the small core, in
    float64. What the scale was (lora_alpha, patterns, rsLoRA) is in the new factors, whose scale
    is 1. See `merge`, of which this is the case of one.
    """
    return merge(
        [adapter],
        out,
        rank=rank,
        energy=energy,
        error=error,
        keep=keep,
        size=size,
        align=align,
        dtype=dtype,
        workers=workers,
        threads=threads,
        force=force,
        progress=progress,
    )


def merge(
    adapters: Sequence[PathLike],
    out: PathLike,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    keep: float | None = None,
    size: int | None = None,
    align: int = 1,
    dtype: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Certificate:
    """Writes the weighted sum of LoRA adapters as one, and returns its certificate.

    The exact sum Σ wᵢ·sᵢ·BᵢAᵢ, then its best approximation at the rank that the policy chooses
    (`error=0`: as many as it has). Different ranks, scales and targets are added as they are;
    weights may be negative. Cost: QR of the stacked factors, and the SVD of a core of the summed
    rank, twice. Peak memory: the factors of one module. Raises CheckpointError for an adapter
    that is not understood, or is for another model.
    """
    policy = policy_of(rank=rank, energy=energy, error=error, keep=keep, size=size)
    check_align(align)
    if not adapters:
        raise UsageError("there is no adapter to merge: name one at least.")
    stored, target = stored_dtype(dtype), Path(out)
    folders = [Path(path) for path in adapters]
    check_output(target, inputs=folders, force=force)
    opened, factors = [open_adapter(path) for path in folders], weights_of(weights, len(folders))
    check_mergeable(opened)
    sums = sums_of(opened, factors)
    count = workers_for([one.shape for one in sums.values()], workers, threads)
    options: Options = {
        policy.name: policy.value,
        "weights": [str(weight) for weight in factors],
        "align": align,
        "dtype": dtype,
        "seed": 0,
        "threads": threads,
    }
    with (
        new_output(target, inputs=folders, force=force) as run,
        Workers(count, progress or Silent()) as crew,
    ):
        rest = sum(opened[0].source.tensors[name].nbytes for name in opened[0].whole.values())
        rest += sum(one.bias_bytes(stored) for one in sums.values())
        choices = choose_ranks(sums, policy, crew, align=align, dtype=stored, rest_bytes=rest)
        job = Job(opened[0].source, run.staged, 0, options, threads=threads, workers=count)
        return write_merged(opened, sums, choices, job, crew, dtype=stored)


def verify(
    out: PathLike,
    against: PathLike | Sequence[PathLike] | None = None,
    *,
    base: PathLike | None = None,
    workers: int | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> list[Check]:
    """Returns what was checked of an output folder; see `eckart.verification.verify_output`."""
    sources = [against] if isinstance(against, str | Path) else against or []
    return verify_output(
        Path(out),
        [Path(path) for path in sources],
        base=None if base is None else Path(base),
        workers=workers,
        allow_pickle=allow_pickle,
        watch=progress,
    )


def inspect(
    path: PathLike,
    *,
    base: PathLike | None = None,
    full: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    workers: int | None = None,
    threads: int | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> InspectionReport:
    """Returns the rank, spectrum and "is it worth it" verdict of every matrix of a checkpoint.

    With `base` of what was added to that one. Every singular value where min(m, n) ≤ 2048 or
    `full`, else the leading 256.
    """
    source = open_dense(Path(path), allow_pickle=allow_pickle)
    origin = None if base is None else open_dense(Path(base), allow_pickle=allow_pickle)
    found, reasons = matrices(source, include=include, exclude=exclude)
    if origin is not None:
        found, reasons = with_base(found, reasons, source, origin)
    unit = Inspector(source, origin, seed, full, threads)
    tasks = [Task(name, (name, matrix), unit.seconds(matrix)) for name, matrix in found.items()]
    peaks = {name: unit.peak_bytes(name, matrix) for name, matrix in found.items()}
    count = spread(peaks, found, workers=workers, threads=threads)
    with Workers(count, progress or Silent()) as crew:
        rows = dict(crew.map(unit, tasks, "inspecting"))
    source.check_unchanged()
    return InspectionReport(
        source=SourceRecord(name=source.name, fingerprint=source.fingerprint()),
        base=origin and SourceRecord(name=origin.name, fingerprint=origin.fingerprint()),
        versions=versions(),
        matrices=[rows[name] for name in found],
        copied=[Row(name=name, reason=why) for name, why in reasons.items()],
        summary=summary([rows[name] for name in found], [*found.values()]),
        remarks=expert_remarks(found),
    )


def _planned(name: str, targets: Targets) -> PlannedMatrix:
    item, policy, terms = targets.items[name], targets.policy, targets.terms
    stored, dense = targets.matrices[name].stored, item.dense_parameters
    limit = policy.limit(item, terms)
    if limit == 0:
        reason = policy.refusal(item, terms)
        return PlannedMatrix(name, stored, (0, 0), (dense, dense), reason)
    smallest = limit if policy.name == "rank" else terms.align
    after = min(item.parameters(limit, terms.form), dense)
    return PlannedMatrix(name, stored, (smallest, limit), (dense, after), "")
