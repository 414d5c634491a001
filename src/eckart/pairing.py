"""A model and its base, held alike and compared: what every claim about an adapter rests on."""

from eckart.arrangement import as_loaded, as_the_base
from eckart.assemble.filling import BYTES_PER_SECOND
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source
from eckart.checkpoint.view import unseen
from eckart.comparison import Changes, Comparer, Digester, comparable
from eckart.errors import InputError
from eckart.execute import Task, Workers
from eckart.families import has_grown

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


def _stored_digests(source: Source, workers: Workers) -> dict[str, str]:
    infos = source.origin.tensors
    tasks = [
        Task(name, (name,), 2 * infos[name].nbytes / BYTES_PER_SECOND) for name in unseen(source)
    ]
    return dict(workers.map(Digester(source.origin), tasks, "comparing")) if tasks else {}


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a scalar"
