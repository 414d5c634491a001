"""Format 1: names, shapes, the guard, and what does not fit."""

import math
from pathlib import Path

import pytest
import torch
from builders import decaying, read_tensors, vector, write_checkpoint
from torch import Tensor

from eckart.allocate import Item
from eckart.certificate import FactoredEntry
from eckart.checkpoint.header import DTYPES
from eckart.checkpoint.opening import open_checkpoint
from eckart.checkpoint.source import Checkpoint
from eckart.checkpoint.tensor_file import TensorLayout, lay_out_checkpoint
from eckart.errors import PromiseError
from eckart.formats import factored
from eckart.formats.factored import Product
from eckart.linalg.factors import factorize, pivot

FORMS = ("ba", "pivoted")
KINDS = {
    "linear": ("x.y.weight", (8, 6), "out_in"),
    "bare": ("W", (8, 6), "out_in"),
    "Conv1D": ("h.0.attn.c_attn.weight", (6, 8), "in_out"),
    "Conv2d": ("layer1.0.conv2.weight", (8, 3, 2, 3), "out_in"),
    "experts": ("mlp.experts.gate_up_proj", (3, 8, 6), "out_in"),
    "experts, (in, out)": ("mlp.experts.down_proj", (3, 6, 8), "in_out"),
    "experts of modules": ("block_sparse_moe.input_linear.weight", (2, 8, 6), "out_in"),
}

every_kind = pytest.mark.parametrize("kind", KINDS)
every_form = pytest.mark.parametrize("form", FORMS)


def entry(form="ba", rank=3, shape=(8, 6), orientation="out_in"):
    return FactoredEntry(rank=rank, form=form, shape=shape, orientation=orientation)


def of_kind(kind: str, form: str, rank: int = 3) -> tuple[str, FactoredEntry]:
    name, shape, orientation = KINDS[kind]
    return name, entry(form, rank, shape, orientation)


def products(one: FactoredEntry, dtype: torch.dtype = torch.float32) -> list[Product]:
    """The factors of each matrix of a tensor, all different."""
    matrix, made = factored.matrix_of(one), []
    for index in range(matrix.count):
        factors = factorize(decaying(f"W{index}", *matrix.shape), rank=one.rank).to(dtype)
        made.append(pivot(factors) if one.form == "pivoted" else factors)
    return made


def write(
    folder: Path, name: str, one: FactoredEntry, made: list[Product], dtype: str = "F32"
) -> Checkpoint:
    """Lays a factored tensor out, and fills it matrix by matrix, the last one first."""
    folder.mkdir()
    files = lay_out_checkpoint(folder, factored.layout(name, one, dtype))
    for index in reversed(range(len(made))):
        for part, tensor in factored.encode(name, one, made[index]).items():
            files.write(part, tensor, index * tensor.numel() * tensor.itemsize)
    return open_checkpoint(folder)


def tensors_of(one: FactoredEntry) -> dict[str, Tensor]:
    """A 2-D tensor called x.weight as format 1 stores it, the guard among them."""
    return {**factored.encode("x.weight", one, products(one)[0]), "x.weight": torch.empty(0)}


@every_kind
@every_form
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64"])
def test_what_encode_gives_fits_layout_and_decode_takes_it_back(dtype, rank, form, kind, tmp_path):
    """Names, shapes and dtypes agree, and the numbers come back to the bit."""
    name, one = of_kind(kind, form, rank)
    made, layout = products(one, DTYPES[dtype]), factored.layout(name, one, dtype)
    checkpoint = write(tmp_path / "src", name, one, made, dtype)
    factored.check(checkpoint, name, one)
    read = [*factored.products(checkpoint, name, one)]

    assert checkpoint.tensors.keys() == layout.keys()
    for part, place in layout.items():
        info = checkpoint.tensors[part]
        assert (info.shape, info.dtype, info.nbytes) == (place.shape, place.dtype, place.nbytes)
    for index, (before, after) in enumerate(zip(made, read, strict=True)):
        parts = factored.encode(name, one, before)
        again = factored.encode(name, one, factored.decode(checkpoint, name, one, index))

        assert type(after) is type(before)
        assert torch.equal(after.product(), before.product())
        assert parts.keys() == again.keys() == layout.keys() - {name}
        assert all(torch.equal(parts[part], again[part]) for part in parts)


@every_kind
@every_form
def test_the_safetensors_library_reads_the_factors_as_they_were_stacked(form, kind, tmp_path):
    """In the shapes that a module would hold: each tensor is its matrices' parts, one by one."""
    name, one = of_kind(kind, form)
    made = products(one)
    write(tmp_path / "src", name, one, made)
    read = read_tensors(tmp_path / "src")
    X = name.removesuffix(".weight")
    for end in ("A", "B", "K"):
        parts = [part for product in made if (part := getattr(product, end, None)) is not None]
        stored = read.get(f"{X}.{end}.weight")

        assert bool(parts) == (stored is not None)
        if stored is not None:
            assert torch.equal(stored.reshape(-1), torch.stack(parts).reshape(-1))
    assert read[name].shape == (0,)
    if form == "pivoted":
        perms = read[f"{X}.perm"].reshape(len(made), -1)
        assert torch.equal(perms, torch.stack([product.perm for product in made]))


@every_kind
@every_form
def test_the_names_are_those_of_the_module_and_its_parts(form, kind):
    """X.A.weight beside X.B.weight, or X.K.weight and X.perm; the guard has the tensor's own."""
    name, one = of_kind(kind, form)
    X = name.removesuffix(".weight")
    parts = ("A.weight", "B.weight") if form == "ba" else ("A.weight", "K.weight", "perm")

    assert factored.module_of(name) == X
    assert factored.layout(name, one, "BF16").keys() == {name} | {f"{X}.{part}" for part in parts}


@every_kind
@every_form
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_layout_has_the_bytes_that_a_budget_counts(dtype, form, kind):
    """Factors, permutations of every matrix, and a guard of none."""
    name, one = of_kind(kind, form)
    matrix, layout = factored.matrix_of(one), factored.layout(name, one, dtype, "F64")
    item = Item(matrix.shape, matrix.count, 8, DTYPES[dtype].itemsize)
    numbers = sum(math.prod(p.shape) for n, p in layout.items() if not n.endswith(".perm"))

    assert sum(place.nbytes for place in layout.values()) == item.bytes(one.rank, form)
    assert numbers == item.parameters(one.rank, form)


@every_kind
def test_the_guard_has_the_original_name_and_no_entries(kind):
    """A loader that does not know the format stops there."""
    for form in FORMS:
        name, one = of_kind(kind, form)

        assert factored.layout(name, one, "F32", "BF16")[name] == TensorLayout("BF16", (0,), 0)
        assert factored.layout(name, one, "BF16")[name] == TensorLayout("BF16", (0,), 0)


@every_form
def test_one_expert_is_read_without_the_others(form, tmp_path, monkeypatch):
    """Memory is one matrix's: each read is as long as one expert's part of a tensor."""
    name, one = of_kind("experts", form)
    made = products(one)
    checkpoint, sizes = write(tmp_path / "src", name, one, made), []
    whole = Checkpoint.read

    def read(self: Checkpoint, part: str, buffer: memoryview, offset: int) -> None:
        sizes.append(len(buffer) * len(made) == self.tensors[part].nbytes)
        whole(self, part, buffer, offset)

    monkeypatch.setattr(Checkpoint, "read", read)
    product = factored.decode(checkpoint, name, one, 1)

    assert torch.equal(product.product(), made[1].product())
    assert sizes == [True] * (2 if form == "ba" else 3)


@pytest.mark.parametrize(
    ("form", "change", "words"),
    [
        ("ba", lambda t: t.pop("x.A.weight"), "x.A.weight is missing, but"),
        ("ba", lambda t: t.pop("x.B.weight"), "x.B.weight is missing, but"),
        ("ba", lambda t: t.pop("x.weight"), "x.weight is missing, but"),
        ("pivoted", lambda t: t.pop("x.A.weight"), "x.A.weight is missing, but"),
        ("pivoted", lambda t: t.pop("x.K.weight"), "x.K.weight is missing, but"),
        ("pivoted", lambda t: t.pop("x.perm"), "x.perm is missing, but"),
        (
            "ba",
            lambda t: t.update({"x.weight": torch.ones(8, 6)}),
            "x.weight is F32 [8, 6], but the certificate says F32 [0]",
        ),
        (
            "ba",
            lambda t: t.update({"x.A.weight": torch.ones(2, 6)}),
            "x.A.weight is F32 [2, 6], but the certificate says F32 [3, 6]",
        ),
        (
            "ba",
            lambda t: t.update({"x.B.weight": torch.ones(8, 3).half()}),
            "x.B.weight is F16 [8, 3], but the certificate says F32 [8, 3]",
        ),
        (
            "ba",
            lambda t: t.update({"x.B.weight": torch.ones(8, 3, 1, 1)}),
            "x.B.weight is F32 [8, 3, 1, 1], but the certificate says F32 [8, 3]",
        ),
        (
            "pivoted",
            lambda t: t.update({"x.perm": torch.arange(8).int()}),
            "x.perm is I32 [8], but the certificate says I64 [8]",
        ),
        (
            "ba",
            lambda t: t.update({"x.weight": torch.empty(1, dtype=torch.uint16)}),
            "x.weight is U16 [1], but",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(form, change, words, tmp_path):
    """PromiseError with what is there and what the certificate says."""
    one = entry(form)
    tensors = tensors_of(one) | {"other": vector("o", 3)}
    factored.check(open_checkpoint(write_checkpoint(tmp_path / "whole", tensors)), "x.weight", one)
    change(tensors)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "src", tensors))

    with pytest.raises(PromiseError) as caught:
        factored.check(checkpoint, "x.weight", one)

    assert words in str(caught.value)


@every_kind
@every_form
def test_every_missing_part_of_every_kind_of_tensor_is_named(form, kind, tmp_path):
    """Whichever of the tensors of the layout it is."""
    name, one = of_kind(kind, form)
    layout = factored.layout(name, one, "F32")
    for number, missing in enumerate(layout):
        folder = tmp_path / str(number)
        folder.mkdir()
        lay_out_checkpoint(folder, {part: layout[part] for part in layout if part != missing})

        with pytest.raises(PromiseError) as caught:
            factored.check(open_checkpoint(folder), name, one)

        assert str(caught.value).startswith(f"{missing} is missing, but the certificate says ")


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("experts", {"shape": (2, 8, 6)}),
        ("experts", {"shape": (3, 6, 8)}),
        ("experts", {"orientation": "in_out"}),
        ("Conv2d", {"shape": (8, 3, 3, 3)}),
        ("Conv2d", {"shape": (8, 18)}),
        ("Conv1D", {"orientation": "out_in"}),
        ("linear", {"rank": 2}),
        ("linear", {"form": "pivoted"}),
    ],
)
def test_an_entry_of_another_shape_does_not_fit(kind, other, tmp_path):
    """Count, kernel, order of the sides, rank and form: each shows in a tensor's shape."""
    name, one = of_kind(kind, "ba")
    checkpoint = write(tmp_path / "src", name, one, products(one))
    said = {"rank": 3, "form": "ba", "shape": one.shape, "orientation": one.orientation} | other
    factored.check(checkpoint, name, one)

    with pytest.raises(PromiseError, match="but the certificate says"):
        factored.check(checkpoint, name, FactoredEntry(**said))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_guard_of_another_dtype_fits(dtype, tmp_path):
    """It has the tensor's own, which the factors need not have: only its emptiness counts."""
    tensors = tensors_of(entry()) | {"x.weight": torch.empty(0, dtype=dtype)}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "src", tensors))
    factored.check(checkpoint, "x.weight", entry())
    product = factored.decode(checkpoint, "x.weight", entry())

    assert product.A.dtype == torch.float32


def test_a_pivoted_matrix_of_full_rank_has_a_k_of_no_rows(tmp_path):
    """Whoever writes one by hand can read it."""
    one = entry("pivoted", 4, (4, 9))
    (made,) = products(one)
    checkpoint = write(tmp_path / "src", "x.weight", one, [made])
    factored.check(checkpoint, "x.weight", one)

    assert torch.equal(factored.decode(checkpoint, "x.weight", one).A, made.A)


def test_only_the_bias_of_a_ba_matrix_moves():
    """And nothing that merely ends alike; a matrix without a module has a bias by its own name."""
    entries = {"x": entry("ba"), "y": entry("pivoted"), "e.gate_up_proj": entry("ba")}
    moved = {"x.bias": "x.B.bias", "e.gate_up_proj.bias": "e.gate_up_proj.B.bias"}
    stay = ("y.bias", "z.bias", "bias", "x.weight", "xx.bias", "x.y.bias", "e.gate_up_proj_bias")

    for name in (*moved, *stay):
        assert factored.stored_name(name, entries) == moved.get(name, name)


def test_the_config_is_sorted_and_complete():
    """quant_method, version, and what a loader must know of each matrix."""
    config = factored.quantization_config(
        {"b": entry(), "a": entry("pivoted", 2), "c": entry("ba", 1, (3, 6, 8), "in_out")}
    )

    assert config == {
        "quant_method": "eckart",
        "format_version": 1,
        "factored": {
            "a": {"rank": 2, "form": "pivoted", "shape": (8, 6), "orientation": "out_in"},
            "b": {"rank": 3, "form": "ba", "shape": (8, 6), "orientation": "out_in"},
            "c": {"rank": 1, "form": "ba", "shape": (3, 6, 8), "orientation": "in_out"},
        },
    }
    assert list(config["factored"]) == ["a", "b", "c"]  # type: ignore[call-overload]
