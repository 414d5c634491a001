"""Where transformers puts each tensor of a checkpoint: a parameter, or a piece of one.

Since version 5 modules in memory have other names than tensors in files, and experts are fused.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eckart.checkpoint.source import Source

if TYPE_CHECKING:
    from eckart.hf.naming import Destination, Joining

STACK, TOP = "MergeModulelist", "Concatenate"

FORMS = ((TOP, 0),), ((STACK, 0),), ((STACK, 0), (TOP, 1))
"""What transformers does to tensors whose entries stay as they are: put on top, and stacked."""


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter by its name, and which part of it a tensor of the checkpoint became."""

    parameter: str
    expert: int | None = None  # of a stack of fused experts
    row: int = 0  # the first, where several tensors were put on top of each other


def places_of(
    model: Any, source: Source, names: Iterable[str]
) -> tuple[dict[str, Place], dict[str, str]]:
    """Returns where some tensors of a checkpoint are in its model, and why others are nowhere.

    By transformers' own renaming; then every entry is compared, so that a tensor which was also
    turned or interleaved on the way is not taken for what it no longer is.
    """
    from eckart.hf.naming import destinations, joinings  # and transformers, when it is needed

    goes, ways = destinations(model, source.tensors), joinings(model)
    state, found, reasons = model.state_dict(), dict[str, Place](), dict[str, str]()
    collected = dict["Destination", list[str]]()
    for name, destination in goes.items():
        collected.setdefault(destination, []).append(name)
    for name in names:
        if name not in goes:
            reasons[name] = "the model has no such weight"
            continue
        destination = goes[name]
        way = None if destination.group is None else ways[destination.group]
        place = _place(name, destination, way, collected, source)
        if place is not None and _holds(state[destination.name], place, source, name):
            found[name] = place
        else:
            reasons[name] = "transformers holds it in another form"
    return found, reasons


def _place(
    name: str,
    destination: "Destination",
    way: "Joining | None",
    collected: "Mapping[Destination, Sequence[str]]",
    source: Source,
) -> Place | None:
    """By the operations that the tensor goes through: none, stacking, putting on top."""
    if way is None:
        return Place(destination.name)
    if way.steps not in FORMS:
        return None
    number, row = collected[destination].index(name), 0
    for group in way.groups[: way.groups.index(destination.group or "")]:
        above = collected.get(replace(destination, group=group), [])
        if number >= len(above):
            return None
        row += source.tensors[above[number]].shape[0]
    return Place(destination.name, number if way.steps[0][0] == STACK else None, row)


def _holds(parameter: Tensor, place: Place, source: Source, name: str) -> bool:
    """Whether the parameter has the tensor's very entries at that place."""
    stored = source.load(name).to(parameter.dtype)
    held = parameter if place.expert is None else parameter[place.expert]
    if stored.shape != held.shape:
        held = held[place.row : place.row + len(stored)] if held.ndim == stored.ndim else held
    return torch.equal(held.detach().cpu(), stored)
