"""Who loads an adapter, and what each of them holds.

Knows the rules of the loaders; must not know how files are written. Rules that were read and not
run are marked so wherever they are claimed (`Consumer.tested` is empty):
PEFT 0.21 and diffusers 0.42, run in the tests;
vLLM: `vllm/lora/peft_helper.py`, `lora_model.py` and `vllm/config/lora.py`;
llama.cpp: `convert_lora_to_gguf.py` and `src/llama-adapter.cpp`;
kohya: sd-scripts' `networks/lora.py`, and ComfyUI's `comfy/lora.py`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from eckart.errors import UsageError
from eckart.families import ROUTER, is_embedding, is_routed_expert
from eckart.matrix import Matrix

ConsumerName = Literal["peft", "vllm", "llama.cpp", "diffusers", "kohya"]
Kind = Literal["linear", "transposed", "embedding", "convolution", "experts", "router"]
Component = Literal["unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3"]

COMPONENTS: tuple[Component, ...] = get_args(Component)
"""The models of a diffusion pipeline, as diffusers calls them."""

WORDS: Mapping[Kind, str] = {
    "linear": "a linear layer",
    "transposed": "a layer that stores its transpose",
    "embedding": "an embedding",
    "convolution": "a convolution",
    "experts": "routed experts",
    "router": "a router of experts",
}


BY_RULE = "by rule, not run"

ALPHA_BYTES = 4
"""kohya stores an alpha beside every module, in float32."""


@dataclass(frozen=True, slots=True)
class Consumer:
    """What a loader of adapters holds, and how it reads the rank and the scale of a module."""

    name: ConsumerName
    title: str
    holds: frozenset[Kind]
    tested: str = ""  # the release that the tests load into; empty: by rule, not run
    whole: bool = False  # tensors stored whole, and biases
    uniform: bool = False  # one rank and one scale for all modules: others are padded with zeros
    components: bool = False  # tensors are named after the pipeline's models
    largest: int | None = None  # rank

    def extra_bytes(self, modules: int) -> int:
        """Returns what the modules' alphas take, where they are stored."""
        return ALPHA_BYTES * modules if self.name == "kohya" else 0

    @property
    def evidence(self) -> str:
        """Whether it was loaded there in a test."""
        return f"tested with {self.tested}" if self.tested else BY_RULE

    def refusal(self, name: str, matrix: Matrix) -> str | None:
        """Returns why it cannot hold a product that is added to a tensor, or None.

        >>> CONSUMERS["vllm"].refusal("conv.weight", Matrix((8, 3, 3, 3)))
        'a convolution, and vLLM holds none'
        """
        kind = kind_of(name, matrix)
        return None if kind in self.holds else f"{WORDS[kind]}, and {self.title} holds none"


CONSUMERS: Mapping[ConsumerName, Consumer] = {
    one.name: one
    for one in (
        Consumer("peft", "PEFT", frozenset(WORDS), tested="PEFT 0.21", whole=True),
        Consumer("vllm", "vLLM", frozenset({"linear", "embedding"}), uniform=True, largest=512),
        Consumer("llama.cpp", "llama.cpp", frozenset({"linear", "embedding"}), uniform=True),
        Consumer(
            "diffusers",
            "diffusers",
            frozenset({"linear", "convolution"}),
            tested="diffusers 0.42",
            uniform=True,
            components=True,
        ),
        Consumer("kohya", "kohya/ComfyUI", frozenset({"linear", "convolution"}), components=True),
    )
}


def kind_of(name: str, matrix: Matrix) -> Kind:
    """Returns what sort of layer a tensor belongs to, as loaders of adapters tell them apart."""
    if matrix.is_stack or is_routed_expert(name):
        return "experts"
    if ROUTER.search(name):
        return "router"
    if len(matrix.stored) == 4:
        return "convolution"
    if is_embedding(name):
        return "embedding"
    return "transposed" if matrix.orientation == "in_out" else "linear"


def consumer_of(name: str) -> Consumer:
    """Returns a consumer by its name; UsageError if there is none."""
    found = next((consumer for known, consumer in CONSUMERS.items() if known == name), None)
    if found is None:
        raise UsageError(f"--for {name} is unknown: choose among {', '.join(CONSUMERS)}.")
    return found


def check_component(consumer: Consumer, component: str | None) -> None:
    """Raises UsageError for a component that there is not, or where none is named."""
    if component is None:
        return
    component_of((), component)
    if not consumer.components:
        raise UsageError(
            f"--component {component}: what {consumer.title} loads is of one model. Leave it out."
        )


BEGINNINGS: Mapping[Component, tuple[str, ...]] = {
    "unet": (
        *("down_blocks", "mid_block", "up_blocks"),
        *("input_blocks", "middle_block", "output_blocks"),
    ),
    "transformer": (
        *("transformer_blocks", "single_transformer_blocks"),
        *("double_blocks", "single_blocks", "joint_blocks"),
    ),
    "text_encoder": ("text_model",),
}
"""How the names of a pipeline's models begin, where no other model's do."""

FIRST_WORDS: Mapping[str, Component] = {
    word: one for one, words in BEGINNINGS.items() for word in words
}

ORIGINAL = frozenset(
    {
        *("input_blocks", "middle_block", "output_blocks"),
        *("double_blocks", "single_blocks", "joint_blocks"),
    }
)
"""… in the original checkpoints, whose layers diffusers cuts and names in another way."""

CUT = frozenset({"transformer_blocks", "single_transformer_blocks"})
"""… in diffusers' transformers, which cut layers that the original checkpoints have as one."""


def component_of(names: Iterable[str], given: str | None) -> Component:
    """Returns which model of a pipeline these tensors are of: as given, or as their names tell.

    >>> component_of(["down_blocks.0.attentions.0.proj_in.weight"], None)
    'unet'
    """
    if given is not None:
        if given not in COMPONENTS:
            choices = ", ".join(COMPONENTS)
            raise UsageError(f"--component {given} is unknown: choose among {choices}.")
        return given
    found: set[Component] = {
        FIRST_WORDS[word] for name in names if (word := name.split(".")[0]) in FIRST_WORDS
    }
    if len(found) != 1:
        raise UsageError(
            "the tensors' names do not tell which model of a diffusion pipeline they are of: add "
            f"--component, one of {', '.join(COMPONENTS)}."
        )
    return found.pop()


def naming_refusal(consumer: Consumer, name: str) -> str | None:
    """Returns why a consumer has no layer of that name (its component in front), or None."""
    component, _, rest = name.partition(".")
    word = rest.split(".")[0]
    if consumer.name == "diffusers" and word in ORIGINAL:
        return "named as in the original checkpoint, and diffusers' layers are others"
    if consumer.name == "kohya" and component == "transformer" and word in CUT:
        return (
            "named as in diffusers, and kohya's layers of a transformer are the original "
            "checkpoint's: --for diffusers, which ComfyUI reads too"
        )
    return None
