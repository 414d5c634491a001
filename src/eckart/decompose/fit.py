"""Fits: factors of one tensor at one rank that a part cannot give, complete and self-checking.

A part holds what any budget can be served from; a fit holds what belongs to one choice of ranks.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import torch
from torch import Tensor

from eckart.checkpoint.documents import parse_json, sealed_json
from eckart.checkpoint.hashing import digest_of
from eckart.checkpoint.header import read_header
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Checkpoint
from eckart.checkpoint.tensor_file import TensorLayout, lay_out_file
from eckart.errors import CheckpointError
from eckart.linalg.factors import Factors
from eckart.linalg.metric import Metric

SCHEMA = "eckart-fit/1"
ABOUT = "about"


class Approximation(Protocol):
    """What gives the factors of a tensor's matrices: a decomposition, or a fit."""

    def factors(
        self,
        W: Tensor,
        rank: int,
        index: int = 0,
        *,
        metric: Metric | None = None,
        wide: bool = True,
    ) -> Factors:
        """Returns B and A of one matrix W; in float64, or, if not `wide`, in float32."""
        ...


class About(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a fit says of itself. `digest` covers all the rest."""

    schema: Literal["eckart-fit/1"] = SCHEMA
    digest: str = ""
    name: str  # the tensor's
    identity: str  # of all that the fit depends on
    rank: int
    method: str
    excess_estimate: float
    sums: dict[str, str] = {}  # tensor → BLAKE3 of its bytes

    def encode(self) -> bytes:
        """Returns the canonical JSON, its digest filled in."""
        return sealed_json(msgspec.to_builtins(self))


@dataclass(frozen=True, slots=True)
class Fit:
    """Factors of one tensor, which is one matrix, at one rank: where they lie."""

    name: str
    rank: int
    method: str
    excess_estimate: float
    part: Path

    def factors(
        self,
        W: Tensor,
        rank: int,
        index: int = 0,
        *,
        metric: Metric | None = None,
        wide: bool = True,
    ) -> Factors:
        """Returns B and A as they were fitted; W and its metric are not asked again."""
        assert (rank, index) == (self.rank, 0), f"{self.name}: fitted at {self.rank}, not {rank}"
        part = Checkpoint(self.part, read_header(self.part))
        dtype = torch.float64 if wide else torch.float32
        return Factors(part.load("B"), part.load("A")).to(dtype)


def write_fit(path: Path, about: About, factors: Factors) -> Fit:
    """Writes a fit, over whatever stood there, and returns what it says.

    Not synced: a fit that the power cut short fails its own check, and is made again.
    """
    path.unlink(missing_ok=True)
    tensors = {"A": factors.A.contiguous(), "B": factors.B.contiguous()}
    sums = {name: digest_of(tensor) for name, tensor in tensors.items()}
    about = msgspec.structs.replace(about, sums=sums)
    tensors[ABOUT] = torch.frombuffer(bytearray(about.encode()), dtype=torch.uint8)
    file = lay_out_file(path, {name: TensorLayout.like(t) for name, t in tensors.items()})
    for name, tensor in tensors.items():
        file.write(name, tensor)
    return _fit(about, path)


def read_fit(path: Path, name: str, identity: str) -> Fit | None:
    """Returns what a fit says, if it is there, whole, and of this very request; else None."""
    if not path.exists():
        return None
    try:
        part = Checkpoint(path, read_header(path))
        text = bytes(part.load(ABOUT).numpy()) if ABOUT in part.tensors else b"{}"
        about = msgspec.convert(parse_json(text, printable(path)), About)
    except (CheckpointError, msgspec.ValidationError):
        return None
    sound = (
        about.encode() == text
        and {*part.tensors} == {ABOUT, *about.sums}
        and all(part.digest(tensor) == known for tensor, known in about.sums.items())
    )
    return _fit(about, path) if sound and (about.name, about.identity) == (name, identity) else None


def fit_bytes(shape: tuple[int, int], rank: int, itemsize: int) -> int:
    """Returns the size of a fit."""
    return rank * sum(shape) * max(4, itemsize) + 2**12


def _fit(about: About, path: Path) -> Fit:
    return Fit(about.name, about.rank, about.method, about.excess_estimate, path)
