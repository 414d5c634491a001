"""eckart turns weight matrices into B·A and proves that the result does what it claims.

Every public name is loaded when it is first used, so `import eckart` costs nothing.
"""

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

__version__ = _version("eckart")

_HOME = {
    "apply": "eckart.folding",
    "Factors": "eckart.linalg.factors",
    "factorize": "eckart.linalg.factors",
    "pivot": "eckart.linalg.factors",
    "PivotedFactors": "eckart.linalg.factors",
    "recompress": "eckart.linalg.factors",
    "split": "eckart.linalg.factors",
    "TruncatedSVD": "eckart.linalg.exact",
    "exact_svd": "eckart.linalg.exact",
    "singular_values": "eckart.linalg.exact",
    "truncated_svd": "eckart.linalg.truncated",
    "Spectrum": "eckart.linalg.spectrum",
    "break_even_rank": "eckart.linalg.spectrum",
    "matrix_rank": "eckart.linalg.rank",
    "SignalRank": "eckart.linalg.rounding",
    "signal_rank": "eckart.linalg.rounding",
    "matrix_with_spectrum": "eckart.linalg.matrices",
    "random_low_rank": "eckart.linalg.matrices",
    "output_difference": "eckart.linalg.residual",
    "relative_error": "eckart.linalg.residual",
    "residual_norm": "eckart.linalg.residual",
    "load": "eckart.loading",
    "LowRankConv2d": "eckart.nn",
    "LowRankLinear": "eckart.nn",
    "PivotedConv2d": "eckart.nn",
    "PivotedLinear": "eckart.nn",
    "peft_targets": "eckart.surgery",
    "Certificate": "eckart.certificate",
    "Check": "eckart.verification",
    "calibrate": "eckart.statistics",
    "calibrate_module": "eckart.statistics",
    "compress": "eckart.api",
    "convert": "eckart.conversion",
    "densify": "eckart.api",
    "extract": "eckart.adaptation",
    "Fit": "eckart.verification",
    "inspect": "eckart.api",
    "lint": "eckart.conversion",
    "merge": "eckart.adaptation",
    "open_statistics": "eckart.checkpoint.statistics",
    "resize": "eckart.adaptation",
    "verify": "eckart.api",
    "Statistics": "eckart.checkpoint.statistics",
    "EckartError": "eckart.errors",
}

if TYPE_CHECKING:
    from eckart.adaptation import extract as extract
    from eckart.adaptation import merge as merge
    from eckart.adaptation import resize as resize
    from eckart.api import compress as compress
    from eckart.api import densify as densify
    from eckart.api import inspect as inspect
    from eckart.api import verify as verify
    from eckart.certificate import Certificate as Certificate
    from eckart.checkpoint.statistics import Statistics as Statistics
    from eckart.checkpoint.statistics import open_statistics as open_statistics
    from eckart.conversion import convert as convert
    from eckart.conversion import lint as lint
    from eckart.errors import EckartError as EckartError
    from eckart.folding import apply as apply
    from eckart.linalg.exact import TruncatedSVD as TruncatedSVD
    from eckart.linalg.exact import exact_svd as exact_svd
    from eckart.linalg.exact import singular_values as singular_values
    from eckart.linalg.factors import Factors as Factors
    from eckart.linalg.factors import PivotedFactors as PivotedFactors
    from eckart.linalg.factors import factorize as factorize
    from eckart.linalg.factors import pivot as pivot
    from eckart.linalg.factors import recompress as recompress
    from eckart.linalg.factors import split as split
    from eckart.linalg.matrices import matrix_with_spectrum as matrix_with_spectrum
    from eckart.linalg.matrices import random_low_rank as random_low_rank
    from eckart.linalg.rank import matrix_rank as matrix_rank
    from eckart.linalg.residual import output_difference as output_difference
    from eckart.linalg.residual import relative_error as relative_error
    from eckart.linalg.residual import residual_norm as residual_norm
    from eckart.linalg.rounding import SignalRank as SignalRank
    from eckart.linalg.rounding import signal_rank as signal_rank
    from eckart.linalg.spectrum import Spectrum as Spectrum
    from eckart.linalg.spectrum import break_even_rank as break_even_rank
    from eckart.linalg.truncated import truncated_svd as truncated_svd
    from eckart.loading import load as load
    from eckart.nn import LowRankConv2d as LowRankConv2d
    from eckart.nn import LowRankLinear as LowRankLinear
    from eckart.nn import PivotedConv2d as PivotedConv2d
    from eckart.nn import PivotedLinear as PivotedLinear
    from eckart.statistics import calibrate as calibrate
    from eckart.statistics import calibrate_module as calibrate_module
    from eckart.surgery import peft_targets as peft_targets
    from eckart.verification import Check as Check
    from eckart.verification import Fit as Fit

__all__ = sorted(["__version__", *_HOME])  # noqa: PLE0605 from the table, so that the two agree  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'eckart' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
