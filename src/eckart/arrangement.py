"""How loaders hold what a checkpoint stores: under which names, and which tensors as one.

transformers loads the experts of a mixture, stored one by one, as two 3-D parameters, and names
some modules otherwise than their files do. An adapter goes onto the model as it is loaded, so that
is how a model and its base are compared. Names alone decide, by the tables here.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from eckart.checkpoint.header import TensorInfo
from eckart.checkpoint.quantized import Dequantized, dequantized
from eckart.checkpoint.source import Source
from eckart.checkpoint.view import Span, View, cut, view_of, whole

LLAVA = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (
        re.compile(
            r"^(vision_tower|multi_modal_projector|image_newline|vision_model|image_tower)\b"
        ),
        r"model.\1",
    ),
    (re.compile(r"^model\.vision_tower\.vision_model\."), "model.vision_tower."),
)
"""Vision–language models as they were stored before transformers 4.52, and its names since."""

MIXTRAL = ((re.compile(r"\.block_sparse_moe\."), ".mlp."),)

GRANITE = (
    (
        re.compile(r"\.block_sparse_moe\.input_linear\.weight$"),
        ".block_sparse_moe.experts.gate_up_proj",
    ),
    (
        re.compile(r"\.block_sparse_moe\.output_linear\.weight$"),
        ".block_sparse_moe.experts.down_proj",
    ),
    (
        re.compile(r"\.block_sparse_moe\.router\.layer\.weight$"),
        ".block_sparse_moe.router.weight",
    ),
)

VIT = (
    (re.compile(r"\bencoder\.layer\."), "layers."),
    (re.compile(r"\.attention\.attention\.(query|key|value)\."), r".attention.\1."),
    (re.compile(r"\.attention\.query\."), ".attention.q_proj."),
    (re.compile(r"\.attention\.key\."), ".attention.k_proj."),
    (re.compile(r"\.attention\.value\."), ".attention.v_proj."),
    (re.compile(r"\.attention\.output\.dense\."), ".attention.o_proj."),
    (re.compile(r"\.intermediate\.dense\."), ".mlp.fc1."),
    (re.compile(r"\.output\.dense\."), ".mlp.fc2."),
)

NEOX = ((re.compile(r"^embed_out\.weight$"), "lm_head.weight"),)

PHIMOE = ((re.compile(r"\.block_sparse_moe\.gate\.weight$"), ".mlp.router.weight"),)

RENAMINGS = (
    ((r"^language_model\.model\.",), LLAVA),
    ((r"\.block_sparse_moe\.experts\.0\.w1\.weight$", r"\.input_layernorm\.bias$"), PHIMOE),
    ((r"\.block_sparse_moe\.experts\.0\.w1\.weight$",), MIXTRAL),
    ((r"\.block_sparse_moe\.input_linear\.weight$",), GRANITE),
    ((r"\.layer\.0\.attention\.attention\.query\.weight$", r"\.layernorm_before\."), VIT),
    ((r"^gpt_neox\.", r"^embed_out\.weight$"), NEOX),
)
"""What names in a checkpoint tell of the others: with all of them, each is loaded otherwise."""

EXPERT = re.compile(r"^(.+\.experts)\.(\d+)\.(\w+)\.weight$")

STACKS = (
    {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
    {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
    {"up_proj": ("up_proj",), "down_proj": ("down_proj",)},
)
"""The parameters that experts are loaded as, each from the layers of an expert in this order."""

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "qkv": ("q", "k", "v"),
    "Wqkv": ("Wq", "Wk", "Wv"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Layers that some checkpoints store as one, rows under rows, and others one by one."""

ENDS = ("weight", "bias")


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A tensor of a view as planned."""

    info: TensorInfo
    spans: tuple[Span, ...]


def as_loaded(source: Source) -> Source:
    """Returns a source as transformers would hold it: dequantized, renamed, experts stacked.

    The source itself where nothing of that applies. Experts that are not all there, in one shape
    and dtype, stay as they are.
    """
    source = dequantized(source)
    renamings = [r for marks, table in RENAMINGS if _all(marks, source) for r in table]
    names = {name: _renamed(name, renamings) for name in source.tensors}
    if len({*names.values()}) < len(names):
        names = {name: name for name in names}
    stacks = _stacks({new: old for old, new in names.items()}, source)
    stacked = {old for parts in stacks.values() for old in parts}
    if not stacked and all(old == new for old, new in names.items()):
        return source
    drawn = {new: _single(old, source) for old, new in names.items() if old not in stacked}
    drawn |= {new: _stack(parts, source) for new, parts in stacks.items()}
    return _view(source, drawn)


def as_the_base(tuned: Source, base: Source) -> Source:
    """Returns a model whose tensors are named and cut as its base's, where that is plain.

    Layers that only one of the two stores as one are joined or cut (see `FUSED`), and what is
    named otherwise is matched by the longest end that names have in common, where shapes agree:
    of a vision–language model the language model to the one that it was made of.
    """
    drawn = {name: _single(name, tuned) for name in tuned.tensors}
    for made, parts in _recut(tuned, base).items():
        for part in parts:
            drawn.pop(part, None)
        drawn |= _made_of(made, parts, tuned, base)
    renamed = _matched({name: one.info for name, one in drawn.items()}, base)
    if not renamed and drawn.keys() == tuned.tensors.keys():
        return tuned
    return _view(tuned, {renamed.get(name, name): one for name, one in drawn.items()})


def is_dequantized(name: str, source: Source) -> bool:
    """Returns whether a tensor was read from 8-bit floats."""
    if isinstance(source, View):
        return any(is_dequantized(span.name, source.of) for span in source.spans[name])
    return isinstance(source, Dequantized) and name in source.scales


def _all(marks: Iterable[str], source: Source) -> bool:
    return all(any(re.search(mark, name) for name in source.tensors) for mark in marks)


def _renamed(name: str, renamings: Iterable[tuple[re.Pattern[str], str]]) -> str:
    for pattern, new in renamings:
        name = pattern.sub(new, name)
    return name


def _stacks(stored: Mapping[str, str], source: Source) -> dict[str, list[str]]:
    """Stored tensors in their order, by the parameter that they are loaded as."""
    found: dict[str, dict[str, dict[int, str]]] = {}
    for name, old in stored.items():
        if match := EXPERT.match(name):
            module, index, layer = match.groups()
            found.setdefault(module, {}).setdefault(layer, {})[int(index)] = old
    stacks: dict[str, list[str]] = {}
    for module, layers in found.items():
        table = next((t for t in STACKS if {*layers} == {p for ps in t.values() for p in ps}), None)
        if table is None or not _complete(layers, source):
            continue
        for parameter, parts in table.items():
            name, count = f"{module}.{parameter}", len(layers[parts[0]])
            if name not in stored:
                stacks[name] = [layers[part][i] for i in range(count) for part in parts]
    return stacks


def _complete(layers: Mapping[str, Mapping[int, str]], source: Source) -> bool:
    """Whether experts 0, 1, … have every layer, each in one shape, and all in one dtype."""
    count = max(len(experts) for experts in layers.values())
    infos = {layer: [source.tensors[n] for n in e.values()] for layer, e in layers.items()}
    return (
        all({*experts} == {*range(count)} for experts in layers.values())
        and all(len({info.shape for info in found}) == 1 for found in infos.values())
        and all(len(found[0].shape) == 2 for found in infos.values())
        and len({info.dtype for found in infos.values() for info in found}) == 1
    )


def _stack(parts: Sequence[str], source: Source) -> _Drawn:
    """Experts under experts; of each, layers under layers."""
    infos = [source.tensors[name] for name in parts]
    experts = sum(part.endswith(_ending(parts[0])) for part in parts)
    rows = sum(info.shape[0] for info in infos) // experts
    shape = (experts, rows, infos[0].shape[1])
    return _Drawn(_info(shape, infos), tuple(map(whole, parts, infos)))


def _ending(name: str) -> str:
    match = EXPERT.match(name)
    return f".{match.group(3)}.weight" if match else name


def _recut(tuned: Source, base: Source) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Tensors of the base, by name, that those of the tuned model hold, and these."""
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    for name in {*tuned.tensors, *base.tensors}:
        path = PurePosixPath(name.replace(".", "/"))
        parts = FUSED.get(path.parent.name)
        if parts is None or path.name not in ENDS:
            continue
        split = tuple(".".join((*path.parts[:-2], part, path.name)) for part in parts)
        for ours, theirs in (((name,), split), (split, (name,))):
            if (
                all(one in tuned.tensors for one in ours)
                and all(one in base.tensors for one in theirs)
                and not any(one in tuned.tensors for one in theirs)
                and _rows(ours, tuned) == _rows(theirs, base) is not None
            ):
                found[theirs] = ours
    return found


def _made_of(
    names: Sequence[str], parts: Sequence[str], tuned: Source, base: Source
) -> dict[str, _Drawn]:
    """Tensors of the base's names and shapes, made of the tuned model's."""
    infos = [tuned.tensors[part] for part in parts]
    spans, begin = list(map(whole, parts, infos)), 0
    size = infos[0].nbytes // max(infos[0].parameters, 1)
    drawn: dict[str, _Drawn] = {}
    for name in names:
        shape = base.tensors[name].shape
        end = begin + math.prod(shape) * size
        drawn[name] = _Drawn(_info(shape, infos), tuple(cut(spans, begin, end)))
        begin = end
    return drawn


def _rows(names: Sequence[str], source: Source) -> tuple[int, tuple[int, ...]] | None:
    """The rows and the width of what tensors under one another make: None unless they fit."""
    infos = [source.tensors[name] for name in names]
    if len({(info.shape[1:], info.dtype) for info in infos}) != 1 or not infos[0].shape:
        return None
    return sum(info.shape[0] for info in infos), infos[0].shape[1:]


def _matched(tuned: Mapping[str, TensorInfo], base: Source) -> dict[str, str]:
    """The base's names of tensors that are named otherwise: by prefixes, the commonest first."""
    ours = {name for name in tuned if name not in base.tensors}
    theirs = {name for name in base.tensors if name not in tuned}
    votes: Counter[tuple[str, str]] = Counter()
    ends: dict[str, list[str]] = {}
    for name in theirs:
        ends.setdefault(_end(name), []).append(name)
    for name in ours:
        for other in ends.get(_end(name), ()):
            if tuned[name].shape == base.tensors[other].shape:
                votes[_prefixes(name, other)] += tuned[name].parameters
    found: dict[str, str] = {}
    for (mine, its), _ in sorted(votes.items(), key=lambda vote: (-vote[1], vote[0])):
        for name in sorted(ours - found.keys()):
            other = f"{its}{name.removeprefix(mine)}"
            if name.startswith(mine) and other in theirs and other not in {*found.values()}:
                found |= {name: other} if tuned[name].shape == base.tensors[other].shape else {}
    return found


def _end(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _prefixes(ours: str, theirs: str) -> tuple[str, str]:
    """What stands before the longest end that two names have in common, by whole words."""
    mine, its = ours.split("."), theirs.split(".")
    while mine and its and mine[-1] == its[-1]:
        mine.pop()
        its.pop()
    return "".join(f"{word}." for word in mine), "".join(f"{word}." for word in its)


def _single(name: str, source: Source) -> _Drawn:
    info = source.tensors[name]
    return _Drawn(info, (whole(name, info),))


def _info(shape: tuple[int, ...], infos: Sequence[TensorInfo]) -> TensorInfo:
    size = math.prod(shape) * (infos[0].nbytes // max(infos[0].parameters, 1))
    return TensorInfo(shape, infos[0].dtype, infos[0].file, 0, size)


def _view(source: Source, drawn: Mapping[str, _Drawn]) -> View:
    infos = {name: one.info for name, one in drawn.items()}
    return view_of(source, infos, {name: one.spans for name, one in drawn.items()})
