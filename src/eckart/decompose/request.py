"""How far a matrix is decomposed, and what that will take: threads, seconds, memory.

All of it from shapes alone, so that a plan is the same on every machine.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

from eckart.linalg.threads import computing_on
from eckart.linalg.truncated import prefers_exact, tries_exact
from eckart.matrix import Matrix, Shape

FLOPS = 4e10
"""Per thread and second, about: measured for float64 eigenproblems and float32 products alike."""

PRODUCTS = 12
"""With W, of a randomized decomposition: as a rule fewer."""

OVERSAMPLED = 16

WIDE_SVD = 17
"""The peak of LAPACK's thin SVD on its float64 rung, in float32 copies of W; 9 in float32."""

ROOT_BYTES = 28
"""Per entry of a second moment at the worst: as stored, in float64, damped, and its root."""

WIDE_PRODUCT = 3
"""Float64 copies of W beside the roots: itself, LᵀW and LᵀWR."""

STEPS = 40
"""The randomized method may take as many: its bases grow by a block in each."""


@dataclass(frozen=True, slots=True)
class Request:
    """How far to decompose a matrix: the largest rank wanted, and whether all values are."""

    rank: int
    all_values: bool

    def within(self, other: "Request") -> bool:
        """Whether what was kept for `other` serves this request too."""
        return self.rank <= other.rank and (other.all_values or not self.all_values)


def is_exact(shape: Shape, request: Request) -> bool:
    """Whether every singular value is computed."""
    return request.all_values or prefers_exact(shape, request.rank)


def threads_for(shape: Shape) -> int:
    """Returns the threads for one matrix: a rule on its shape, never on the machine.

    The same threads give the same bits, so this is part of what makes results repeatable. A matrix
    for each core beats a core more for each matrix: threads that wait for one another lose up to
    nine tenths of their time on a machine that does something else too (measured at 4096×11264).

    >>> threads_for((4096, 11008)), threads_for((8192, 28672)), threads_for((16384, 53248))
    (1, 2, 4)
    """
    m, n = shape
    return 1 if m * n <= 2**26 else 2 if m * n <= 2**28 else 4


def on_threads(shape: Shape, threads: int | None) -> AbstractContextManager[None]:
    """Computes on the threads asked for, or on those for the shape; afterwards as before."""
    return computing_on(threads or threads_for(shape))


def seconds_for(matrix: Matrix, request: Request, threads: int, *, weighted: bool = False) -> float:
    """Returns about how long a decomposition takes, on a machine of today.

    `weighted`: in a metric, whose roots and products with W come before it.
    """
    m, n = matrix.shape
    k = min(m, n)
    if is_exact(matrix.shape, request):
        flops = 9 * k**3 + 2 * k * m * n
    else:
        flops = PRODUCTS * 2 * m * n * (request.rank + OVERSAMPLED)
    if weighted:
        flops += (m**3 + n**3) / 3 + m * n * (m + n)
    return matrix.count * flops / (FLOPS * threads)


def peak_bytes(matrix: Matrix, request: Request, itemsize: int, *, weighted: bool = False) -> int:
    """Returns the most memory that a decomposition may need, on the worst rung it may reach.

    Per matrix of a stack, and on top of the bare process. `weighted`: in a metric, whose roots
    are taken, and multiplied with W, before and never beside the SVD.
    """
    m, n = matrix.shape
    if weighted:
        roots = ROOT_BYTES * max(m, n) ** 2 + 8 * min(m, n) ** 2
        plain = peak_bytes(matrix, request, itemsize)
        return max(plain, m * n * itemsize + roots + WIDE_PRODUCT * 8 * m * n)
    width = max(4, itemsize)  # of the dtype that is computed in
    stored = m * n * itemsize
    if is_exact(matrix.shape, request) or tries_exact(matrix.shape, request.rank):
        return stored + WIDE_SVD * 4 * m * n + (m * n * width if width == 8 else 0)
    columns = min(STEPS * (request.rank + OVERSAMPLED), m, n)
    bases, projected = 3 * (m + n) * columns * width // 2, 6 * 8 * columns**2
    return stored + m * n * width + bases + projected


def part_bytes(matrix: Matrix, request: Request, itemsize: int) -> int:
    """Returns the size of the part: vectors of the short side, and the values."""
    k = min(matrix.shape)
    return matrix.count * (min(request.rank, k) * k * max(4, itemsize) + 8 * k) + 2**12
