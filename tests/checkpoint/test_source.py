"""Checkpoints read lazily: headers alone, then single tensors, by rows or as bytes, to the bit."""

import hashlib
import os
import pickle

import pytest
import torch
from blake3 import blake3
from builders import WEIGHTS, small_tensors, write_checkpoint, write_raw
from safetensors.torch import save_file

from eckart.checkpoint import header
from eckart.checkpoint import source as module
from eckart.checkpoint.header import DTYPES, read_header
from eckart.checkpoint.opening import open_checkpoint
from eckart.checkpoint.source import Checkpoint, same_bytes
from eckart.errors import CheckpointError, DtypeError

KINDS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def test_every_dtype_comes_back_to_the_bit(tmp_path):
    """All twelve, as the library writes them."""
    bits = torch.arange(64, dtype=torch.uint8)
    tensors = {
        name: (bits % 2 if name == "BOOL" else bits).view(kind) for name, kind in KINDS.items()
    }
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "src", tensors))

    assert KINDS == DTYPES
    for name, kind in KINDS.items():
        loaded = checkpoint.load(name)

        assert checkpoint.tensors[name].dtype == name
        assert loaded.dtype == kind
        assert torch.equal(loaded.view(torch.uint8), tensors[name].view(torch.uint8))


def test_names_are_sorted_and_shapes_and_counts_are_those_of_the_header(tmp_path):
    """Scalars, empty tensors, and sizes in bytes."""
    tensors = small_tensors()
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "src", tensors))

    assert list(checkpoint.tensors) == sorted(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert checkpoint.tensors[name].nbytes == tensor.nbytes
        assert checkpoint.tensors[name].parameters == tensor.numel()
        assert torch.equal(checkpoint.load(name), tensor)
    assert checkpoint.files == [WEIGHTS]
    assert checkpoint.tied == {}


def test_rows_are_those_of_the_tensor(tmp_path):
    """Every range, none and all of them; without an end, all that follow."""
    tensors = {"a": torch.arange(60).reshape(5, 4, 3), "v": torch.arange(5), "e": torch.ones(0, 3)}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "src", tensors))

    for name, tensor in tensors.items():
        for start in range(len(tensor) + 1):
            assert torch.equal(checkpoint.load(name, start), tensor[start:])
            for stop in range(start, len(tensor) + 1):
                assert torch.equal(checkpoint.load(name, start, stop), tensor[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(0, 6), (-1, 2), (3, 2), (6, None)])
def test_rows_that_are_none_are_our_own_mistake(start, stop, tmp_path):
    """They would be another tensor's bytes."""
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "src", {"a": torch.ones(5, 2)}))

    with pytest.raises(AssertionError, match=r"a: rows .* of 5"):
        checkpoint.load("a", start, stop)


def test_chunks_are_pieces_of_the_bytes_and_the_digest_is_theirs(tmp_path, monkeypatch):
    """Cut at the size, one short of it, and one more."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 16)
    tensors = {f"{n}": torch.arange(n, dtype=torch.uint8) for n in (0, 1, 15, 16, 17, 32, 40)}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "src", tensors))

    for name, tensor in tensors.items():
        pieces = [*checkpoint.chunks(name)]

        assert [len(piece) for piece in pieces[:-1]] == [16] * (len(pieces) - 1)
        assert torch.equal(torch.cat([tensor[:0], *pieces]), tensor)
        assert checkpoint.digest(name) == blake3(tensor.numpy().tobytes()).hexdigest()


def test_a_loaded_tensor_is_in_memory_of_its_own(tmp_path):
    """What happens to the file later does not change it."""
    src = write_checkpoint(tmp_path / "src")
    loaded = open_checkpoint(src).load("norm.weight")
    before = loaded.clone()
    (src / WEIGHTS).write_bytes(bytes((src / WEIGHTS).stat().st_size))

    assert torch.equal(loaded, before)


def test_a_file_cut_after_opening_is_an_error_that_names_it(tmp_path):
    """No SIGBUS, as a mapped file would give."""
    src = write_checkpoint(tmp_path / "src")
    checkpoint = open_checkpoint(src)
    content = (src / WEIGHTS).read_bytes()
    (src / WEIGHTS).write_bytes(content[: len(content) // 2])

    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} ends at byte \d+, where more"):
        [checkpoint.load(name) for name in checkpoint.tensors]


def test_a_file_that_became_a_fifo_does_not_hang(tmp_path):
    """It is looked at whenever it is opened."""
    src = write_checkpoint(tmp_path / "src")
    checkpoint = open_checkpoint(src)
    (src / WEIGHTS).unlink()
    os.mkfifo(src / WEIGHTS)

    with pytest.raises(CheckpointError, match="not a regular file"):
        checkpoint.load("norm.weight")


def test_the_fingerprint_is_that_of_the_weights_alone(tmp_path):
    """One changed byte of a tensor changes it; a sidecar does not."""
    src = write_checkpoint(tmp_path / "src")
    first = open_checkpoint(src).fingerprint()
    (src / "tokenizer.json").write_text("{}")
    second = open_checkpoint(src).fingerprint()
    content = bytearray((src / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (src / WEIGHTS).write_bytes(content)
    third = open_checkpoint(src).fingerprint()

    assert first == second != third


@pytest.mark.parametrize(
    "other",
    [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3, dtype=torch.int32)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(0)},
    ],
    ids=["name", "shape", "dtype", "one more"],
)
def test_the_fingerprint_covers_names_shapes_and_dtypes(other, tmp_path):
    """Though the bytes are the same."""
    one = open_checkpoint(write_checkpoint(tmp_path / "one", {"a": torch.zeros(2, 3)}))
    two = open_checkpoint(write_checkpoint(tmp_path / "two", other))

    assert one.fingerprint() != two.fingerprint()


def test_the_fingerprint_does_not_know_how_tensors_are_ordered_in_the_file(tmp_path):
    """Another writer's order, the same model."""
    one = open_checkpoint(
        write_checkpoint(tmp_path / "a", {"x": torch.ones(2), "y": torch.ones(3)})
    )
    entries = {"y": (0, 12, [3]), "x": (12, 20, [2])}
    header = {
        n: {"dtype": "F32", "shape": s, "data_offsets": [a, b]} for n, (a, b, s) in entries.items()
    }
    write_raw(tmp_path / "b" / WEIGHTS, header, torch.ones(5).numpy().tobytes())

    assert open_checkpoint(tmp_path / "b").fingerprint() == one.fingerprint()


def test_digests_that_are_known_are_not_read_again(tmp_path, monkeypatch):
    """The fingerprint is the same; only the others are read."""
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "src"))
    expected = checkpoint.fingerprint()
    known = {name: checkpoint.digest(name) for name in checkpoint.tensors if name != "steps"}
    read: list[str] = []
    real = Checkpoint.digest
    monkeypatch.setattr(
        Checkpoint, "digest", lambda self, name: read.append(name) or real(self, name)
    )

    assert checkpoint.fingerprint(known) == expected
    assert read == ["steps"]


def test_a_dtype_that_torch_lacks_is_listed_and_read_as_bytes_only(tmp_path):
    """`chunks` and `digest` give the bytes, `load` says why it cannot."""
    header = {"scale": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}
    write_raw(tmp_path / "src" / WEIGHTS, header, b"\1\2\3\4")
    checkpoint = open_checkpoint(tmp_path / "src")

    assert torch.cat([*checkpoint.chunks("scale")]).tolist() == [1, 2, 3, 4]
    assert checkpoint.digest("scale") == blake3(b"\1\2\3\4").hexdigest()
    with pytest.raises(DtypeError, match="scale has dtype F8_E8M0"):
        checkpoint.load("scale")


def test_opening_reads_headers_only(tmp_path, monkeypatch):
    """No byte of a tensor is touched until it is loaded."""
    src = write_checkpoint(tmp_path / "src")
    size = int.from_bytes((src / WEIGHTS).read_bytes()[:8], "little") + 8
    real, ends = header.read_into, []

    def recorded(descriptor, buffer, offset, path):
        ends.append(offset + len(buffer))
        return real(descriptor, buffer, offset, path)

    for place in (module, header):
        monkeypatch.setattr(place, "read_into", recorded)
    open_checkpoint(src)

    assert max(ends) == size


def touched(path):
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))


CHANGES = {
    "grown": (lambda path: path.write_bytes(path.read_bytes() + b"\0"), r"had \d+ bytes and has"),
    "cut": (lambda path: os.truncate(path, 100), r"had \d+ bytes and has 100"),
    "written again": (touched, "was written again while it was being read: wait"),
    "gone": (os.unlink, "No such file or directory. It was there a moment ago"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_read_is_noticed(change, tmp_path):
    """By its size, or a modification a nanosecond later; other files may change."""
    src = write_checkpoint(tmp_path / "src")
    checkpoint = open_checkpoint(src)
    (src / "config.json").unlink()
    checkpoint.check_unchanged()
    do, words = CHANGES[change]
    do(src / WEIGHTS)

    with pytest.raises(CheckpointError, match=rf"src/{WEIGHTS}.*{words}"):
        checkpoint.check_unchanged()


def test_a_source_that_was_sent_to_another_process_keeps_its_stamps(tmp_path):
    """It reads the same, and still notices what changed since it was opened here."""
    src = write_checkpoint(tmp_path / "src")
    checkpoint = open_checkpoint(src)
    received = pickle.loads(pickle.dumps(checkpoint))

    assert received == checkpoint
    assert torch.equal(received.load("norm.weight"), checkpoint.load("norm.weight"))
    touched(src / WEIGHTS)
    again = pickle.loads(pickle.dumps(checkpoint))
    with pytest.raises(CheckpointError, match="was written again"):
        again.check_unchanged()


def test_a_source_has_a_name_a_folder_and_files(tmp_path, monkeypatch):
    """Of a folder, the name it really has; of a file, the one it was given (blobs are hashes)."""
    src = write_checkpoint(tmp_path / "llama")
    (tmp_path / "link").symlink_to(src)
    (tmp_path / "one.safetensors").symlink_to(src / WEIGHTS)
    single = Checkpoint(tmp_path / "one.safetensors", read_header(tmp_path / "one.safetensors"))
    monkeypatch.chdir(src)

    assert open_checkpoint(tmp_path / "link").name == "llama"
    assert open_checkpoint(".").name == "llama"
    assert open_checkpoint(src).folder == src
    assert open_checkpoint(src).file(WEIGHTS) == src / WEIGHTS
    assert single.name == "one.safetensors"
    assert single.folder is None
    assert single.file(single.files[0]) == tmp_path / "one.safetensors"


def test_a_folder_without_tensors_has_no_files(tmp_path):
    """And a fingerprint all the same: that of nothing."""
    save_file({}, tmp_path / WEIGHTS)
    empty = open_checkpoint(tmp_path)

    assert empty.files == []
    assert empty.fingerprint() == hashlib.sha256(b"[]").hexdigest()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.uint8])
def test_same_bytes_are_the_same_bits(dtype):
    """To the last entry; equal numbers with other bits are not, and NaN is itself."""
    a = torch.arange(301.0).to(dtype)
    b = a.clone()
    b[-1] = 7
    zeros = torch.zeros(3)

    assert same_bytes(a, a.clone())
    assert not same_bytes(a, b)
    assert not same_bytes(zeros, -zeros)
    assert same_bytes(zeros / 0, zeros / 0)
    assert same_bytes(a[:0], b[:0])
