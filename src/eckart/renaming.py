"""Where transformers puts each tensor of a checkpoint: a parameter, or a piece of one.

Since version 5 modules in memory have other names than tensors in files, and experts are fused.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eckart.checkpoint.paths import natural_order
from eckart.checkpoint.source import Source

STACK, TOP = "MergeModulelist", "Concatenate"

FORMS = [(TOP, 0)], [(STACK, 0)], [(STACK, 0), (TOP, 1)]
"""What transformers does to tensors whose entries stay as they are: put on top, and stacked."""


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter by its name, and which part of it a tensor of the checkpoint became."""

    parameter: str
    expert: int | None = None  # of a stack of fused experts
    row: int = 0  # the first, where several tensors were put on top of each other


@dataclass(frozen=True, slots=True)
class Renamed:
    """What transformers' rules say of a tensor: its parameter, and how it gets there."""

    parameter: str
    pattern: str | None  # of the converter, that the tensor's name fits
    converter: Any


def places_of(
    model: Any, source: Source, names: Iterable[str]
) -> tuple[dict[str, Place], dict[str, str]]:
    """Returns where some tensors of a checkpoint are in its model, and why others are nowhere.

    By transformers' own renaming; then every entry is compared, so that a tensor which was also
    turned or interleaved on the way is not taken for what it no longer is.
    """
    state, found, reasons = model.state_dict(), dict[str, Place](), dict[str, str]()
    renamed = _renamed(model, source.tensors, state)
    alike: dict[tuple[str, str | None], list[str]] = {}
    for name in sorted(source.tensors, key=natural_order):
        alike.setdefault((renamed[name].parameter, renamed[name].pattern), []).append(name)
    for name in names:
        rule = renamed[name]
        if rule.parameter not in state:
            reasons[name] = "the model has no such weight"
            continue
        place = _place(name, rule, alike, source)
        if place is not None and _holds(state[rule.parameter], place, source, name):
            found[name] = place
        else:
            reasons[name] = "transformers holds it in another form"
    return found, reasons


def _renamed(model: Any, names: Iterable[str], state: Mapping[str, Tensor]) -> dict[str, Renamed]:
    from eckart.hf import quiet_transformers  # and transformers, when it is needed

    with quiet_transformers():
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        transforms = get_model_conversion_mapping(model, None, None)
        renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        converters = [one for one in transforms if isinstance(one, WeightConverter)]
        through = {pattern: one for one in converters for pattern in one.source_patterns}
        prefix, known, found = model.base_model_prefix, dict(state), dict[str, Renamed]()
        for name in names:
            key, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if key not in state and name in state:
                key, pattern = name, None
            found[name] = Renamed(key, pattern, through.get(pattern) if pattern else None)
    return found


def _place(
    name: str,
    rule: Renamed,
    alike: Mapping[tuple[str, str | None], list[str]],
    source: Source,
) -> Place | None:
    """By the operations that the tensor goes through: none, stacking, putting on top."""
    if rule.converter is None:
        return Place(rule.parameter)
    steps = [(type(step).__name__, step.__dict__.get("dim")) for step in rule.converter.operations]
    if steps not in FORMS:
        return None
    number, row = alike[rule.parameter, rule.pattern].index(name), 0
    for pattern in rule.converter.source_patterns:
        if pattern == rule.pattern:
            break
        above = alike.get((rule.parameter, pattern), [])
        if number >= len(above):
            return None
        row += source.tensors[above[number]].shape[0]
    return Place(rule.parameter, number if steps[0][0] == STACK else None, row)


def _holds(parameter: Tensor, place: Place, source: Source, name: str) -> bool:
    """Whether the parameter has the tensor's very entries at that place."""
    stored = source.load(name).to(parameter.dtype)
    held = parameter if place.expert is None else parameter[place.expert]
    if stored.shape != held.shape:
        held = held[place.row : place.row + len(stored)] if held.ndim == stored.ndim else held
    return torch.equal(held.detach().cpu(), stored)
