"""Files are laid out as the library lays them out, and filled in any order."""

import pickle

import pytest
import torch
from builders import raw_header, small_tensors
from safetensors.torch import load_file, save_file

from eckart.checkpoint.index import SAFETENSORS
from eckart.checkpoint.opening import open_checkpoint
from eckart.checkpoint.tensor_file import TensorLayout, lay_out_checkpoint, lay_out_file
from eckart.errors import StorageError, UsageError


def layout_of(tensors):
    return {name: TensorLayout.like(tensor) for name, tensor in tensors.items()}


def test_a_file_filled_in_any_order_is_the_same_and_the_library_reads_it(tmp_path):
    """Tensors written forwards and backwards: equal bytes, equal values."""
    tensors = small_tensors()
    for path, names in (("a", list(tensors)), ("b", list(reversed(tensors)))):
        file = lay_out_file(tmp_path / path, layout_of(tensors))
        for name in names:
            file.write(name, tensors[name])
        file.sync()
    read = load_file(tmp_path / "a")

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_tensors_lie_as_the_library_would_lay_them(tmp_path):
    """By falling element size, then by name: the same places as in safetensors' own file."""
    tensors = {name: t for name, t in small_tensors().items() if t.dtype != torch.bool}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    file = lay_out_file(tmp_path / "ours", layout_of(tensors))
    for name, tensor in tensors.items():
        file.write(name, tensor)
    file.sync()

    assert raw_header(tmp_path / "ours")[0] == raw_header(tmp_path / "theirs")[0]


def test_what_is_written_need_not_be_contiguous(tmp_path):
    """A transposed view, a slice, a scalar, an empty tensor."""
    W = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": W.T, "s": W[:, 1:3], "n": torch.tensor(2.5), "e": torch.zeros(0, 3)}
    file = lay_out_file(tmp_path / "x", layout_of(tensors))
    for name, tensor in tensors.items():
        file.write(name, tensor)
    file.sync()

    assert all(torch.equal(load_file(tmp_path / "x")[name], t) for name, t in tensors.items())


def test_a_file_without_tensors_is_a_file(tmp_path):
    """A header and nothing else."""
    lay_out_file(tmp_path / "x", {}).sync()

    assert load_file(tmp_path / "x") == {}


def test_what_does_not_fit_is_our_own_mistake(tmp_path):
    """A tensor of another size than laid out, or a piece beyond its end."""
    file = lay_out_file(tmp_path / "x", {"a": TensorLayout.of("F32", (2,))})

    with pytest.raises(AssertionError, match="a: 12 bytes do not fit at 0"):
        file.write("a", torch.ones(3))
    with pytest.raises(AssertionError, match="a: 8 bytes do not fit at 4"):
        file.write("a", torch.ones(2), 4)


def test_names_of_any_script_stand_in_the_header(tmp_path):
    """UTF-8, control characters escaped as JSON does, and read back exactly."""
    names = ["é", "模型", "a\x1b\n\x00b", '"quoted"\\', "\u202e", "", "\U0001f600"]
    file = lay_out_file(tmp_path / "x", {name: TensorLayout.of("I8", (1,)) for name in names})
    for i, name in enumerate(names):
        file.write(name, torch.tensor([i], dtype=torch.int8))
    file.sync()
    read = load_file(tmp_path / "x")

    assert {name: int(read[name]) for name in names} == {name: i for i, name in enumerate(names)}


def test_pieces_and_other_processes_make_the_same_file(tmp_path):
    """A tensor in two pieces, by a copy of the value as a worker would have it."""
    tensors = {"a": torch.arange(10.0), "b": torch.arange(6, dtype=torch.int16)}
    whole = lay_out_file(tmp_path / "whole", layout_of(tensors))
    pieces = pickle.loads(pickle.dumps(lay_out_file(tmp_path / "pieces", layout_of(tensors))))
    for name, tensor in tensors.items():
        whole.write(name, tensor)
        pieces.write(name, tensor[4:], 4 * tensor.itemsize)
        pieces.write(name, tensor[:4])

    assert (tmp_path / "whole").read_bytes() == (tmp_path / "pieces").read_bytes()


@pytest.mark.parametrize(("shard_bytes", "count"), [(10**9, 1), (48, 4), (1, 7)])
def test_shards_are_cut_by_size_in_the_order_of_names(shard_bytes, count, tmp_path):
    """Each at most so large, or a single tensor; the index agrees with them."""
    tensors = {f"t{i}": torch.full((6,), float(i)) for i in range(7)}
    files = lay_out_checkpoint(tmp_path, layout_of(tensors), shard_bytes)
    for name, tensor in tensors.items():
        files.write(name, tensor)
    read = open_checkpoint(tmp_path)

    assert len(files.files) == count
    assert (tmp_path / SAFETENSORS.index).exists() == (count > 1)
    assert all(torch.equal(read.load(name), tensor) for name, tensor in tensors.items())
    order = [files.places[name].file for name in sorted(tensors)]
    assert order == sorted(order)


def test_a_shard_size_below_one_byte_is_refused(tmp_path):
    """Before anything is written."""
    with pytest.raises(UsageError, match="--shard-size 0 is out of range"):
        lay_out_checkpoint(tmp_path, {}, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_never_overwritten(tmp_path):
    """Exit 5; it stays as it was."""
    (tmp_path / "x").write_text("theirs")

    with pytest.raises(StorageError, match="File exists"):
        lay_out_file(tmp_path / "x", {})
    assert (tmp_path / "x").read_text() == "theirs"
