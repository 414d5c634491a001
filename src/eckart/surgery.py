"""Factored layers put in the place of dense ones, and dense ones back.

Knows modules and what a manifest says of them; must not know files. A layer is replaced only
where torch's own class is called: whatever else holds a weight (embeddings, attention that
computes with it, experts) keeps it, multiplied out.
"""

from collections.abc import Sequence

from torch import nn

from eckart.certificate import FactoredEntry
from eckart.errors import CheckpointError, UsageError
from eckart.formats.factored import matrix_of
from eckart.nn import (
    FactoredLayer,
    LowRankConv2d,
    LowRankLinear,
    PivotedConv2d,
    PivotedLinear,
)

CONV1D = "Conv1D"
"""transformers' linear layer that stores (in, out); torch has no class of this name."""


def factored_layer(layer: nn.Module, entry: FactoredEntry) -> FactoredLayer | None:
    """Returns an empty factored layer for the place of `layer`; None where none can stand there.

    Of its dtype and on its device, values unset.
    """
    parameters = dict(layer.named_parameters(recurse=False))
    weight = parameters.get("weight")
    if weight is None or tuple(weight.shape) != entry.shape:
        return None
    if type(layer) is nn.Conv2d:
        conv = LowRankConv2d if entry.form == "ba" else PivotedConv2d
        return conv(layer, entry.rank) if layer.groups == 1 else None
    is_turned = type(layer).__name__ == CONV1D
    if not is_turned and type(layer) is not nn.Linear:
        return None
    if is_turned != (entry.orientation == "in_out"):
        return None
    m, n = matrix_of(entry).shape
    kind = LowRankLinear if entry.form == "ba" else PivotedLinear
    has_bias = "bias" in parameters
    new = kind(n, m, entry.rank, bias=has_bias, device="meta", dtype=weight.dtype)
    return new.to_empty(device=weight.device)


def fill_dense(layer: nn.Module, factored: FactoredLayer, entry: FactoredEntry) -> nn.Module:
    """Gives `layer` (whose values may be on meta) the product and the bias of a factored layer.

    Multiplied in float64 and rounded once, as `eckart densify` does.
    """
    (m, _), factors = factored.factors().shape, factored.factors()
    dtype = factored.A.weight.dtype
    stored = matrix_of(entry).restore(factors.rows(0, m)).to(dtype).contiguous()
    trains = factored.A.weight.requires_grad
    layer.register_parameter("weight", nn.Parameter(stored, requires_grad=trains))
    layer.register_parameter("bias", factored.bias)
    return layer.train(factored.training)


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Returns a part of a model by its dotted name; CheckpointError if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(
            f"{type(model).__name__} has no layer {name}: the checkpoint is another model's."
        ) from None


def peft_targets(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Returns what PEFT calls `target_modules`, for a LoRA on a model with factored layers.

    `names` are layers by their full names or by the end of them, as PEFT takes them; of a
    factored one come its thin layers, which PEFT can adapt (it refuses the whole). PEFT's own
    "all-linear" needs no translation. Raises UsageError for a name that no layer has.

    >>> model = nn.ModuleDict({"q_proj": LowRankLinear(8, 8, 2), "k_proj": nn.Linear(8, 8)})
    >>> peft_targets(model, ["q_proj", "k_proj"])
    ['q_proj.A', 'q_proj.B', 'k_proj']
    """
    found = list[str]()
    for wanted in names:
        layers = {
            name: layer
            for name, layer in model.named_modules()
            if name == wanted or name.endswith(f".{wanted}")
        }
        if not layers:
            raise UsageError(f"{type(model).__name__} has no layer {wanted}: check the name.")
        for name, layer in layers.items():
            thin = [f"{name}.{part}" for part, _ in layer.named_children()]
            found += thin if isinstance(layer, FactoredLayer) else [name]
    return found
