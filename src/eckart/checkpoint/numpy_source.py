"""`.npy` and `.npz` files as sources: each array a tensor, read whole, never unpickled.

numpy's own reader believes the file: it takes memory for a header of 4 GiB, or for a shape of 2⁶⁰
entries, before it looks at what is there. Here sizes are compared first.
"""

import ast
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from eckart.checkpoint.archive import Record, read_directory
from eckart.checkpoint.header import TensorInfo, check_claims, check_tensor
from eckart.checkpoint.paths import damage, open_regular, printable
from eckart.checkpoint.source import Source, Stamp
from eckart.errors import CheckpointError

DTYPES = {
    "f8": "F64",
    "f4": "F32",
    "f2": "F16",
    "i8": "I64",
    "i4": "I32",
    "i2": "I16",
    "i1": "I8",
    "u8": "U64",
    "u4": "U32",
    "u2": "U16",
    "u1": "U8",
    "b1": "BOOL",
}
"""numpy's dtypes (kind and bytes) as safetensors spells them."""

SUFFIX = ".npy"

MAGIC, LENGTHS = b"\x93NUMPY", {b"\1": 2, b"\2": 4, b"\3": 4}
"""How every array begins, and the bytes that the header's length takes, by version (NEP 1)."""

HEADER_BYTES = 10_000
"""numpy's own limit, for the same reason: a long Python expression can crash the interpreter."""


@dataclass(frozen=True, slots=True)
class Array:
    """Where an array's numbers lie, and in which order."""

    record: Record  # header and numbers
    start: int
    dtype: str  # as numpy spells it, with the byte order
    fortran: bool  # the first dimension runs fastest

    def read(self, path: Path, shape: tuple[int, ...]) -> memoryview:
        """Returns the bytes, little-endian and row-major. Peak: the record, and often a copy."""
        numbers = np.frombuffer(self.record.read(path), self.dtype, offset=self.start)
        array = numbers.reshape(shape[::-1]).T if self.fortran else numbers.reshape(shape)
        plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        return plain.reshape(-1).view(np.uint8).data


@dataclass(frozen=True)
class NumpySource(Source):
    """The arrays of an `.npz`, by their names in it, or the one of an `.npy`, by the file's."""

    arrays: Mapping[str, Array] = field(default_factory=dict)

    def read(self, name: str, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` from the array, which is kept until another is asked for."""
        info = self.tensors[name]
        data = _array(self.path, self.arrays[name], info.shape, self._check_file(info.file))
        buffer[:] = data[offset : offset + len(buffer)]


def open_arrays(path: Path) -> NumpySource:
    """Returns the arrays of an `.npy` or `.npz` file, from their headers alone."""
    tensors, arrays = dict[str, TensorInfo](), dict[str, Array]()
    for member, record in _records(path).items():
        if not member.endswith(SUFFIX):
            raise CheckpointError(
                f"{printable(path)} holds {printable(member)}, which is no array: take it out."
            )
        name = member.removesuffix(SUFFIX)
        with damage(path):
            tensors[name], arrays[name] = _read_array_header(name, record, path)
    check_claims(tensors.values(), path)
    return NumpySource(path, tensors, arrays=arrays)


def _records(path: Path) -> Mapping[str, Record]:
    """The arrays' files: the archive's members, or the file itself."""
    if path.suffix != SUFFIX:
        return read_directory(path)
    with damage(path), os.fdopen(open_regular(path), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
    return {path.name: Record(0, size, size)}


def _read_array_header(name: str, record: Record, path: Path) -> tuple[TensorInfo, Array]:
    head = record.head(path, HEADER_BYTES)
    width = LENGTHS.get(bytes(head[6:7]), 0) if head.startswith(MAGIC) else 0
    start = 8 + width + int.from_bytes(head[8 : 8 + width], "little")
    if not width or start > len(head):
        raise ValueError(f"{name} does not begin as an array does")
    descr, fortran, shape = _parsed(head[8 + width : start].decode())
    spelled = DTYPES.get(descr[1:])
    if spelled is None or descr[0] not in "<>|=":
        raise CheckpointError(
            f"{printable(name)} in {printable(path)} has dtype {printable(descr)}: store floats, "
            "integers or booleans (objects would have to be unpickled)."
        )
    check_tensor(name, shape, path)
    size, stored = math.prod(shape) * int(descr[2:]), record.nbytes - start
    if size != stored:
        raise ValueError(
            f"{name} should take {size} bytes after its header, and {stored} are there"
        )
    return TensorInfo(shape, spelled, path.name, 0, size), Array(record, start, descr, fortran)


def _parsed(text: str) -> tuple[str, bool, tuple[int, ...]]:
    """What an array's header says: a Python dictionary of literals, with these keys."""
    match ast.literal_eval(text.strip()):
        case {"descr": str(descr), "fortran_order": bool(fortran), "shape": tuple(shape)} if all(
            type(side) is int and side >= 0 for side in shape
        ):
            return descr, fortran, shape
        case _:
            raise ValueError("the header of an array says no shape, or no dtype")


@lru_cache(maxsize=2)  # one of a tuned model and one of its base
def _array(path: Path, array: Array, shape: tuple[int, ...], _: Stamp) -> memoryview:
    """The bytes of one array of a file as it then was."""
    return array.read(path, shape)
