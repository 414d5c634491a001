"""The index of a sharded checkpoint, held against its shards without mercy.

Loaders in use take the wrong copy of a tensor that stands in two shards, fill a missing one at
random, and follow a shard name out of the folder; here each is an error that says what and where.
"""

from pathlib import Path

from eckart.checkpoint.documents import read_json
from eckart.checkpoint.header import TensorInfo, read_header
from eckart.checkpoint.paths import printable
from eckart.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

NAME_BYTES = 255


def read_shards(folder: Path) -> dict[str, TensorInfo]:
    """Returns every tensor of a sharded checkpoint, sorted by name.

    The index must name, for each tensor, the one shard that holds it, and the shards must hold no
    tensor that it does not name.
    """
    path = folder / INDEX
    places = _places(path)
    shards = sorted(set(places.values()))
    _check_present(folder, shards)
    found: dict[str, TensorInfo] = {}
    for number, shard in enumerate(shards, 1):
        for name, info in read_header(folder / shard).items():
            if name in found:
                raise CheckpointError(
                    f"{printable(name)} stands in two shards of {printable(folder)}: "
                    f"{printable(found[name].file)} and {printable(shard)}. Download both again."
                )
            if places.get(name) != shard:
                said = f"names {printable(places[name])}" if name in places else "does not name it"
                raise CheckpointError(
                    f"{printable(name)} stands in shard {number} of {len(shards)}, "
                    f"{printable(shard)}, but {printable(path)} {said}."
                )
            found[name] = info
    if missing := sorted(places.keys() - found.keys()):
        name = missing[0]
        raise CheckpointError(
            f"{len(missing)} tensor{'s' if len(missing) > 1 else ''} named in {printable(path)} "
            f"stand{'' if len(missing) > 1 else 's'} in no shard, the first {printable(name)} "
            f"(expected in {printable(places[name])}). Download the checkpoint again."
        )
    return dict(sorted(found.items()))


def _places(path: Path) -> dict[str, str]:
    """Tensor → shard, as the index says, each shard a plain file name."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{printable(path)} has no weight_map of tensors to shards.")
    for name, shard in places.items():
        if not isinstance(shard, str) or not _is_plain(shard):
            raise CheckpointError(
                f"{printable(path)} places {printable(name)} in {printable(repr(shard))}, which is "
                "not the name of a safetensors file beside it."
            )
    return places


def _is_plain(shard: str) -> bool:
    """One path component, so that it cannot lead out of the folder."""
    return (
        shard.endswith(".safetensors")
        and not any(c in "/\\" or not c.isprintable() for c in shard)
        and len(shard.encode()) <= NAME_BYTES
        and not shard.startswith(".")
    )


def _check_present(folder: Path, shards: list[str]) -> None:
    missing = [number for number, shard in enumerate(shards, 1) if not (folder / shard).exists()]
    if missing:
        names = ", ".join(printable(shards[number - 1]) for number in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(
            f"{len(missing)} of {len(shards)} shards are missing: {names}{more} "
            f"named in {INDEX} but not in {printable(folder)}. Download them again, or check that "
            "the copy finished."
        )
