"""The use cases, a few lines each: the stages of the house in order, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eckart.allocate import Form, RankPolicy
from eckart.assemble.certification import Accounts, versions
from eckart.assemble.checkpoints import dense_assembly
from eckart.assemble.job import Job
from eckart.certificate import (
    Certificate,
    InspectionReport,
    Options,
    Row,
    SourceRecord,
    read_certificate,
)
from eckart.checkpoint.header import DTYPES
from eckart.checkpoint.opening import open_checkpoint
from eckart.checkpoint.paths import printable
from eckart.checkpoint.tensor_file import SHARD_BYTES
from eckart.checkpoint.writer import check_output, new_output
from eckart.compression import (
    check_room,
    check_statistics,
    decompose_all,
    work_folder,
    write_assembly,
    write_factored,
)
from eckart.decision import decide
from eckart.errors import CheckpointError
from eckart.execute import Progress, Silent, Task, Workers, workers_for
from eckart.families import matrices
from eckart.forecast import PlannedMatrix, planned
from eckart.inspection import Inspector, summary
from eckart.planning import (
    check_device,
    expert_remarks,
    find_targets,
    inputs_of,
    open_dense,
    policy_of,
    resources_for,
    spread,
    stored_dtype,
    with_base,
)
from eckart.trial import fitted_to
from eckart.tryout import check_text, text_of, trial_of
from eckart.verification import Check, TextOptions, check_files, verify_output

PathLike = str | Path


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
    statistics: PathLike | None = None,
    text: PathLike | None = None,
    tokens: PathLike | None = None,
    batch: PathLike | None = None,
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
        statistics=Path(statistics) if statistics else None,
    )
    check_text(targets, {"text": text, "tokens": tokens, "batch": batch})
    resources_for(targets, workers=workers, threads=threads)
    if out is not None:
        check_output(Path(out), inputs=inputs_of(targets), force=force)
    return Plan(
        [planned(name, targets) for name in targets.items],
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
    loss: float | None = None,
    form: Form = "ba",
    align: int = 1,
    statistics: PathLike | None = None,
    text: PathLike | None = None,
    tokens: PathLike | None = None,
    batch: PathLike | None = None,
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

    Exactly one of `rank`, `energy`, `error`, `keep`, `size` and `loss` chooses the ranks. A matrix
    that does not pay is copied, and the certificate says so. With `statistics` (a folder that
    `calibrate` wrote, of this very model) matrices are approximated for the inputs that they see
    and the loss that they cost: see `eckart.linalg.metric.Metric`; `energy` and `error` are then
    shares in that metric, and a budget is spent where it saves most nats per token; a matrix
    without statistics is copied. With `text`, `tokens` or `batch` too (see `calibrate`), a tenth of
    it is held out: what the model loses on it is measured, and several ways to spend a budget are
    compared on it (`eckart.allocate.candidates`), which takes eight forward passes a matrix, the
    model in float32 in memory, and the `hf` extra. On the rest the factors are then fitted, in
    forward order, to what the compressed part of the model feeds them (`eckart.drift`), and are
    taken where the tenth says so; not where an `error` or `energy` of each matrix is promised.
    `loss`, in nats per token, needs a text: as few parameters as it measures to allow, which takes
    some sixteen forward passes over the tenth more, and as a rule three rounds of fits.
    `out` appears whole or not at all. A run
    that was stopped goes on where it was when it is called again; with `work` (a folder) or
    `keep_work` its decompositions stay, and serve another budget in seconds.

    Cost: one SVD per matrix (a randomized one for small `rank`). Peak memory: the largest matrix
    and its SVD, times the workers. Raises UsageError (options, output exists), InputError (the
    checkpoint), BusyError and StaleError (the work folder), StorageError, ResourceError.
    """
    policy = policy_of(rank=rank, energy=energy, error=error, keep=keep, size=size, loss=loss)
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
        statistics=Path(statistics) if statistics else None,
    )
    given = text_of(targets, {"text": text, "tokens": tokens, "batch": batch})
    targets = replace(targets, text=given and given.digest)
    trial = given and trial_of(
        targets, given, device=device, threads=threads, allow_pickle=allow_pickle
    )
    count = resources_for(targets, workers=workers, threads=threads)
    source, target, named = targets.source, Path(out), Path(work) if work else None
    inputs = inputs_of(targets)
    check_output(target, inputs=inputs, force=force)
    check_room(targets, target, named, fits=given is not None)
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
    with (
        new_output(target, inputs=inputs, force=force) as run,
        Workers(count, progress or Silent()) as crew,
    ):
        job = Job(
            source,
            run.staged,
            seed,
            options,
            shard_bytes,
            threads,
            count,
            statistics=targets.statistics,
        )
        job = check_statistics(job, crew)
        with work_folder(run, named, job, targets) as work_done:
            decompose_all(work_done, targets, job, crew)
            rest = given and fitted_to(given)
            selection = decide(work_done, targets, job, crew, trial, rest)
            certificate = write_factored(work_done, selection, targets, job, crew, trial)
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


def verify(
    out: PathLike,
    against: PathLike | Sequence[PathLike] | None = None,
    *,
    base: PathLike | None = None,
    statistics: PathLike | None = None,
    consumers: Sequence[str] = (),
    text: PathLike | None = None,
    tokens: PathLike | None = None,
    batch: PathLike | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    workers: int | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> list[Check]:
    """Returns what was checked of an output folder; see `eckart.verification.verify_output`.

    One of `text`, `tokens` and `batch` is run through the output and what it was made from, both
    loaded in `dtype`; the figures of those checks are in their `figures`.
    """
    check_device(device)
    options = TextOptions(
        *(None if path is None else Path(path) for path in (text, tokens, batch)),
        dtype=DTYPES[stored_dtype(dtype) or "F32"],
        device=device,
    )
    sources = [against] if isinstance(against, str | Path) else against or []
    return verify_output(
        Path(out),
        [Path(path) for path in sources],
        base=None if base is None else Path(base),
        statistics=None if statistics is None else Path(statistics),
        consumers=consumers,
        text=options,
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
