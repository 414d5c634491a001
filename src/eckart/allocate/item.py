"""A matrix as a budget sees it, what a rank costs, and what is decided."""

from dataclasses import dataclass
from typing import Literal

from eckart.matrix import FactorForm, Shape

Form = Literal["ba", "pivoted", "auto"]

PERM_BYTES = 8
"""A permutation is stored as int64: it counts in bytes, not in parameters."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A rank and a form, or None and the reason why the matrix is copied as it is."""

    rank: int | None
    reason: str = ""
    form: FactorForm = "ba"


@dataclass(frozen=True, slots=True)
class Item:
    """One targeted matrix, or a stack of `count` that share a rank: its sizes, dense and factored.

    >>> Item((4096, 4096)).parameters(64, "ba"), Item((8, 6), count=3).parameters(2, "pivoted")
    (524288, 72)
    """

    shape: Shape
    count: int = 1
    dense_itemsize: int = 4  # bytes per entry in the source …
    itemsize: int = 4  # … and of the factors
    known_rank: int | None = None  # above rounding, where it was looked for
    barred: str = ""  # why it stays dense, whatever the policy
    energy: float | None = None  # of a change whose spectrum does not compare with others'

    @property
    def dense_parameters(self) -> int:
        """mn, of the whole stack."""
        m, n = self.shape
        return self.count * m * n

    @property
    def dense_bytes(self) -> int:
        """What the matrix takes where it is copied."""
        return self.dense_parameters * self.dense_itemsize

    def parameters(self, rank: int, form: Form) -> int:
        """r(m + n), or r(m + n − r) if pivoted, of the whole stack."""
        return self.count * cost(self.shape, rank, form)

    def bytes(self, rank: int, form: Form) -> int:
        """What the factors take, the permutation included; "auto": the smaller form."""
        plain = self.parameters(rank, "ba") * self.itemsize
        perm = self.count * self.shape[0] * PERM_BYTES
        pivoted = self.parameters(rank, "pivoted") * self.itemsize + perm
        return {"ba": plain, "pivoted": pivoted, "auto": min(plain, pivoted)}[form]


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds for every matrix: the form of the factors, and ranks in multiples of `align`.

    "auto" is planned with the smaller cost of the two forms at every rank.
    """

    form: Form = "ba"
    align: int = 1
    rest_bytes: int = 0  # of the tensors that are no matrices
    additive: bool = False  # an adapter: rank 0 says nothing changed, and dense is no choice
    in_nats: bool = False  # ½σᵢ² is a loss in nats per token, of every matrix

    def largest(self, item: Item) -> int:
        """Returns the largest rank that pays, in multiples of `align`; 0 if none.

        In an adapter any rank pays; a matrix with fewer rows than `align` takes what it has.
        """
        if item.barred:
            return 0
        if self.additive:
            return min(item.shape) // self.align * self.align or min(item.shape)
        return paying_rank(item.shape, self.form) // self.align * self.align

    def choice(self, rank: int) -> Choice:
        """Returns the choice of a rank; of "auto" the form is still to be settled."""
        return Choice(rank, form="ba" if self.form == "ba" else "pivoted")

    def aligned(self, rank: int) -> int:
        """Returns the rank, rounded up to a multiple of `align`; at least one."""
        return max(-(-rank // self.align), 1) * self.align

    def within(self, item: Item, rank: int) -> int:
        """Returns the rank, or the largest one of an adapter's matrix if that is less."""
        return min(rank, self.largest(item)) if self.additive else rank

    def break_even(self, item: Item) -> str:
        """Returns in words where factoring stops to pay."""
        ranks = f", ranks are multiples of {self.align}" if self.align > 1 else ""
        return f"break-even is {paying_rank(item.shape, self.form)} of {min(item.shape)}{ranks}"


def cost(shape: Shape, rank: int, form: Form) -> int:
    """Returns the parameters of one factored matrix: r(m + n), or r(m + n − r) if pivoted."""
    m, n = shape
    return rank * (m + n - (0 if form == "ba" else rank))


def paying_rank(shape: Shape, form: Form) -> int:
    """Returns the largest rank that holds fewer parameters than the dense matrix; 0 if none.

    >>> paying_rank((512, 512), "ba"), paying_rank((512, 512), "pivoted")
    (255, 511)
    """
    m, n = shape
    return (m * n - 1) // (m + n) if form == "ba" else min(m, n) - 1
