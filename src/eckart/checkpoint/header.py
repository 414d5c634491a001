"""Headers of safetensors files: what they hold, and where. Strict where the library is not."""

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from eckart.checkpoint.documents import parse_json
from eckart.checkpoint.paths import damage, open_regular, printable, read_into
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

MAX_DIMENSIONS, MAX_ENTRIES = 8, 2**48

CLAIM, CLAIM_RATIO = 2**26, 100
"""Tensors may take 64 MiB, or 100 times their file: beyond, it is made to fill memory or disk.

Heuristic: deflate reaches 1000:1, and views can share what is stored, but weights do neither.
"""


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
        with damage(path), safe_open(path, framework="pt", backend="pread"):
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


def read_metadata(path: Path) -> dict[str, str]:
    """Returns what a safetensors file says of itself: texts by name."""
    header, _ = _header_bytes(path)
    found = parse_json(header, f"the header of {printable(path)}").get("__metadata__")
    texts = found if isinstance(found, dict) else {}
    return {str(key): value for key, value in texts.items() if isinstance(value, str)}


def check_tensor(name: str, shape: Sequence[int], path: Path) -> None:
    """Raises CheckpointError for a name that cannot be written, or a shape that no tensor has."""
    where = f"{printable(name)} in {printable(path)}"
    if any("\ud800" <= c <= "\udfff" for c in name):  # halves of UTF-16 pairs, from a pickle
        raise CheckpointError(f"{where} has a name that is no Unicode text: rename it.")
    if len(shape) > MAX_DIMENSIONS or math.prod(max(side, 1) for side in shape) >= MAX_ENTRIES:
        raise CheckpointError(
            f"{where} has an absurd shape, {printable([*shape[:MAX_DIMENSIONS]])}. Download it "
            "again."
        )


def check_claims(tensors: Iterable[TensorInfo], path: Path) -> None:
    """Raises CheckpointError where the tensors of a file are out of proportion to it."""
    claimed = sum(info.nbytes for info in tensors)
    with damage(path):
        stored = path.stat().st_size
    if claimed > max(CLAIM, CLAIM_RATIO * stored):
        raise CheckpointError(
            f"{printable(path)} has {stored} bytes, but its tensors would take {claimed}: it was "
            "made to fill memory. If you trust it, convert it to safetensors."
        )


def _header_bytes(path: Path) -> tuple[bytes, int]:
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size < 8:
            raise CheckpointError(
                f"{printable(path)} has {size} bytes: not a safetensors file. Download it again."
            )
        prefix = bytearray(8)
        read_into(descriptor, memoryview(prefix), 0, path)
        length = int.from_bytes(prefix, "little")
        if length > min(size - 8, HEADER_BYTES):
            raise CheckpointError(
                f"{printable(path)} announces a header of {length} bytes, but has {size} in all "
                f"(and at most {HEADER_BYTES} are read): not a safetensors file, or cut short. "
                "Download it again."
            )
        header = bytearray(length)
        read_into(descriptor, memoryview(header), 8, path)
    finally:
        os.close(descriptor)
    return bytes(header), 8 + length


def _tensor_info(name: str, entry: object, path: Path, start: int) -> TensorInfo:
    match entry:  # safetensors has checked the types, if the file is still the same
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            check_tensor(name, shape, path)
            return TensorInfo(tuple(shape), dtype, path.name, start + begin, start + end)
        case _:
            raise CheckpointError(f"{printable(path)} was changed while being read. Start again.")
