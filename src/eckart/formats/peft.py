"""PEFT's LoRA adapters: how they are stored, and what a configuration says of them.

The layer X becomes `base_model.model.X.lora_A.weight` (r×n) and `….lora_B.weight` (m×r); an
embedding `….lora_embedding_A` (r×vocabulary) and `….lora_embedding_B` (dimension×r). The scale is
lora_alpha/r of the module, 1 in what we write. What is no linear layer where it is loaded, as the
experts of a mixture (one 3-D parameter) and its router, is targeted as a parameter: of E experts A
is E·r×n, expert under expert, and B is m×r·E, in which the experts are the last dimension. Checked
against PEFT 0.21.
"""

import re
from collections.abc import Collection, Container, Iterable, Mapping

import torch
from torch import Tensor

from eckart.certificate import FactoredEntry
from eckart.checkpoint.source import Source
from eckart.checkpoint.tensor_file import TensorLayout
from eckart.families import ROUTER, is_embedding, is_norm, is_stack_of_experts
from eckart.formats.factored import Product, matrix_of, module_of
from eckart.linalg.factors import Factors, PivotedFactors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."

TIED_HEAD = f"{PREFIX}lm_head.weight"
"""The output head that is tied to a whole embedding is stored beside it, and must be equal."""

INNER = ".base_layer"
"""What stands under another parameter of its module."""

NARROWING = "down_proj"
"""The last parameter of experts, and so the outer one."""

HIJACKED = re.compile(r"(^|\.)(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")
"""Of a mixture's layers outside the experts: PEFT takes targets of these names for the experts'."""


def module_for(name: str, kept: Container[str], *, is_mixture: bool) -> str | None:
    """Returns the module under which a tensor's factors are stored, where it is targeted as a
    parameter; None where it is the weight of a layer.

    PEFT wraps the parameters of one module one around the other, in the order in which the module
    has them: of experts, what narrows around what widens. `kept` are the adapter's tensors.
    """
    if is_stack_of_experts(name):
        module, _, parameter = name.rpartition(".")
        is_inner = parameter != NARROWING and f"{module}.{NARROWING}" in kept
        return f"{module}{INNER}" if is_inner else module
    if ROUTER.search(name) or (is_mixture and HIJACKED.search(name)):
        return module_of(name)
    return None


def part_names(name: str, entry: FactoredEntry) -> tuple[str, str]:
    """Returns the names of A and B of a tensor.

    >>> entry = FactoredEntry(rank=8, form="ba", shape=(32, 64), orientation="out_in")
    >>> part_names("model.layers.0.self_attn.q_proj.weight", entry)[0]
    'base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight'
    """
    X = f"{PREFIX}{entry.module or module_of(name)}"
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
    matrix, A, B = matrix_of(entry), *part_names(name, entry)
    (m, n), r, count = matrix.shape, entry.rank, matrix.count
    shapes = matrix.factors(r, "ba")
    if matrix.is_stack:
        shapes = {"A.weight": (count * r, n), "B.weight": (m, r * count)}
    return {
        A: TensorLayout.of(dtype, shapes["A.weight"]),
        B: TensorLayout.of(dtype, shapes["B.weight"]),
    }


def stacked(products: Iterable[Product]) -> Factors:
    """Returns the products of a stack of experts as one pair of factors, as they are stored."""
    factors = [one for one in products if isinstance(one, Factors)]
    B = torch.stack([one.B for one in factors], 2)
    return Factors(B.flatten(1), torch.cat([one.A for one in factors]))


def encode(name: str, entry: FactoredEntry, product: Factors | PivotedFactors) -> dict[str, Tensor]:
    """Returns the tensors of `layout`."""
    assert isinstance(product, Factors), f"{name}: an adapter is B·A"
    A, B = part_names(name, entry)
    return {A: product.A, B: product.B}


def decode(source: Source, name: str, entry: FactoredEntry, index: int = 0) -> Factors:
    """Returns B and A of one matrix as they are stored. Cost: of a stack, all of B is read."""
    A, B = part_names(name, entry)
    if matrix_of(entry).is_stack:
        return one_of_stack(source, A, B, entry.rank, index)
    return Factors(source.load(B).flatten(1), source.load(A).flatten(1))


def one_of_stack(source: Source, A: str, B: str, rank: int, index: int) -> Factors:
    """Returns B and A of one expert."""
    left = source.load(B)
    return Factors(
        left.reshape(len(left), rank, -1)[:, :, index].contiguous(),
        source.load(A, index * rank, (index + 1) * rank),
    )


def configuration(
    entries: Mapping[str, FactoredEntry],
    *,
    base: object,
    task: object = None,
    whole: Collection[str],
    has_lora_bias: bool = False,
    is_tied: bool = False,
) -> dict[str, object]:
    """Returns adapter_config.json: compact true ranks, patterns anchored and escaped, scale 1.

    PEFT reads the keys of a pattern as regular expressions, and the first that matches wins.
    `is_tied`: what is said of the embedding holds for the output head.
    """
    parameters = {name: entry for name, entry in entries.items() if entry.module}
    layers = {module_of(name): entry for name, entry in entries.items() if not entry.module}
    targets = {**parameters, **layers}
    largest = max((entry.rank for entry in targets.values()), default=1)
    pattern = {
        f"^{re.escape(X)}": entry.rank
        for X, entry in sorted(targets.items())
        if entry.rank != largest
    }
    turned = any(
        entry.orientation == "in_out" and not is_embedding(name) for name, entry in entries.items()
    )
    biases = {name for name in whole if name.endswith(".bias") and not is_norm(name)}
    head = {TIED_HEAD.removeprefix(PREFIX)} if is_tied and any(map(is_embedding, whole)) else set()
    saved = [name for name in whole if name not in biases | head]
    modules = sorted({module_of(name.removesuffix(".bias")) for name in saved})
    extra: dict[str, object] = {}
    if parameters:
        extra["target_parameters"] = sorted(parameters)
    if is_tied:
        extra["ensure_weight_tying"] = True
    return {
        **extra,
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(layers),
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
