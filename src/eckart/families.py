"""Which tensors of a checkpoint are matrices worth factoring, how they are read, and why the
others are not.

The default rule needs no list of models: 2-D, floating, called `….weight` (or a bare array, whose
name has no dot), and not an embedding, norm or output head; 4-D weights are convolutions. The
exceptions are a short table: transposed Conv1D layers, and experts fused into one 3-D tensor.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from eckart.checkpoint.documents import read_json
from eckart.checkpoint.header import TensorInfo
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source
from eckart.errors import UsageError
from eckart.matrix import Matrix, Orientation

FLOATING = ("F64", "F32", "F16", "BF16")

GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")
"""How the architectures end that have an output head over the vocabulary."""

EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe|shared|relative_attention_bias)(\.|$)")
NORM = re.compile(r"norm|(^|\.)ln(_\w+)?(\.|$)", re.IGNORECASE)
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|score|classifier|head|cls)(\.|$)")

CONV1D = re.compile(r"(^|\.)(c_attn|q_attn|c_proj|c_fc)\.weight$")
"""GPT-2's layers, which transformers stores as (in, out) in some families and not in others."""

EXPERT = re.compile(r"(^|\.)(experts\.|(block_sparse_moe|mlp)\.(in|out)put_linear)")
"""Experts, each a tensor of its own or fused into a 3-D one (Llama 4, gpt-oss, Qwen3-VL-MoE;
Granite and JetMoE)."""

STACK = re.compile(r"(^|\.)experts\.(gate_up_proj|up_proj|down_proj)$")
"""Experts as transformers holds them: a 3-D parameter of a module called `experts`."""

ROUTER = re.compile(r"(^|\.)(gate|router)\.weight$")

LOOKED_UP = re.compile(
    r"(^|\.)(wte|wpe|shared|relative_attention_bias|embed_(tokens|positions|in)|tok_embeddings|"
    r"(token|word|position|token_type)_embeddings?|embeddings?)\.weight$"
)
"""Tables that a layer looks rows up in (torch's Embedding), by the names that they go by."""

TABLE = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|shared)\.weight$")
"""Embeddings of tokens, to which an output head may be tied."""

VOCABULARY_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)\.(weight|bias)$")

PAIRS = {"gate_up_proj": "down_proj", "input_linear": "output_linear"}
"""The fused layer that widens, and the one behind it: their shapes tell the order of the sides."""


def matrices(
    source: Source, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[dict[str, Matrix], dict[str, str]]:
    """Returns the matrices by name, and for every other tensor the reason why it is not one.

    `include` replaces the rule by names (shell globs over the tensor's or module's name) among the
    floating weights of a fitting shape, so that a head can be named; `exclude` takes matrices out.
    A pattern that matches no candidate is an error. Of tied tensors (one memory, several names)
    one stands for all.
    """
    tensors, tied = source.tensors, _tied(source)
    unfit = {name: f"tied to {to}" for name, to in tied.items()}
    unfit |= {
        name: why
        for name, info in tensors.items()
        if name not in tied and (why := _unfit(name, info))
    }
    candidates = [name for name in tensors if name not in unfit]
    _check_patterns(candidates, [*include, *exclude])
    reasons = {
        name: why
        for name, info in tensors.items()
        if (why := unfit.get(name) or _left_out(name, info, include, exclude))
    }
    transposed = has_conv1d(tensors)
    found = {
        name: Matrix(tensors[name].shape, _orientation(name, tensors, transposed))
        for name in tensors
        if name not in reasons
    }
    return found, reasons


def adaptable(
    source: Source,
    names: Iterable[str],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> tuple[dict[str, Matrix], dict[str, str]]:
    """Returns which of some tensors an adapter can hold as B·A, and why not the others.

    More than `matrices`: output heads and embeddings too, the latter as the layer computes them,
    (dimension × vocabulary). A pattern must match a tensor of the source, of whatever kind.
    """
    tensors, transposed = source.tensors, has_conv1d(source.tensors)
    _check_patterns([*tensors], [*include, *exclude], "tensor")
    found, reasons = dict[str, Matrix](), dict[str, str]()
    for name in names:
        if _matches(name, exclude):
            reasons[name] = "excluded by --exclude"
        elif include and not _matches(name, include):
            reasons[name] = "not among --include"
        elif why := _unadaptable(name, tensors):
            reasons[name] = why
        else:
            found[name] = matrix_as_used(name, tensors, transposed)
    return found, reasons


def matrix_as_used(name: str, tensors: Mapping[str, TensorInfo], transposed: bool) -> Matrix:
    """Returns a weight as its layer computes it: embeddings and Conv1D layers are transposed.

    `transposed` is what `has_conv1d` says of the checkpoint.
    """
    if is_embedding(name) and len(tensors[name].shape) == 2:
        return Matrix(tensors[name].shape, "in_out")
    return Matrix(tensors[name].shape, _orientation(name, tensors, transposed))


def is_embedding(name: str) -> bool:
    """Returns whether a tensor is the table of an embedding, by its name.

    >>> is_embedding("model.embed_tokens.weight"), is_embedding("lm_head.weight")
    (True, False)
    """
    return LOOKED_UP.search(name) is not None


def is_vocabulary(name: str) -> bool:
    """Returns whether a tensor has a row for each token: an embedding of tokens, or an output head.

    >>> is_vocabulary("model.embed_tokens.weight"), is_vocabulary("lm_head.bias")
    (True, True)
    """
    return TABLE.search(name) is not None or VOCABULARY_HEAD.search(name) is not None


def has_grown(name: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
    """Returns whether a tensor with a row for each token has rows that the base's has not.

    >>> has_grown("lm_head.weight", (204, 64), (200, 64))
    True
    """
    return (
        is_vocabulary(name)
        and len(ours) == len(theirs) > 0
        and ours[1:] == theirs[1:]
        and ours[0] > theirs[0]
    )


def is_tied_to_head(name: str, source: Source) -> bool:
    """Returns whether a tensor is the embedding that the model's output head is tied to.

    By its name, the architecture in config.json, `tie_word_embeddings` (true unless it says
    otherwise), and that the checkpoint holds no head.
    """
    if not TABLE.search(name) or any(HEAD.search(other) for other in source.tensors):
        return False
    if source.folder is None or not (source.folder / "config.json").exists():
        return False
    config = read_json(source.folder / "config.json")
    architectures = config.get("architectures")
    heads = isinstance(architectures, list) and any(
        str(one).endswith(GENERATING) for one in architectures
    )
    return heads and config.get("tie_word_embeddings") is not False


def is_stack_of_experts(name: str) -> bool:
    """Returns whether a tensor is a parameter that holds a layer of every expert of a mixture.

    >>> is_stack_of_experts("model.layers.0.mlp.experts.gate_up_proj")
    True
    """
    return STACK.search(name) is not None


def is_norm(name: str) -> bool:
    """Returns whether a tensor is the weight or the bias of a norm, by its name.

    >>> is_norm("model.layers.0.input_layernorm.weight"), is_norm("h.0.ln_1.bias")
    (True, True)
    """
    module, _, part = name.rpartition(".")
    return part in ("weight", "bias") and NORM.search(module) is not None


def is_routed_expert(name: str) -> bool:
    """Returns whether a tensor belongs to the experts of a mixture, which loaders fuse.

    >>> is_routed_expert("model.layers.0.mlp.experts.3.up_proj.weight")
    True
    """
    return EXPERT.search(name) is not None


def _left_out(
    name: str, info: TensorInfo, include: Sequence[str], exclude: Sequence[str]
) -> str | None:
    if _matches(name, exclude):
        return "excluded by --exclude"
    if include:
        return None if _matches(name, include) else "not among --include"
    return _role(name, info)


def _unfit(name: str, info: TensorInfo) -> str | None:
    """Why no pattern can make a matrix of it: its number format, or its shape.

    A convolution over one input channel is depthwise, as a rule: its channels share no input, so
    that no A before a 1×1 B computes it.
    """
    dimensions = len(info.shape)
    if info.dtype not in FLOATING:
        return f"dtype {info.dtype}"
    if dimensions not in (2, 4) and not (dimensions == 3 and EXPERT.search(name)):
        return f"{dimensions}-D"
    if 0 in info.shape:
        return "empty"
    return "one input channel" if dimensions == 4 and info.shape[1] == 1 else None


def _unadaptable(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Why no adapter holds it as a product."""
    info, module = tensors[name], name.removesuffix(".weight")
    if why := _unfit(name, info):
        return why
    if is_stack_of_experts(name) and len(info.shape) == 3:
        return None
    if is_routed_expert(name) or len(info.shape) == 3:
        return "routed experts, in a form that loaders do not make one parameter of"
    if f"{module.removesuffix('.out_proj')}.in_proj_weight" in tensors:
        return "part of torch's own attention, which computes with it and calls no layer"
    linear = f"{module}.bias" in tensors or HEAD.search(module) or len(info.shape) == 4
    if EMBEDDING.search(module) and not is_embedding(name) and not linear:
        return "a layer or a table, its name does not tell which"
    return None if name.endswith(".weight") else "not a module's weight"


def _role(name: str, info: TensorInfo) -> str | None:
    """Why a tensor of a fitting shape is none by default: what it is called."""
    fused = len(info.shape) == 3  # parameters of a module, without `.weight` in most models
    if "." in name and not name.endswith(".weight") and not fused:
        return "not a module's weight"
    module = name.removesuffix(".weight")
    kinds = (("embedding", EMBEDDING), ("norm", NORM), ("output head", HEAD))
    return next((role for role, pattern in kinds if pattern.search(module)), None)


def _tied(source: Source) -> dict[str, str]:
    """Every tied name but one of each group, and that one: the embedding, where there is one."""
    groups: dict[str, list[str]] = {}
    for name, first in source.tied.items():
        groups.setdefault(first, [first]).append(name)
    kept = {
        first: next((name for name in names if EMBEDDING.search(name)), first)
        for first, names in groups.items()
    }
    return {
        name: kept[first]
        for first, names in groups.items()
        for name in names
        if name != kept[first]
    }


def _orientation(name: str, tensors: Mapping[str, TensorInfo], transposed: bool) -> Orientation:
    if len(tensors[name].shape) == 3:
        return _fused_orientation(name, tensors)
    return "in_out" if transposed and CONV1D.search(name) else "out_in"


def has_conv1d(tensors: Mapping[str, TensorInfo]) -> bool:
    """Returns whether the layers of `CONV1D` are (in, out), as their biases tell.

    Those are then as long as the second side. One layer that is not square decides for all of
    them; the square ones cannot tell.
    """
    for name, info in tensors.items():
        bias = tensors.get(f"{name.removesuffix('.weight')}.bias")
        if CONV1D.search(name) and bias and len(info.shape) == 2 and len(set(info.shape)) == 2:
            return bias.shape == info.shape[1:]
    return False


def _fused_orientation(name: str, tensors: Mapping[str, TensorInfo]) -> Orientation:
    """(E, in, out) where only that order lets the two layers of an expert follow each other."""
    for widening, narrowing in PAIRS.items():
        wide, narrow = (
            tensors.get(name.replace(narrowing, widening)),
            tensors.get(name.replace(widening, narrowing)),
        )
        if wide and narrow and wide is not narrow and len(wide.shape) == len(narrow.shape) == 3:
            (_, a, b), (_, c, d) = wide.shape, narrow.shape
            return "in_out" if (a, b) == (d, 2 * c) else "out_in"
    return "out_in"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    module = name.removesuffix(".weight")
    return any(fnmatchcase(name, p) or fnmatchcase(module, p) for p in patterns)


def _check_patterns(candidates: list[str], patterns: list[str], what: str = "matrix") -> None:
    for pattern in patterns:
        if not any(_matches(name, [pattern]) for name in candidates):
            some = ", ".join(printable(name) for name in candidates[:3])
            raise UsageError(
                f"the pattern {pattern!r} matches no {what}; there are {len(candidates)}, such as "
                f"{some}. Patterns are shell globs: '*.q_proj'."
                if candidates
                else f"the pattern {pattern!r} matches nothing: there is no 2-D weight at all."
            )
