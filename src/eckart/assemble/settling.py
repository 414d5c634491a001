"""Choices settled by measurement, before anything is laid out.

Where a policy promises an error, the rank is raised until the factors *as rounded* keep it; where
forms compete under a budget, the one with the smaller error in the same space is taken.
"""

import math
from dataclasses import dataclass

from eckart.allocate import Choice, Item, Priced, RankPolicy, Terms
from eckart.assemble.filling import product_of
from eckart.assemble.measurement import measure_error
from eckart.certificate import FactoredEntry
from eckart.checkpoint.source import Source
from eckart.checkpoint.statistics import Statistics
from eckart.decompose import Decomposition
from eckart.decompose.request import FLOPS, on_threads, threads_for
from eckart.decompose.weighting import Metrics
from eckart.matrix import FactorForm, Matrix

SLACK = 1e-9
"""A share of the error asked: float32's own rounding, where the rank just reaches it."""


@dataclass(frozen=True, slots=True)
class Unsettled:
    """A tensor for which a rank was chosen."""

    name: str
    matrix: Matrix
    item: Item
    decomposition: Decomposition
    dtype: str  # of the factors
    rank: int

    @property
    def seconds(self) -> float:
        """About how long it takes."""
        m, n = self.matrix.shape
        return 8 * m * n * self.rank * self.matrix.count / (FLOPS * threads_for(self.matrix.shape))


@dataclass(frozen=True, slots=True)
class Settler:
    """Settles one choice: its rank, where the policy promises an error, or its form."""

    source: Source
    policy: RankPolicy
    terms: Terms
    threads: int | None = None
    statistics: Statistics | None = None  # errors are in the metric that they make

    def __call__(self, case: Unsettled) -> Choice:
        """Measures the candidates. Cost: a residual each; as a rule one, or two of forms."""
        metrics = Metrics(self.statistics, case.name)
        with on_threads(case.matrix.shape, self.threads):
            if isinstance(self.policy, Priced):
                return self._form(case, self.policy, metrics)
            return self._raised(case, self.policy.allowed or 0.0, metrics)

    def _raised(self, case: Unsettled, promised: float, metrics: Metrics) -> Choice:
        form: FactorForm = "pivoted" if self.terms.form == "pivoted" else "ba"
        allowed, spectrum = promised * (1 + SLACK), case.decomposition.spectrum
        largest = min(self.terms.largest(case.item), case.decomposition.rank)
        rank = case.rank
        while rank <= largest:
            error = self._error(case, rank, form, metrics)
            if error <= allowed or not math.isfinite(error):  # an overflow is refused when written
                return Choice(rank, form=form)
            rounding = max(error**2 - spectrum.relative_error(rank) ** 2, 0.0)
            left = math.sqrt(max(allowed**2 - rounding, 0.0))
            rank = self.terms.aligned(max(rank + 1, spectrum.rank_at_error(left)))
        return Choice(
            None,
            f"dense: rounded to {case.dtype}, no rank that pays (up to {largest} of "
            f"{min(spectrum.shape)}) is within the error asked; a wider --dtype may be",
        )

    def _form(self, case: Unsettled, policy: Priced, metrics: Metrics) -> Choice:
        """Of both forms, each at the largest rank for the same price, the one with less error."""
        forms: tuple[FactorForm, ...] = ("ba", "pivoted")
        fitting: dict[FactorForm, int] = {
            form: min(
                policy.same_price(case.item, case.rank, self.terms, form),
                self._kept(case),
            )
            for form in forms
        }
        errors: dict[FactorForm, float] = {
            form: self._error(case, rank, form, metrics) for form, rank in fitting.items() if rank
        }
        form = min(errors, key=errors.__getitem__)  # "ba" of equals: it is the faster one
        return Choice(fitting[form], form=form)

    def _kept(self, case: Unsettled) -> int:
        return case.decomposition.rank // self.terms.align * self.terms.align

    def _error(self, case: Unsettled, rank: int, form: FactorForm, metrics: Metrics) -> float:
        entry = FactoredEntry(
            rank=rank, form=form, shape=case.matrix.stored, orientation=case.matrix.orientation
        )
        pairs = (
            (W, product_of(case.decomposition, W, entry, case.dtype, index, metrics(index)))
            for index in range(case.matrix.count)
            for W in [case.matrix.load(self.source, case.name, index)]
        )
        return measure_error(pairs, case.name, metrics)
