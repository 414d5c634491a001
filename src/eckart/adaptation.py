"""The use cases of adapters, a few lines each: extract, resize, merge."""

from collections.abc import Sequence
from pathlib import Path

from eckart.allocate import AutoRank
from eckart.assemble.job import Job
from eckart.brief import brief_of
from eckart.certificate import Certificate, Options
from eckart.checkpoint.writer import check_output, new_output
from eckart.compression import (
    check_room,
    decompose_all,
    work_folder,
)
from eckart.execute import Progress, Silent, Workers, workers_for
from eckart.extraction import (
    adapter_targets,
    compare_all,
    for_consumer,
    inspection_peaks,
    signal_ranks,
    statistics_beside,
    warn_of_losses,
    write_adapter,
)
from eckart.linalg.rounding import SignalRank
from eckart.merging import choose_ranks, merge_of, write_merged
from eckart.planning import (
    check_device,
    policy_of,
    resources_for,
    spread,
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
    check_device(device)
    brief = brief_of(
        tuned,
        base,
        rank=rank,
        energy=energy,
        error=error,
        keep=keep,
        size=size,
        align=align,
        consumer=consumer,
        component=component,
        statistics=statistics,
        store_whole=store_whole,
        include=include,
        exclude=exclude,
        dtype=dtype,
        allow_pickle=allow_pickle,
    )
    target, named = Path(out), Path(work) if work else None
    check_output(target, inputs=brief.inputs, force=force)
    shapes = [info.shape for info in brief.tuned.tensors.values() if len(info.shape) > 1]
    count = workers_for(shapes, workers, threads)
    with Workers(count, progress or Silent()) as crew:
        changes = compare_all(brief.tuned, brief.base, crew)
        fates = brief.fates(changes)
        brief = brief.addressed(fates.matrices)
        delta, known = changes.delta(), statistics_beside(brief.statistics, changes, fates)
        if not accept_loss:
            warn_of_losses(changes, fates, crew.watch)
        found: dict[str, SignalRank] = {}
        if isinstance(brief.policy, AutoRank):
            peaks = inspection_peaks(changes, fates)
            crew.count = spread(peaks, fates.matrices, workers=workers, threads=threads)
            found = signal_ranks(changes, fates, seed, crew)
        ranks = {name: one.rank for name, one in found.items()}
        targets = adapter_targets(brief, changes, fates, delta, ranks=ranks, statistics=known)
        targets = for_consumer(targets, brief.consumer)
        crew.count = resources_for(targets, workers=workers, threads=threads)
        check_room(targets, target, named)
        own = {"accept_loss": accept_loss, "seed": seed, "device": device, "threads": threads}
        with new_output(target, inputs=brief.inputs, force=force) as run:
            job = Job(
                delta,
                run.staged,
                seed,
                {**brief.options(dtype), **own},
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
                    found=found,
                    accept_loss=accept_loss,
                    brief=brief,
                )
            run.keep = keep_work and named is None
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
    folders, target = [Path(path) for path in adapters], Path(out)
    check_output(target, inputs=folders, force=force)
    brief = merge_of(
        folders,
        weights=weights,
        rank=rank,
        energy=energy,
        error=error,
        keep=keep,
        size=size,
        align=align,
        consumer=consumer,
        component=component,
        dtype=dtype,
    )
    count = workers_for([one.shape for one in brief.sums.values()], workers, threads)
    asked = policy_of(rank=rank, energy=energy, error=error, keep=keep, size=size)
    options: Options = {  # as it was asked: the brief's own policy is held against the sums
        asked.name: asked.value,
        "weights": [str(weight) for weight in brief.weights],
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
        source = brief.adapters[0].source
        job = Job(source, run.staged, 0, options, threads=threads, workers=count)
        return write_merged(brief, choose_ranks(brief, crew), job, crew)
