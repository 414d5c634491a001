"""Checkpoints as lazy sources: headers first, then tensors, whole or by rows.

Knows bytes on disk; must not know what the tensors are for.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eckart.checkpoint.documents import canonical_json
from eckart.checkpoint.hashing import TensorHash, bytes_of
from eckart.checkpoint.header import DTYPES, TensorInfo
from eckart.checkpoint.paths import open_regular, printable, read_into
from eckart.errors import CheckpointError, DtypeError

CHUNK_BYTES = 2**22
"""Tensors are copied and hashed in pieces of 4 MiB, which stay in the cache."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What the file system says of a file's contents."""

    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Source(ABC):
    """Anything on disk that names tensors and gives their bytes."""

    path: Path  # what the user named: a folder, or one file
    tensors: Mapping[str, TensorInfo]  # from headers alone, in sorted order
    tied: Mapping[str, str] = field(default_factory=dict)  # name → the name it shares memory with
    known: Mapping[str, str] = field(default_factory=dict, kw_only=True)  # digests, hashed before
    folder: Path | None = field(init=False)  # where other files are; a single file has none
    stamps: Mapping[str, Stamp] = field(init=False)  # of every weight file, when it was opened

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", dict(sorted(self.tensors.items())))
        object.__setattr__(self, "folder", self.path if self.path.is_dir() else None)
        object.__setattr__(self, "stamps", {file: self._stamp(file) for file in self.files})

    @abstractmethod
    def read(self, name: str, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` with a tensor's bytes from `offset` on: little-endian, row-major."""

    @property
    def name(self) -> str:
        """The source's own name, without the path to it."""
        return self.path.name if self.folder is None else self.path.resolve().name

    @property
    def files(self) -> list[str]:
        """The weight files, sorted."""
        return sorted({info.file for info in self.tensors.values()})

    @property
    def origin(self) -> "Source":
        """The source of what is stored, where this one reads it otherwise."""
        return self

    def told(self, digests: Mapping[str, str]) -> dict[str, str]:
        """Returns what digests of this source's tensors tell of the stored ones."""
        return dict(digests)

    def file(self, name: str) -> Path:
        """Returns the path of a weight file."""
        return self.path if self.folder is None else self.folder / name

    def load(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Returns a tensor, or rows start … stop − 1 of it, in memory of its own.

        Rows are indices of the first dimension; without `stop`, all from `start` on. Peak: the
        bytes of what is returned (other sources than safetensors keep the tensor beside them).
        """
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise DtypeError(
                f"{printable(name)} has dtype {printable(info.dtype)}, which torch cannot hold."
            )
        dtype, shape, offset = DTYPES[info.dtype], info.shape, 0
        if (start, stop) != (0, None):
            rows = shape[0]
            stop = rows if stop is None else stop
            assert 0 <= start <= stop <= rows, f"{name}: rows {start} … {stop} of {rows}"
            shape, offset = (stop - start, *shape[1:]), start * (info.nbytes // max(rows, 1))
        buffer = torch.empty(shape, dtype=dtype)
        self.read(name, bytes_of(buffer), offset)
        return buffer

    def entries(self, name: str, start: int, stop: int) -> Tensor:
        """Returns entries start … stop − 1 of a tensor, in the order in which they are stored."""
        dtype = DTYPES[self.tensors[name].dtype]
        buffer = torch.empty(stop - start, dtype=dtype)
        self.read(name, bytes_of(buffer), start * dtype.itemsize)
        return buffer

    def chunks(self, name: str) -> Iterator[Tensor]:
        """Yields the bytes of a tensor in pieces of at most 4 MiB, each as uint8."""
        size = self.tensors[name].nbytes
        for offset in range(0, size, CHUNK_BYTES):
            piece = torch.empty(min(CHUNK_BYTES, size - offset), dtype=torch.uint8)
            self.read(name, bytes_of(piece), offset)
            yield piece

    def digest(self, name: str) -> str:
        """Returns the BLAKE3 of a tensor's bytes. Cost: reads it once, unless it is known."""
        if name in self.known:
            return self.known[name]
        found = TensorHash()
        for piece in self.chunks(name):
            found.update(bytes_of(piece))
        return found.hexdigest()

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a weight file is not as it was when the source was opened."""
        for file in self.files:
            self._check_file(file)

    def fingerprint(self, digests: Mapping[str, str] | None = None) -> str:
        """Returns the SHA-256 over every tensor's name, dtype, shape and BLAKE3.

        How tensors are spread over files does not matter: the same model in one file and in
        shards has the same fingerprint. `digests` are those already known; the rest is read. Of
        what is read otherwise than it is stored, the stored tensors count.
        """
        origin, known = self.origin, self.told(digests or {})
        lines = [
            [name, info.dtype, [*info.shape], known.get(name) or origin.digest(name)]
            for name, info in origin.tensors.items()
        ]
        return hashlib.sha256(canonical_json(lines)).hexdigest()

    def _check_file(self, file: str) -> Stamp:
        """The file's stamp, which must be what it was."""
        stamp, found = self.stamps[file], self._stamp(file)
        if found == stamp:
            return stamp
        sizes = f"had {stamp.bytes} bytes and has {found.bytes}"
        what = sizes if found.bytes != stamp.bytes else "was written again"
        raise CheckpointError(
            f"{printable(self.file(file))} {what} while it was being read: wait until it is "
            "complete, and start again."
        )

    def _stamp(self, file: str) -> Stamp:
        try:
            found = self.file(file).stat()
        except OSError as error:
            raise CheckpointError(
                f"cannot read {printable(self.file(file))}: {error.strerror}. It was there a "
                "moment ago: put it back, and start again."
            ) from None
        return Stamp(found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class Derived(Source):
    """A source that reads the tensors of another in its own way."""

    of: Source = field(kw_only=True)

    @property
    def files(self) -> list[str]:
        """Those of the other."""
        return self.of.files

    @property
    def origin(self) -> Source:
        """The source of what is stored."""
        return self.of.origin


@dataclass(frozen=True)
class Checkpoint(Source):
    """safetensors: one file, or the shards of a folder, read through pread and never mapped.

    (A mapped file that shrinks kills the process with SIGBUS; a changed one changes tensors that
    were already loaded.)
    """

    def read(self, name: str, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` by pread, straight from the file."""
        info = self.tensors[name]
        path = self.file(info.file)
        descriptor = open_regular(path)
        try:
            read_into(descriptor, buffer, info.begin + offset, path)
        finally:
            os.close(descriptor)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Returns whether two contiguous tensors of as many bytes are equal bit for bit.

    (Comparing their memoryviews would go byte by byte: longer than to hash them.)
    """
    return np.array_equal(np.asarray(bytes_of(a)), np.asarray(bytes_of(b)))
