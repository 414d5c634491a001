"""`.npy` and `.npz`: what numpy reads is what is read, and nothing is unpickled or believed."""

import io
import os
import struct
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3

from eckart.checkpoint import archive
from eckart.checkpoint.numpy_source import DTYPES
from eckart.checkpoint.opening import open_source
from eckart.errors import CheckpointError, DtypeError

NUMBERS = np.arange(24).reshape(2, 3, 4)

ARRAYS = {
    "C order": NUMBERS.astype("<f4"),
    "Fortran order": np.asfortranarray(NUMBERS.astype("<f8")),
    "transposed": NUMBERS.astype("<f4").T,
    "sliced": NUMBERS.astype("<f4")[:, ::2, 1:3],
    "big-endian": NUMBERS.astype(">f4"),
    "big-endian in Fortran order": np.asfortranarray(NUMBERS.astype(">i8")),
    "float16": NUMBERS.astype("<f2"),
    "big-endian float16": NUMBERS.astype(">f2"),
    "int64": NUMBERS.astype("<i8"),
    "int32": NUMBERS.astype(">i4"),
    "int16": NUMBERS.astype("<i2"),
    "int8": NUMBERS.astype("i1"),
    "uint8": NUMBERS.astype("u1"),
    "bool": NUMBERS % 3 == 0,
    "0-d": np.array(3.5),
    "big-endian 0-d": np.array(-2, ">i4"),
    "empty": np.empty((0, 5), "<f4"),
    "empty in Fortran order": np.asfortranarray(np.empty((3, 0, 2))),
    "one row": np.ones((1, 7), "<f4"),
    "NaN": np.array([np.nan, np.inf, -0.0], ">f4"),
}


def save(path: Path, arrays: dict[str, np.ndarray], compressed: bool = False) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def npy(header: object, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    """An `.npy` file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else repr(header).encode()
    length = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text + data


def claims(shape: object, descr: object = "<f4", fortran: object = False) -> dict[str, object]:
    return {"descr": descr, "fortran_order": fortran, "shape": shape}


@pytest.mark.parametrize("kind", ["npy", "npz", "compressed npz"])
@pytest.mark.parametrize("case", ARRAYS)
def test_every_array_comes_back_to_the_bit(case, kind, tmp_path):
    """Of any dtype and order: shape, numbers, rows, bytes and digest are numpy's."""
    array = ARRAYS[case]
    if kind == "npy":
        np.save(tmp_path / "w.npy", array)
        source = open_source(tmp_path / "w.npy")
    else:
        source = open_source(save(tmp_path / "x.npz", {"w": array}, kind != "npz"))
    plain = array.astype(array.dtype.newbyteorder("<"), order="C")

    loaded = source.load("w")

    assert [*source.tensors] == ["w"]
    assert source.tensors["w"].shape == array.shape == tuple(loaded.shape)
    assert source.tensors["w"].nbytes == array.nbytes
    assert loaded.numpy().dtype == plain.dtype
    assert loaded.numpy().tobytes() == plain.tobytes()
    assert b"".join(piece.numpy() for piece in source.chunks("w")) == plain.tobytes()
    assert source.digest("w") == blake3(plain.tobytes()).hexdigest()
    for start in range(len(array) if array.ndim else 0):
        assert source.load("w", start, start + 1).numpy().tobytes() == plain[start].tobytes()


def test_the_names_of_an_archive_are_those_that_numpy_gives(tmp_path):
    """With slashes, dots and other scripts; several arrays, each its own."""
    names = ["layers/0/w", "a.b.weight", "模型", "x.npy", "npy"]
    path = save(tmp_path / "x.npz", {name: np.full(2, i) for i, name in enumerate(names)})
    source = open_source(path)

    with np.load(path) as loaded:
        assert {*source.tensors} == {*loaded.files} == {*names}
        for name in names * 2:
            assert source.load(name).tolist() == loaded[name].tolist()
    assert (source.files, source.folder, source.name) == (["x.npz"], None, "x.npz")


def test_every_dtype_of_the_table_has_the_size_it_says():
    """The kinds that numpy and safetensors both know."""
    for kind, name in DTYPES.items():
        bits = 8 if name == "BOOL" else int(name[1:])

        assert np.dtype(kind).itemsize * 8 == bits


def test_unsigned_integers_that_few_programs_read_are_copied_as_bytes(tmp_path):
    """Their digests and chunks are to be had, a tensor of them is not."""
    np.save(tmp_path / "w.npy", np.arange(5, dtype=">u2"))
    source = open_source(tmp_path / "w.npy")

    assert torch.cat([*source.chunks("w")]).tolist() == [0, 0, 1, 0, 2, 0, 3, 0, 4, 0]
    with pytest.raises(DtypeError, match="w has dtype U16"):
        source.load("w")


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_format_is_read(version, tmp_path):
    """The third allows other scripts in the names of fields, which no tensor has."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.arange(3), version)
    (tmp_path / "w.npy").write_bytes(stream.getvalue())

    assert open_source(tmp_path / "w.npy").load("w").tolist() == [0, 1, 2]


def test_the_keys_of_a_header_may_stand_in_any_order(tmp_path):
    """So the format's description demands of readers."""
    text = b"{'shape': (2,), 'fortran_order': False, \"descr\": '=i4'}"
    (tmp_path / "w.npy").write_bytes(npy(text, bytes(8)))

    assert open_source(tmp_path / "w.npy").load("w").tolist() == [0, 0]


class Evil:
    """Unpickled, it would leave a trace."""

    def __reduce__(self):
        return os.system, ("touch trace",)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_objects_are_refused_without_unpickling(suffix, tmp_path, monkeypatch):
    """Not even to say what they are."""
    monkeypatch.chdir(tmp_path)
    array = np.array([Evil()], dtype=object)
    if suffix == "npy":
        np.save("w.npy", array, allow_pickle=True)
    else:
        save(tmp_path / "w.npz", {"w": array})

    with pytest.raises(CheckpointError, match=r"w in .* has dtype \|O: store floats"):
        open_source(tmp_path / f"w.{suffix}")

    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("dtype", ["<c8", "<U3", "S5", "<M8[s]", "<f16", "V2"])
def test_a_dtype_that_is_no_plain_number_is_refused_by_name(dtype, tmp_path):
    """Complex numbers, text, dates, long doubles, raw bytes."""
    np.save(tmp_path / "w.npy", np.zeros(2, dtype))

    with pytest.raises(CheckpointError, match=r"w in .*w\.npy has dtype .*: store floats"):
        open_source(tmp_path / "w.npy")


GOOD = npy(claims((2, 3)), bytes(24))
LARGEST = 10_000

BROKEN = {
    "no bytes": (b"", "does not begin as an array does"),
    "one byte": (b"\x93", "does not begin as an array does"),
    "the magic alone": (GOOD[:6], "does not begin as an array does"),
    "cut in the header": (GOOD[:30], "does not begin as an array does"),
    "cut in the data": (GOOD[:-1], "should take 24 bytes after its header, and 23 are there"),
    "a byte more": (GOOD + b"\0", "should take 24 bytes after its header, and 25 are there"),
    "two arrays": (GOOD + GOOD, "should take 24 bytes"),
    "garbage": (bytes(range(256)), "does not begin as an array does"),
    "another version": (npy(claims((2,)), bytes(8), (4, 0)), "does not begin as an array does"),
    "more than is there": (
        npy(claims((2**20, 2**20)), bytes(24)),
        "should take 4398046511104 bytes",
    ),
    "an absurd shape": (npy(claims((2**62, 8)), bytes(24)), "absurd shape"),
    "an absurd shape of nothing": (npy(claims((0, 2**62))), "absurd shape"),
    "a number that fills the header": (npy(claims((0, 10**4000))), "absurd shape|digits"),
    "33 dimensions": (npy(claims((1,) * 33), bytes(4)), "absurd shape"),
    "a negative side": (npy(claims((-2, -3)), bytes(24)), "says no shape"),
    "a side that is true": (npy(claims((True, 6)), bytes(24)), "says no shape"),
    "a side of 2.0": (npy(claims((2.0, 3)), bytes(24)), "says no shape"),
    "a list for a shape": (npy(claims([2, 3]), bytes(24)), "says no shape"),
    "1 for true": (npy(claims((2, 3), fortran=1), bytes(24)), "says no shape"),
    "no byte order": (npy(claims((2, 3), "f4"), bytes(24)), "has dtype f4"),
    "an unknown byte order": (npy(claims((2, 3), "?f4"), bytes(24)), r"has dtype \?f4"),
    "an empty dtype": (npy(claims((2, 3), ""), bytes(24)), "has dtype "),
    "fields": (npy(claims((2,), [("a", "<f4")]), bytes(8)), "says no shape, or no dtype"),
    "a key is missing": (npy({"descr": "<f4", "shape": (2,)}, bytes(8)), "says no shape"),
    "a list": (npy([1, 2]), "says no shape"),
    "code": (npy(b"__import__('os').system('touch trace')"), "damaged"),
    "an unhashable key": (npy(b"{[]: 1}"), "damaged"),
    "no Python": (npy(b"{'descr'"), "damaged"),
    "a NUL": (npy(b"{'descr': '\0'}"), "damaged"),
    "no text": (npy(b"\xff\xfe"), "damaged"),
    "an escape that means nothing": (npy(b"{'\\d': 1}"), "says no shape"),
    "brackets without end": (npy(b"(" * 9000), "damaged"),
    "signs without end": (npy(b"-" * 9000 + b"1"), "damaged"),
    "a long header": (npy(b" " * LARGEST + repr(claims((2, 3))).encode(), bytes(24)), "begin as"),
    "a header of 4 GiB": (
        b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + bytes(20_000),
        "does not begin as an array does",
    ),
    "control characters": (npy(claims((2, 3), "\x1b[2J"), bytes(24)), r"has dtype \\x1b\[2J"),
}


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_no_array_of_numbers_is_refused(case, suffix, tmp_path, monkeypatch):
    """One sentence with its path, before memory is taken, alone or as a member of an archive."""
    monkeypatch.chdir(tmp_path)
    content, words = BROKEN[case]
    path = tmp_path / f"w.{suffix}"
    if suffix == "npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("w.npy", content)

    with pytest.raises(CheckpointError, match=words) as caught:
        open_source(path)

    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 3000
    assert not (tmp_path / "trace").exists()


def test_an_archive_of_other_files_is_refused(tmp_path):
    """The first of them is named."""
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", GOOD)
        archive.writestr("notes\x1b[2J.txt", b"")

    with pytest.raises(
        CheckpointError, match=r"x\.npz holds notes\\x1b\[2J\.txt, which is no array"
    ):
        open_source(tmp_path / "x.npz")


def test_an_array_that_stands_twice_is_refused(tmp_path):
    """numpy takes the last."""
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        warnings.simplefilter("ignore")  # zipfile's own
        archive.writestr("a.npy", GOOD)
        archive.writestr("a.npy", GOOD)

    with pytest.raises(CheckpointError, match=r"a\.npy stands there twice"):
        open_source(tmp_path / "x.npz")


def test_a_path_for_a_name_leads_nowhere(tmp_path):
    """It is a name like any other: nothing is unpacked."""
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("../../etc/x.npy", GOOD)

    source = open_source(tmp_path / "x.npz")

    assert [*source.tensors] == ["../../etc/x"]
    assert source.load("../../etc/x").shape == (2, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_a_small_archive_of_enormous_arrays_is_refused(tmp_path):
    """100 MB of zeros, deflated to 100 kB: opened and refused in little memory."""
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", npy(claims((25, 10**6)), bytes(10**8)))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"x\.npz has \d+ bytes, but .* take 100000000"):
            open_source(tmp_path / "x.npz")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 10**6


def test_a_small_archive_of_zeros_is_no_bomb(tmp_path):
    """Masks and biases deflate well, and are read up to 64 MiB."""
    source = open_source(save(tmp_path / "x.npz", {"a": np.zeros((1000, 1000), "i1")}, True))

    assert not source.load("a").any()


def test_a_member_that_claims_more_than_it_unpacks_to_is_refused_when_read(tmp_path):
    """The directory and the header agree on a lie, and deflate does not."""
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", npy(claims((6000,)), bytes(100)))
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\1\2") + 24
    size = len(npy(claims((6000,)))) + 24000
    content[place : place + 4] = struct.pack("<I", size)
    path.write_bytes(content)
    source = open_source(path)

    with pytest.raises(CheckpointError, match=r"x\.npz is damaged at byte"):
        source.load("a")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_changed_byte_is_found_by_the_archive(compressed, tmp_path):
    """Its CRC-32, which also covers the header."""
    path = save(tmp_path / "x.npz", {"a": np.arange(100.0)}, compressed)
    record = archive.read_directory(path)["a.npy"]
    content = bytearray(path.read_bytes())
    content[record.offset + record.stored - 9] ^= 0x10
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=r"x\.npz is damaged"):
        open_source(path).load("a")


def test_opening_reads_no_array(tmp_path, monkeypatch):
    """Only headers; then an array is read once for all its pieces."""
    path = save(tmp_path / "x.npz", {"a": np.arange(100.0), "b": np.arange(3)})
    read: list[int] = []
    real = archive.Record.read
    monkeypatch.setattr(archive.Record, "read", lambda self, p: read.append(1) or real(self, p))
    source = open_source(path)

    assert read == []
    for row in range(100):
        assert source.load("a", row, row + 1).item() == row
    assert read == [1]


def test_a_file_that_is_written_again_is_never_read_from_memory(tmp_path):
    """What was kept of the old file is not given for the new one, nor read at all."""
    path = tmp_path / "w.npy"
    np.save(path, np.zeros(3))
    old = open_source(path)
    assert old.load("w").tolist() == [0, 0, 0]
    np.save(path, np.ones(3))
    os.utime(path, ns=(1, 1))

    assert open_source(path).load("w").tolist() == [1, 1, 1]
    with pytest.raises(CheckpointError, match=r"w\.npy was written again while it was being read"):
        old.load("w")


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_only_regular_files_are_read(suffix, tmp_path):
    """A FIFO would hang, a device never end."""
    os.mkfifo(tmp_path / f"a.{suffix}")
    (tmp_path / f"b.{suffix}").symlink_to("/dev/zero")

    for name in "ab":
        with pytest.raises(CheckpointError, match=rf"{name}\.{suffix} is not a regular file"):
            open_source(tmp_path / f"{name}.{suffix}")
