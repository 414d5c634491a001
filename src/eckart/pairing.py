"""A model and its base, held alike and compared: what every claim about an adapter rests on."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import msgspec

from eckart.arrangement import as_loaded, as_the_base
from eckart.assemble.filling import BYTES_PER_SECOND
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source
from eckart.checkpoint.statistics import LeftOut, Moments, Rows, Statistics
from eckart.checkpoint.view import Span, View, cut, is_whole, unseen, whole
from eckart.comparison import Changes, Comparer, Digester, comparable
from eckart.decompose.weighting import check_shape
from eckart.errors import InputError
from eckart.execute import Task, Workers
from eckart.families import has_grown
from eckart.matrix import Matrix

SHARED_SHARE = 0.5
"""Of the tuned model's parameters: with less in common, the base is another model's."""


def alike(tuned: Source, base: Source) -> tuple[Source, Source]:
    """Returns both as a loader holds them, under the base's names; InputError where headers show
    that they are not a pair."""
    theirs = as_loaded(base)
    ours = as_the_base(as_loaded(tuned), theirs)
    shared = [name for name in ours.tensors if name in theirs.tensors]
    common = sum(ours.tensors[name].parameters for name in shared)
    total = sum(info.parameters for info in ours.tensors.values())
    if common < SHARED_SHARE * total:
        raise InputError(
            f"{printable(base.path)} is not the base of {printable(tuned.path)}: they have "
            f"{common / total:.1%} of its parameters in common, by the tensors' names."
        )
    for name in shared:
        mine, its = ours.tensors[name].shape, theirs.tensors[name].shape
        if mine != its and not has_grown(name, mine, its):
            raise InputError(
                f"{printable(name)} is {_shape(mine)} in {printable(tuned.path)} and {_shape(its)} "
                f"in {printable(base.path)}: a change needs equal shapes. Give the base it was "
                "tuned from."
            )
    return ours, theirs


def compare(tuned: Source, base: Source, workers: Workers) -> Changes:
    """Returns what differs. Cost: reads both once, and twice what is put together or dequantized,
    whose digests are those of what is stored."""
    tasks = [
        Task(name, (name,), 2 * size / BYTES_PER_SECOND)
        for name, size in comparable(tuned, base).items()
    ]
    compared = dict(workers.map(Comparer(tuned, base), tasks, "comparing"))
    stored = _stored_digests(tuned, workers), _stored_digests(base, workers)
    return Changes(tuned, base, dict(sorted(compared.items())), stored)


def weighed(statistics: Statistics, tuned: Source, matrices: Mapping[str, Matrix]) -> Statistics:
    """Returns statistics of a model under the names that its tensors have beside its base's.

    Of what is held otherwise than it is stored, the experts of a mixture or layers that only one
    of the two fuses, they are put together from those of its parts, which must share their input.
    The matrices that nothing is known of are `left_out` of the document, with the reason.
    CheckpointError where they are of a matrix of another shape.
    """
    known, left = dict[str, Moments](), list[LeftOut]()
    parts: dict[str, tuple[tuple[Rows, ...], ...]] = {}
    reasons = {row.name: row.reason for row in statistics.document.left_out}
    for name, matrix in matrices.items():
        held = _stored_as(name, tuned)
        found = _moments(held, tuned, matrix, statistics)
        if isinstance(found, str):
            left.append(LeftOut(name=name, reason=reasons.get(held[0].name, found)))
        else:
            known[name], parts[name] = found
    document = msgspec.structs.replace(statistics.document, matrices=known, left_out=left)
    renamed = replace(statistics, document=document, parts=parts)
    for name in known:
        check_shape(renamed, name, matrices[name])
    return renamed


def _stored_as(name: str, source: Source) -> tuple[Span, ...]:
    if isinstance(source, View):
        return source.spans[name]
    return (whole(name, source.tensors[name]),)


Known = tuple[Moments, tuple[tuple[Rows, ...], ...]]


def _moments(
    held: Sequence[Span], tuned: Source, matrix: Matrix, statistics: Statistics
) -> Known | str:
    """What is known of a tensor's matrices, and whose rows each of them has; or why nothing is."""
    source, there = tuned.of if isinstance(tuned, View) else tuned, statistics.document.matrices
    if any(span.name not in there for span in held):
        return "no statistics of it"
    if is_whole(held, source):
        moments = there[held[0].name]
        indices = [None] if moments.count == 1 else [*range(moments.count)]
        return moments, tuple((Rows(held[0].name, i, 0, moments.shape[0]),) for i in indices)
    infos = [source.tensors[span.name] for span in held]
    if matrix.orientation != "out_in" or any(len(info.shape) != 2 for info in infos):
        return "its statistics are of tensors that it has no whole rows of"
    size = sum(span.nbytes for span in held) // matrix.count
    spans = [cut(held, i * size, (i + 1) * size) for i in range(matrix.count)]
    groups = [{there[span.name].groups[0] for span in one} for one in spans]
    curvature = there[held[0].name].curvature
    same = all(there[span.name].curvature == curvature for span in held)
    if not same or any(len(found) > 1 for found in groups):
        return "its statistics are of parts whose inputs differ"
    moments = Moments(
        shape=matrix.shape,
        groups=[group for found in groups for group in found],
        curvature=curvature,
        count=matrix.count,
    )
    return moments, tuple(tuple(_rows(span, source) for span in one) for one in spans)


def _rows(span: Span, source: Source) -> Rows:
    info = source.tensors[span.name]
    each = info.nbytes // info.shape[0]
    return Rows(span.name, None, span.begin // each, span.end // each)


def _stored_digests(source: Source, workers: Workers) -> dict[str, str]:
    infos = source.origin.tensors
    tasks = [
        Task(name, (name,), 2 * infos[name].nbytes / BYTES_PER_SECOND) for name in unseen(source)
    ]
    return dict(workers.map(Digester(source.origin), tasks, "comparing")) if tasks else {}


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a scalar"
