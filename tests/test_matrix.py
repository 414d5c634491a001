"""Stored tensors read as matrices: shapes, order of the sides, and what the factors compute."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eckart.checkpoint.header import TensorInfo
from eckart.checkpoint.source import Source
from eckart.checkpoint.tensor_file import NAMES
from eckart.linalg.factors import Factors, PivotedFactors
from eckart.linalg.matrices import named_generator
from eckart.matrix import Matrix

KINDS = {
    "linear": Matrix((7, 5)),
    "wide": Matrix((3, 11)),
    "one row": Matrix((1, 6)),
    "Conv1D": Matrix((5, 7), "in_out"),
    "Conv2d": Matrix((6, 4, 3, 2)),
    "Conv2d, 1×1": Matrix((6, 4, 1, 1)),
    "experts": Matrix((4, 7, 5)),
    "experts, (in, out)": Matrix((4, 5, 7), "in_out"),
    "one expert": Matrix((1, 7, 5)),
}
FORMS = ("ba", "pivoted")

every_kind = pytest.mark.parametrize("kind", KINDS)
every_form = pytest.mark.parametrize("form", FORMS)


def draw(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=named_generator(0, name), dtype=torch.float64)


@dataclass(frozen=True)
class InMemory(Source):
    """Tensors in memory, and every span of bytes that was read of them."""

    path: Path = Path("memory")
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    stored: Mapping[str, Tensor] = field(default_factory=dict)
    spans: list[tuple[int, int]] = field(default_factory=list)

    @property
    def files(self) -> list[str]:
        return []

    def read(self, name: str, buffer: memoryview, offset: int) -> None:
        data = self.stored[name].contiguous().reshape(-1).view(torch.uint8).numpy().data
        self.spans.append((offset, offset + len(buffer)))
        buffer[:] = data[offset : offset + len(buffer)]


def source(**stored: Tensor) -> InMemory:
    infos = {
        name: TensorInfo(tuple(t.shape), NAMES[t.dtype], "memory", 0, t.numel() * t.itemsize)
        for name, t in stored.items()
    }
    return InMemory(tensors=infos, stored=stored)


def product(matrix: Matrix, form: str, rank: int) -> list[Factors] | list[PivotedFactors]:
    """Random factors of that rank for each matrix of a tensor."""
    (m, n), indices = matrix.shape, range(matrix.count)
    if form == "ba":
        return [Factors(draw(f"B{i}", m, rank), draw(f"A{i}", rank, n)) for i in indices]
    perms = [torch.randperm(m, generator=named_generator(0, f"perm{i}")) for i in indices]
    return [
        PivotedFactors(draw(f"A{i}", rank, n), draw(f"K{i}", m - rank, rank), perms[i])
        for i in indices
    ]


def as_stored(matrix: Matrix, form: str, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A tensor of exactly that rank, and its factors, both as they are stored."""
    products = product(matrix, form, rank)
    dense = torch.cat([matrix.restore(p.product()) for p in products]).reshape(matrix.stored)
    parts = {"A.weight": [p.A for p in products]}
    if form == "ba":
        parts["B.weight"] = [p.B for p in products]  # type: ignore[union-attr]
    else:
        parts["K.weight"] = [p.K for p in products]  # type: ignore[union-attr]
        parts["perm"] = [p.perm for p in products]  # type: ignore[union-attr]
    shapes = matrix.factors(rank, form)  # type: ignore[arg-type]
    assert shapes.keys() == parts.keys()
    return dense, {part: torch.stack(parts[part]).reshape(shapes[part]) for part in shapes}


@pytest.mark.parametrize(
    ("matrix", "shape", "count"),
    [
        (Matrix((7, 5)), (7, 5), 1),
        (Matrix((1, 1)), (1, 1), 1),
        (Matrix((5, 7), "in_out"), (7, 5), 1),
        (Matrix((6, 4, 3, 2)), (6, 24), 1),
        (Matrix((64, 3, 7, 7)), (64, 147), 1),
        (Matrix((4, 7, 5)), (7, 5), 4),
        (Matrix((4, 5, 7), "in_out"), (7, 5), 4),
        (Matrix((1, 7, 5)), (7, 5), 1),
    ],
)
def test_the_shape_is_out_by_in_and_a_stack_counts_its_matrices(matrix, shape, count):
    """2-D, transposed, a convolution, experts; only three dimensions make a stack."""
    assert matrix.shape == shape
    assert matrix.count == count
    assert matrix.is_stack == (len(matrix.stored) == 3)


@every_kind
def test_no_entry_is_lost_or_counted_twice(kind):
    """The matrices hold as many entries as the tensor."""
    matrix = KINDS[kind]
    m, n = matrix.shape

    assert matrix.count * m * n == draw(kind, *matrix.stored).numel()


@every_kind
def test_read_and_restore_are_inverse(kind):
    """Of each matrix of the tensor, to the bit, both ways round."""
    matrix = KINDS[kind]
    stored = draw(kind, *matrix.stored)
    for piece in stored.split(1) if matrix.is_stack else [stored]:
        W = matrix.read(piece)

        assert W.shape == matrix.shape
        assert torch.equal(matrix.restore(W), piece)
        assert torch.equal(matrix.read(matrix.restore(W)), W)


@every_kind
def test_an_entry_of_w_is_where_the_order_of_the_sides_says(kind):
    """W[i, j] is entry (i, j) of (out, in) and (j, i) of (in, out), whatever lies behind j."""
    matrix = KINDS[kind]
    stored = draw(kind, *matrix.stored)
    given = source(x=stored)
    pieces = stored if matrix.is_stack else stored[None]
    for index, piece in enumerate(pieces):
        W, flat = matrix.load(given, "x", index), piece.flatten(1)

        assert torch.equal(W, flat if matrix.orientation == "out_in" else flat.T)


@every_kind
def test_a_loaded_matrix_has_memory_of_its_own(kind):
    """Writing into it changes nothing that is loaded later."""
    matrix = KINDS[kind]
    given = source(x=draw(kind, *matrix.stored))
    W = matrix.load(given, "x")
    before = W.clone()
    W.zero_()

    assert torch.equal(matrix.load(given, "x"), before)


@pytest.mark.parametrize("orientation", ["out_in", "in_out"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_loading_one_expert_reads_its_bytes_and_no_others(dtype, orientation):
    """Peak memory is one matrix's, not the stack's."""
    matrix = Matrix((4, 7, 5), orientation)
    given = source(x=draw("x", 4, 7, 5).to(dtype))
    size = 7 * 5 * dtype.itemsize
    for index in (2, 0, 3):
        given.spans.clear()
        matrix.load(given, "x", index)

        assert given.spans == [(index * size, (index + 1) * size)]


@every_kind
@every_form
def test_factors_multiply_back_to_the_tensor_as_it_is_stored(form, kind):
    """At rank 1, in the middle and one below full, with the numbers that each form should hold."""
    matrix = KINDS[kind]
    (m, n), full = matrix.shape, min(matrix.shape)
    for rank in {1, max(full // 2, 1), max(full - 1, 1)}:
        dense, parts = as_stored(matrix, form, rank)
        A = parts["A.weight"].reshape(matrix.count, rank, n)
        if form == "ba":
            rows = parts["B.weight"].reshape(matrix.count, m, rank) @ A
        else:
            rows = torch.cat([A, parts["K.weight"].reshape(matrix.count, m - rank, rank) @ A], 1)
            perms = parts["perm"].reshape(matrix.count, m)
            rows = torch.stack([W[perm.argsort()] for W, perm in zip(rows, perms, strict=True)])
        sides = rows if matrix.orientation == "out_in" else rows.mT
        numbers = sum(t.numel() for part, t in parts.items() if part != "perm")

        assert dense.shape == matrix.stored
        assert torch.allclose(sides.reshape(matrix.stored), dense, rtol=1e-12, atol=1e-12)
        assert numbers == matrix.count * rank * (m + n - (rank if form == "pivoted" else 0))


@every_form
@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (Matrix((7, 5)), {"A": (2, 5), "B": (7, 2), "K": (5, 2), "perm": (7,)}),
        (Matrix((5, 7), "in_out"), {"A": (2, 5), "B": (7, 2), "K": (5, 2), "perm": (7,)}),
        (
            Matrix((6, 4, 3, 2)),
            {"A": (2, 4, 3, 2), "B": (6, 2, 1, 1), "K": (4, 2, 1, 1), "perm": (6,)},
        ),
        (Matrix((4, 7, 5)), {"A": (4, 2, 5), "B": (4, 7, 2), "K": (4, 5, 2), "perm": (4, 7)}),
        (
            Matrix((4, 5, 7), "in_out"),
            {"A": (4, 2, 5), "B": (4, 7, 2), "K": (4, 5, 2), "perm": (4, 7)},
        ),
    ],
)
def test_factors_are_stored_as_modules_would_hold_them(matrix, expected, form):
    """Always (out, in); a convolution and a 1×1 one after it; a stack of each."""
    parts = {
        part if part == "perm" else f"{part}.weight": expected[part]
        for part in (("A", "B") if form == "ba" else ("A", "K", "perm"))
    }

    assert matrix.factors(2, form) == parts


def test_a_linear_layer_is_two_linear_layers():
    """y = Wx = B(Ax), by torch's own layers on the stored tensors."""
    dense, parts = as_stored(Matrix((7, 5)), "ba", 2)
    x = draw("x", 3, 5)
    y = torch.nn.functional.linear(
        torch.nn.functional.linear(x, parts["A.weight"]), parts["B.weight"]
    )

    assert torch.allclose(y, torch.nn.functional.linear(x, dense), rtol=1e-12, atol=1e-12)


def test_a_transposed_layer_is_two_linear_layers():
    """GPT-2's Conv1D multiplies x by what is stored; its factors are plain linear layers."""
    dense, parts = as_stored(Matrix((5, 7), "in_out"), "ba", 2)
    x = draw("x", 3, 5)
    y = torch.nn.functional.linear(
        torch.nn.functional.linear(x, parts["A.weight"]), parts["B.weight"]
    )

    assert torch.allclose(y, x @ dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stored", [(6, 4, 3, 2), (6, 4, 1, 1)])
def test_a_convolution_is_a_thin_one_and_a_pointwise_one(stored):
    """Stride, padding and dilation belong to the first."""
    dense, parts = as_stored(Matrix(stored), "ba", 2)
    x, how = draw("x", 2, 4, 9, 8), {"stride": 2, "padding": 1, "dilation": (1, 2)}
    h = torch.nn.functional.conv2d(x, parts["A.weight"], **how)
    y = torch.nn.functional.conv2d(h, parts["B.weight"])

    assert torch.allclose(y, torch.nn.functional.conv2d(x, dense, **how), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("orientation", ["out_in", "in_out"])
def test_experts_are_two_batched_products(orientation):
    """x by each expert's (in, out), or by its transpose."""
    stored = (4, 7, 5) if orientation == "out_in" else (4, 5, 7)
    dense, parts = as_stored(Matrix(stored, orientation), "ba", 2)
    x = draw("x", 4, 3, 5)
    y = x @ parts["A.weight"].mT @ parts["B.weight"].mT
    expected = x @ (dense.mT if orientation == "out_in" else dense)

    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-12)
