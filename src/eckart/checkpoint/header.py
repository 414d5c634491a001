"""Headers of safetensors files: what they hold, and where. Strict where the library is not."""

import hashlib
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from eckart.checkpoint.documents import parse_json
from eckart.checkpoint.paths import open_regular, printable, read_into
from eckart.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names for torch's dtypes; a tensor of any other is only ever copied as bytes."""

HEADER_BYTES = 2**25
"""32 MiB: parsing costs about 20 times the header in memory, and no model comes near it."""

MAX_DIMENSIONS, MAX_SIDE = 8, 2**48


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: "BF16"
    file: str
    begin: int  # bytes, from the start of the file
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.end - self.begin

    @property
    def parameters(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Returns the tensors that a safetensors file holds, sorted by name.

    safetensors' own parser checks offsets, holes, overlaps and sizes; ours, in front of it,
    refuses what that one lets pass: FIFOs, huge headers, and a name that stands there twice.
    """
    header, start = _header_bytes(path)
    document = parse_json(header, f"the header of {printable(path)}")
    try:
        with safe_open(path, framework="pt", backend="pread"):
            pass
    except SafetensorError as error:
        raise CheckpointError(
            f"{printable(path)} is damaged: {printable(error)}. Download it again, or check that "
            "the copy finished."
        ) from None
    document.pop("__metadata__", None)
    return {
        name: _tensor_info(name, entry, path, start) for name, entry in sorted(document.items())
    }


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a regular file's contents."""
    descriptor = open_regular(path)
    with os.fdopen(descriptor, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _header_bytes(path: Path) -> tuple[bytes, int]:
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size < 8:
            raise CheckpointError(f"{printable(path)} has {size} bytes: not a safetensors file.")
        prefix = bytearray(8)
        read_into(descriptor, memoryview(prefix), 0, path)
        length = int.from_bytes(prefix, "little")
        if length > min(size - 8, HEADER_BYTES):
            raise CheckpointError(
                f"{printable(path)} announces a header of {length} bytes, but has {size} in all "
                f"(and at most {HEADER_BYTES} are read): not a safetensors file, or cut short."
            )
        header = bytearray(length)
        read_into(descriptor, memoryview(header), 8, path)
    finally:
        os.close(descriptor)
    return bytes(header), 8 + length


def _tensor_info(name: str, entry: dict[str, object], path: Path, start: int) -> TensorInfo:
    shape, offsets = entry["shape"], entry["data_offsets"]  # safetensors has checked their types
    assert isinstance(shape, list)
    assert isinstance(offsets, list)
    if len(shape) > MAX_DIMENSIONS or any(side >= MAX_SIDE for side in shape):
        raise CheckpointError(f"{printable(name)} in {printable(path)} has an absurd shape.")
    begin, end = offsets
    return TensorInfo(tuple(shape), str(entry["dtype"]), path.name, start + begin, start + end)
