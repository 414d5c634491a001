"""Each matrix factored once, kept on disk as a part. The only expensive stage.

A part holds U (float32, up to the largest rank that could be wanted); A = UᵀW is recomputed from
the source by `assemble`, so a part is half the size of a factorization.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eckart.checkpoint.header import read_header
from eckart.checkpoint.source import Checkpoint, Source
from eckart.checkpoint.tensor_file import TensorFile, TensorLayout
from eckart.checkpoint.writer import new_folder
from eckart.errors import FactorizationError
from eckart.linalg.exact import TruncatedSVD, exact_svd
from eckart.linalg.factors import Factors
from eckart.linalg.matrices import named_generator
from eckart.linalg.spectrum import Spectrum
from eckart.linalg.truncated import truncated_svd


@dataclass(frozen=True, slots=True)
class Request:
    """How far to decompose a matrix: the largest rank wanted, and whether all values are."""

    rank: int
    all_values: bool


@dataclass(frozen=True, slots=True)
class Decomposition:
    """What is known of one matrix: its values, and where its left vectors lie."""

    name: str
    spectrum: Spectrum
    rank: int  # columns of U kept
    method: str
    excess_estimate: float
    part: Path

    def factors(self, W: Tensor, rank: int) -> Factors:
        """Returns balanced B, A of the given rank: B = U√s, A = √s⁻¹ UᵀW; nested in the rank."""
        assert rank <= self.rank, f"{self.name}: rank {rank} of {self.rank} kept"
        kept = Checkpoint(self.part.parent, read_header(self.part)).load("U")
        U = kept[:, :rank].to(torch.float64)
        root = self.spectrum.values[:rank].sqrt()
        inverse = torch.where(root > 0, 1 / root, 0.0)
        return Factors(U * root, inverse[:, None] * (U.mT @ W.to(torch.float64)))


def decompose(
    source: Source, requests: Mapping[str, Request], work: Path, *, seed: int, device: str = "cpu"
) -> tuple[dict[str, Decomposition], dict[str, str]]:
    """Returns a decomposition per matrix, and the reasons of those that no method could factor.

    Parts go to `work`/parts. Each matrix has its own generator from (seed, name), so the order
    never matters. Peak memory: one matrix and its SVD.
    """
    parts = work / "parts"
    new_folder(parts)
    done: dict[str, Decomposition] = {}
    failed: dict[str, str] = {}
    for index, (name, request) in enumerate(sorted(requests.items())):
        W = source.load(name).to(device)
        try:
            svd = _svd(W, request, name, seed)
        except FactorizationError as error:
            failed[name] = str(error)
            continue
        part = parts / f"part-{index:06d}.safetensors"
        _write_part(part, svd.U.to(torch.float32))
        done[name] = Decomposition(
            name, svd.spectrum, svd.rank, svd.method, svd.excess_estimate, part
        )
    return done, failed


def _write_part(path: Path, U: Tensor) -> None:
    file = TensorFile(path, {"U": TensorLayout.of("F32", tuple(U.shape))})
    file.write("U", U)
    file.close()


def _svd(W: Tensor, request: Request, name: str, seed: int) -> TruncatedSVD:
    if request.all_values:
        return exact_svd(W, name).truncate(request.rank)
    generator = named_generator(seed, name, W.device)
    return truncated_svd(W, rank=request.rank, generator=generator, name=name)
