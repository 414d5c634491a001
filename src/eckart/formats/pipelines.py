"""LoRA adapters in any form that is read: PEFT's folders, and the files of diffusion pipelines.

Knows the names in each; whatever is in a file and not understood is refused by name, as in
`adapters`. The parts of a file are named with their component in front: `unet.mid_block.….weight`.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from eckart.certificate import FactoredEntry, read_certificate
from eckart.checkpoint.header import read_header, read_metadata
from eckart.checkpoint.paths import is_there, printable
from eckart.checkpoint.source import Checkpoint, Source
from eckart.checkpoint.writer import CERTIFICATE
from eckart.consumers import COMPONENTS, Consumer, component_of
from eckart.errors import CheckpointError, UsageError
from eckart.formats import diffusers, kohya, peft
from eckart.formats.adapters import LARGEST, Adapter, Part, check_config, open_adapter, part_of

DIFFUSERS_PARTS = {".lora_A.weight": "A", ".lora_B.weight": "B"}
KOHYA_PARTS = {".lora_down.weight": "A", ".lora_up.weight": "B"}
ALPHA = ".alpha"


def open_lora(path: Path, listed: Collection[str] = ()) -> Adapter:
    """Returns the adapter at a path: a folder in PEFT's format, or a file of diffusers or kohya.

    A file may be named itself, or by its folder where it has the name that we give it. `listed`
    are modules that kohya's names may stand for; what eckart wrote says so itself.
    """
    file = _weights(path)
    if file is None:
        return open_adapter(path)
    source = Checkpoint(path, read_header(file))
    if any(name.startswith(tuple(f"{p}_" for p in kohya.PREFIXES)) for name in source.tensors):
        return _kohya(source, [*listed, *_certified(path)])
    if not any(name.endswith((*DIFFUSERS_PARTS,)) for name in source.tensors):
        raise CheckpointError(f"{printable(path)} holds no LoRA at all: give an adapter.")
    return _diffusers(source, _settings(file))


def holds_adapter(path: Path) -> bool:
    """Returns whether a path looks like an adapter: by the files that are there, unread."""
    if path.is_dir():
        return is_there(path / peft.CONFIG) or _weights(path) is not None
    return path.suffix == ".safetensors" and is_there(path)


def addressed(adapter: Adapter, consumer: Consumer, component: str | None) -> Adapter:
    """Returns the adapter with its tensors named as a consumer has them.

    Files of pipelines carry the component in front; in PEFT's format there is none, and one model.
    `component` says which, where it must be chosen or cannot be told from the names.
    """
    parts = adapter.parts
    where = printable(adapter.source.path)
    if adapter.keys == "peft":
        if consumer.components:
            of = component_of(parts, component)
            return _renamed(adapter, {name: f"{of}.{name}" for name in parts})
        if component is not None:
            raise UsageError(
                f"--component {component}: {where} and what {consumer.title} loads are of one "
                "model. Leave it out."
            )
        return adapter
    of = None if component is None else component_of((), component)
    kept = [name for name in parts if of is None or name.startswith(f"{of}.")]
    found = sorted({name.split(".")[0] for name in parts})
    if not kept:
        raise UsageError(f"--component {component}: {where} holds {', '.join(found)}.")
    if consumer.components:
        return _renamed(adapter, {name: name for name in kept})
    if len({name.split(".")[0] for name in kept}) > 1:
        raise UsageError(
            f"{where} holds {' and '.join(found)}, and {consumer.title} loads an adapter of one "
            f"model: add --component, one of {', '.join(found)}."
        )
    return _renamed(adapter, {name: name.partition(".")[2] for name in kept})


def entry_of(part: Part, source: Source, rank: int | None = None) -> FactoredEntry:
    """Returns how a part of an adapter is stored, at its rank or another."""
    A, (m, n) = source.tensors[part.A].shape, part.shape
    turned = part.is_embedding or part.transposed
    shape = (m, *A[1:]) if len(A) == 4 else (n, m) if turned else (m, n)
    if part.experts:
        shape = (part.experts, m, n)
    return FactoredEntry(
        rank=part.rank if rank is None else rank,
        form="ba",
        shape=shape,
        orientation="in_out" if turned and len(shape) == 2 else "out_in",
    )


def _renamed(adapter: Adapter, names: Mapping[str, str]) -> Adapter:
    parts = {new: replace(adapter.parts[old], name=new) for old, new in names.items()}
    return replace(adapter, parts=dict(sorted(parts.items())))


def _weights(path: Path) -> Path | None:
    """The file of a pipeline that a path means; None: it is PEFT's, or nothing."""
    if path.is_file():
        return path
    if is_there(path / peft.CONFIG):
        return None
    files = (path / name for name in (diffusers.WEIGHTS, kohya.WEIGHTS))
    return next((file for file in files if is_there(file)), None)


def _certified(path: Path) -> list[str]:
    """The modules that eckart named when it wrote a file of kohya's."""
    if not is_there(path / CERTIFICATE):
        return []
    certificate = read_certificate(path)
    component = certificate.options.get("component")
    named = certificate.kind == "adapter" and component is not None
    return [f"{component}.{X}" if named else X for X in certificate.factored]


def _diffusers(source: Source, settings: Mapping[str, Mapping[str, Any]]) -> Adapter:
    found, alphas = _sorted_out(source, DIFFUSERS_PARTS)
    parts: dict[str, Part] = {}
    for X, names in found.items():
        component, _, rest = X.partition(".")
        if component not in COMPONENTS:
            raise CheckpointError(
                f"{printable(names.get('A', X))} in {printable(source.path)} is no tensor of "
                f"diffusers' LoRA files: they begin with {', '.join(COMPONENTS)}."
            )
        config = settings.get(component) or _stated(source, names, alphas.get(X))
        parts[f"{X}.weight"] = replace(part_of(rest, names, source, config), name=f"{X}.weight")
    return _adapter(source, parts, "diffusers")


def _kohya(source: Source, listed: Collection[str]) -> Adapter:
    found, alphas = _sorted_out(source, KOHYA_PARTS)
    modules = kohya.modules_of(found, listed, printable(source.path))
    if len({*modules.values()}) < len(modules):
        raise CheckpointError(f"{printable(source.path)} names a module twice: take one out.")
    parts = {
        f"{modules[X]}.weight": part_of(
            f"{modules[X]}.weight", names, source, _stated(source, names, alphas.get(X))
        )
        for X, names in found.items()
    }
    return _adapter(source, parts, "kohya")


def _adapter(source: Source, parts: Mapping[str, Part], keys: Any) -> Adapter:
    return Adapter(source, {}, dict(sorted(parts.items())), {}, {}, keys)


def _sorted_out(
    source: Source, ends: Mapping[str, str]
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The two factors of each module, and where its alpha is."""
    parts: dict[str, dict[str, str]] = {}
    alphas: dict[str, str] = {}
    for name in source.tensors:
        end = next((end for end in ends if name.endswith(end)), None)
        if end is not None:
            parts.setdefault(name.removesuffix(end), {})[ends[end]] = name
        elif name.endswith(ALPHA):
            alphas[name.removesuffix(ALPHA)] = name
        else:
            raise CheckpointError(
                f"{printable(name)} in {printable(source.path)} is not supported: only "
                f"{', '.join((*ends, ALPHA))} are. Load it where it came from, and save a plain "
                "LoRA."
            )
    for X, alpha in alphas.items():
        if X not in parts:
            raise CheckpointError(
                f"{printable(alpha)} in {printable(source.path)} belongs to no LoRA."
            )
    return parts, alphas


def _stated(source: Source, names: Mapping[str, str], alpha: str | None) -> dict[str, Any]:
    """What a file says of a module, as a configuration would: without an alpha the scale is 1."""
    rank = source.tensors[names["A"]].shape[0] if "A" in names else 0
    if alpha is None:
        return {"r": rank, "lora_alpha": rank}
    info = source.tensors[alpha]
    value = float(source.load(alpha)) if info.parameters == 1 else math.nan
    if not 0 < value <= LARGEST:
        raise CheckpointError(
            f"{printable(alpha)} in {printable(source.path)} is {value}: it must be a number above "
            "0, because loaders read 0 in different ways."
        )
    return {"r": rank, "lora_alpha": value}


def _settings(file: Path) -> dict[str, dict[str, Any]]:
    """The configuration of each component that diffusers keeps in a file's header, if any."""
    text = read_metadata(file).get(diffusers.METADATA)
    if text is None:
        return {}
    where = f"{diffusers.METADATA} of {printable(file)}"
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise CheckpointError(f"{where} is no JSON object: save the adapter again.")
    settings: dict[str, dict[str, Any]] = {}
    for key, value in document.items():
        component, _, field = str(key).partition(".")
        settings.setdefault(component, {})[field] = value
    for component, config in settings.items():
        config.setdefault("peft_type", "LORA")
        check_config(config, file / component)
    return settings
