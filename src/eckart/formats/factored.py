"""Format 1: factored matrices beside the untouched tensors, with a guard for each.

`X.weight` becomes `X.A.weight` and `X.B.weight` (pivoted: `X.A.weight`, `X.K.weight`, `X.perm`),
`X.bias` becomes `X.B.bias` (pivoted: unchanged), and the guard keeps the original name with shape
[0]: a loader that does not know the format stops there, instead of filling the layer at random.
"""

from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor

from eckart.certificate import FactoredEntry
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source
from eckart.checkpoint.tensor_file import TensorLayout
from eckart.errors import PromiseError
from eckart.linalg.factors import Factors, PivotedFactors

Product = Factors | PivotedFactors

FORMAT_VERSION = 1


def module_of(matrix: str) -> str:
    """Returns X of the matrix X.weight."""
    return matrix.removesuffix(".weight")


def layout(
    X: str, entry: FactoredEntry, dtype: str, guard: str | None = None
) -> dict[str, TensorLayout]:
    """Returns the tensors that stand for the factored matrix of module X, the guard among them.

    Factors have `dtype`; the guard has the matrix's own, `guard`, where that differs.
    """
    (m, n), r = entry.shape, entry.rank
    tensors = {
        f"{X}.A.weight": TensorLayout.of(dtype, (r, n)),
        f"{X}.weight": TensorLayout.of(guard or dtype, (0,)),
    }
    if entry.form == "ba":
        tensors[f"{X}.B.weight"] = TensorLayout.of(dtype, (m, r))
    else:
        tensors[f"{X}.K.weight"] = TensorLayout.of(dtype, (m - r, r))
        tensors[f"{X}.perm"] = TensorLayout.of("I64", (m,))
    return tensors


def encode(X: str, product: Product) -> dict[str, Tensor]:
    """Returns the tensors of `layout`."""
    guard = torch.empty(0, dtype=product.A.dtype)
    tensors = {f"{X}.A.weight": product.A, f"{X}.weight": guard}
    if isinstance(product, Factors):
        return {**tensors, f"{X}.B.weight": product.B}
    return {**tensors, f"{X}.K.weight": product.K, f"{X}.perm": product.perm}


def decode(source: Source, X: str, entry: FactoredEntry) -> Product:
    """Returns the factors of module X as they are stored; PromiseError where they do not fit."""
    stored, guard = (source.tensors.get(f"{X}{part}") for part in (".A.weight", ".weight"))
    dtype = stored.dtype if stored else "F32"
    for name, expected in layout(X, entry, dtype, guard.dtype if guard else None).items():
        found = source.tensors.get(name)
        if found is None or (found.dtype, found.shape) != (expected.dtype, expected.shape):
            what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise PromiseError(
                f"{printable(name)} is {what}, but the certificate says {expected.dtype} "
                f"{list(expected.shape)}."
            )
    A = source.load(f"{X}.A.weight")
    if entry.form == "ba":
        return Factors(source.load(f"{X}.B.weight"), A)
    return PivotedFactors(A, source.load(f"{X}.K.weight"), source.load(f"{X}.perm"))


def stored_name(name: str, factored: Mapping[str, FactoredEntry]) -> str:
    """Returns the output's name of a tensor that is copied: the bias of a `ba` matrix moves."""
    X = name.removesuffix(".bias")
    moves = name.endswith(".bias") and X in factored and factored[X].form == "ba"
    return f"{X}.B.bias" if moves else name


def quantization_config(factored: Mapping[str, FactoredEntry]) -> dict[str, object]:
    """Returns what config.json gains, keyed by file names."""
    return {
        "quant_method": "eckart",
        "format_version": FORMAT_VERSION,
        "factored": msgspec.to_builtins(dict(sorted(factored.items()))),
    }
