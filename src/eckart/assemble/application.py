"""An adapter folded into its base, or taken out again: W ± s·B·A, tensor by tensor.

A unit of work that any process can be handed. Computed in float32 (float64 for float64), rounded
once to the base's dtype; what rounding cost is measured as a share of what was added.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.assemble.filling import BYTES_PER_SECOND, Copy, Filled
from eckart.assemble.placement import placed
from eckart.certificate import MatrixRecord
from eckart.checkpoint.hashing import Hash, bytes_of, digest_of
from eckart.checkpoint.header import DTYPES, TensorInfo
from eckart.checkpoint.paths import printable
from eckart.checkpoint.quantized import EIGHT_BITS
from eckart.checkpoint.source import Source
from eckart.checkpoint.stream import FileStream
from eckart.checkpoint.tensor_file import TensorFiles, TensorLayout
from eckart.decompose.request import FLOPS
from eckart.errors import CheckpointError
from eckart.families import FLOATING, has_conv1d, has_grown, is_tied_to_head, matrix_as_used
from eckart.formats.adapters import Adapter, Part
from eckart.linalg.arrays import check_finite
from eckart.linalg.factors import Factors, product_energy
from eckart.linalg.norms import energy_from_above
from eckart.linalg.residual import rounded_up
from eckart.linalg.threads import computing_on
from eckart.matrix import Matrix


@dataclass(frozen=True, slots=True)
class Add:
    """A tensor to which a part of the adapter is added."""

    name: str
    part: Part
    matrix: Matrix

    @property
    def seconds(self) -> float:
        """About how long it takes."""
        m, n = self.matrix.shape
        once = 2 * m * n * self.part.rank / FLOPS + 8 * m * n / BYTES_PER_SECOND
        return self.matrix.count * once

    def addition(self, adapter: Source, sign: int, dtype: torch.dtype, index: int) -> Factors:
        """Returns ±s·BA of one matrix as the tensor is stored, or its transpose."""
        found = self.part.one(index).load(adapter)
        B, A = found.B.to(dtype) * (sign * self.part.scale), found.A.to(dtype)
        return Factors(B, A) if self.matrix.orientation == "out_in" else Factors(A.mT, B.mT)


@dataclass(frozen=True, slots=True)
class AddBias:
    """A bias to which the one of a part is added."""

    name: str
    part: Part
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Replace:
    """A tensor of which the adapter holds the new one."""

    name: str
    stored: str
    nbytes: int

    @property
    def seconds(self) -> float:
        """About how long it takes."""
        return 2 * self.nbytes / BYTES_PER_SECOND


Order = Copy | Add | AddBias | Replace

THREADS = 1
"""For one tensor, whatever its shape: its bytes pass by faster than they are hashed."""

BLOCK_ENTRIES = 2**18
"""Added to at once: as stored and in float32 they stay in the cache together."""


@dataclass(frozen=True, slots=True)
class FilledFile:
    """A file of the output that is on the disk, and what is said of its tensors."""

    digest: str
    tensors: tuple[Filled, ...]


@dataclass(frozen=True, slots=True)
class Applier:
    """Carries out the orders of one file."""

    base: Source
    adapter: Source
    files: TensorFiles
    sign: int
    threads: int | None = None

    def __call__(self, file: str, orders: Sequence[Order]) -> FilledFile:
        """Reads, adds and writes in one pass, in the order of the file.

        Peak memory: the factors of a matrix, and some MiB.
        """
        with FileStream(self.files, file) as out, computing_on(self.threads or THREADS):
            filled = tuple(self._fill(order, out) for order in orders)
            return FilledFile(out.digest(), filled)

    def _fill(self, order: Order, out: FileStream) -> Filled:
        match order:
            case Copy():
                return Filled(order.name, _copy(self.base, order.name, order.stored, out))
            case Replace():
                check_finite(self.adapter.load(order.stored), order.stored)
                _copy(self.adapter, order.stored, order.name, out)
                return Filled(order.name, self.base.digest(order.name))
            case AddBias():
                return self._add_bias(order, out)
            case Add():
                return self._add(order, out)

    def _add_bias(self, order: AddBias, out: FileStream) -> Filled:
        bias = self.base.load(order.name)
        added = bias_sum(bias, order.part, self.adapter, self.sign)
        check_finite(added, f"the sum of {order.name} and the adapter's")
        out.write(order.name, added)
        return Filled(order.name, digest_of(bias))

    def _add(self, order: Add, out: FileStream) -> Filled:
        missed, total, seen = 0.0, 0.0, Hash()
        what = f"the sum of {order.name} and the adapter's product"
        for sums in sums_of(self.base, self.adapter, order, self.sign):
            for rows, exact in sums:
                seen.update(bytes_of(rows))
                rows.copy_(exact)
                missed += rounding(exact, rows, what)
                out.write(order.name, rows)
            total += product_energy(sums.addition)
        error, info = rounded_up(missed, total), self.base.tensors[order.name]
        return Filled(order.name, seen.hexdigest(), _record(order, info, error))


def _copy(source: Source, name: str, stored: str, out: FileStream) -> str:
    """Copies a tensor's bytes, and returns their digest."""
    seen = Hash()
    for piece in source.chunks(name):
        seen.update(bytes_of(piece))
        out.write(stored, piece)
    return seen.hexdigest()


@dataclass(frozen=True, slots=True)
class Sums:
    """W ± s·BA of one matrix of a tensor, by blocks of its rows as it is stored."""

    base: Source
    name: str
    addition: Factors  # what is added, in float32 or better
    index: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields rows as the base has them, and the sum, in the dtype of the addition.

        One and the same memory for every block: each must be used up before the next.
        """
        added, (count, width) = self.addition, self.addition.shape
        step, first = max(1, BLOCK_ENTRIES // width), self.index * count * width
        memory = torch.empty(min(step, count), width, dtype=added.B.dtype)
        for start in range(0, count, step):
            stop = min(start + step, count)
            rows = self.base.entries(self.name, first + start * width, first + stop * width)
            exact = memory[: stop - start].copy_(rows.view(-1, width))
            yield rows.view(-1, width), exact.addmm_(added.B[start:stop], added.A)


def sums_of(base: Source, adapter: Source, order: Add, sign: int) -> Iterator[Sums]:
    """Yields the sum of every matrix of a tensor."""
    dtype = torch.promote_types(DTYPES[base.tensors[order.name].dtype], torch.float32)
    for index in range(order.matrix.count):
        yield Sums(base, order.name, order.addition(adapter, sign, dtype, index), index)


def rounding(exact: Tensor, rounded: Tensor, name: str) -> float:
    """Returns ‖exact − rounded‖_F², from above; NonFiniteError where one of them is not finite.

    `exact` is used up.
    """
    found = energy_from_above(exact.sub_(rounded))
    if not math.isfinite(found):
        check_finite(rounded, name)
    return found


def bias_sum(bias: Tensor, part: Part, adapter: Source, sign: int) -> Tensor:
    """Returns b + s·(the adapter's bias), computed in float32 or better, as b is stored."""
    assert part.bias is not None
    wide = torch.promote_types(bias.dtype, torch.float32)
    return (bias.to(wide) + sign * part.scale * adapter.load(part.bias).to(wide)).to(bias.dtype)


def orders_of(
    base: Source, adapter: Adapter, *, subtract: bool = False
) -> tuple[dict[str, Order], dict[str, TensorLayout]]:
    """Returns an order and a layout for every tensor of the base; CheckpointError where the
    adapter is for another model."""
    orders: dict[str, Order] = {}
    layout: dict[str, TensorLayout] = {}
    tensors, adapter = base.tensors, placed(adapter, base)
    for name, info in tensors.items():
        if name not in base.tied:
            orders[name] = Copy(name, name, info.nbytes)
            layout[name] = TensorLayout(info.dtype, info.shape, info.nbytes)
    for name, stored in adapter.whole.items():
        if _is_tied_head(name, base, adapter):
            continue
        _check_there(name, base, adapter)
        info = adapter.source.tensors[stored]
        if subtract:
            raise CheckpointError(
                f"{printable(adapter.source.path)} replaces {printable(name)}, and what stood "
                "there before it does not say: it cannot be taken out."
            )
        fits = info.shape == tensors[name].shape or has_grown(name, info.shape, tensors[name].shape)
        if info.dtype not in FLOATING or not fits:
            raise CheckpointError(
                f"{printable(name)} is {info.dtype} {[*info.shape]} in "
                f"{printable(adapter.source.path)} and {tensors[name].dtype} "
                f"{[*tensors[name].shape]} in {printable(base.path)}: they must have one shape."
            )
        orders[name] = Replace(name, stored, info.nbytes)
        layout[name] = TensorLayout(info.dtype, info.shape, info.nbytes)
    for name, stored in adapter.bases.items():
        _check_there(name, base, adapter)
        if not subtract and adapter.source.digest(stored) != base.digest(name):
            raise CheckpointError(
                f"{printable(adapter.source.path)} holds another {printable(name)} than "
                f"{printable(base.path)}, and adds to that one: give the base it was trained on."
            )
    transposed = has_conv1d(tensors)
    for name, part in adapter.parts.items():
        _check_there(name, base, adapter)
        orders[name] = Add(name, part, _matrix(name, part, base, transposed))
        if part.bias is not None:
            bias = f"{name.removesuffix('.weight')}.bias"
            _check_there(bias, base, adapter)
            orders[bias] = AddBias(bias, part)
    return orders, layout


def _is_tied_head(name: str, base: Source, adapter: Adapter) -> bool:
    """Whether a whole output head is the embedding once more, and the base has them as one."""
    tables = [other for other in adapter.whole if other.endswith("embed_tokens.weight")]
    return (
        name not in base.tensors
        and len(tables) == 1
        and is_tied_to_head(tables[0], base)
        and adapter.source.digest(adapter.whole[tables[0]])
        == adapter.source.digest(adapter.whole[name])
    )


def _check_there(name: str, base: Source, adapter: Adapter) -> None:
    if name not in base.tensors:
        raise CheckpointError(
            f"{printable(adapter.source.path)} adds to {printable(name)}, which is not in "
            f"{printable(base.path)}: it is an adapter for another model."
        )


def _matrix(name: str, part: Part, base: Source, transposed: bool) -> Matrix:
    """How the tensor is read; its sides must be those of the product."""
    stored = base.tensors[name]
    if stored.dtype in EIGHT_BITS:
        raise CheckpointError(
            f"{printable(name)} is stored in 8-bit floats in {printable(base.path)}: what an "
            "adapter adds would be rounded away. Apply it to the checkpoint in bfloat16."
        )
    fits = stored.dtype in FLOATING and len(stored.shape) in (2, 3, 4)
    matrix = matrix_as_used(name, base.tensors, transposed) if fits else None
    if matrix is None or (matrix.shape, matrix.count) != (part.shape, part.count):
        raise CheckpointError(
            f"{printable(name)} is {stored.dtype} {[*stored.shape]} in {printable(base.path)}, and "
            f"the adapter adds a product of {part.shape[0]}×{part.shape[1]}: it is an adapter for "
            "another model."
        )
    return matrix


def _record(order: Add, info: TensorInfo, error: float) -> MatrixRecord:
    """What was added, and the share of it that rounding took: relative to ‖s·BA‖."""
    held, size = (info.parameters, info.parameters), (info.nbytes, info.nbytes)
    return MatrixRecord(
        name=order.name,
        shape=order.matrix.stored,
        dtype=info.dtype,
        orientation=order.matrix.orientation,
        rank=order.part.rank,
        form="dense",
        parameters=held,
        bytes=size,
        relative_error=error,
        excess_estimate=0.0,
        optimum=None,
        output_error=None,
        metric="frobenius",
        method="sum",
        tail=[],
    )
