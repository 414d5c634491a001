"""One look at a model as it runs: which matrices take part, which share inputs, which matter.

Knows products; must not know what is summed of them.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eckart.calibration.observation import Key, Observer, Product, Rows
from eckart.calibration.prediction import Model
from eckart.checkpoint.paths import natural_order, printable
from eckart.errors import InputError
from eckart.families import PAIRS
from eckart.matrix import Matrix
from eckart.renaming import Place

NARROWING = {*PAIRS.values(), "w2"}
"""Layers of fused experts whose inputs are an expert's own; all others share the layer's."""

Inputs = tuple[Any, ...]
"""What tells one input from another: equal for matrices that share theirs."""


@dataclass(frozen=True, slots=True)
class Site:
    """One matrix of the checkpoint, and where it is in memory."""

    name: str
    index: int  # among the matrices of a stack
    label: str  # "name", or "name[index]"
    key: Key
    row: int  # the first of the parameter's rows that are its own
    shape: tuple[int, int]

    @property
    def is_expert(self) -> bool:
        """Whether it is one of a stack in memory."""
        return self.key[1] is not None

    @property
    def narrows(self) -> bool:
        """Whether it is an expert's second layer."""
        module = self.key[0].removesuffix(".weight").rpartition(".")[2]
        return self.is_expert and module in NARROWING


def sites_of(matrices: Mapping[str, Matrix], places: Mapping[str, Place]) -> list[Site]:
    """Returns every single matrix of those that have a place, in the order of the model."""
    return [
        Site(name, index, _label(name, index, matrix), key, place.row, matrix.shape)
        for name, place in sorted(places.items(), key=lambda item: natural_order(item[0]))
        for matrix in [matrices[name]]
        for index in range(matrix.count)
        for key in [(place.parameter, index if matrix.is_stack else place.expert)]
    ]


def _label(name: str, index: int, matrix: Matrix) -> str:
    return f"{name}[{index}]" if matrix.count > 1 else name


@dataclass
class Survey:
    """What was seen of each parameter's products."""

    shapes: dict[Key, tuple[int, int]] = field(default_factory=dict[Key, tuple[int, int]])
    inputs: dict[Key, list[int]] = field(default_factory=dict[Key, list[int]])
    reached: set[Key] = field(default_factory=set[Key])  # by the loss's gradient
    predicts: bool = False  # whether there is a loss
    _sources: dict[int, tuple[weakref.ref[Tensor], int]] = field(
        default_factory=dict[int, tuple[weakref.ref[Tensor], int]]
    )
    _count: Iterator[int] = field(default_factory=lambda: iter(range(2**62)))

    def __call__(self, product: Product) -> Callable[[Tensor], None]:
        """Takes a product down."""
        key = product.key
        self.shapes[key] = (product.height, product.width)
        self.inputs.setdefault(key, []).append(self._number(product.source))

        def reach(_: Tensor) -> None:
            self.reached.add(key)

        return reach

    def left_out(self, sites: Sequence[Site]) -> dict[str, str]:
        """Returns the tensors of which nothing can be said, and why."""
        found: dict[str, str] = {}
        stacks = {key[0] for key in self.shapes if key[1] is not None}
        for site in sites:
            if site.is_expert and site.key[0] in stacks:
                continue
            seen = self.shapes.get(site.key)
            if seen is None:
                found[site.name] = "the model does not multiply by it"
            elif seen[1] != site.shape[1] or seen[0] < site.row + site.shape[0]:
                found[site.name] = f"the model uses it as {seen[0]}×{seen[1]}"
        return found

    def input_of(self, site: Site) -> Inputs:
        """Returns what tells a site's inputs from others'; fused experts share their layer's."""
        if site.narrows:
            return site.key
        if not site.is_expert:
            return tuple(self.inputs[site.key])
        name = site.key[0]
        sources = {n for key, numbers in self.inputs.items() if key[0] == name for n in numbers}
        return tuple(sources) if len(sources) == 1 else (name,)

    def has_gradient(self, site: Site) -> bool:
        """Returns whether the loss depends on a site's output; of a stack, on any of them."""
        if not site.is_expert:
            return site.key in self.reached
        return any(key[0] == site.key[0] for key in self.reached)

    def _number(self, source: Tensor) -> int:
        known = self._sources.get(id(source))
        if known is None or known[0]() is not source:
            known = (weakref.ref(source), next(self._count))
            self._sources[id(source)] = known
        return known[1]


def look_at(
    model: Model, parameters: Mapping[str, Tensor], batch: Any, *, backward: bool
) -> Survey:
    """Returns what a model does on a batch. Cost: a forward pass, and with a loss a backward."""
    found, rows = Survey(), Rows(model.mask(batch))
    try:
        with torch.set_grad_enabled(backward), Observer(parameters, found, rows):
            losses = model.losses(batch, 0, rows)
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{type(model.module).__name__} cannot be run on this text: "
            f"{printable(reason).rstrip('.')}."
        ) from error
    found.predicts = losses is not None
    if backward and losses is not None and losses.requires_grad:
        losses.sum().backward()
    return found
