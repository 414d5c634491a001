"""LoRA adapters in PEFT's format, read strictly: what each adds to which tensor, and how strongly.

Knows the configuration and the tensors' names; must not know the model. Whatever changes what an
adapter does and is not understood here is refused by name, never passed over.
"""

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from eckart.checkpoint.documents import read_json
from eckart.checkpoint.header import read_header
from eckart.checkpoint.paths import is_there, printable
from eckart.checkpoint.source import Checkpoint, Source
from eckart.errors import CheckpointError
from eckart.families import FLOATING, is_embedding, is_stack_of_experts
from eckart.formats.patterns import first_match
from eckart.formats.peft import CONFIG, INNER, NARROWING, PREFIX, WEIGHTS, one_of_stack
from eckart.linalg.factors import Factors

INERT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path"),
        *("corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode"),
        *("layers_pattern", "layers_to_transform", "loftq_config"),
        *("lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save"),
        *("peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules"),
        *("task_type", "velora_config"),
    }
)
"""Fields that say nothing of what is added: how it was trained, and where it goes by names that
the tensors have anyway."""

UNDERSTOOD = frozenset(
    {
        *(
            "alpha_pattern",
            "bias",
            "fan_in_fan_out",
            "lora_alpha",
            "init_lora_weights",
            "lora_bias",
            "peft_type",
            "r",
        ),
        *("rank_pattern", "target_parameters", "use_rslora"),
    }
)

HARMLESS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Initializations (`init_lora_weights`) that leave the base as it was; PiSSA's does not."""

LARGEST = 10**6
"""More than any rank or lora_alpha in use."""

NEUTRAL: tuple[object, ...] = (None, False, [], {}, "none")
"""Values of any other field that change nothing."""

PARTS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_B.bias": "bias",
}


@dataclass(frozen=True, slots=True)
class Part:
    """What an adapter adds to one tensor: scale·B·A, and to its layer's bias."""

    name: str  # X.weight
    A: str  # the tensors' names in the adapter
    B: str
    bias: str | None
    rank: int
    scale: float
    is_embedding: bool
    transposed: bool  # the layer stores (in, out), as GPT-2's Conv1D
    shape: tuple[int, int]  # (m, n) of B·A
    is_parameter: bool = False  # it is targeted itself, and not as the weight of a layer
    experts: int | None = None  # of a stack: how many, each with a product of its own
    expert: int | None = None  # the one that is meant, where it is not all of them, and …
    rows: tuple[int, int] | None = None  # … which of its rows

    @property
    def count(self) -> int:
        """How many matrices it adds to."""
        return self.experts or 1 if self.expert is None else 1

    def one(self, index: int) -> "Part":
        """Returns what is added to one of them."""
        stays = self.experts is None or self.expert is not None
        return self if stays else replace(self, expert=index)

    def load(self, source: Source) -> Factors:
        """Returns B and A of one matrix as they are stored."""
        if self.experts is None:
            found = Factors(source.load(self.B).flatten(1), source.load(self.A).flatten(1))
        else:
            assert self.expert is not None, f"{self.name}: which expert?"
            found = one_of_stack(source, self.A, self.B, self.rank, self.expert)
        return found if self.rows is None else Factors(found.B[slice(*self.rows)], found.A)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's file, what each part of it does, and what it replaces."""

    source: Source
    config: Mapping[str, Any]
    parts: Mapping[str, Part]  # by tensor of the model
    whole: Mapping[str, str]  # tensor of the model → the adapter's
    bases: Mapping[str, str]  # … of a layer under a LoRA, which must be the base's own
    keys: Literal["peft", "diffusers", "kohya"] = "peft"  # how its tensors are named


def open_adapter(folder: Path) -> Adapter:
    """Returns an adapter from its headers and configuration; CheckpointError if any of it is not
    understood, or does not agree."""
    if not folder.exists():
        raise CheckpointError(f"{printable(folder)} does not exist: check the path.")
    for name in (CONFIG, WEIGHTS):
        if not is_there(folder / name):
            raise CheckpointError(
                f"there is no {name} in {printable(folder)}: give the folder of a LoRA adapter in "
                "PEFT's format, or make one with eckart convert --for peft."
            )
    config = read_json(folder / CONFIG)
    check_config(config, folder / CONFIG)
    source = Checkpoint(folder, read_header(folder / WEIGHTS))
    parts, whole, bases = _sorted_out(source)
    if not parts and not whole:
        raise CheckpointError(f"{printable(folder)} holds no LoRA at all: give another adapter.")
    return Adapter(
        source,
        config,
        _parts(parts, source, config),
        whole,
        bases,
    )


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError for a field that is not understood, and changes what is added."""
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{printable(path)} is for an adapter of type {printable(config.get('peft_type'))}: "
            "only LORA is understood."
        )
    odd = {
        key: value
        for key, value in config.items()
        if key not in INERT | UNDERSTOOD and value not in NEUTRAL
    }
    if config.get("init_lora_weights") not in HARMLESS:
        odd["init_lora_weights"] = config["init_lora_weights"]
    for key in ("use_rslora", "fan_in_fan_out", "lora_bias"):
        if config.get(key) not in (None, True, False):
            odd[key] = config[key]
    if odd:
        key, value = min(odd.items())
        raise CheckpointError(
            f"{printable(path)} has {printable(key)} = {printable(value)}, which "
            "changes what the adapter does and is not supported: merge it with PEFT and extract it."
        )
    for key in ("r", "lora_alpha"):
        _number(config, key, path)


def _number(config: Mapping[str, Any], key: str, path: Path) -> float:
    value = config.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= LARGEST:
        raise CheckpointError(
            f"{printable(path)} has {key} = {printable(value)}: it must be a number "
            "from 0 to a million."
        )
    return float(value)


def _sorted_out(
    source: Source,
) -> tuple[dict[str, dict[str, str]], dict[str, str], dict[str, str]]:
    """The parts of each module, the tensors that stand for whole ones, and copies of the base's.

    (PEFT saves an embedding beside its LoRA, resized or not.)
    """
    parts: dict[str, dict[str, str]] = {}
    whole, bases = dict[str, str](), dict[str, str]()
    for name in source.tensors:
        if not name.startswith(PREFIX):
            raise CheckpointError(
                f"{printable(name)} in {printable(source.path)} is no tensor of a PEFT adapter: "
                f"they begin with {PREFIX}"
            )
        end = next((end for end in PARTS if name.endswith(end)), None)
        if end is None:
            if ".lora_" in name:
                raise CheckpointError(
                    f"{printable(name)} in {printable(source.path)} is not supported: only "
                    "lora_A, lora_B and lora_embedding_A, _B are."
                )
            layer = name.removeprefix(PREFIX).replace(".base_layer.", ".")
            kept = bases if name.endswith(".base_layer.weight") else whole
            if layer in kept:
                raise CheckpointError(
                    f"{printable(source.path)} holds {printable(layer)} twice, as "
                    f"{printable(kept[layer])} and as {printable(name)}: take one of them out."
                )
            kept[layer] = name
        else:
            X = name.removeprefix(PREFIX).removesuffix(end)
            parts.setdefault(X, {})[PARTS[end]] = name
    for X, found in parts.items():
        both = [f"{X}.weight"] if f"{X}.weight" in whole else []
        both += [f"{X}.bias"] if "bias" in found and f"{X}.bias" in whole else []
        if both:
            raise CheckpointError(
                f"{printable(source.path)} both replaces {printable(both[0])} and adds to it: "
                "merge it with PEFT and extract it."
            )
    return parts, whole, bases


def _parts(
    found: Mapping[str, Mapping[str, str]], source: Source, config: Mapping[str, Any]
) -> dict[str, Part]:
    """What is added, by tensor of the model: the weight of a layer, or a parameter."""
    parts: dict[str, Part] = {}
    for X, names in sorted(found.items()):
        name = _target(X, found.keys(), source, config)
        if name in parts:
            raise CheckpointError(f"{printable(source.path)} adds to {printable(name)} twice.")
        parts[name] = part_of(name, names, source, config)
    return parts


def _target(X: str, modules: Container[str], source: Source, config: Mapping[str, Any]) -> str:
    """The tensor that a module's factors are for. Of experts several parameters may be targeted,
    wrapped one around the other."""
    experts = X.removesuffix(INNER)
    if not experts.endswith("experts") or experts.count(INNER):
        return f"{X}.weight"
    named = config.get("target_parameters")
    targets = [str(one) for one in named] if isinstance(named, list) else []
    own = {t.rpartition(".")[2] for t in targets if _is_end(t.rpartition(".")[0], experts)}
    known = sorted(one for one in own if is_stack_of_experts(f"{experts}.{one}"))
    inner = [one for one in known if one != NARROWING]
    both = f"{experts}{INNER}" in modules and experts in modules
    if len(known) == 2 and both and len(inner) == 1:
        return f"{experts}.{NARROWING if experts == X else inner[0]}"
    if len(known) != 1 or both:
        raise CheckpointError(
            f"{printable(X)} in {printable(source.path)}: which of the parameters of the experts "
            f"it is for ({printable(known)}), its configuration does not tell. Merge it with PEFT, "
            "and extract it."
        )
    return f"{experts}.{known[0]}"


def _is_end(end: str, name: str) -> bool:
    return not end or name == end or name.endswith(f".{end}")


def part_of(name: str, found: Mapping[str, str], source: Source, config: Mapping[str, Any]) -> Part:
    """Returns what is added to a tensor by those found for it, as a configuration says."""
    X = name.removesuffix(".weight")
    where = f"{printable(X)} in {printable(source.path)}"
    if not {"A", "B"} <= found.keys():
        there = ", ".join(printable(name) for name in found.values())
        raise CheckpointError(f"{where} has only {there}: A and B belong together.")
    A, B = (source.tensors[found[part]] for part in "AB")
    for info in (A, B):
        if info.dtype not in FLOATING or len(info.shape) not in (2, 4) or 0 in info.shape:
            raise CheckpointError(f"{where} has a factor of {info.dtype} {[*info.shape]}.")
    held, bias = A.shape[0], source.tensors.get(found.get("bias", ""))
    key = name if _is_parameter(name, config) else X
    stated = first_match(_pattern(config, "rank_pattern"), key) or config["r"]
    rank, experts = held, None
    if is_stack_of_experts(name) and stated and not held % stated:
        rank, experts = int(stated), int(held // stated)
    if bias is not None and (bias.dtype not in FLOATING or bias.shape != B.shape[:1]):
        raise CheckpointError(f"{where} has a bias of {bias.dtype} {[*bias.shape]}.")
    if found["A"].endswith("_A") != is_embedding(name):
        raise CheckpointError(f"{where} is not stored as its name would have it: rename it.")
    if B.shape[1:] != (held, *(1 for _ in A.shape[2:])) or rank != stated:
        raise CheckpointError(
            f"{where} has A {[*A.shape]} and B {[*B.shape]}, and its configuration says rank "
            f"{printable(stated)}: they must agree."
        )
    given = first_match(_pattern(config, "alpha_pattern"), key)
    alpha = config["lora_alpha"] if given is None else given
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Part(
        name,
        found["A"],
        found["B"],
        found.get("bias"),
        rank,
        scale,
        found["A"].endswith("_A"),
        bool(config.get("fan_in_fan_out")) and A.shape[2:] == () and not found["A"].endswith("_A"),
        (B.shape[0], math.prod(A.shape[1:])),
        _is_parameter(name, config),
        experts,
    )


def _is_parameter(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is targeted as a parameter: patterns are then matched against its name."""
    named = config.get("target_parameters")
    return isinstance(named, list) and any(_is_end(str(one), name) for one in named)


def _pattern(config: Mapping[str, Any], key: str) -> Mapping[str, float]:
    found = config.get(key) or {}
    sound = isinstance(found, dict) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= LARGEST
        for v in found.values()
    )
    if not sound:
        raise CheckpointError(f"{key} = {printable(found)} is no table of numbers by module.")
    return found
