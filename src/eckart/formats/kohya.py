"""kohya's LoRA files, which ComfyUI reads too: `lora_unet_X.lora_down.weight`, `….lora_up.weight`,
`….alpha`.

X is the module's name with every dot an underscore, and so are the underscores of its words: what a
name stands for is told by the model's own list of modules, or by a table of the words that Stable
Diffusion's U-Nets and CLIP's text models are made of. The scale is alpha/rank, 1 in what we write.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache

from eckart.checkpoint.paths import printable
from eckart.consumers import COMPONENTS, FIRST_WORDS
from eckart.errors import CheckpointError

WEIGHTS = "lora.safetensors"

PREFIXES: Mapping[str, str] = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
}
"""What names begin with, and whose they are: `te` where a pipeline has one text encoder, `te1` and
`te2` where it has two; a transformer goes by `unet` too."""

CLIP, FLAT_CLIP = "text_model.", "encoder.layers."
"""How the layers of CLIP's text model are called in its checkpoints, and in newer transformers."""

WORDS = frozenset(
    {
        *("down_blocks", "mid_block", "up_blocks", "attentions", "resnets", "downsamplers"),
        *("upsamplers", "transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out"),
        *("ff", "net", "proj", "proj_in", "proj_out", "conv", "conv1", "conv2", "conv_in"),
        *("conv_out", "conv_shortcut", "time_emb_proj", "time_embedding", "add_embedding"),
        *("linear_1", "linear_2"),
        *("input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers"),
        *("emb_layers", "skip_connection", "op", "time_embed", "label_emb"),
        *("double_blocks", "single_blocks", "img_attn", "txt_attn", "img_mlp", "txt_mlp"),
        *("img_mod", "txt_mod", "qkv", "lin", "linear1", "linear2", "modulation"),
        *("text_model", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj"),
        *("out_proj", "mlp", "fc1", "fc2", "text_projection"),
    }
)
"""The words between the dots of a name: of the U-Nets (in diffusers and in the original), of Flux
(in the original), of CLIP's text models."""

FIRST = WORDS | {"out"}
"""… at the beginning of a name: elsewhere `proj_out` could be cut in two."""

LONGEST = max(word.count("_") for word in WORDS) + 1
BARE = ("unet", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Whose a module may be that is listed without its component."""


def part_names(name: str, *, numbered: bool = False) -> tuple[str, str]:
    """Returns the names of A and B of a tensor whose component stands in front.

    >>> part_names("unet.mid_block.attentions.0.proj_in.weight")[0]
    'lora_unet_mid_block_attentions_0_proj_in.lora_down.weight'
    """
    X = key_of(name.removesuffix(".weight"), numbered=numbered)
    return f"{X}.lora_down.weight", f"{X}.lora_up.weight"


def alpha_name(name: str, *, numbered: bool = False) -> str:
    """Returns where the alpha of a tensor's module is stored."""
    return f"{key_of(name.removesuffix('.weight'), numbered=numbered)}.alpha"


def key_of(module: str, *, numbered: bool = False) -> str:
    """Returns what a module goes by; `numbered`: the pipeline has two text encoders.

    >>> key_of("text_encoder.encoder.layers.0.mlp.fc1", numbered=True)
    'lora_te1_text_model_encoder_layers_0_mlp_fc1'
    """
    component, _, rest = module.partition(".")
    if component.startswith("text_encoder") and rest.startswith(FLAT_CLIP):
        rest = f"{CLIP}{rest}"
    first = "lora_te1" if numbered else "lora_te"
    known = {"transformer": "lora_unet", "text_encoder": first}
    prefixes = {component: prefix for prefix, component in PREFIXES.items()} | known
    return f"{prefixes[component]}_{rest.replace('.', '_')}"


def modules_of(keys: Iterable[str], listed: Iterable[str], where: str) -> dict[str, str]:
    """Returns the module, its component in front, that each key stands for.

    `listed` are modules that the keys may be of, with their component or without; what is not
    among them is cut into the words of `WORDS`. CheckpointError where that is not unique.
    """
    known: dict[str, set[str]] = {}
    for module in listed:
        first = module.split(".")[0]
        bare = "" if first in COMPONENTS else module
        for full in [f"{one}.{bare}" for one in BARE] if bare else [module]:
            for numbered in (False, True):
                known.setdefault(key_of(full, numbered=numbered), set()).add(full)
    return {key: _module(key, known.get(key, set()), where) for key in keys}


def _module(key: str, listed: set[str], where: str) -> str:
    prefix = next((p for p in PREFIXES if key.startswith(f"{p}_")), None)
    if prefix is None:
        raise CheckpointError(
            f"{printable(key)} in {where} is no name of kohya's: they begin with "
            f"{', '.join(PREFIXES)}."
        )
    component, rest = PREFIXES[prefix], key.removeprefix(f"{prefix}_")
    cuts = _cuts(tuple(rest.split("_")), FIRST)
    found = listed or {f"{component}.{'.'.join(words)}" for words in cuts}
    if len(found) != 1:
        why = "may be " + " or ".join(sorted(found)[:2]) if found else "is none that is known"
        raise CheckpointError(
            f"{printable(key)} in {where} {printable(why)}: kohya's names do not tell dots from "
            "underscores. Add --base with the model it was made for, whose tensors name the layers."
        )
    (module,) = found
    rest = module.removeprefix("unet.")
    other = FIRST_WORDS.get(rest.split(".")[0]) == "transformer"
    return f"transformer.{rest}" if other else module


@lru_cache(maxsize=4096)
def _cuts(pieces: tuple[str, ...], words: frozenset[str] = WORDS) -> tuple[tuple[str, ...], ...]:
    """Every way to join the pieces of a name to known words and numbers."""
    if not pieces:
        return ((),)
    cuts = list[tuple[str, ...]]()
    for count in range(1, min(LONGEST, len(pieces)) + 1):
        word = "_".join(pieces[:count])
        if word in words or (count == 1 and word.isascii() and word.isdigit()):
            cuts += [(word, *others) for others in _cuts(pieces[count:])]
    return tuple(cuts)
