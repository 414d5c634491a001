"""Checkpoints as lazy sources: headers first, tensors one at a time.

Knows safetensors on disk; must not know what the tensors are for.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from eckart.checkpoint.header import DTYPES, TensorInfo, file_sha256, read_header
from eckart.checkpoint.index import INDEX, WEIGHTS, read_shards
from eckart.checkpoint.paths import open_regular, printable, read_into
from eckart.errors import CheckpointError, DtypeError


class Source(Protocol):
    """Anything that names tensors and loads them one at a time."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, from headers alone, by name in sorted order."""
        ...

    def load(self, name: str) -> Tensor:
        """Returns one tensor, in memory of its own."""
        ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One safetensors file or the shards of a folder, read through pread and never mapped.

    (A mapped file that shrinks kills the process with SIGBUS; a changed one changes tensors that
    were already loaded.)
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]

    def load(self, name: str) -> Tensor:
        """Returns one tensor, in memory of its own. Peak: its bytes."""
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise DtypeError(
                f"{printable(name)} has dtype {printable(info.dtype)}, which torch cannot hold."
            )
        return self.raw(name).view(DTYPES[info.dtype]).reshape(info.shape)

    def raw(self, name: str) -> Tensor:
        """Returns the bytes of one tensor, as uint8."""
        info = self.tensors[name]
        path = self.folder / info.file
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        descriptor = open_regular(path)
        try:
            read_into(descriptor, buffer.numpy().data, info.begin, path)
        finally:
            os.close(descriptor)
        return buffer

    @property
    def files(self) -> list[str]:
        """The weight files, sorted."""
        return sorted({info.file for info in self.tensors.values()})

    def fingerprint(self) -> str:
        """Returns the SHA-256 over every weight file's name and contents.

        Cost: reads the checkpoint once.
        """
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file}\0{file_sha256(self.folder / file)}\n".encode())
        return digest.hexdigest()


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Returns the checkpoint in `folder`, from its headers alone.

    Either `model.safetensors`, or shards with an index that agrees with them exactly. Raises
    CheckpointError, naming the file, for anything that is not whole and unambiguous.
    """
    folder = Path(folder)
    if not folder.exists():
        raise CheckpointError(f"{printable(folder)} does not exist: check the path.")
    if not folder.is_dir():
        raise CheckpointError(
            f"{printable(folder)} is not a folder: give the folder that holds {WEIGHTS}."
        )
    single, index = ((folder / name).exists() for name in (WEIGHTS, INDEX))
    if single and index:
        raise CheckpointError(
            f"{printable(folder)} holds both {WEIGHTS} and {INDEX}, which may be two different "
            "models: move one of them away."
        )
    if index:
        return Checkpoint(folder, MappingProxyType(read_shards(folder)))
    if not single:
        raise CheckpointError(
            f"there is neither {WEIGHTS} nor {INDEX} in {printable(folder)}: give the folder of a "
            "safetensors checkpoint."
        )
    return Checkpoint(folder, MappingProxyType(read_header(folder / WEIGHTS)))
