"""The use cases of adapters, a few lines each: extract, apply, resize, merge."""

from collections.abc import Sequence
from pathlib import Path

from eckart.accounting import check_whole, fates_of
from eckart.allocate import AutoRank
from eckart.application import check_base, vocabulary_of, write_applied
from eckart.assemble.application import orders_of
from eckart.assemble.job import Job
from eckart.assemble.recombination import sums_of
from eckart.certificate import (
    Certificate,
    Options,
)
from eckart.checkpoint.statistics import open_statistics
from eckart.checkpoint.tensor_file import SHARD_BYTES
from eckart.checkpoint.writer import check_output, check_space, new_output
from eckart.compression import (
    check_room,
    decompose_all,
    work_folder,
)
from eckart.consumers import check_component, component_of, consumer_of
from eckart.errors import UsageError
from eckart.execute import Progress, Silent, Workers, workers_for
from eckart.extraction import (
    adapter_targets,
    compare_all,
    inspection_peaks,
    open_pair,
    signal_ranks,
    statistics_beside,
    warn_of_losses,
    write_adapter,
)
from eckart.formats.adapters import open_adapter
from eckart.formats.pipelines import addressed, open_lora
from eckart.linalg.rounding import SignalRank
from eckart.merging import (
    check_held_by,
    check_mergeable,
    choose_ranks,
    weights_of,
    write_merged,
)
from eckart.planning import (
    check_align,
    check_device,
    open_dense,
    policy_of,
    resources_for,
    spread,
    stored_dtype,
)
from eckart.selection import select

PathLike = str | Path


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
    consumer: str = "peft",
    component: str | None = None,
    statistics: PathLike | None = None,
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
    """Writes tuned − base as a LoRA adapter for a consumer, and returns its certificate.

    Exactly one of `rank`, `energy`, `error`, `keep` (against the parameters of the changed
    matrices) and `size` (bytes of the adapter's tensors) chooses the ranks, which only min(m, n)
    limits; under a budget rank 0 leaves a module out. `rank="auto"` is the rank of each change
    above the rounding of the tuned model's dtype: see `eckart.signal_rank`. Tensors that do not
    differ are read, and no more. Every one that differs is factored, stored whole (`store_whole`:
    norms, biases, embeddings) or named as lost; more than a thousandth of the change's energy
    lost is a LossError, unless `accept_loss`, and nothing is written but the work folder, from
    which the next run goes on. `consumer` says who must be able to load it (peft, vllm, llama.cpp,
    diffusers, kohya): what it cannot hold is lost for it, and where it takes one rank for all
    modules a budget gives them one. `component` says which model of a diffusion pipeline this is.

    With `statistics` (a folder that `calibrate` wrote, of the tuned model) the error of each change
    is weighed by the inputs that its layer sees and the loss that it costs, as in `compress`:
    `energy` and `error` are shares in that metric, and a budget is spent where it saves most nats
    per token, if every matrix has the curvature; if not, each change counts by its plain energy,
    and the metric within it. Matrices that the statistics do not know are approximated in the
    Frobenius norm, and the certificate names them. `rank="auto"` asks for what rounding hides,
    in no metric; the factors of that rank are those of the metric.

    Cost: both models read twice, and an SVD of each matrix that differs. Peak memory: the largest
    matrix and its SVD, times the workers. Raises InputError (not a pair, nothing to extract), and
    what `compress` raises.
    """
    policy = policy_of(rank=rank, energy=energy, error=error, keep=keep, size=size)
    check_device(device)
    reader = consumer_of(consumer)
    check_whole(store_whole, reader)
    check_component(reader, component)
    check_align(align)
    stored = stored_dtype(dtype)
    model, origin = open_pair(Path(tuned), Path(base), allow_pickle=allow_pickle)
    known = None if statistics is None else open_statistics(Path(statistics))
    inputs = [model.path, origin.path, *([known.folder] if known else [])]
    target, named = Path(out), Path(work) if work else None
    check_output(target, inputs=inputs, force=force)
    options: Options = {
        policy.name: policy.value,
        "for": consumer,
        "component": component,
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
        fates = fates_of(
            changes,
            store_whole=store_whole,
            include=include,
            exclude=exclude,
            consumer=reader,
            component=component,
        )
        if reader.components and fates.matrices:
            component = component_of(fates.matrices, component)
            options["component"] = component
        delta, known = changes.delta(), statistics_beside(known, changes, fates)
        if not accept_loss:
            warn_of_losses(changes, fates, crew.watch)
        ranks: dict[str, SignalRank] = {}
        if isinstance(policy, AutoRank):
            peaks = inspection_peaks(changes, fates)
            crew.count = spread(peaks, fates.matrices, workers=workers, threads=threads)
            ranks = signal_ranks(changes, fates, seed, crew)
        targets = adapter_targets(
            changes,
            fates,
            delta,
            policy,
            align=align,
            dtype=stored,
            found=ranks,
            consumer=reader,
            statistics=known,
        )
        crew.count = resources_for(targets, workers=workers, threads=threads)
        check_room(targets, target, named)
        with new_output(target, inputs=inputs, force=force) as run:
            job = Job(
                delta,
                run.staged,
                seed,
                options,
                threads=threads,
                workers=crew.count,
                statistics=known,
            )
            with work_folder(run, named, job, targets) as work_done:
                decompose_all(work_done, targets, job, crew)
                choices = select(work_done, targets, job, crew).choices
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
                    consumer=reader,
                    component=component,
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

    A LoRA adapter in PEFT's format whose every field is understood: lora_alpha, rank_pattern,
    alpha_pattern, rsLoRA, biases, modules_to_save. Computed in float32 and rounded once to the
    base's dtype; the certificate says what share of the addition that rounding took. An adapter
    that eckart extracted from another base is refused, unless `other_base`. Cost: the base read
    and written once, and both hashed. Peak memory: a few MiB and the factors of one tensor, times
    the workers. Raises CheckpointError where the adapter is for another model.
    """
    origin, folder, target = (
        open_dense(Path(base), allow_pickle=allow_pickle),
        Path(adapter),
        Path(out),
    )
    parts, inputs = open_adapter(folder), [origin.path, folder]
    check_output(target, inputs=inputs, force=force)
    orders, layout = orders_of(origin, parts, subtract=subtract)
    vocabulary_of(orders, layout, origin)
    check_space(target, sum(place.nbytes for place in layout.values()), "the output")
    count = workers_for([], workers, threads)
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
    rank: int | str | None = None,
    energy: float | None = None,
    error: float | None = None,
    keep: float | None = None,
    size: int | None = None,
    align: int = 1,
    consumer: str = "peft",
    component: str | None = None,
    dtype: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Certificate:
    """Writes a LoRA adapter with other ranks: the best approximation of each B·A at its rank.

    `keep` counts against the adapter's own parameters; `error=0` keeps all that is there, and
    `rank="auto"` all but what is rounding: see `eckart.linalg.rank.product_rank`. No base is
    needed, and B·A is never formed: QR of both factors and the SVD of the small core, in float64.
    What the scale was (lora_alpha, patterns, rsLoRA) is in the new factors, whose scale is 1. See
    `merge`, of which this is the case of one.
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
        consumer=consumer,
        component=component,
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
    rank: int | str | None = None,
    energy: float | None = None,
    error: float | None = None,
    keep: float | None = None,
    size: int | None = None,
    align: int = 1,
    consumer: str = "peft",
    component: str | None = None,
    dtype: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Certificate:
    """Writes the weighted sum of LoRA adapters as one, and returns its certificate.

    The exact sum Σ wᵢ·sᵢ·BᵢAᵢ, then its best approximation at the rank that the policy chooses
    (`rank="auto"`: the numerical rank of the sum, so that what adapters share is stored once).
    Different ranks, scales and targets are added as they are; weights may be negative, and
    adapters in any form that `convert` reads. `consumer` is who must be able to load the result;
    where all modules have one rank there, so does a budget. Cost: QR of the stacked factors, and
    the SVD of a core of the summed rank, twice. Peak memory: the factors of one module. Raises
    CheckpointError for an adapter that is not understood, or is for another model, UsageError for
    what the consumer cannot hold.
    """
    policy = policy_of(rank=rank, energy=energy, error=error, keep=keep, size=size)
    check_align(align)
    if not adapters:
        raise UsageError("there is no adapter to merge: name one at least.")
    stored, target, reader = stored_dtype(dtype), Path(out), consumer_of(consumer)
    folders = [Path(path) for path in adapters]
    check_output(target, inputs=folders, force=force)
    opened = [addressed(open_lora(path), reader, component) for path in folders]
    factors = weights_of(weights, len(folders))
    check_mergeable(opened)
    sums = sums_of(opened, factors)
    check_held_by(reader, opened, sums)
    count = workers_for([one.shape for one in sums.values()], workers, threads)
    options: Options = {
        policy.name: policy.value,
        "weights": [str(weight) for weight in factors],
        "for": consumer,
        "component": component,
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
        rest += reader.extra_bytes(len(sums))
        choices = choose_ranks(
            sums, policy, crew, align=align, dtype=stored, rest_bytes=rest, consumer=reader
        )
        job = Job(opened[0].source, run.staged, 0, options, threads=threads, workers=count)
        return write_merged(opened, sums, choices, job, crew, dtype=stored, consumer=reader)
