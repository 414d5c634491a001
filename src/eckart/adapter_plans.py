"""What the commands of adapters would do, from headers and options alone; nothing is written.

Each refuses what its command would refuse before it reads a weight.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eckart.allocate import AutoRank, Budget, FixedRank, Size
from eckart.application import application_of
from eckart.assemble.application import Add, Replace
from eckart.assemble.recombination import Sum
from eckart.brief import brief_of
from eckart.checkpoint.writer import check_output, check_space
from eckart.comparison import supposed
from eckart.consumers import Consumer
from eckart.errors import UsageError
from eckart.execute import free_memory, workers_for
from eckart.extraction import (
    adapter_targets,
    for_consumer,
    inspection_peaks,
    known_beside,
    metric_remarks,
)
from eckart.forecast import AdapterPlan, PlannedMatrix, free_at, planned, room_remarks
from eckart.merging import MergeBrief, conversion_of, merge_of
from eckart.planning import Targets, check_device, peaks_of, spread

PathLike = str | Path

FLOAT64 = 8

COPIES = 6
"""Of a sum's factors in float64, at the worst: given, their QR, the best, and its error's QR."""


def plan_extraction(
    tuned: PathLike,
    base: PathLike,
    out: PathLike,
    *,
    device: str = "cpu",
    workers: int | None = None,
    threads: int | None = None,
    force: bool = False,
    **asked: Any,
) -> AdapterPlan:
    """Returns what `extract` would do with the same options if every tensor differed.

    Which do, only the weights tell: what a run is sure to refuse is refused, and what it refuses
    if enough of them differ is a remark.
    """
    check_device(device)
    brief = brief_of(tuned, base, **asked)
    check_output(Path(out), inputs=brief.inputs, force=force)
    changes = supposed(brief.tuned, brief.base)
    fates = brief.fates(changes)
    brief = brief.addressed(fates.matrices)
    known = brief.statistics and known_beside(brief.statistics, changes, fates)
    is_auto = isinstance(brief.policy, AutoRank)
    full = {name: min(matrix.shape) for name, matrix in fates.matrices.items()} if is_auto else {}
    targets = adapter_targets(brief, changes, fates, changes.delta(), ranks=full, statistics=known)
    peaks = peaks_of(targets)
    if is_auto:
        found = inspection_peaks(changes, fates)
        peaks = {name: max(peak, found[name]) for name, peak in peaks.items()}
    remarks = [*metric_remarks(targets), *_consumer_remarks(targets, brief.consumer)]
    count = _workers(peaks, targets, workers=workers, threads=threads)
    peak, free = count * max(peaks.values(), default=0), free_at(Path(out))
    output = targets.output_bytes
    if isinstance(brief.policy, Size):
        output = min(output, brief.policy.value)
    room = output + targets.work_bytes
    sources = brief.tuned, brief.base
    return AdapterPlan(
        matrices=[planned(name, targets) for name in targets.items],
        read_bytes=sum(i.nbytes for source in sources for i in source.tensors.values()),
        output_bytes=output,
        free_bytes=free,
        work_bytes=targets.work_bytes,
        peak_bytes=peak,
        workers=count,
        whole=fates.whole,
        lost=fates.lost,
        remarks=remarks + room_remarks([("disk", room, free), ("memory", peak, free_memory())]),
    )


def plan_merge(
    adapters: Sequence[PathLike],
    out: PathLike,
    *,
    workers: int | None = None,
    threads: int | None = None,
    force: bool = False,
    **asked: Any,
) -> AdapterPlan:
    """Returns what `merge`, or `resize` of one adapter, would do with the same options."""
    check_output(Path(out), inputs=[Path(path) for path in adapters], force=force)
    return _plan_sums(merge_of(adapters, **asked), Path(out), workers, threads)


def plan_conversion(
    adapter: PathLike,
    out: PathLike,
    *,
    workers: int | None = None,
    threads: int | None = None,
    force: bool = False,
    **asked: Any,
) -> AdapterPlan:
    """Returns what `convert` would do with the same options."""
    check_output(Path(out), inputs=[Path(adapter)], force=force)
    return _plan_sums(conversion_of(adapter, **asked), Path(out), workers, threads)


def plan_application(
    adapter: PathLike,
    base: PathLike,
    out: PathLike,
    *,
    workers: int | None = None,
    threads: int | None = None,
    force: bool = False,
    **asked: Any,
) -> AdapterPlan:
    """Returns what `apply` would do with the same options."""
    check_output(Path(out), inputs=[Path(base), Path(adapter)], force=force)
    brief = application_of(adapter, base, **asked)
    check_space(Path(out), brief.output_bytes, "the output")
    count, tensors = workers_for([], workers, threads), brief.base.tensors
    matrices = [
        PlannedMatrix(
            name,
            tensors[name].shape,
            (order.part.rank, order.part.rank),
            (tensors[name].parameters, tensors[name].parameters),
            "",
        )
        for name, order in brief.orders.items()
        if isinstance(order, Add)
    ]
    sources = brief.base, brief.adapter.source
    return AdapterPlan(
        matrices=matrices,
        read_bytes=sum(i.nbytes for source in sources for i in source.tensors.values()),
        output_bytes=brief.output_bytes,
        free_bytes=free_at(Path(out)),
        workers=count,
        whole=[name for name, order in brief.orders.items() if isinstance(order, Replace)],
    )


def _plan_sums(
    brief: MergeBrief, out: Path, workers: int | None, threads: int | None
) -> AdapterPlan:
    """The plan of a sum of adapters."""
    count = workers_for([one.shape for one in brief.sums.values()], workers, threads)
    ranks = {name: _range(one, brief) for name, one in brief.sums.items()}
    most = max((high for _, high in ranks.values()), default=0)
    stored = {name: most if brief.consumer.uniform else high for name, (_, high) in ranks.items()}
    matrices = [
        PlannedMatrix(
            name,
            one.shape if one.count == 1 else (one.count, *one.shape),
            ranks[name],
            (one.parameters, one.count * stored[name] * sum(one.shape)),
            "",
        )
        for name, one in brief.sums.items()
    ]
    items = brief.items
    output = brief.terms.rest_bytes + sum(items[name].bytes(r, "ba") for name, r in stored.items())
    free = free_at(out)
    sides = (sum(one.shape) * one.given for one in brief.sums.values())
    return AdapterPlan(
        matrices=matrices,
        read_bytes=sum(i.nbytes for a in brief.adapters for i in a.source.tensors.values()),
        output_bytes=output,
        free_bytes=free,
        peak_bytes=count * COPIES * FLOAT64 * max(sides, default=0),
        workers=count,
        whole=[*brief.adapters[0].whole],
        remarks=room_remarks([("disk", output, free)]),
    )


def _range(one: Sum, brief: MergeBrief) -> tuple[int, int]:
    """The ranks that a sum may be given."""
    if brief.policy is None:
        return one.given, one.given
    if isinstance(brief.policy, FixedRank):
        rank = min(brief.policy.value, one.rank)
        return rank, rank
    budgeted = isinstance(brief.policy, AutoRank | Budget)
    return 0 if budgeted else min(brief.terms.align, one.rank), one.rank


def _consumer_remarks(targets: Targets, consumer: Consumer) -> list[str]:
    """What the consumer may refuse, or make of the ranks, if enough of the tensors differ."""
    try:
        settled = for_consumer(targets, consumer)
    except UsageError as error:
        return [f"if all of them differ, the run refuses: {error}"]
    policy = settled.policy
    if policy is targets.policy or not isinstance(policy, FixedRank):
        return []
    return [f"{consumer.title} takes one rank: {policy.value}, if all of them differ."]


def _workers(
    peaks: Mapping[str, int], targets: Targets, *, workers: int | None, threads: int | None
) -> int:
    """How many; ResourceError where not even the smallest matrix would fit."""
    least = sorted(peaks, key=peaks.__getitem__)[:1]
    return spread(
        {name: peaks[name] for name in least}, targets.matrices, workers=workers, threads=threads
    )
