"""The way back: original names, the product within rounding, everything else to the byte."""

import json

import pytest
import torch
from builders import (
    CONFIG,
    law_tensors,
    numpy_error,
    product_of,
    read_document,
    read_tensors,
    small_tensors,
    write_checkpoint,
)

from eckart import compress, densify, verify
from eckart.formats.dense import dense_name

FORMS = ("ba", "pivoted")


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
    ],
)
def test_parts_of_a_factored_matrix_go_and_the_rest_keeps_its_name(name, expected):
    """Only module x is factored here."""
    assert dense_name(name, {"x"}) == expected


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
