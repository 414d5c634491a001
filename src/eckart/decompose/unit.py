"""The unit of work: one tensor's matrices from the source, decomposed, onto disk as a part.

A value that any process can be handed: it knows the source and the settings, and nothing of who
calls it.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from eckart.checkpoint.hashing import TensorHash, bytes_of
from eckart.checkpoint.source import Source
from eckart.checkpoint.statistics import Statistics
from eckart.decompose.part import About, Decomposition, write_part
from eckart.decompose.request import Request, on_threads
from eckart.decompose.weighting import metric_of
from eckart.errors import FactorizationError
from eckart.linalg.arrays import working_dtype
from eckart.linalg.gram import short_side_svd
from eckart.linalg.matrices import named_generator
from eckart.linalg.truncated import truncated_svd
from eckart.matrix import Matrix


@dataclass(frozen=True, slots=True)
class Failure:
    """A tensor that no method could factor, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Found:
    """One matrix: all known values, the leading vectors of its short side as rows."""

    values: Tensor
    vectors: Tensor
    energy: float
    method: str
    excess: float


@dataclass(frozen=True, slots=True)
class Decomposer:
    """Decomposes the matrices of one tensor, and writes them as a part."""

    source: Source
    identity: str
    seed: int
    device: str = "cpu"
    threads: int | None = None  # None: by shape
    statistics: Statistics | None = None  # None: in the Frobenius norm

    def __call__(
        self, name: str, matrix: Matrix, request: Request, part: Path
    ) -> Decomposition | Failure:
        """Reads, decomposes, writes. Peak memory: one matrix and its SVD."""
        with on_threads(matrix.shape, self.threads):
            return self._decompose(name, matrix, request, part)

    def _decompose(
        self, name: str, matrix: Matrix, request: Request, part: Path
    ) -> Decomposition | Failure:
        known, seen = self.source.known.get(name), TensorHash()
        found: list[_Found] = []
        for index in range(matrix.count):
            stored = self.source.load(name, index, index + 1 if matrix.is_stack else None)
            if known is None:
                seen.update(bytes_of(stored))
            label = f"{name}[{index}]" if matrix.is_stack else name
            try:
                M = self._weighted(matrix.read(stored).to(self.device), name, index)
                found.append(self._find(M, request, label))
            except FactorizationError as error:
                return Failure(name, str(error))
        about = About(
            name=name,
            identity=self.identity,
            source=known or seen.hexdigest(),
            shape=matrix.shape,
            rank=len(found[0].vectors),
            energy=sum(one.energy for one in found),
            method="+".join(sorted({one.method for one in found})),
            excess_estimate=max(one.excess for one in found),
            values="",
            vectors="",
        )
        values, vectors = [one.values for one in found], [one.vectors for one in found]
        return write_part(part, about, values, vectors)

    def _weighted(self, W: Tensor, name: str, index: int) -> Tensor:
        """W, or M = LᵀWR in the dtype that W is worked on in: the SVD needs no more digits."""
        metric = metric_of(self.statistics, name, index, device=self.device)
        if metric is None:
            return W
        return metric.transformed(W).to(working_dtype(W.dtype)).contiguous()

    def _find(self, W: Tensor, request: Request, label: str) -> _Found:
        """The SVD that was asked for, of one matrix."""
        dtype = working_dtype(W.dtype)
        if request.all_values:
            short = short_side_svd(W, label)
            kept = short.vectors[:, : request.rank].mT.to("cpu", dtype)
            return _Found(short.values.cpu(), kept, short.energy, short.method, 0.0)
        generator = named_generator(self.seed, label, W.device)
        svd = truncated_svd(W, rank=request.rank, generator=generator, name=label)
        vectors = svd.U.mT if W.shape[0] <= W.shape[1] else svd.Vh
        values = svd.s if svd.values is None else svd.values
        kept = vectors.to("cpu", dtype)
        return _Found(values.cpu().double(), kept, svd.energy, svd.method, svd.excess_estimate)
