"""A checkpoint as a module that runs: through transformers, or into a module of the user's own.

Knows files and modules; must not know what a model computes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from eckart.certificate import FactoredEntry
from eckart.checkpoint.opening import open_checkpoint
from eckart.checkpoint.paths import is_there, printable
from eckart.checkpoint.source import Source
from eckart.errors import CheckpointError, UsageError
from eckart.formats import dense, factored
from eckart.formats.manifest import guards, read_manifest
from eckart.surgery import factored_layer, submodule

PathLike = str | Path


def load(
    path: PathLike, into: nn.Module | None = None, *, dtype: torch.dtype | None = None
) -> nn.Module:
    """Returns the model of a factored checkpoint (or a dense one), in evaluation mode.

    Without `into` it is built and loaded by transformers (the `hf` extra), by the class that
    config.json names, in `dtype` or the checkpoint's own. A module `into` is changed in place:
    the layers that are factored are replaced, and every weight is loaded under the name that it
    has in the files, in the module's own dtypes and on its devices. What no factored layer can
    stand for (embeddings, experts fused into one tensor, grouped convolutions) is multiplied out.

    Raises CheckpointError where the checkpoint, its list of what is factored, and the module do
    not agree; `into` is then as it was. Cost: every tensor read once.
    """
    folder = Path(path)
    if into is not None:
        if dtype is not None:
            raise UsageError("dtype is the module's own where there is one: leave it out.")
        return load_into(folder, into)
    if not is_there(folder / "config.json"):
        raise UsageError(
            f"{printable(folder)} has no config.json that says which model it is: build the "
            "module, and give it as into=."
        )
    from eckart.hf import load_model

    return load_model(folder, dtype=dtype)


@dataclass(frozen=True, slots=True)
class _Placement:
    """What a checkpoint puts into a module: layers first, then tensors."""

    source: Source
    layers: Mapping[str, nn.Module]  # by module
    dense: Mapping[str, FactoredEntry]  # by guard: those that are multiplied out

    def stored(self) -> dict[str, str]:
        """The module's name of every tensor of the files that is loaded as it is."""
        modules = {factored.module_of(name) for name in self.dense}
        found = {name: dense.dense_name(name, modules) for name in self.source.tensors}
        return {name: to for name, to in found.items() if to is not None}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of everything that is loaded."""
        whole = {name: tuple(entry.shape) for name, entry in self.dense.items()}
        return whole | {to: self.source.tensors[name].shape for name, to in self.stored().items()}

    def load(self) -> dict[str, Tensor]:
        """Everything, read; products in float64 and rounded once."""
        state = {to: self.source.load(name) for name, to in self.stored().items()}
        for name, entry in self.dense.items():
            dtype = self.source.tensors[name].dtype
            state[name] = torch.cat([*dense.encode(self.source, name, entry, dtype)])
        return state


def load_into(folder: Path, module: nn.Module) -> nn.Module:
    """Loads a factored checkpoint into a module: see `load`."""
    source = open_checkpoint(folder)
    found = guards(source, read_manifest(folder))
    layers, rest = dict[str, nn.Module](), dict[str, FactoredEntry]()
    for name, entry in found.items():
        X = factored.module_of(name)
        layer = factored_layer(submodule(module, X), entry) if name != X else None
        if layer is None:
            rest[name] = entry
        else:
            layers[X] = layer
    placement = _Placement(source, layers, rest)
    _check_fits(placement, module)
    state = placement.load()
    for X, layer in layers.items():
        module.set_submodule(X, layer)
    on_meta = any(tensor.is_meta for tensor in module.state_dict().values())
    module.load_state_dict(state, strict=False, assign=on_meta)  # all is there: see _check_fits
    return module.eval()


def _check_fits(placement: _Placement, module: nn.Module) -> None:
    """Every tensor of the module is loaded, or shares memory with one that is; and no other."""
    replaced = tuple(f"{X}." for X in placement.layers)
    before = module.state_dict(keep_vars=True)
    kept = {k: t for k, t in before.items() if not k.startswith(replaced)}
    new = {
        f"{X}.{k}": t
        for X, layer in placement.layers.items()
        for k, t in layer.state_dict(keep_vars=True).items()
    }
    shapes, here = placement.shapes(), {**kept, **new}
    loaded = {id(tensor) for name, tensor in here.items() if name in shapes}
    for name, tensor in here.items():
        shared = id(tensor) in loaded and not tensor.is_meta  # what is assigned ties nothing
        if name not in shapes and not shared:
            raise CheckpointError(
                f"{printable(placement.source.path)} has no {name}, which the module needs."
            )
        if name in shapes and shapes[name] != tuple(tensor.shape):
            raise CheckpointError(
                f"{name} is {[*shapes[name]]} in {printable(placement.source.path)} and "
                f"{[*tensor.shape]} in the module: it is another model's."
            )
    if others := sorted(shapes.keys() - here.keys()):
        raise CheckpointError(
            f"{printable(placement.source.path)} holds {printable(others[0])}, which the module "
            "has no place for: it is another model's."
        )
