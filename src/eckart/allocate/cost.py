"""What a rank costs, and what is decided of a matrix."""

from dataclasses import dataclass

from eckart.certificate import FactorForm as Form

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Choice:
    """A rank, or None and the reason why the matrix is copied as it is."""

    rank: int | None
    reason: str = ""


def cost(shape: Shape, rank: int, form: Form) -> int:
    """Returns the parameters of a factored matrix: r(m + n), or r(m + n − r) if pivoted."""
    m, n = shape
    return rank * (m + n - (rank if form == "pivoted" else 0))


def paying_rank(shape: Shape, form: Form) -> int:
    """Returns the largest rank that holds fewer parameters than the dense matrix; 0 if none.

    >>> paying_rank((512, 512), "ba"), paying_rank((512, 512), "pivoted")
    (255, 511)
    """
    m, n = shape
    return (m * n - 1) // (m + n) if form == "ba" else min(m, n) - 1


def break_even(shape: Shape, form: Form) -> str:
    """Returns in words where factoring stops to pay."""
    return f"break-even is {paying_rank(shape, form)} of {min(shape)}"
