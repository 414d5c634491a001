"""What was added to a checkpoint: tuned − base, tensor by tensor, as a source of its own."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from eckart.checkpoint.header import DTYPES, TensorInfo
from eckart.checkpoint.source import Source

PIECE_ENTRIES = 2**20
"""Subtracted at once: 4 MiB in float32 stay in the cache."""


@dataclass(frozen=True)
class Delta(Source):
    """tuned − base in float32, in float64 where one of the two is; nothing of it is on disk.

    Half precision is subtracted exactly unless the exponents are more than 16 apart, and then to
    2⁻²⁴ of the difference; float32 to 2⁻²⁴ of it too.
    """

    tuned: Source = field(kw_only=True)
    base: Source = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        stamps = {f"tuned/{file}": stamp for file, stamp in self.tuned.stamps.items()}
        stamps |= {f"base/{file}": stamp for file, stamp in self.base.stamps.items()}
        object.__setattr__(self, "stamps", stamps)

    @property
    def files(self) -> list[str]:
        """None of its own."""
        return []

    def read(self, name: str, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` with entries of the difference."""
        dtype = DTYPES[self.tensors[name].dtype]
        out, first = torch.frombuffer(buffer, dtype=dtype), offset // dtype.itemsize
        for start in range(0, len(out), PIECE_ENTRIES):
            piece = out[start : start + PIECE_ENTRIES]
            begin, end = first + start, first + start + len(piece)
            tuned, base = (s.entries(name, begin, end) for s in (self.tuned, self.base))
            piece.copy_(tuned).sub_(base)

    def check_unchanged(self) -> None:
        """Raises CheckpointError if a weight file of either is not as it was."""
        self.tuned.check_unchanged()
        self.base.check_unchanged()


def delta_of(tuned: Source, base: Source, known: dict[str, str]) -> Delta:
    """Returns the difference of the tensors whose digests are known, by name."""
    return Delta(tuned.path, dict(_infos(tuned, base, known)), known=known, tuned=tuned, base=base)


def _infos(tuned: Source, base: Source, names: Iterable[str]) -> Iterable[tuple[str, TensorInfo]]:
    for name in names:
        theirs, ours = base.tensors[name], tuned.tensors[name]
        assert theirs.shape == ours.shape, name
        dtype = "F64" if "F64" in (theirs.dtype, ours.dtype) else "F32"
        size = ours.parameters * DTYPES[dtype].itemsize
        yield name, TensorInfo(ours.shape, dtype, "", 0, size)
