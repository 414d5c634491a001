"""Files written and hashed from their first byte to their last: the bytes of any other way."""

import errno
import os
import threading

import pytest
import torch
from blake3 import blake3

from eckart.checkpoint import stream
from eckart.checkpoint.stream import FileStream
from eckart.checkpoint.tensor_file import TensorLayout, lay_out_checkpoint
from eckart.errors import StorageError

TENSORS = {f"t{i}": torch.arange(300.0 * i) + i for i in range(9)}
TENSORS |= {"half": torch.arange(7.0).bfloat16(), "n": torch.tensor(2.5)}


def laid_out(folder, shard_bytes=9000):
    folder.mkdir()
    layout = {name: TensorLayout.like(tensor) for name, tensor in TENSORS.items()}
    return lay_out_checkpoint(folder, layout, shard_bytes)


def filled(files, pieces=1):
    """Streams every file; returns the digests."""
    found = {}
    for file in files.files:
        with FileStream(files, file) as out:
            for name in files.held(file):
                for piece in TENSORS[name].reshape(-1).chunk(pieces):
                    out.write(name, piece)
            found[file] = out.digest()
    return found


def check_same(files, found, expected):
    """The files are those of `expected`, and the digests theirs."""
    for file in files.files:
        content = (files.folder / file).read_bytes()
        assert content == (expected.folder / file).read_bytes()
        assert found[file] == blake3(content).hexdigest()
    assert len(files.files) > 2


@pytest.fixture
def expected(tmp_path):
    """The same files, filled by tensor."""
    files = laid_out(tmp_path / "expected")
    for name, tensor in TENSORS.items():
        files.write(name, tensor)
    return files


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("buffer", [16, 2**12, 2**22])
def test_a_stream_writes_what_writing_by_tensor_does(
    tmp_path, monkeypatch, expected, buffer, pieces
):
    """Buffers that end within tensors, or hold whole files; and some too small for direct I/O."""
    monkeypatch.setattr(stream, "BUFFER_BYTES", buffer)
    files = laid_out(tmp_path / "files")
    check_same(files, filled(files, pieces), expected)


@pytest.mark.parametrize("call", ["open", "pwrite"])
def test_a_file_system_that_cannot_write_directly(tmp_path, monkeypatch, expected, call):
    """It says so when the file is opened, or at the first write; the bytes are the same."""
    refused, real_open, real_pwrite = [], os.open, os.pwrite
    monkeypatch.setattr(stream, "BUFFER_BYTES", 2**12)

    def refusing_open(path, flags, *rest, **names):
        if stream.DIRECT and flags & stream.DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *rest, **names)

    def refusing_pwrite(descriptor, data, offset):
        if stream.fcntl.fcntl(descriptor, stream.fcntl.F_GETFL) & stream.DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_pwrite(descriptor, data, offset)

    files = laid_out(tmp_path / "files")
    replaced = {"open": refusing_open, "pwrite": refusing_pwrite}[call]
    monkeypatch.setattr(os, call, replaced)
    found = filled(files)
    monkeypatch.undo()
    check_same(files, found, expected)
    assert refused or not stream.DIRECT


def test_a_full_disk_is_told_and_ends_the_thread(tmp_path, monkeypatch):
    """Whichever write it is that fails: the sentence names the file, and no thread is left."""
    monkeypatch.setattr(stream, "BUFFER_BYTES", 2**12)

    def full(descriptor, data, offset):
        if offset:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)

    files, before = laid_out(tmp_path / "files", 10**6), threading.active_count()
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match=r"model\.safetensors: No space left on device"):
        filled(files)

    assert threading.active_count() == before


def test_what_is_invalid_of_a_write_by_way_of_the_cache_is_an_error(tmp_path, monkeypatch):
    """It is tried once more without O_DIRECT, and not for ever."""
    monkeypatch.setattr(stream, "BUFFER_BYTES", 2**12)

    def invalid(descriptor, data, offset):
        raise OSError(errno.EINVAL, "Invalid argument")

    files = laid_out(tmp_path / "files")
    monkeypatch.setattr(os, "pwrite", invalid)
    with pytest.raises(StorageError, match="Invalid argument"):
        filled(files)


def test_a_tensor_out_of_turn_is_a_bug(tmp_path):
    """Nor may a file end before its last byte."""
    files = laid_out(tmp_path / "files", 10**6)
    (file,) = files.files
    first, second, *_ = (name for name in files.held(file) if TENSORS[name].numel())
    with FileStream(files, file) as out:
        with pytest.raises(AssertionError, match=f"{second}: .* do not belong at"):
            out.write(second, TENSORS[second])
        out.write(first, TENSORS[first])
        with pytest.raises(AssertionError, match=r"model\.safetensors: \d+ of \d+ bytes"):
            out.digest()
