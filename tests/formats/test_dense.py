"""The way back: original names, the product within rounding, everything else to the byte."""

import json
import math
import re

import numpy as np
import pytest
import torch
from builders import (
    CONFIG,
    decaying,
    law_tensors,
    numpy_error,
    product_of,
    read_document,
    read_tensors,
    small_tensors,
    vector,
    write_checkpoint,
)
from torch import Tensor

from eckart import compress, densify, verify
from eckart.certificate import FactoredEntry
from eckart.checkpoint.header import DTYPES
from eckart.checkpoint.opening import open_checkpoint
from eckart.checkpoint.tensor_file import TensorLayout
from eckart.errors import InputError
from eckart.formats import dense, factored
from eckart.formats.dense import dense_name
from eckart.linalg.factors import Factors, PivotedFactors
from eckart.linalg.matrices import named_generator
from eckart.matrix import Matrix

FORMS = ("ba", "pivoted")
KINDS = {
    "linear": ("x.weight", Matrix((8, 6))),
    "bare": ("W", Matrix((8, 6))),
    "Conv1D": ("c_attn.weight", Matrix((6, 8), "in_out")),
    "Conv2d": ("conv.weight", Matrix((8, 3, 2, 3))),
    "experts": ("experts.gate_up_proj", Matrix((3, 8, 6))),
    "experts, (in, out)": ("experts.down_proj", Matrix((3, 6, 8), "in_out")),
}


def stored(name: str, *shape: int) -> Tensor:
    """A tensor of decaying singular values: its first side by all others."""
    return decaying(name, shape[0], math.prod(shape[1:])).reshape(shape)


def every_kind_of_tensor() -> dict[str, Tensor]:
    """A stack of experts in either order, GPT-2's layers, a convolution, and an array by name."""
    experts = "layers.0.mlp.experts."
    tensors = {
        "layers.1.block_sparse_moe.input_linear.weight": (3, 24, 16),
        "layers.1.block_sparse_moe.output_linear.weight": (3, 16, 12),
        f"{experts}gate_up_proj": (3, 16, 24),
        f"{experts}down_proj": (3, 12, 16),
        "h.0.attn.c_attn.weight": (16, 48),
        "h.0.attn.c_proj.weight": (16, 16),
        "conv.weight": (24, 4, 3, 3),
        "W": (20, 14),
    }
    biases = {"h.0.attn.c_attn.bias": 48, "h.0.attn.c_proj.bias": 16, "conv.bias": 24}
    return {
        **{name: stored(name, *shape) for name, shape in tensors.items()},
        **{name: vector(name, n) for name, n in biases.items()},
        "norm.weight": vector("norm", 16),
    }


def whole_numbers(name: str, *shape: int) -> Tensor:
    """Small ones, so that every product of them is exact."""
    return torch.randint(-9, 10, shape, generator=named_generator(0, name)).float()


@pytest.mark.parametrize("rows", [1, 3, 8, 4096])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_encode_gives_the_product_as_the_tensor_was_stored(form, kind, rows, tmp_path, monkeypatch):
    """By numpy, to the bit, one matrix of a stack at a time, in blocks of any number of rows."""
    monkeypatch.setattr(dense, "ROWS", rows)
    (name, matrix), rank = KINDS[kind], 3
    (m, n), products = matrix.shape, []
    entry = FactoredEntry(rank=rank, form=form, shape=matrix.stored, orientation=matrix.orientation)
    tensors: dict[str, list[Tensor]] = {}
    for i in range(matrix.count):
        A, B = whole_numbers(f"A{i}", rank, n), whole_numbers(f"B{i}", m, rank)
        perm = torch.randperm(m, generator=named_generator(0, f"perm{i}"))
        made = Factors(B, A) if form == "ba" else PivotedFactors(A, B[rank:], perm)
        W = B.numpy() @ A.numpy()
        if form == "pivoted":
            W = np.concatenate([A.numpy(), B[rank:].numpy() @ A.numpy()])[np.argsort(perm.numpy())]
        products.append(W if matrix.orientation == "out_in" else W.T)
        for part, tensor in factored.encode(name, entry, made).items():
            tensors.setdefault(part, []).append(tensor)
    layout = factored.layout(name, entry, "F32")
    folder = write_checkpoint(
        tmp_path / "src",
        {part: torch.stack(pieces).reshape(layout[part].shape) for part, pieces in tensors.items()},
    )
    pieces = [*dense.encode(open_checkpoint(folder), name, entry, "F32")]
    expected = torch.from_numpy(np.stack(products)).reshape(matrix.stored)

    assert len(pieces) == matrix.count
    assert torch.equal(torch.cat(pieces).reshape(matrix.stored), expected)
    assert dense.layout(name, entry, "F32") == {name: TensorLayout.of("F32", matrix.stored)}


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_encode_multiplies_in_float64_and_rounds_once(dtype, tmp_path):
    """Half-precision factors, and the dtype that the tensor had."""
    A, B = decaying("A", 3, 6).bfloat16(), decaying("B", 8, 3).bfloat16()
    entry = FactoredEntry(rank=3, form="ba", shape=(8, 6), orientation="out_in")
    parts = factored.encode("x.weight", entry, Factors(B, A))
    source = open_checkpoint(write_checkpoint(tmp_path / "src", parts))
    (W,) = dense.encode(source, "x.weight", entry, dtype)
    exact = torch.from_numpy(B.double().numpy() @ A.double().numpy())

    assert W.dtype == DTYPES[dtype]
    assert torch.equal(W, exact.to(DTYPES[dtype]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x.weight", None),
        ("x.A.weight", None),
        ("x.B.weight", None),
        ("x.K.weight", None),
        ("x.perm", None),
        ("x.B.bias", "x.bias"),
        ("x.bias", "x.bias"),
        ("y.weight", "y.weight"),
        ("y.B.bias", "y.B.bias"),
        ("y.A.weight", "y.A.weight"),
        ("perm", "perm"),
        ("x", None),
        ("e.gate_up_proj", None),
        ("e.gate_up_proj.A.weight", None),
        ("e.gate_up_proj.perm", None),
        ("e.gate_up_proj_bias", "e.gate_up_proj_bias"),
        ("e", "e"),
        ("xx", "xx"),
        ("x.x", "x.x"),
        ("x.A", "x.A"),
        ("x.A.bias", "x.A.bias"),
    ],
)
def test_parts_of_a_factored_matrix_go_and_the_rest_keeps_its_name(name, expected):
    """Only module x and the parameter e.gate_up_proj are factored here."""
    assert dense_name(name, {"x", "e.gate_up_proj"}) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_no_tensor_of_the_layout_is_left_under_its_own_name(form, kind):
    """The guard and every factor of each kind of tensor; a bias that moved comes back."""
    name, matrix = KINDS[kind]
    entry = FactoredEntry(rank=2, form=form, shape=matrix.stored, orientation=matrix.orientation)
    X = factored.module_of(name)
    bias = factored.stored_name(f"{X}.bias", {X: entry})

    assert {dense_name(part, {X}) for part in factored.layout(name, entry, "F32")} == {None}
    assert dense_name(bias, {X}) == f"{X}.bias"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_densify_gives_the_names_shapes_and_dtypes_of_the_source(form, dtype, tmp_path):
    """Biases are back, guards are gone, the product is within one rounding of its dtype."""
    tensors = small_tensors(dtype)
    src = write_checkpoint(tmp_path / "src", tensors)
    compress(src, tmp_path / "out", rank=3, form=form)
    certificate = densify(tmp_path / "out", tmp_path / "dense")
    factored, dense = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "dense")

    assert {n: (t.shape, t.dtype) for n, t in dense.items()} == {
        n: (t.shape, t.dtype) for n, t in tensors.items()
    }
    for record in certificate.matrices:
        product = product_of(factored, record.name.removesuffix(".weight"))
        error = numpy_error(dense[record.name], product)

        assert error <= torch.finfo(dtype).eps
        assert error <= record.relative_error * (1 + 1e-9) + 1e-15
        assert record.form == "dense"
    for name in tensors.keys() - {record.name for record in certificate.matrices}:
        assert dense[name].reshape(-1).view(torch.uint8).tolist() == (
            tensors[name].reshape(-1).view(torch.uint8).tolist()
        )


def of_index(tensor: Tensor, index: int) -> Tensor:
    """One matrix of a tensor, its sides in the order in which they are stored."""
    if tensor.ndim == 1:
        return tensor
    return tensor[index] if tensor.ndim == 3 else tensor.flatten(1)


def factors_of(tensors: dict[str, Tensor], X: str, index: int, stack: bool) -> dict[str, Tensor]:
    """The factors of one matrix, as if it had been stored alone."""
    parts = {f"{X}.{end}" for end in ("A.weight", "B.weight", "K.weight", "perm")}
    return {
        name: tensors[name][index] if stack else of_index(tensors[name], 0)
        for name in parts & tensors.keys()
    }


@pytest.mark.parametrize("form", FORMS)
def test_every_kind_of_tensor_comes_back_as_it_was_stored(form, tmp_path):
    """Shapes, order of the sides, biases; the product of each expert by numpy, at its optimum."""
    tensors = every_kind_of_tensor()
    src = write_checkpoint(tmp_path / "src", tensors)
    certificate = compress(src, tmp_path / "out", rank=3, form=form, threads=1)
    densify(tmp_path / "out", tmp_path / "dense")
    parts, back = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "dense")
    matrices = {name for name, tensor in tensors.items() if tensor.ndim > 1}

    assert {record.name for record in certificate.matrices} == matrices
    assert {n: (t.shape, t.dtype) for n, t in back.items()} == {
        n: (t.shape, t.dtype) for n, t in tensors.items()
    }
    assert all(torch.equal(back[name], tensors[name]) for name in tensors.keys() - matrices)
    for record in certificate.matrices:
        name, stack = record.name, len(record.shape) == 3
        for index in range(record.shape[0] if stack else 1):
            W, before = of_index(back[name], index), of_index(tensors[name], index)
            product = product_of(
                factors_of(parts, name.removesuffix(".weight"), index, stack),
                name.removesuffix(".weight"),
            )
            optimum = torch.linalg.svdvals(before.double())[3:].norm()

            assert numpy_error(W.T if record.orientation == "in_out" else W, product) <= 2e-7
            assert float((W - before).double().norm()) <= float(optimum) * (1 + 1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_every_kind_of_tensor_holds_what_its_certificates_say(form, tmp_path):
    """Factored against the source, and dense against the factored one."""
    src = write_checkpoint(tmp_path / "src", every_kind_of_tensor())
    compress(src, tmp_path / "out", rank=3, form=form, threads=1)
    densify(tmp_path / "out", tmp_path / "dense")

    assert [c for c in verify(tmp_path / "out", src) if not c.held] == []
    assert [c for c in verify(tmp_path / "dense", tmp_path / "out") if not c.held] == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", ["x", "x.A.weight", "x.B.weight", "x.K.weight", "x.perm", "x.B.bias"]
)
def test_a_tensor_named_like_a_factor_of_either_form_is_refused(form, name, tmp_path):
    """Nothing is lost or renamed in silence, whichever form the name belongs to."""
    tensors = {"x.weight": decaying("x", 24, 16), name: vector("o", 5)}
    src = write_checkpoint(tmp_path / "src", tensors)

    with pytest.raises(
        InputError, match=rf"a tensor called {re.escape(name)}, which a factor of x"
    ):
        compress(src, tmp_path / "out", rank=3, form=form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", FORMS)
def test_the_config_and_sidecars_are_the_sources_again(form, tmp_path):
    """quantization_config is gone, every other key and file is there, the certificate is new."""
    src = write_checkpoint(tmp_path / "src")
    compress(src, tmp_path / "out", rank=3, form=form)
    densify(tmp_path / "out", tmp_path / "dense")
    document = read_document(tmp_path / "dense")

    assert json.loads((tmp_path / "dense" / "config.json").read_text()) == CONFIG
    assert (tmp_path / "dense" / "tokenizer.json").read_bytes() == (
        src / "tokenizer.json"
    ).read_bytes()
    assert document["kind"] == "dense"
    assert document["factored"] == {}
    assert document["source"]["name"] == "out"


@pytest.mark.parametrize("form", FORMS)
def test_a_dense_output_holds_against_the_factored_one(form, tmp_path):
    """Recomputed: product, biases, counts; alone and against its source."""
    src = write_checkpoint(tmp_path / "src", law_tensors())
    compress(src, tmp_path / "out", keep=0.5, form=form)
    densify(tmp_path / "out", tmp_path / "dense")

    assert [c for c in verify(tmp_path / "dense") if not c.held] == []
    assert [c for c in verify(tmp_path / "dense", tmp_path / "out") if not c.held] == []


@pytest.mark.parametrize("form", FORMS)
def test_a_dense_output_can_be_factored_again_at_no_loss(form, tmp_path):
    """It has the rank it was cut to, so the same rank finds it again."""
    src = write_checkpoint(tmp_path / "src")
    compress(src, tmp_path / "out", rank=3, form=form)
    densify(tmp_path / "out", tmp_path / "dense")
    again = compress(tmp_path / "dense", tmp_path / "again", rank=3, form=form)

    assert all(record.relative_error < 1e-5 for record in again.matrices)
    assert all(check.held for check in verify(tmp_path / "again", tmp_path / "dense"))
    assert read_document(tmp_path / "again")["kind"] == "factored"


def test_a_factored_checkpoint_in_which_nothing_is_factored_is_densified_as_it_is(tmp_path):
    """Every matrix was left dense: the tensors are the source's."""
    src = write_checkpoint(tmp_path / "src")
    compress(src, tmp_path / "out", keep=1.0)
    densify(tmp_path / "out", tmp_path / "dense")

    assert read_tensors(tmp_path / "dense").keys() == small_tensors().keys()
    assert all(check.held for check in verify(tmp_path / "dense", tmp_path / "out"))
