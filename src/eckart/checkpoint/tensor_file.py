"""safetensors files laid out first and filled in any order, by any process."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eckart.checkpoint.header import DTYPES
from eckart.checkpoint.index import SAFETENSORS
from eckart.checkpoint.paths import storage_errors, sync, write_file
from eckart.errors import UsageError

SHARD_BYTES = 5 * 10**9
"""The default of `--shard-size`, as the Hub's own tools cut."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """The dtype, as safetensors spells it, shape and bytes of a tensor to be written."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, dtype: str, shape: tuple[int, ...]) -> "TensorLayout":
        """Returns the layout of a tensor of a dtype that torch holds."""
        return cls(dtype, shape, math.prod(shape) * DTYPES[dtype].itemsize)

    @classmethod
    def like(cls, tensor: Tensor) -> "TensorLayout":
        """Returns the layout of a tensor in memory."""
        return cls.of(NAMES[tensor.dtype], tuple(tensor.shape))

    @property
    def itemsize(self) -> int:
        """Bytes per element; 1 for what torch does not know, which is copied as bytes."""
        return DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes lie."""

    file: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorFiles:
    """safetensors files of a folder, laid out and being filled.

    A value: a process that is handed it can fill its own tensors, in any order.
    """

    folder: Path
    places: Mapping[str, Place]

    @property
    def files(self) -> list[str]:
        """The files' names, sorted."""
        return sorted({place.file for place in self.places.values()})

    def held(self, file: str) -> list[str]:
        """The names of a file's tensors, in the order in which they stand in it."""
        names = [name for name, place in self.places.items() if place.file == file]
        return sorted(names, key=lambda name: (self.places[name].begin, self.places[name].end))

    def write(self, name: str, tensor: Tensor, offset: int = 0) -> None:
        """Puts a tensor, or a piece of its bytes, in its place, `offset` bytes from its start."""
        place = self.places[name]
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        begin = place.begin + offset
        assert begin + len(flat) <= place.end, f"{name}: {len(flat)} bytes do not fit at {offset}"
        path = self.folder / place.file
        with storage_errors(path):
            descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                _write_all(descriptor, flat.numpy().data, begin)
            finally:
                os.close(descriptor)

    def sync(self) -> None:
        """Syncs every file."""
        for file in self.files:
            sync(self.folder / file)


def lay_out_file(path: Path, layout: Mapping[str, TensorLayout]) -> TensorFiles:
    """Creates one safetensors file with its header written and its tensors' places empty.

    The header is ours because safetensors' own writer needs all tensors in memory and, with two
    or more metadata keys, orders its header at random (safetensors issue 584). Tensors stand by
    falling element size, then by name, as the library sorts them, so that none is misaligned.
    """
    text, offsets = _header(layout)
    start = 8 + len(text)
    with storage_errors(path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)  # less the umask
        try:
            os.truncate(descriptor, start + max((end for _, end in offsets.values()), default=0))
            _write_all(descriptor, len(text).to_bytes(8, "little") + text, 0)
        finally:
            os.close(descriptor)
    places = {name: Place(path.name, start + a, start + b) for name, (a, b) in offsets.items()}
    return TensorFiles(path.parent, places)


def lay_out_checkpoint(
    folder: Path, layout: Mapping[str, TensorLayout], shard_bytes: int = SHARD_BYTES
) -> TensorFiles:
    """Creates one `model.safetensors`, or shards with their index where one would be too large.

    Shards are cut in sorted order of the tensors' names, so that equal tensors give equal files;
    a single tensor larger than `shard_bytes` has a shard of its own.
    """
    shards = _cut(layout, shard_bytes)
    files = {_shard_name(i, len(shards)): names for i, names in enumerate(shards, 1)}
    return lay_out_shards(folder, layout, files)


def lay_out_shards(
    folder: Path, layout: Mapping[str, TensorLayout], shards: Mapping[str, Iterable[str]]
) -> TensorFiles:
    """Creates files of these names, each with the tensors that are named, and their index; none
    where all are in `model.safetensors`."""
    places = dict[str, Place]()
    for file, names in shards.items():
        places |= lay_out_file(folder / file, {name: layout[name] for name in names}).places
    if shards.keys() - {SAFETENSORS.weights}:
        total = sum(place.nbytes for place in layout.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: place.file for name, place in places.items()},
        }
        text = json.dumps(index, indent=2, sort_keys=True).encode("ascii")
        write_file(folder / SAFETENSORS.index, text + b"\n")
    return TensorFiles(folder, places)


def _write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done : done + 2**30], offset + done)


def _cut(layout: Mapping[str, TensorLayout], shard_bytes: int) -> list[list[str]]:
    if shard_bytes < 1:
        raise UsageError(f"--shard-size {shard_bytes} is out of range: choose 1 byte or more.")
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(layout):
        if shards[-1] and filled + layout[name].nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += layout[name].nbytes
    return shards


def _shard_name(number: int, count: int) -> str:
    if count == 1:
        return SAFETENSORS.weights
    return f"model-{number:05d}-of-{count:05d}{SAFETENSORS.suffix}"


def _header(layout: Mapping[str, TensorLayout]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    order = sorted(layout, key=lambda name: (-layout[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, tuple[int, int]] = {}
    offset = 0
    for name in order:
        end = offset + layout[name].nbytes
        offsets[name] = offset, end
        header[name] = {
            "dtype": layout[name].dtype,
            "shape": layout[name].shape,
            "data_offsets": offsets[name],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8), offsets
