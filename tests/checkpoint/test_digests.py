"""Files hashed while they are being filled: the same digest as of the finished file."""

import os
import random

import pytest
import torch
from blake3 import blake3

from eckart.checkpoint import digests
from eckart.checkpoint.digests import FileDigests
from eckart.checkpoint.tensor_file import TensorLayout, lay_out_checkpoint
from eckart.errors import CheckpointError

TENSORS = {f"t{i}": torch.arange(10.0 * i) + i for i in range(9)} | {"n": torch.tensor(2.5)}


def laid_out(folder, shard_bytes=600):
    layout = {name: TensorLayout.like(tensor) for name, tensor in TENSORS.items()}
    return lay_out_checkpoint(folder, layout, shard_bytes)


@pytest.mark.parametrize("order", ["as stored", "reversed", "shuffled"])
@pytest.mark.parametrize("piece", [16, 2**22])
def test_a_file_filled_in_any_order_has_the_digest_of_its_bytes(
    tmp_path, monkeypatch, order, piece
):
    """Several shards, tensors without entries among them, in pieces that end within tensors."""
    monkeypatch.setattr(digests, "PIECE_BYTES", piece)
    monkeypatch.setattr(digests, "FLUSHED_BYTES", 100)
    files, names = laid_out(tmp_path), sorted(TENSORS)
    if order == "reversed":
        names.reverse()
    if order == "shuffled":
        random.Random(0).shuffle(names)
    with FileDigests(files) as following:
        for name in names:
            files.write(name, TENSORS[name])
            following.filled(name)
        found = following.result()

    assert len(files.files) > 2
    assert found == {
        file: blake3((tmp_path / file).read_bytes()).hexdigest() for file in files.files
    }


def test_nothing_is_hashed_before_it_is_filled(tmp_path, monkeypatch):
    """The bytes are read back from the file, and only where they are complete."""
    read = []
    monkeypatch.setattr(digests, "read_into", lambda d, piece, at, p: read.append(at + len(piece)))
    files = laid_out(tmp_path, 10**6)
    place = files.places["n"]
    with FileDigests(files) as following:
        following.filled("t8")  # the last one: all that stands before it is missing

    assert place.begin < files.places["t8"].begin
    assert read == []


def test_a_run_that_fails_ends_the_threads(tmp_path):
    """The error is the run's own, and no thread is left."""
    following = FileDigests(laid_out(tmp_path))
    with pytest.raises(ZeroDivisionError), following:
        raise ZeroDivisionError

    assert following._hashing.done()
    assert following._flushing.done()


def test_a_file_that_shrinks_is_an_error(tmp_path):
    """Not a digest of something else."""
    files = laid_out(tmp_path, 10**6)
    with FileDigests(files) as following:
        os.truncate(tmp_path / files.files[0], 100)
        following.filled(*TENSORS)

        with pytest.raises(CheckpointError, match="where more should follow"):
            following.result()
