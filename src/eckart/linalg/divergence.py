"""How far apart two predictions are.

Knows tensors only.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def divergence_between(
    log_p: Float[Tensor, "*rows classes"], log_q: Float[Tensor, "*rows classes"]
) -> float:
    """Returns Σ KL(p ‖ q) over all rows, in nats, from logarithms of probabilities.

    Σ p (log p − log q) (Kullback & Leibler, 1951), summed in float64; q may not be 0 where p is
    not.

    >>> half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> round(divergence_between(half, quarter), 4)
    0.1438
    """
    return float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
