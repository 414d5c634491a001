"""safetensors files laid out first and filled in any order, and the shards of a checkpoint."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eckart.checkpoint.header import DTYPES
from eckart.checkpoint.index import INDEX, WEIGHTS
from eckart.checkpoint.paths import storage_errors, write_file
from eckart.errors import UsageError

SHARD_BYTES = 5 * 10**9
"""The default of `--shard-size`, as the Hub's own tools cut."""


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

    @property
    def itemsize(self) -> int:
        """Bytes per element; 1 for what torch does not know, which is copied as bytes."""
        return DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1


class TensorFile:
    """A safetensors file laid out first and filled tensor by tensor, in any order.

    The header is ours because safetensors' own writer needs all tensors in memory and, with two
    or more metadata keys, orders its header at random (safetensors issue 584). Tensors stand by
    falling element size, then by name, as the library sorts them, so that none is misaligned.
    """

    def __init__(self, path: Path, layout: Mapping[str, TensorLayout]) -> None:
        self.path, self._left = path, set(layout)
        header, self._places = _lay_out(layout)
        self._start = 8 + len(header)
        size = self._start + max((end for _, end in self._places.values()), default=0)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with storage_errors(path):
            self._descriptor = os.open(path, flags, 0o666)  # less the umask
            os.truncate(self._descriptor, size)
            self._write(len(header).to_bytes(8, "little") + header, 0)

    def write(self, name: str, tensor: Tensor) -> None:
        """Puts one tensor in its place; its bytes must be as many as were laid out."""
        begin, end = self._places[name]
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        assert len(flat) == end - begin, f"{name}: {len(flat)} bytes for a place of {end - begin}"
        with storage_errors(self.path):
            self._write(flat.numpy().data, self._start + begin)
        self._left.discard(name)

    def close(self) -> None:
        """Syncs and closes; every tensor must have been written."""
        assert not self._left, f"never written: {sorted(self._left)[:3]}"
        with storage_errors(self.path):
            os.fsync(self._descriptor)
            os.close(self._descriptor)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done : done + 2**30], offset + done)


class TensorFiles:
    """One `model.safetensors`, or shards with their index where one would be too large.

    Shards are cut in sorted order of the tensors' names, so that equal tensors give equal files;
    a single tensor larger than `shard_bytes` has a shard of its own.
    """

    def __init__(
        self, folder: Path, layout: Mapping[str, TensorLayout], shard_bytes: int = SHARD_BYTES
    ) -> None:
        self._folder, self._layout = folder, layout
        shards = _cut(layout, shard_bytes)
        self._files = {
            _shard_name(number, len(shards)): TensorFile(
                folder / _shard_name(number, len(shards)), {name: layout[name] for name in names}
            )
            for number, names in enumerate(shards, 1)
        }
        self._places = {
            name: _shard_name(number, len(shards))
            for number, names in enumerate(shards, 1)
            for name in names
        }

    def write(self, name: str, tensor: Tensor) -> None:
        """Puts one tensor in its place."""
        self._files[self._places[name]].write(name, tensor)

    def close(self) -> None:
        """Syncs and closes all files, and writes the index where there are several."""
        for file in self._files.values():
            file.close()
        if len(self._files) > 1:
            total = sum(place.nbytes for place in self._layout.values())
            index = {"metadata": {"total_size": total}, "weight_map": self._places}
            text = json.dumps(index, indent=2, sort_keys=True).encode("ascii")
            write_file(self._folder / INDEX, text + b"\n")


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
    return WEIGHTS if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _lay_out(layout: Mapping[str, TensorLayout]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    order = sorted(layout, key=lambda name: (-layout[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places: dict[str, tuple[int, int]] = {}
    offset = 0
    for name in order:
        end = offset + layout[name].nbytes
        places[name] = offset, end
        header[name] = {
            "dtype": layout[name].dtype,
            "shape": layout[name].shape,
            "data_offsets": places[name],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8), places
