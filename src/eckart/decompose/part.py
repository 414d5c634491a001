"""Part files: what was found of one matrix, complete in itself and self-checking.

A part keeps the vectors of the *short* side only (U where m ≤ n, else V): the other factor is
their product with W, recomputed from the source, which is both smaller and, for the given
vectors, optimal. So a part takes at most min(m, n)·r numbers. In a metric they are those of
M = LᵀWR, and its roots are recomputed from the statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
from eckart.linalg.factors import Factors, from_short_side, from_weighted_side
from eckart.linalg.metric import Metric
from eckart.linalg.spectrum import Spectrum

SCHEMA = "eckart-part/1"
ABOUT, VALUES, VECTORS = "about", "values", "vectors"


class About(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a part says of itself. `digest` covers all the rest."""

    schema: Literal["eckart-part/1"] = SCHEMA
    digest: str = ""
    name: str  # the tensor's
    identity: str  # of the decomposition: see `eckart.decompose.work`
    source: str  # BLAKE3 of the tensor's bytes
    shape: tuple[int, int]
    rank: int  # vectors kept, of each matrix of a stack
    energy: float  # of W, or of M = LᵀWR
    method: str
    excess_estimate: float
    values: str  # BLAKE3 of each of the two tensors
    vectors: str

    def encode(self) -> bytes:
        """Returns the canonical JSON, its digest filled in."""
        return sealed_json(msgspec.to_builtins(self))


@dataclass(frozen=True, slots=True)
class Decomposition:
    """What is known of one tensor's matrices: their values, and where their vectors lie."""

    name: str
    spectrum: Spectrum  # of a stack: σᵢ = √(Σ over its matrices of σᵢ²), as they share a rank
    values: Tensor  # count × k
    rank: int  # vectors kept, of each
    method: str
    excess_estimate: float
    source_digest: str
    part: Path

    @property
    def all_values(self) -> bool:
        """Whether every singular value is known."""
        return self.spectrum.complete

    def factors(
        self,
        W: Tensor,
        rank: int,
        index: int = 0,
        *,
        metric: Metric | None = None,
        wide: bool = True,
    ) -> Factors:
        """Returns balanced B, A of the given rank for one matrix; nested in the rank.

        `metric` is the one that W was decomposed in. See `eckart.linalg.factors.from_short_side`
        and, in a metric, `from_weighted_side`. Computed in float64, or in float32 where the
        result is rounded to half precision anyway (`wide=False`).
        """
        assert rank <= self.rank, f"{self.name}: rank {rank} of {self.rank} kept"
        dtype, start = torch.float64 if wide else torch.float32, index * self.rank
        kept = Checkpoint(self.part, read_header(self.part)).load(VECTORS, start, start + rank)
        if metric is None:
            return from_short_side(W, kept, self.values[index, :rank], dtype)
        return from_weighted_side(W, kept, metric.short_side((W.shape[0], W.shape[1])), dtype)


def write_part(
    path: Path,
    about: About,
    values: Sequence[Tensor],
    vectors: Sequence[Tensor],
) -> Decomposition:
    """Writes a part, over whatever stood there, and returns what it says.

    Not synced: a part that the power cut short fails its own check, and is made again.
    One entry of `values` (k) and `vectors` (rank×d) per matrix of a stack.
    """
    path.unlink(missing_ok=True)
    tensors = {VALUES: torch.stack([*values]).double(), VECTORS: torch.cat([*vectors])}
    about = msgspec.structs.replace(
        about, values=digest_of(tensors[VALUES]), vectors=digest_of(tensors[VECTORS])
    )
    tensors[ABOUT] = torch.frombuffer(bytearray(about.encode()), dtype=torch.uint8)
    layout = {name: TensorLayout.like(tensor) for name, tensor in tensors.items()}
    file = lay_out_file(path, layout)
    for name, tensor in tensors.items():
        file.write(name, tensor)
    return _decomposition(about, tensors[VALUES], path)


def read_part(path: Path, name: str, identity: str) -> Decomposition:
    """Returns what a part says, if it is whole and belongs here; CheckpointError if not.

    Cost: reads and hashes the part.
    """
    part = Checkpoint(path, read_header(path))
    if {*part.tensors} != {ABOUT, VALUES, VECTORS}:
        raise CheckpointError(f"{printable(path)} is no part.")
    text = bytes(part.load(ABOUT).numpy())
    try:
        about = msgspec.convert(parse_json(text, printable(path)), About)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{printable(path)} is damaged: {error}.") from None
    values = part.load(VALUES)
    sound = (
        about.encode() == text
        and digest_of(values) == about.values
        and part.digest(VECTORS) == about.vectors
    )
    if not sound or (about.name, about.identity) != (name, identity):
        raise CheckpointError(f"{printable(path)} is damaged, or belongs to another run.")
    return _decomposition(about, values, path)


def _decomposition(about: About, values: Tensor, path: Path) -> Decomposition:
    combined = values.square().sum(0).sqrt() if len(values) > 1 else values[0]
    return Decomposition(
        about.name,
        Spectrum(about.shape, combined, about.energy),
        values,
        about.rank,
        about.method,
        about.excess_estimate,
        about.source,
        path,
    )
