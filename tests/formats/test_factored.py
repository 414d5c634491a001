"""Format 1: names, shapes, the guard, and what does not fit."""

import pytest
import torch
from builders import decaying, vector, write_checkpoint

from eckart.certificate import FactoredEntry
from eckart.checkpoint.source import open_checkpoint
from eckart.errors import PromiseError
from eckart.formats import factored
from eckart.linalg.factors import factorize, pivot


def entry(form="ba", rank=3, shape=(8, 6)):
    return FactoredEntry(rank=rank, form=form, shape=shape, orientation="out_in")


def product(form, rank=3, dtype=torch.float32):
    factors = factorize(decaying("W", 8, 6), rank=rank).to(dtype)
    return pivot(factors) if form == "pivoted" else factors


@pytest.mark.parametrize("form", ["ba", "pivoted"])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64"])
def test_layout_is_what_encode_gives_and_decode_takes_back(form, rank, dtype, tmp_path):
    """Names, shapes and dtypes agree, and the numbers come back to the bit."""
    from eckart.checkpoint.header import DTYPES

    made = product(form, rank, DTYPES[dtype])
    tensors = factored.encode("x.y", made)
    layout = factored.layout("x.y", entry(form, rank), dtype)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "src", tensors))
    read = factored.decode(checkpoint, "x.y", entry(form, rank))

    assert tensors.keys() == layout.keys() == checkpoint.tensors.keys()
    for name, place in layout.items():
        assert checkpoint.tensors[name].shape == place.shape
        assert checkpoint.tensors[name].dtype == place.dtype
    assert type(read) is type(made)
    assert torch.equal(read.product(), made.product())


def test_the_guard_has_the_original_name_and_no_entries():
    """A loader that does not know the format stops there."""
    for form in ("ba", "pivoted"):
        assert factored.layout("x", entry(form), "F32", "BF16")["x.weight"].shape == (0,)
        assert factored.layout("x", entry(form), "F32", "BF16")["x.weight"].dtype == "BF16"
        assert factored.layout("x", entry(form), "BF16")["x.weight"].dtype == "BF16"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("x.A.weight"), "x.A.weight is missing"),
        (lambda t: t.pop("x.B.weight"), "x.B.weight is missing"),
        (lambda t: t.pop("x.weight"), "x.weight is missing"),
        (lambda t: t.update({"x.weight": torch.ones(8, 6)}), "x.weight is F32 [8, 6], but"),
        (lambda t: t.update({"x.A.weight": torch.ones(2, 6)}), "x.A.weight is F32 [2, 6]"),
        (lambda t: t.update({"x.B.weight": torch.ones(8, 3).half()}), "x.B.weight is F16 [8, 3]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, words, tmp_path):
    """PromiseError with what is there and what the certificate says."""
    tensors = factored.encode("x", product("ba"))
    change(tensors)
    tensors["other"] = vector("o", 3)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "src", tensors))

    with pytest.raises(PromiseError) as caught:
        factored.decode(checkpoint, "x", entry())

    assert words in str(caught.value)


def test_only_the_bias_of_a_ba_matrix_moves():
    """And nothing that merely ends alike."""
    entries = {"x": entry("ba"), "y": entry("pivoted")}
    moved = {"x.bias": "x.B.bias"}

    for name in ("x.bias", "y.bias", "z.bias", "bias", "x.weight", "xx.bias", "x.y.bias"):
        assert factored.stored_name(name, entries) == moved.get(name, name)


def test_the_config_is_sorted_and_complete():
    """quant_method, version, and what a loader must know of each matrix."""
    config = factored.quantization_config({"b": entry(), "a": entry("pivoted", 2)})

    assert config == {
        "quant_method": "eckart",
        "format_version": 1,
        "factored": {
            "a": {"rank": 2, "form": "pivoted", "shape": (8, 6), "orientation": "out_in"},
            "b": {"rank": 3, "form": "ba", "shape": (8, 6), "orientation": "out_in"},
        },
    }
    assert list(config["factored"]) == ["a", "b"]  # type: ignore[call-overload]
