"""The index of a sharded checkpoint, held against its shards without mercy.

Loaders in use take the wrong copy of a tensor that stands in two shards, fill a missing one at
random, and follow a shard name out of the folder; here each is an error that says what and where.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eckart.checkpoint.documents import read_json
from eckart.checkpoint.header import TensorInfo
from eckart.checkpoint.paths import is_there, printable
from eckart.errors import CheckpointError

NAME_BYTES = 255


@dataclass(frozen=True, slots=True)
class Layout:
    """How a kind of checkpoint names its files: one for all the weights, or shards and an index."""

    weights: str
    suffix: str

    @property
    def index(self) -> str:
        """The index's file name."""
        return f"{self.weights}.index.json"

    def found_in(self, folder: Path) -> bool:
        """Whether a folder holds weights of this kind; CheckpointError if it holds them twice."""
        single, index = (is_there(folder / name) for name in (self.weights, self.index))
        if single and index:
            raise CheckpointError(
                f"{printable(folder)} holds both {self.weights} and {self.index}, which may be two "
                "different models: move one of them away."
            )
        return single or index


SAFETENSORS = Layout("model.safetensors", ".safetensors")
PICKLE = Layout("pytorch_model.bin", ".bin")


@dataclass(frozen=True, slots=True)
class Index:
    """Which shard holds which tensor, as the index says; every shard is there."""

    folder: Path
    file: str
    places: Mapping[str, str]

    @property
    def shards(self) -> list[str]:
        """The shards' file names, sorted."""
        return sorted(set(self.places.values()))

    def merge(self, headers: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, TensorInfo]:
        """Returns every tensor of the shards, given what each shard's own header says.

        The index must name, for each tensor, the one shard that holds it, and the shards must
        hold no tensor that it does not name.
        """
        path, found = self.folder / self.file, dict[str, TensorInfo]()
        for number, shard in enumerate(self.shards, 1):
            for name, info in headers[shard].items():
                if name in found:
                    raise CheckpointError(
                        f"{printable(name)} stands in two shards of {printable(self.folder)}: "
                        f"{printable(found[name].file)} and {printable(shard)}. "
                        "Download both again."
                    )
                if self.places.get(name) != shard:
                    place = self.places.get(name)
                    said = f"names {printable(place)}" if place else "does not name it"
                    raise CheckpointError(
                        f"{printable(name)} stands in shard {number} of {len(self.shards)}, "
                        f"{printable(shard)}, but {printable(path)} {said}. Download both again."
                    )
                found[name] = info
        self._check_all_found(found)
        return found

    def _check_all_found(self, found: Mapping[str, TensorInfo]) -> None:
        missing = sorted(self.places.keys() - found.keys())
        if not missing:
            return
        name, many = missing[0], len(missing) > 1
        raise CheckpointError(
            f"{len(missing)} tensor{'s' if many else ''} named in "
            f"{printable(self.folder / self.file)} stand{'' if many else 's'} in no shard, the "
            f"first {printable(name)} (expected in {printable(self.places[name])}). Download the "
            "checkpoint again."
        )


def read_index(folder: Path, layout: Layout) -> Index:
    """Returns the index of a sharded checkpoint, each shard a plain file name that is there."""
    path = folder / layout.index
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(
            f"{printable(path)} has no weight_map of tensors to shards. Download it again."
        )
    for name, shard in places.items():
        if not isinstance(shard, str) or not _is_plain(shard, layout.suffix):
            raise CheckpointError(
                f"{printable(path)} places {printable(name)} in {printable(repr(shard))}, which is "
                f"not the name of a {layout.suffix} file beside it. Download it again."
            )
    index = Index(folder, layout.index, places)
    _check_present(index)
    return index


def _is_plain(shard: str, suffix: str) -> bool:
    """One path component, so that it cannot lead out of the folder."""
    return (
        shard.endswith(suffix)
        and not any(c in "/\\" or not c.isprintable() for c in shard)
        and len(shard.encode()) <= NAME_BYTES
        and not shard.startswith(".")
    )


def _check_present(index: Index) -> None:
    shards = index.shards
    missing = [shard for shard in shards if not is_there(index.folder / shard)]
    if missing:
        names = ", ".join(printable(shard) for shard in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(
            f"{len(missing)} of {len(shards)} shards are missing: {names}{more} "
            f"named in {index.file} but not in {printable(index.folder)}. Download them again, or "
            "check that the copy finished."
        )
