"""Zip archives as records: whole, within the file, and as their CRC says."""

import os
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest

from eckart.checkpoint.archive import Record, read_directory
from eckart.errors import CheckpointError

CONTENT = b"all that is in it " * 100


@pytest.fixture(params=[zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def archive(request, tmp_path) -> Path:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", request.param) as archive:
        archive.writestr("a/b", CONTENT)
        archive.writestr("empty", b"")
    return path


def test_a_directory_says_where_each_member_lies(archive):
    """Stored or deflated: its content, from the beginning or whole."""
    found = read_directory(archive)

    assert list(found) == ["a/b", "empty"]
    assert found["a/b"].read(archive) == CONTENT
    assert found["empty"].read(archive) == b""
    for count in (1, 100, len(CONTENT), 10**6):
        assert found["a/b"].head(archive, count) == CONTENT[:count]


def test_a_changed_byte_in_a_member_is_found(archive):
    """By its CRC-32, or by deflate itself, here and there."""
    record = read_directory(archive)["a/b"]
    content = archive.read_bytes()
    for place in range(record.offset, record.offset + record.stored, 97):
        archive.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])

        with pytest.raises(CheckpointError, match=r"x\.zip is damaged"):
            record.read(archive)


def test_a_record_that_unpacks_to_more_than_it_says_is_cut_off(tmp_path):
    """A bomb costs what it claims and one byte, and is then refused."""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    packed = packer.compress(bytes(10**8)) + packer.flush()
    (tmp_path / "x").write_bytes(packed)

    with pytest.raises(CheckpointError, match="damaged at byte 0"):
        Record(0, len(packed), 1000, deflated=True).read(tmp_path / "x")


def test_a_record_beyond_the_end_of_the_file_is_an_error(tmp_path):
    """It was cut after it was opened."""
    (tmp_path / "x").write_bytes(bytes(10))

    with pytest.raises(CheckpointError, match="ends at byte 10"):
        Record(5, 6, 6).read(tmp_path / "x")


def twice(path: Path) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")  # zipfile's own
        archive.writestr("a", b"1")
        archive.writestr("a", b"2")


def packed_otherwise(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a", b"1")


def changed(place: int, value: bytes, sign: bytes = b"PK\1\2"):
    """An archive of one stored member with some bytes of its entry in the directory changed."""

    def build(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", b"12345")
        content = bytearray(path.read_bytes())
        start = content.index(sign) + place
        content[start : start + len(value)] = value
        path.write_bytes(content)

    return build


BROKEN = {
    "a name twice": (twice, "a stands there twice"),
    "bzip2": (packed_otherwise, "packed in a way unknown here"),
    "encrypted": (changed(8, b"\1"), "encrypted"),
    "more stored than unpacked": (changed(24, struct.pack("<I", 4)), "larger than"),
    "larger than the file": (changed(20, struct.pack("<II", 10**6, 10**6)), "larger than"),
    "a header beyond the end": (changed(42, struct.pack("<I", 10**6)), "damaged"),
    "an extra field beyond the end": (changed(28, b"\xff\xff", b"PK\3\4"), "larger than"),
    "no directory": (changed(0, b"XXXX", b"PK\5\6"), "not a zip file"),
    "a directory elsewhere": (changed(16, struct.pack("<I", 10**6), b"PK\5\6"), "damaged"),
    "an enormous directory": (changed(12, struct.pack("<I", 2**31), b"PK\5\6"), "damaged"),
    "no bytes": (lambda path: path.touch(), "not a zip file"),
    "a FIFO": (os.mkfifo, "not a regular file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_directory_that_is_not_sound_is_refused(case, tmp_path):
    """What and where, before anything of a member is read."""
    build, words = BROKEN[case]
    build(tmp_path / "x.zip")

    with pytest.raises(CheckpointError, match=words) as caught:
        read_directory(tmp_path / "x.zip")

    assert "x.zip" in str(caught.value)
