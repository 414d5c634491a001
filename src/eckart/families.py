"""Which tensors of a checkpoint are matrices worth factoring, and why the others are not.

The default rule needs no list of models: 2-D, floating, called `….weight`, and not an
embedding, norm or output head.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from eckart.checkpoint.header import TensorInfo
from eckart.checkpoint.paths import printable
from eckart.errors import UsageError

FLOATING = ("F64", "F32", "F16", "BF16")

EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe|shared|relative_attention_bias)(\.|$)")
NORM = re.compile(r"norm|(^|\.)ln(_\w+)?(\.|$)", re.IGNORECASE)
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|score|classifier|head|cls)(\.|$)")


def matrices(
    tensors: Mapping[str, TensorInfo],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> dict[str, str | None]:
    """Returns every tensor's name with None if it is a matrix, else the reason why it is not.

    `include` replaces the rule by names (shell globs over the tensor's or module's name) among the
    2-D floating weights, so that a head can be named; `exclude` takes matrices out. A pattern that
    matches no candidate is an error.

    >>> info = TensorInfo((8, 8), "F32", "model.safetensors", 0, 256)
    >>> matrices({"layers.0.up.weight": info, "embed.weight": info, "lm_head.weight": info})
    {'layers.0.up.weight': None, 'embed.weight': 'embedding', 'lm_head.weight': 'output head'}
    """
    shapes = {name: _not_a_matrix(name, info) for name, info in tensors.items()}
    candidates = [name for name, reason in shapes.items() if reason is None]
    _check_patterns(candidates, [*include, *exclude])
    return {name: reason or _left_out(name, include, exclude) for name, reason in shapes.items()}


def _left_out(name: str, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    if _matches(name, exclude):
        return "excluded by --exclude"
    if include:
        return None if _matches(name, include) else "not among --include"
    return _role(name)


def _not_a_matrix(name: str, info: TensorInfo) -> str | None:
    if info.dtype not in FLOATING:
        return f"dtype {info.dtype}"
    if len(info.shape) != 2:
        return f"{len(info.shape)}-D"
    if 0 in info.shape:
        return "empty"
    return None if name.endswith(".weight") else "not a module's weight"


def _role(name: str) -> str | None:
    module = name.removesuffix(".weight")
    for role, pattern in (("embedding", EMBEDDING), ("norm", NORM), ("output head", HEAD)):
        if pattern.search(module):
            return role
    return None


def _matches(name: str, patterns: Sequence[str]) -> bool:
    module = name.removesuffix(".weight")
    return any(fnmatchcase(name, p) or fnmatchcase(module, p) for p in patterns)


def _check_patterns(candidates: list[str], patterns: list[str]) -> None:
    for pattern in patterns:
        if not any(_matches(name, [pattern]) for name in candidates):
            some = ", ".join(printable(name) for name in candidates[:3])
            raise UsageError(
                f"the pattern {pattern!r} matches no matrix; there are {len(candidates)}, such as "
                f"{some}. Patterns are shell globs: '*.q_proj'."
                if candidates
                else f"the pattern {pattern!r} matches nothing: there is no 2-D weight at all."
            )
