"""PEFT's LoRA adapters: how they are stored, and what a configuration says of them.

The layer X becomes `base_model.model.X.lora_A.weight` (r×n) and `….lora_B.weight` (m×r); an
embedding `….lora_embedding_A` (r×vocabulary) and `….lora_embedding_B` (dimension×r). The scale is
lora_alpha/r of the module, 1 in what we write. Checked against PEFT 0.21.
"""

import re
from collections.abc import Collection, Container, Mapping

from torch import Tensor

from eckart.certificate import FactoredEntry
from eckart.checkpoint.source import Source
from eckart.checkpoint.tensor_file import TensorLayout
from eckart.families import is_embedding, is_norm
from eckart.formats.factored import matrix_of, module_of
from eckart.linalg.factors import Factors, PivotedFactors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


def part_names(name: str) -> tuple[str, str]:
    """Returns the names of A and B of a tensor.

    >>> part_names("model.layers.0.self_attn.q_proj.weight")[0]
    'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'
    """
    X = f"{PREFIX}{module_of(name)}"
    if is_embedding(name):
        return f"{X}.lora_embedding_A", f"{X}.lora_embedding_B"
    return f"{X}.lora_A.weight", f"{X}.lora_B.weight"


def bias_name(name: str) -> str:
    """Returns where what was added to the bias of a tensor's layer is stored."""
    return f"{PREFIX}{module_of(name)}.lora_B.bias"


def whole_name(name: str, factored: Container[str]) -> str:
    """Returns the name of a tensor that is stored as it is; `factored` are the tensors with a LoRA.

    The layer under a LoRA is called `base_layer`: its bias is loaded by that name.
    """
    X = name.removesuffix(".bias")
    wrapped = name.endswith(".bias") and f"{X}.weight" in factored
    return f"{PREFIX}{X}.base_layer.bias" if wrapped else f"{PREFIX}{name}"


def layout(
    name: str, entry: FactoredEntry, dtype: str, guard: str | None = None
) -> dict[str, TensorLayout]:
    """Returns the two tensors that stand for what was added to one. No guard: it is an addition."""
    shapes = matrix_of(entry).factors(entry.rank, "ba")
    A, B = part_names(name)
    return {
        A: TensorLayout.of(dtype, shapes["A.weight"]),
        B: TensorLayout.of(dtype, shapes["B.weight"]),
    }


def encode(name: str, entry: FactoredEntry, product: Factors | PivotedFactors) -> dict[str, Tensor]:
    """Returns the tensors of `layout`."""
    assert isinstance(product, Factors), f"{name}: an adapter is B·A"
    A, B = part_names(name)
    return {A: product.A, B: product.B}


def decode(source: Source, name: str, entry: FactoredEntry, index: int = 0) -> Factors:
    """Returns B and A as they are stored."""
    A, B = part_names(name)
    return Factors(source.load(B).flatten(1), source.load(A).flatten(1))


def configuration(
    entries: Mapping[str, FactoredEntry],
    *,
    base: object,
    task: object = None,
    whole: Collection[str],
    has_lora_bias: bool = False,
) -> dict[str, object]:
    """Returns adapter_config.json: compact true ranks, patterns anchored and escaped, scale 1.

    PEFT reads the keys of a pattern as regular expressions, and the first that matches wins.
    """
    ranks = {module_of(name): entry.rank for name, entry in entries.items()}
    largest = max(ranks.values(), default=1)
    pattern = {f"^{re.escape(X)}": r for X, r in sorted(ranks.items()) if r != largest}
    turned = any(
        entry.orientation == "in_out" and not is_embedding(name) for name, entry in entries.items()
    )
    biases = {name for name in whole if name.endswith(".bias") and not is_norm(name)}
    saved = [name for name in whole if name not in biases]
    modules = sorted({module_of(name.removesuffix(".bias")) for name in saved})
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "modules_to_save": modules or None,
        "lora_dropout": 0.0,
        "bias": "all" if biases else "none",
        "lora_bias": has_lora_bias,
        "fan_in_fan_out": turned,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
