"""Ranks raised where rounding the factors to their dtype would break a promise of error."""

import math
from collections.abc import Mapping

import torch

from eckart.allocate import Choice, paying_rank
from eckart.certificate import FactorForm
from eckart.checkpoint.header import DTYPES
from eckart.checkpoint.source import Checkpoint
from eckart.decompose import Decomposition
from eckart.linalg.factors import Factors, PivotedFactors, pivot
from eckart.linalg.residual import relative_error

SLACK = 1e-9
"""A share of the error asked: float32's own rounding, where the rank just reaches it."""


def rounded_product(
    decomposition: Decomposition, W: torch.Tensor, rank: int, form: FactorForm, dtype: str
) -> Factors | PivotedFactors:
    """Returns the factors of one matrix as they are written."""
    factors = decomposition.factors(W, rank)
    return (pivot(factors) if form == "pivoted" else factors).to(DTYPES[dtype])


def keep_promises(
    source: Checkpoint,
    choices: Mapping[str, Choice],
    decompositions: Mapping[str, Decomposition],
    allowed: float | None,
    *,
    form: FactorForm,
    dtype: str | None,
) -> dict[str, Choice]:
    """Returns the choices, their ranks raised until the factors *as rounded* are within `allowed`.

    `allowed` is the relative error that the policy promises of each matrix, None if it promises
    none. A matrix that no rank brings there is left dense, with that reason. Cost: one residual
    a matrix, as a rule.
    """
    if allowed is None:
        return dict(choices)
    return {
        name: choice
        if choice.rank is None
        else _raised(
            source.load(name),
            decompositions[name],
            choice.rank,
            allowed * (1 + SLACK),
            form,
            dtype or source.tensors[name].dtype,
        )
        for name, choice in choices.items()
    }


def _raised(  # noqa: PLR0917 one matrix and one request
    W: torch.Tensor,
    decomposition: Decomposition,
    rank: int,
    allowed: float,
    form: FactorForm,
    dtype: str,
) -> Choice:
    spectrum = decomposition.spectrum
    largest = min(paying_rank(spectrum.shape, form), decomposition.rank)
    while rank <= largest:
        product = rounded_product(decomposition, W, rank, form, dtype)
        error = relative_error(W, product, decomposition.name)
        if error <= allowed or not math.isfinite(error):  # an overflow is refused when written
            return Choice(rank)
        rounding = max(error**2 - spectrum.relative_error(rank) ** 2, 0.0)
        left = math.sqrt(max(allowed**2 - rounding, 0.0))
        rank = max(rank + 1, spectrum.rank_at_error(left))
    return Choice(
        None,
        f"dense: rounded to {dtype}, no rank that pays (up to {largest} of "
        f"{min(spectrum.shape)}) is within the error asked; a wider --dtype may be",
    )
