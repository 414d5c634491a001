"""Tensors in 8-bit floats with scales beside them, as the numbers they stand for.

`X.weight` (F8_E4M3 or F8_E5M2) with `X.weight_scale_inv` (DeepSeek's blocks, as transformers stores
them) or `X.weight_scale` (compressed-tensors): the weight is the product of the two, a scale being
that of the whole tensor, of a row, or of a block.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eckart.checkpoint.header import DTYPES, TensorInfo
from eckart.checkpoint.source import Derived, Source

EIGHT_BITS = ("F8_E4M3", "F8_E5M2")
SCALES = ("_scale_inv", "_scale")
SCALE_DTYPES = ("F32", "F16", "BF16")

BLOCKS = (128, 64, 32, 256)
"""Sides of a block in use, the usual one first."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Which tensor scales another, and the rows and columns that share one of its numbers."""

    name: str
    rows: int
    columns: int


@dataclass(frozen=True)
class Dequantized(Derived):
    """A source whose 8-bit tensors are read as float32 products of numbers and scales.

    Exact but for one float32 rounding. Scales are no tensors of their own here.
    """

    scales: Mapping[str, Scale] = field(kw_only=True)

    def told(self, digests: Mapping[str, str]) -> dict[str, str]:
        """Returns the digests of what is stored as it is read."""
        return self.of.told({name: d for name, d in digests.items() if name not in self.scales})

    def read(self, name: str, buffer: memoryview, offset: int) -> None:
        """Fills `buffer`; what is scaled is read by whole rows."""
        if name not in self.scales:
            self.of.read(name, buffer, offset)
            return
        out, begin = torch.frombuffer(buffer, dtype=torch.float32), offset // 4
        width = max(math.prod(self.tensors[name].shape[1:]), 1)
        first, last = begin // width, -(-(begin + len(out)) // width)
        rows = self._rows(name, first, last).reshape(-1)
        out.copy_(rows[begin - first * width :][: len(out)])

    def _rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows first … last − 1, scaled."""
        scale = self.scales[name]
        W = self.of.load(name, first, last).float()
        S = self.of.load(scale.name).float()
        if S.numel() == 1:
            return W.mul_(S.reshape(()))
        S = S.reshape(S.shape[0], -1)
        by_row = S[torch.arange(first, last) // scale.rows]
        columns = torch.arange(W.shape[1]) // scale.columns
        return W.mul_(by_row[:, columns])


def dequantized(source: Source) -> Source:
    """Returns a source without 8-bit floats, where their scales stand beside them."""
    scales = {
        name: scale
        for name, info in source.tensors.items()
        if info.dtype in EIGHT_BITS and len(info.shape) == 2 and (scale := _scale(name, source))
    }
    if not scales:
        return source
    used = {scale.name for scale in scales.values()}
    tensors = {
        name: _as_float32(info) if name in scales else info
        for name, info in source.tensors.items()
        if name not in used
    }
    return Dequantized(source.path, tensors, source.tied, of=source, scales=scales)


def _as_float32(info: TensorInfo) -> TensorInfo:
    size = info.parameters * DTYPES["F32"].itemsize
    return TensorInfo(info.shape, "F32", info.file, 0, size)


def _scale(name: str, source: Source) -> Scale | None:
    """The scale of a tensor, if one stands beside it whose shape tells what it scales."""
    (m, n), tensors = source.tensors[name].shape, source.tensors
    for end in SCALES:
        info = tensors.get(f"{name}{end}")
        if info is None or info.dtype not in SCALE_DTYPES or not m * n:
            continue
        if info.parameters == 1:
            return Scale(f"{name}{end}", m, n)
        if info.shape in ((m,), (m, 1)):
            return Scale(f"{name}{end}", 1, n)
        sides = [b for b in BLOCKS if info.shape == (-(-m // b), -(-n // b))]
        if sides:
            return Scale(f"{name}{end}", sides[0], sides[0])
    return None
