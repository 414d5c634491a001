"""Factors as named tensors: format 1, dense again, adapters."""

from typing import Protocol

from torch import Tensor

from eckart.certificate import FactoredEntry
from eckart.checkpoint.source import Source
from eckart.checkpoint.tensor_file import TensorLayout
from eckart.linalg.factors import Factors, PivotedFactors


class Format(Protocol):
    """How the factors of a tensor are stored."""

    def layout(
        self, name: str, entry: FactoredEntry, dtype: str, guard: str | None = None
    ) -> dict[str, TensorLayout]:
        """Returns the tensors that stand for one."""
        ...

    def encode(
        self, name: str, entry: FactoredEntry, product: Factors | PivotedFactors
    ) -> dict[str, Tensor]:
        """Returns them, of one matrix."""
        ...

    def decode(
        self, source: Source, name: str, entry: FactoredEntry, index: int = 0
    ) -> Factors | PivotedFactors:
        """Returns the factors of one matrix, as they are stored."""
        ...
