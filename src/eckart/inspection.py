"""What there is to see of a matrix: ranks, spectrum, and in words whether factoring pays."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.allocate import cost
from eckart.certificate import Delta, Inspection, Summary
from eckart.checkpoint.header import DTYPES
from eckart.checkpoint.source import Source
from eckart.decompose.request import FLOPS, on_threads, threads_for
from eckart.errors import RankError
from eckart.linalg.arrays import working_dtype
from eckart.linalg.gram import gram_values
from eckart.linalg.matrices import named_generator
from eckart.linalg.norms import energy
from eckart.linalg.rank import numerical_rank
from eckart.linalg.rounding import SignalRank, signal_rank
from eckart.linalg.spectrum import Spectrum
from eckart.linalg.truncated import truncated_svd
from eckart.matrix import Matrix, Shape

ALL_VALUES = 2048
"""Up to this min(m, n) every singular value is computed, beyond it only if asked."""

LEADING = 256

HALF = ("BF16", "F16")

ERRORS = (0.01, 0.03, 0.10)
"""The relative errors for which a verdict looks for a rank that pays."""


@dataclass(frozen=True, slots=True)
class Inspector:
    """Looks at the matrices of one tensor, or at what was added to a base."""

    source: Source
    base: Source | None
    seed: int
    full: bool
    threads: int | None = None

    def seconds(self, matrix: Matrix) -> float:
        """About how long it takes."""
        m, n = matrix.shape
        k = min(m, n) if self._is_whole(matrix.shape) else LEADING
        return matrix.count * 6 * m * n * k / (FLOPS * threads_for(matrix.shape))

    def peak_bytes(self, name: str, matrix: Matrix) -> int:
        """Returns the most memory that it may need, on top of the bare process.

        The matrix and its base as stored, what they are computed in, and a Gram matrix with the
        workspace of its eigenproblem; or, beyond, the ladder's float64 rung for values alone.
        """
        (m, n), itemsize = matrix.shape, DTYPES[self.source.tensors[name].dtype].itemsize
        held = m * n * (2 * itemsize + 4 * max(4, itemsize))
        values = max(4 * min(m, n) ** 2, 3 * m * n) if self._is_whole(matrix.shape) else 0
        return held + 8 * values

    def __call__(self, name: str, matrix: Matrix) -> Inspection:
        """Reads and looks. Peak memory: one matrix, and what its singular values take."""
        with on_threads(matrix.shape, self.threads):
            return self._inspect(name, matrix)

    def _inspect(self, name: str, matrix: Matrix) -> Inspection:
        values, energies, ranks, signals = list[Tensor](), list[float](), list[int | None](), []
        for index in range(matrix.count):
            label = f"{name}[{index}]" if matrix.is_stack else name
            W = matrix.load(self.source, name, index)
            base = None if self.base is None else matrix.load(self.base, name, index)
            looked_at = W if base is None else _difference(W, base)
            found = self._values(looked_at, label)
            values.append(found.double())
            energies.append(energy(looked_at))
            ranks.append(_numerical(found.to(working_dtype(looked_at.dtype)), matrix.shape))
            if base is not None or self.source.tensors[name].dtype in HALF:
                generator = named_generator(self.seed, label)
                signals.append(signal_rank(W, base, generator=generator, name=label))
        spectrum = Spectrum(matrix.shape, _combined(values), sum(energies))
        numerical = None if None in ranks else max(rank for rank in ranks if rank is not None)
        signal = max((one.rank for one in signals), default=None)
        delta = None if self.base is None else evidence(together(signals))
        trusted = signals and not any(one.below_floor for one in signals)
        return Inspection(
            name=name,
            shape=matrix.stored,
            dtype=self.source.tensors[name].dtype,
            numerical_rank=numerical,
            signal_rank=signal,
            effective_rank=round(spectrum.effective_rank, 3) if spectrum.complete else None,
            rank_90=_rank(spectrum, 0.90),
            rank_99=_rank(spectrum, 0.99),
            break_even=spectrum.break_even,
            verdict=verdict(spectrum, signal if trusted or delta else numerical, delta),
            energy=spectrum.energy,
            values=[float(value) for value in spectrum.values],
            delta=delta,
        )

    def _is_whole(self, shape: Shape) -> bool:
        return self.full or min(shape) <= ALL_VALUES

    def _values(self, W: Tensor, label: str) -> Tensor:
        """All singular values, or the leading ones of a large matrix."""
        if self._is_whole((W.shape[0], W.shape[1])):
            return gram_values(W, label)[0]
        generator = named_generator(self.seed, label)
        return truncated_svd(W, rank=LEADING, generator=generator, name=label).s


def together(signals: Sequence[SignalRank]) -> SignalRank:
    """Returns the largest rank of a stack's matrices, and the worst that is known of any."""
    return SignalRank(
        rank=max(one.rank for one in signals),
        bound=max(one.bound for one in signals),
        threshold=max(one.threshold for one in signals),
        share=min(one.share for one in signals),
        below_floor=any(one.below_floor for one in signals),
        weakest=min(one.weakest for one in signals),
    )


def evidence(found: SignalRank) -> Delta:
    """Returns what the rank of a change rests on."""
    return Delta(
        threshold=found.threshold,
        bound=found.bound,
        share=found.share,
        below_floor=found.below_floor,
        weakest=found.weakest,
    )


def summary(rows: Sequence[Inspection], matrices: Sequence[Matrix]) -> Summary:
    """Returns what 99 % of the energy of every matrix costs: dense where factoring does not pay."""
    before = after = 0
    for row, matrix in zip(rows, matrices, strict=True):
        m, n = matrix.shape
        dense = matrix.count * m * n
        pays = row.rank_99 is not None and row.rank_99 <= row.break_even
        factored = matrix.count * cost(matrix.shape, max(row.rank_99 or 1, 1), "ba")
        before, after = before + dense, after + (factored if pays else dense)
    share = after / before if before else 1.0
    advice = (
        "plain factoring does not pay here"
        if share > 0.9  # a heuristic: a tenth saved at a tenth of error is no bargain
        else "plain factoring may pay here"
    )
    text = f"at 99 % energy: {100 * share:.0f} % of the parameters; {advice}"
    return Summary(parameters=(before, after), text=text)


def verdict(spectrum: Spectrum, rank: int | None, delta: Delta | None = None) -> str:
    """Returns in words whether factoring pays, and to which rank.

    Tried in this order, the first that pays wins: the rank itself (nothing is lost), then the
    ranks of 1 %, 3 % and 10 % relative error. Of a delta, the rank that was found in it.
    """
    if delta is not None:
        return _delta_verdict(spectrum, rank or 0, delta)
    pays = spectrum.break_even
    if rank is not None and max(rank, 1) <= pays:
        least = max(rank, 1)
        return (
            f"factor to {least}: {_share(spectrum, least)} of the parameters, error below rounding"
        )
    for error in ERRORS:
        needed = _rank_at_error(spectrum, error)
        if needed is not None and 1 <= needed <= pays:
            found = 100 * spectrum.relative_error(needed)
            return (
                f"factor to {needed}: {_share(spectrum, needed)} of the parameters "
                f"at {found:.1f} % error"
            )
    needed, known = _rank(spectrum, 0.99), len(spectrum.values)
    if needed is None and known < pays:
        return f"99 % of the energy needs more than rank {known}; break-even is {pays}: see --full"
    return (
        f"not worth it: 99 % of the energy needs "
        f"{f'rank {needed}' if needed is not None else f'more than rank {known}'} of "
        f"{min(spectrum.shape)}, break-even is {pays}"
    )


def _delta_verdict(spectrum: Spectrum, rank: int, delta: Delta) -> str:
    if spectrum.energy == 0:
        return "unchanged"
    if delta.below_floor and rank:
        return f"below the rounding floor in part: rank {rank} above it, more may be hidden"
    if delta.below_floor:
        return "below the rounding floor: the change is no larger than rounding makes it"
    return f"rank {rank} above rounding: {_share(spectrum, max(rank, 1))} of the parameters hold it"


def _numerical(values: Tensor, shape: Shape) -> int | None:
    """numpy's rank, where the values known reach down to its threshold."""
    found = numerical_rank(values, shape)
    return None if found == len(values) < min(shape) else found


def _rank(spectrum: Spectrum, fraction: float) -> int | None:
    try:
        return spectrum.rank_at_energy(fraction)
    except RankError:  # the leading values do not reach that far
        return None


def _rank_at_error(spectrum: Spectrum, error: float) -> int | None:
    try:
        return spectrum.rank_at_error(error)
    except RankError:
        return None


def _combined(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack([*values]).square().sum(0).sqrt()


def _difference(W: Tensor, base: Tensor) -> Tensor:
    """W − base, exact for half precision in float32, and for float32 in float64."""
    wide = torch.float32 if W.dtype.itemsize == 2 and base.dtype.itemsize == 2 else torch.float64
    return W.to(wide) - base.to(wide)


def _share(spectrum: Spectrum, rank: int) -> str:
    m, n = spectrum.shape
    return f"{100 * cost((m, n), rank, 'ba') / (m * n):.0f} %"
