"""The leading singular triplets: a rank, an energy or an error decides how many."""

import torch

from eckart.errors import UsageError
from eckart.linalg.arrays import Array, check_rank
from eckart.linalg.exact import TruncatedSVD, exact_svd


def truncated_svd(
    W: Array,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    accuracy: float = 1e-3,
    method: str = "auto",
    generator: torch.Generator | None = None,
    name: str = "matrix",
) -> TruncatedSVD:
    """Returns the leading triplets of W; exactly one of rank, energy, error says how many."""
    if sum(value is not None for value in (rank, energy, error)) != 1:
        raise UsageError("give exactly one of rank, energy and error.")
    svd = exact_svd(W, name)
    if energy is not None:
        rank = max(1, svd.spectrum.rank_at_energy(energy))
    elif error is not None:
        rank = max(1, svd.spectrum.rank_at_error(error))
    assert rank is not None
    return svd.truncate(check_rank(rank, svd.shape, name))
