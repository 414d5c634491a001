"""Format 1: factored matrices beside the untouched tensors, with a guard for each.

The tensor `X.weight` becomes `X.A.weight` and `X.B.weight` (pivoted: `X.A.weight`, `X.K.weight`,
`X.perm`), `X.bias` becomes `X.B.bias` (pivoted: unchanged), and the guard keeps the original name
with shape [0]: a loader that does not know the format stops there, instead of filling the layer at
random. A tensor without `.weight` in its name is its own X.
"""

from collections.abc import Iterator, Mapping

import msgspec
from torch import Tensor

from eckart.certificate import FactoredEntry
from eckart.checkpoint.header import DTYPES, TensorInfo
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Source
from eckart.checkpoint.tensor_file import TensorLayout
from eckart.errors import PromiseError
from eckart.linalg.factors import Factors, PivotedFactors
from eckart.matrix import Matrix

Product = Factors | PivotedFactors

FORMAT_VERSION = 1

PERM = "perm"


def module_of(name: str) -> str:
    """Returns X of the tensor X.weight, or of X."""
    return name.removesuffix(".weight")


def names(name: str) -> set[str]:
    """Returns every name that could stand for a factored tensor, or for its bias, in any form."""
    X, parts = module_of(name), ("A.weight", "B.weight", "K.weight", PERM, "B.bias", "weight")
    return {X, *(f"{X}.{part}" for part in parts)}


def matrix_of(entry: FactoredEntry) -> Matrix:
    """Returns how the tensor of an entry is read."""
    return Matrix(entry.shape, entry.orientation)


def layout(
    name: str, entry: FactoredEntry, dtype: str, guard: str | None = None
) -> dict[str, TensorLayout]:
    """Returns the tensors that stand for a factored one, the guard among them.

    Factors have `dtype`; the guard has the tensor's own, `guard`, where that differs.
    """
    X, shapes = module_of(name), matrix_of(entry).factors(entry.rank, entry.form)
    tensors = {
        f"{X}.{part}": TensorLayout.of("I64" if part == PERM else dtype, shape)
        for part, shape in shapes.items()
    }
    return {name: TensorLayout.of(guard or dtype, (0,)), **tensors}


def encode(name: str, entry: FactoredEntry, product: Product) -> dict[str, Tensor]:
    """Returns the tensors of `layout`, without the guard, for one matrix of the tensor."""
    parts = {"A.weight": product.A}
    if isinstance(product, Factors):
        parts["B.weight"] = product.B
    else:
        parts |= {"K.weight": product.K, PERM: product.perm}
    return {f"{module_of(name)}.{part}": tensor for part, tensor in parts.items()}


def decode(source: Source, name: str, entry: FactoredEntry, index: int = 0) -> Product:
    """Returns the factors of one matrix as they are stored; see `check` for what may be wrong."""
    X, matrix = module_of(name), matrix_of(entry)

    def part(end: str) -> Tensor:
        stop = index + 1 if matrix.is_stack else None
        stored = source.load(f"{X}.{end}", index, stop)
        stored = stored[0] if matrix.is_stack else stored
        return stored if end == PERM else stored.flatten(1)

    if entry.form == "ba":
        return Factors(part("B.weight"), part("A.weight"))
    return PivotedFactors(part("A.weight"), part("K.weight"), part(PERM))


def products(source: Source, name: str, entry: FactoredEntry) -> Iterator[Product]:
    """Yields the factors of each matrix of the tensor."""
    for index in range(matrix_of(entry).count):
        yield decode(source, name, entry, index)


def check(source: Source, name: str, entry: FactoredEntry) -> None:
    """Raises PromiseError unless the tensors of `layout` are there, in one dtype."""
    first, guard = source.tensors.get(f"{module_of(name)}.A.weight"), source.tensors.get(name)
    expected = layout(name, entry, _known(first) or "F32", _known(guard))
    for stored, place in expected.items():
        found = source.tensors.get(stored)
        if found is None or (found.dtype, found.shape) != (place.dtype, place.shape):
            what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise PromiseError(
                f"{printable(stored)} is {what}, but the certificate says {place.dtype} "
                f"{list(place.shape)}."
            )


def _known(info: TensorInfo | None) -> str | None:
    """A tensor's dtype, if torch has it."""
    return info.dtype if info and info.dtype in DTYPES else None


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
