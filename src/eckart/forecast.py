"""What a run would do and take, from headers and options alone; nothing is written.

What only the weights tell, which tensors differ and what ranks their spectra need, is a range.
"""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from eckart.allocate import AutoRank, Budget
from eckart.planning import Targets


@dataclass(frozen=True, slots=True)
class PlannedMatrix:
    """What would be done with one matrix, from headers alone."""

    name: str
    shape: tuple[int, ...]
    ranks: tuple[int, int]  # the smallest and the largest possible; (0, 0) if copied
    parameters: tuple[int, int]  # before, and after at the largest rank
    reason: str


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What a command of adapters would do, and what it would take at most, in bytes."""

    matrices: list[PlannedMatrix]
    read_bytes: int  # of the inputs' tensors
    output_bytes: int  # of the output's tensors
    free_bytes: int  # where the output would be
    work_bytes: int = 0  # of decompositions, meanwhile
    peak_bytes: int = 0  # of memory, of all workers together
    workers: int = 1
    whole: list[str] = field(default_factory=list[str])  # stored as they are
    lost: dict[str, str] = field(default_factory=dict[str, str])  # if they differ, and why
    remarks: list[str] = field(default_factory=list[str])


def planned(name: str, targets: Targets) -> PlannedMatrix:
    """Returns what would be done with a targeted matrix."""
    item, policy, terms = targets.items[name], targets.policy, targets.terms
    stored, dense = targets.matrices[name].stored, item.dense_parameters
    limit = policy.limit(item, terms)
    if limit == 0:
        reason = targets.refused[name].reason
        return PlannedMatrix(name, stored, (0, 0), (dense, dense), reason)
    smallest = limit if policy.name == "rank" else terms.align
    if terms.additive:
        least = 0 if isinstance(policy, AutoRank | Budget) else min(smallest, limit)
        after = item.parameters(limit, terms.form)
        return PlannedMatrix(name, stored, (least, limit), (dense, after), "")
    after = min(item.parameters(limit, terms.form), dense)
    return PlannedMatrix(name, stored, (smallest, limit), (dense, after), "")


def free_at(place: Path) -> int:
    """Returns the bytes that are free where an output would be."""
    existing = next(path for path in (place, *place.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def room_remarks(needs: Iterable[tuple[str, int, int]]) -> list[str]:
    """Returns where more may be needed than there is: what, how much of it, and what is free."""
    return [
        f"up to {needed:,} bytes of {what} are needed, and {free:,} are free: if all of it is, the "
        "run refuses."
        for what, needed, free in needs
        if needed > free
    ]
