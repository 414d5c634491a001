"""Who loads an adapter as it stands, and what must be set there: the consumers' rules, applied.

Knows how each loader reads rank and scale; what it cannot judge from the files it does not claim.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from eckart.certificate import FactoredEntry
from eckart.checkpoint.paths import printable
from eckart.consumers import BY_RULE, CONSUMERS, ORIGINAL, ConsumerName, naming_refusal
from eckart.formats.adapters import Adapter, Part
from eckart.formats.factored import matrix_of
from eckart.formats.pipelines import entry_of
from eckart.verification.check import Check

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank takes; 16 unless it is given."""

DEFAULT_RANK = 16

READS: Mapping[ConsumerName, tuple[str, ...]] = {
    "peft": ("peft",),
    "vllm": ("peft",),
    "llama.cpp": ("peft",),
    "diffusers": ("diffusers", "kohya"),
    "kohya": ("kohya",),
}
"""How the tensors may be named; diffusers' pipelines rename kohya's U-Nets and text models."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a consumer loads an adapter as it stands, and what to set or to do."""

    consumer: ConsumerName
    loads: bool
    detail: str


def fits_of(adapter: Adapter) -> list[Fit]:
    """Returns what each consumer makes of an adapter, from its headers and configuration."""
    return [_fit(adapter, name) for name in CONSUMERS]


def check_fits(fits: list[Fit], consumer: ConsumerName) -> Check:
    """Returns whether a consumer loads it, as a check."""
    (found,) = (fit for fit in fits if fit.consumer == consumer)
    return Check(f"loads in {CONSUMERS[consumer].title}", held=found.loads, detail=found.detail)


def _fit(adapter: Adapter, name: ConsumerName) -> Fit:
    consumer, form = CONSUMERS[name], f"eckart convert … --for {name}"
    if why := _unheld(adapter, name):
        return Fit(name, loads=False, detail=why)
    if adapter.keys not in READS[name]:
        return Fit(name, loads=False, detail=f"in another form: {form}")
    if consumer.largest is not None and (largest := _largest(adapter)) > consumer.largest:
        why = f"rank {largest}, above {consumer.largest}: eckart resize … --for {name}"
        return Fit(name, loads=False, detail=why)
    if why := _misread(adapter, name):
        return Fit(name, loads=False, detail=f"{why}: {form}")
    details = [*_settings(adapter, name), _evidence(adapter, name)]
    return Fit(name, loads=True, detail="; ".join(details))


def _unheld(adapter: Adapter, name: ConsumerName) -> str | None:
    """What no conversion makes it hold."""
    consumer = CONSUMERS[name]
    if adapter.keys != "peft" and not consumer.components and len(_components(adapter)) > 1:
        return f"it holds {' and '.join(_components(adapter))}: convert each, with --component"
    for tensor, part in adapter.parts.items():
        entry: FactoredEntry = entry_of(part, adapter.source)
        why = consumer.refusal(tensor, matrix_of(entry))
        if adapter.keys != "peft" and adapter.keys not in READS[name]:
            why = why or naming_refusal(consumer, tensor)
        if why:
            return f"{printable(tensor)} is {why}"
    if consumer.whole:
        return None
    others = [*adapter.whole, *(f"the bias of {X}" for X, p in adapter.parts.items() if p.bias)]
    if others:
        first = printable(others[0])
        return f"it holds {first} beside its products, and {consumer.title} takes products alone"
    return None


def _components(adapter: Adapter) -> list[str]:
    return sorted({name.split(".")[0] for name in adapter.parts})


def _largest(adapter: Adapter) -> int:
    stated = adapter.config.get("r") if adapter.keys == "peft" else 0
    return max([int(stated or 0), *(part.rank for part in adapter.parts.values())])


def _vllm_scale(adapter: Adapter, part: Part) -> float:
    """One scale for all modules: lora_alpha over r, as the configuration has them."""
    r = adapter.config["r"]
    divisor = math.sqrt(r) if adapter.config.get("use_rslora") else r
    return adapter.config["lora_alpha"] / divisor if divisor else math.inf


def _llama_scale(adapter: Adapter, part: Part) -> float:
    """lora_alpha of the configuration over the rank of the tensor; patterns and rsLoRA unread."""
    return adapter.config["lora_alpha"] / part.rank


SCALES: Mapping[ConsumerName, Callable[[Adapter, Part], float]] = {
    "vllm": _vllm_scale,
    "llama.cpp": _llama_scale,
}
"""The scale that a consumer would give a module, where it does not read it as PEFT does."""


def _misread(adapter: Adapter, name: ConsumerName) -> str | None:
    """How a consumer would read ranks or scales as something else than they are."""
    if name == "vllm" and (largest := _largest(adapter)) > adapter.config["r"]:
        return f"a module has rank {largest}, above r = {adapter.config['r']}, the limit vLLM sets"
    if name == "diffusers" and adapter.keys == "kohya":
        alphas = {round(part.scale * part.rank, 6) for part in adapter.parts.values()}
        many = len(alphas) > 1  # diffusers 0.42 finds no attention layer by the names of alphas
        return (
            "its alphas differ, and diffusers reads one for all attention layers" if many else None
        )
    scale = SCALES.get(name)
    if scale is None:
        return None
    for tensor, part in adapter.parts.items():
        read = scale(adapter, part)
        if not math.isclose(read, part.scale, rel_tol=1e-6):
            times = read / part.scale if part.scale else math.inf
            return f"it would scale {printable(tensor)} {times:.3g} times as strongly as PEFT does"
    return None


def _evidence(adapter: Adapter, name: ConsumerName) -> str:
    """Whether such an adapter was loaded there in a test."""
    if name != "diffusers" or adapter.keys != "kohya":
        return CONSUMERS[name].evidence
    words = {tuple(tensor.split(".")[:2]) for tensor in adapter.parts}
    known = all(one == "unet" and word not in ORIGINAL for one, word in words)
    return f"renamed there; {CONSUMERS[name].evidence if known else BY_RULE}"


def _settings(adapter: Adapter, name: ConsumerName) -> list[str]:
    """What to set or to see to, where the default does not do for every model."""
    head = any(tensor.endswith("lm_head.weight") for tensor in adapter.parts)
    table = any(part.is_embedding for part in adapter.parts.values())
    if name == "llama.cpp" and head:
        return ["only for a base whose lm_head is its own"]
    if name != "vllm":
        return []
    settings = ["only for models that take LoRA on embeddings there"] if head or table else []
    needed = next(rank for rank in VLLM_RANKS if rank >= _largest(adapter))
    if needed > DEFAULT_RANK:
        settings.append(f"start it with --max-lora-rank {needed} (default {DEFAULT_RANK})")
    return settings
