"""Where transformers puts the tensors of a checkpoint: its own renaming, asked instead of guessed.

Names on disk are not those in memory (ViT: `vit.encoder.layer.0.attention.attention.key` becomes
`vit.layers.0.attention.k_proj`), and several tensors may become one (experts, fused projections).
All that is private in transformers and used here stands in this file.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

Multiply = Callable[[str], Tensor | None]


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a tensor of the checkpoint goes."""

    name: str  # of the model's tensor
    group: str | None  # the converter's pattern that collects it, with others, into that one


def destinations(
    model: Any, stored: Iterable[str], conversions: Sequence[Any] | None = None
) -> dict[str, Destination]:
    """Returns where the loader puts every tensor of a checkpoint that the model has a place for.

    In the order in which it collects them. `conversions` are what it will use, if it is known.
    """
    known = get_model_conversion_mapping(model) if conversions is None else conversions
    known = copy.deepcopy([*known])  # they note what they were used for
    renamings = [one for one in known if isinstance(one, WeightRenaming)]
    converters = [one for one in known if isinstance(one, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    found = dict[str, Destination]()
    for name in sorted(stored, key=dot_natural_key):
        target, group = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:  # as the loader does
            target, group = rename_source_key(name, [], [], prefix, state)
        if target in state:
            found[name] = Destination(target, group)
    return found


@dataclass(frozen=True, slots=True)
class Joining:
    """What becomes of the tensors that one converter collects."""

    groups: tuple[str, ...]  # its patterns, in the order in which it puts them together
    steps: tuple[tuple[str, int | None], ...]  # its operations, by class and dimension


def joinings(model: Any) -> dict[str, Joining]:
    """Returns how the loader of a model joins tensors, by the group that collects them."""
    converters = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightConverter)]
    return {
        group: Joining(
            tuple(one.source_patterns),
            tuple((type(step).__name__, step.__dict__.get("dim")) for step in one.operations),
        )
        for one in converters
        for group in one.source_patterns
    }


def stored_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Returns what `save_pretrained` calls each of some tensors, by their name in the model."""
    return {name: next(iter(revert_weight_conversion(model, {name: _EMPTY}))) for name in names}


_EMPTY = torch.empty(0)

DENSE = "a guard that is multiplied out where it stands"


class Products(ConversionOps):
    """Puts the product in the place of every guard that a converter collects.

    `sources` says which tensors of the checkpoint it collects, by destination, in its order;
    `multiply` makes the product of one of them, and None of a tensor that is no guard.
    """

    def __init__(self, multiply: Multiply) -> None:
        self.sources: Mapping[Destination, Sequence[str]] = {}
        self.multiply = multiply

    def __deepcopy__(self, memo: object) -> "Products":
        """The loader copies a converter for each of its targets; this is the same for all."""
        return self

    def convert(
        self, input_dict: dict[str, Any], *_: Any, full_layer_name: str = "", **__: Any
    ) -> dict[str, Any]:
        """Returns the tensors by group as they came, those of guards multiplied out."""
        return {
            full_layer_name if group == DENSE else group: [
                self._filled(name, tensor)
                for name, tensor in zip(
                    self.sources[Destination(full_layer_name, group)], tensors, strict=True
                )
            ]
            for group, tensors in input_dict.items()
        }

    def _filled(self, name: str, tensor: Tensor) -> Tensor:
        product = self.multiply(name)
        return tensor if product is None else product.to(tensor)

    @property
    def reverse_op(self) -> ConversionOps:
        """What is saved again is dense: nothing to undo."""
        return AsItIs()


class AsItIs(ConversionOps):
    """Leaves tensors as they are."""

    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, Any]:
        """Returns what it is given."""
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        """Itself."""
        return self


class InPlace(WeightConverter):
    """Collects the guards that no converter of the model does, by their renamed names.

    A lookup, where a converter's patterns would be compiled from names of the checkpoint.
    """

    __slots__ = ("names",)

    def __init__(self, names: frozenset[str], operations: list[Any]) -> None:
        super().__init__([DENSE], [DENSE], operations)
        self.names = names

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Returns the name as it is, and the group of those that are multiplied out."""
        return source_key, DENSE if source_key in self.names else None


class Biases(WeightRenaming):
    """Gives the bias of a layer that is multiplied out its own name again: X.B.bias → X.bias."""

    __slots__ = ("names",)

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__(DENSE, DENSE)
        self.names = names

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Returns the new name, and that it is one."""
        found = self.names.get(source_key)
        return (source_key, None) if found is None else (found, DENSE)


def with_products(
    conversions: Sequence[Any],
    model: Any,
    stored: Sequence[str],
    *,
    guards: Set[str],
    biases: Mapping[str, str],
    multiply: Multiply,
) -> list[Any]:
    """Returns the loader's conversions, by which `guards` are multiplied out before all else.

    So an expert is as it was before the experts are stacked. `biases` move (see `Biases`).
    """
    products = Products(multiply)
    renamed: list[Any] = [Biases(biases), *conversions]
    goes = destinations(model, stored, renamed)
    groups = {goes[name].group for name in guards if name in goes}
    alone = [one for one in copy.deepcopy(renamed) if isinstance(one, WeightRenaming)]
    names = [
        _renamed(name, alone)
        for name in stored
        if name in guards and name in goes and goes[name].group is None
    ]
    extended = [_extended(one, groups, products) for one in renamed]
    extended.append(InPlace(frozenset(names), [products]))
    sources = dict[Destination, list[str]]()
    for name, place in destinations(model, stored, extended).items():
        sources.setdefault(place, []).append(name)
    products.sources = sources
    return extended


def without_products(conversions: Sequence[Any]) -> list[Any]:
    """Returns the conversions by which a model is saved: those of the checkpoint it was loaded
    from, which is dense where guards were multiplied out."""
    return [one for one in conversions if not isinstance(one, InPlace | Biases)]


def _extended(conversion: Any, groups: Set[str | None], products: Products) -> Any:
    if not isinstance(conversion, WeightConverter) or not groups & {*conversion.source_patterns}:
        return conversion
    extended = copy.deepcopy(conversion)
    extended.operations = [products, *conversion.operations]
    return extended


def _renamed(name: str, renamings: Sequence[WeightRenaming]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name
