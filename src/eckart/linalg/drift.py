"""What a matrix should become where its inputs are no longer those that it was trained on.

Knows tensors only; which model feeds which matrix is the business of others.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.linalg.arrays import working_dtype
from eckart.linalg.factors import Factors, from_weighted_side
from eckart.linalg.metric import Metric, damped_root
from eckart.linalg.truncated import truncated_svd

SHARE = 0.5
"""How far the target goes from W to what would undo the drift. Heuristic: all the way fits the
error of the layers before, which are then fitted twice; KLs on held-out text are flat around ½."""

DAMPING = 1e-3
"""Of the mean of diag C', added to it before it is inverted."""


@dataclass(frozen=True, slots=True)
class DriftFit:
    """Factors in float64, and how they were found."""

    factors: Factors
    method: str
    excess_estimate: float


def drift_target(
    W: Float[Tensor, "m n"],
    cross: Float[Tensor, "n n"],
    C: Float[Tensor, "n n"],
    *,
    share: float = SHARE,
    damping: float = DAMPING,
) -> Float[Tensor, "m n"]:
    """Returns W* = W + share·(W E[x x'ᵀ] (C' + δI)⁻¹ − W), in float64.

    x are the inputs of W in the model as it was, x' those it gets in the changed one, and C' =
    E[x' x'ᵀ]. With a share of 1 it is the matrix whose outputs W* x' are nearest to W x, by least
    squares. δ is `damping` times the mean of diag C'. FactorizationError where C' is zero. Cost:
    n³ + 2mn² flops; peak six copies of C in float64.

    >>> W, C = torch.eye(2), torch.diag(torch.tensor([4.0, 1.0]))
    >>> drift_target(W, 0.5 * C, C, damping=0.0).tolist()  # x' = 2x: W/2 would undo it
    [[0.75, 0.0], [0.0, 0.75]]
    """
    root, W = damped_root(C, damping, "the inputs"), W.double()
    undone = root.solved((W @ cross.double()).mT).mT
    return torch.lerp(W, undone, share)


def fit_to_drift(
    W: Float[Tensor, "m n"],
    cross: Float[Tensor, "n n"],
    C: Float[Tensor, "n n"],
    G: Float[Tensor, "..."] | None,
    rank: int,
    *,
    generator: torch.Generator,
    name: str = "matrix",
) -> DriftFit:
    """Returns the factors nearest to `drift_target` in the metric of C' and G.

    The SVD of LᵀW*R' with G = LLᵀ and C' = R'R'ᵀ, damped: see `eckart.linalg.metric.Metric`.
    """
    target, metric = drift_target(W, cross, C), Metric.of(C, G, name=name)
    M = metric.transformed(target).to(working_dtype(W.dtype)).contiguous()
    svd = truncated_svd(M, rank=rank, generator=generator, name=name)
    vectors = svd.U.mT if M.shape[0] <= M.shape[1] else svd.Vh
    shape = (M.shape[0], M.shape[1])
    factors = from_weighted_side(target, vectors, metric.short_side(shape), torch.float64)
    return DriftFit(factors, svd.method, svd.excess_estimate)
