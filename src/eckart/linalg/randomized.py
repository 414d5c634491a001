"""The leading singular triplets by a randomized block Krylov method that knows when to stop.

Knows tensors; must not know files, nor when an exact method is better: that is `truncated`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.linalg.krylov import SAFETY, GolubKahan, Progress
from eckart.linalg.norms import energy
from eckart.linalg.orthogonal import Basis, extend
from eckart.linalg.spectrum import LOST_DIGITS

MAX_STEPS = 10
"""Steps (a product with W and one with Wᵀ) after which the iteration gives up."""

OVERSAMPLING = 8
"""Columns more than the rank (Halko, Martinsson & Tropp, 2011, §1.3: five or ten), one less for
each 8 of the rank: measured, wide blocks need none, their Krylov spaces are several times wider."""

WIDTH = 16
"""Blocks are multiples of this, which is what matrix kernels are made for."""

FIRST_RANK = 24
"""The rank to try first where only an error is asked."""

ROUNDING = 4.0
"""A residual of at most 4·ε·√max(m, n)·‖W‖_F is rounding: no further step can lower it."""

NARROW = 4
"""Products after which a rank that does not fit into the block calls for a wider one."""

ROW_BLOCK = 128


@dataclass(frozen=True, slots=True)
class Found:
    """The triplets at which the iteration stopped.

    `excess` is by how much their error is expected to exceed the optimum, as a share of it.
    """

    U: Float[Tensor, "m r"]
    s: Float[Tensor, " r"]
    Vh: Float[Tensor, "r n"]
    excess: float


def at_rank(
    W: Float[Tensor, "m n"],
    rank: int,
    *,
    energy: float,
    accuracy: float,
    generator: torch.Generator,
    steps: int = MAX_STEPS,
) -> Found | None:
    """Returns `rank` singular triplets of W, or None if `steps` did not reach the accuracy.

    A step is two products; the stop rule is tested after every product while that is cheap:
    stop when the last step raised the captured energy Σσ² by at most `accuracy` × the remaining
    tail energy, or when the geometric series that continues the gains says that no more is to
    come. Where the tail ‖W‖_F² − Σσ² has lost its digits, it is measured.

    Cost: two products of W with a block of `rank` + 0 to 22 columns per step.
    """
    space = GolubKahan(W, _gaussian(W, block_width(rank, W.shape), generator), energy)
    measured = math.inf
    for ritz, left in _tests(space, steps, lambda _: rank):
        tail = min(measured, _tail(ritz, rank, energy, W.dtype, space.products))
        if left > SAFETY * accuracy * tail:
            continue
        U, s, Vh = _padded(W, *space.triplets(rank), rank=rank, generator=generator)
        if tail < LOST_DIGITS**2 * energy:
            tail = measured = residual_energy(W, U, s, Vh)
        if left <= SAFETY * accuracy * tail or tail <= rounding_energy(W, energy):
            return Found(U, s, Vh, _excess(left, tail))
    return None


def at_error(
    W: Float[Tensor, "m n"],
    allowed: float,
    *,
    energy: float,
    accuracy: float,
    generator: torch.Generator,
    largest: int,
    steps: int = MAX_STEPS,
) -> Found | None:
    """Returns the fewest triplets whose tail energy is at most `allowed`, or None.

    The rank is guessed, and the block doubled while the Ritz values say that it is too narrow;
    each attempt starts from the Ritz vectors of the one before, so all of them together cost
    about twice the last. The tail of what is returned is measured. None if the rank would exceed
    `largest`, or `steps` did not reach the accuracy.
    """
    start = _gaussian(W, block_width(min(FIRST_RANK, largest), W.shape), generator)
    while True:
        space = GolubKahan(W, start, energy)
        found, narrow = _search(space, allowed, energy, accuracy, steps)
        width = min(2 * start.shape[1], *W.shape)
        if found is not None or not narrow or start.shape[1] >= min(largest, width):
            return found if found is not None and len(found.s) <= largest else None
        V = space.triplets(width)[2].mT
        start = torch.cat([V, _gaussian(W, width - V.shape[1], generator)], dim=1)


def _search(
    space: GolubKahan, allowed: float, energy: float, accuracy: float, steps: int
) -> tuple[Found | None, bool]:
    """One attempt of `at_error`, and whether its block was too narrow for the rank."""
    W, width = space.W, space.start.shape[1]
    fewest = partial(_fewest, space, allowed, energy)
    for ritz, left in _tests(space, steps, fewest):
        rank = fewest(ritz)
        if rank is None or rank > width:
            if space.exhausted or space.products >= NARROW:
                rest = energy - float(ritz.sum())  # copies of repeated values, or rounding
                return None, not space.exhausted or rest > 4 * torch.finfo(W.dtype).eps * energy
        elif left <= SAFETY * accuracy * max(allowed, rounding_energy(W, energy)):
            return _settle(space, ritz, rank, allowed, left), False
    return None, False


def _tests(
    space: GolubKahan, steps: int, rank: Callable[[Tensor], int | None]
) -> Iterator[tuple[Tensor, float]]:
    """Advances the space; yields the Ritz values and the energy still to come at `rank` of them."""
    progress = Progress(space.W.shape, space.W.dtype)
    for _ in range(2 * steps):
        space.advance()
        if space.worth_a_test or space.exhausted:
            ritz = space.ritz()
            progress.record(space.products, ritz)
            if space.products == 1:
                continue
            wanted = rank(ritz)
            known = wanted is not None and not space.exhausted
            yield ritz, progress.remaining(wanted) if known and wanted else 0.0
        if space.exhausted:
            return


def _fewest(space: GolubKahan, allowed: float, energy: float, ritz: Tensor) -> int | None:
    """The fewest Ritz triplets that leave at most `allowed`; None where all leave more."""
    rest = energy - float(ritz.sum())
    if rest < LOST_DIGITS**2 * energy and allowed < (10 * LOST_DIGITS) ** 2 * energy:
        rest = residual_energy(space.W, *space.triplets(len(ritz)))
    tails = max(rest, 0.0) + ritz.flip(0).cumsum(0).flip(0) - ritz  # tails[k]: beyond k + 1
    enough = (tails <= allowed).nonzero()
    return int(enough[0]) + 1 if len(enough) else None


def _settle(
    space: GolubKahan, ritz: Tensor, rank: int, allowed: float, left: float
) -> Found | None:
    """The fewest triplets by the measured residual, which may ask for another rank or two."""
    best = None
    heads = ritz.cumsum(0)
    for _ in range(3):
        U, s, Vh = space.triplets(rank)
        tail = residual_energy(space.W, U, s, Vh)
        if tail <= allowed:
            best = Found(U, s, Vh, _excess(left, tail))
        enough = (tail + heads[rank - 1] - heads <= allowed).nonzero()
        if len(enough) == 0 or int(enough[0]) + 1 == rank or (best and int(enough[0]) >= rank):
            break
        rank = int(enough[0]) + 1
    return best


def _tail(
    ritz: Float[Tensor, " s"], rank: int, energy: float, dtype: torch.dtype, products: int
) -> float:
    """The tail energy ‖W‖_F² − Σ_{i≤rank} σᵢ², or a guess on which a measurement is worth while.

    Where the difference has lost its digits the further Ritz values bound it from below; that is
    used at first. From step 3 on it is the rounding of the difference: an upper bound, which
    the measurement replaces.
    """
    tail = energy - float(ritz[:rank].sum())
    if tail >= LOST_DIGITS**2 * energy:
        return tail
    if products < 6:
        return float(ritz[rank:].sum())
    return max(tail, 4 * torch.finfo(dtype).eps * energy)


def residual_energy(W: Tensor, U: Tensor, s: Tensor, Vh: Tensor) -> float:
    """Returns ‖W − U diag(s) Vh‖_F², by row blocks with float64 sums."""
    blocks = zip(W.split(ROW_BLOCK), (U * s).split(ROW_BLOCK), strict=True)
    return sum(energy(torch.addmm(rows, left, Vh, alpha=-1)) for rows, left in blocks)


def rounding_energy(W: Tensor, energy: float) -> float:
    """Returns the square of 4·ε·√max(m, n)·‖W‖_F."""
    return (ROUNDING * torch.finfo(W.dtype).eps) ** 2 * max(W.shape) * energy


def block_width(rank: int, shape: tuple[int, ...]) -> int:
    """Returns the columns of a block: rank + 8 − ⌊rank/8⌋, rounded up to a multiple of 16.

    Not fewer than the rank (Musco & Musco allow it): a space grown from b columns holds no more
    than b copies of a repeated singular value, and no stop rule would notice the missing ones.
    """
    extra = max(0, OVERSAMPLING - rank // OVERSAMPLING)
    width = -(-(rank + extra) // WIDTH) * WIDTH
    return min(width, *shape)


def _gaussian(
    W: Tensor, columns: int, generator: torch.Generator, *, rows: int | None = None
) -> Tensor:
    """Entries of N(0, 1/rows) in W's dtype, n rows unless said, drawn where the generator lives."""
    size = (W.shape[1] if rows is None else rows, columns)
    draw = torch.randn(size, dtype=W.dtype, generator=generator, device=generator.device)
    draw *= size[0] ** -0.5
    return draw.to(W.device)


def _padded(
    W: Tensor, U: Tensor, s: Tensor, Vh: Tensor, *, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The triplets, completed to `rank` with zero singular values: W has a lower rank than that."""
    missing = rank - len(s)
    if missing <= 0:
        return U, s, Vh
    sides: list[Tensor] = []
    for vectors in (U, Vh.mT):
        basis = Basis(len(vectors), W)
        basis.append(vectors)
        draw = _gaussian(W, missing, generator, rows=len(vectors))
        sides.append(torch.cat([vectors, extend(basis, draw)[0]], dim=1))
    return sides[0], torch.cat([s, s.new_zeros(missing)]), sides[1].mT


def _excess(left: float, tail: float) -> float:
    """√(1 + left/tail) − 1: an energy still missing, as a share of the error."""
    return math.sqrt(1 + left / tail) - 1 if tail > 0 else 0.0
