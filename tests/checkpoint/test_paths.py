"""Nothing hangs on opening, and no name moves the cursor."""

import os
import socket
import struct
import unicodedata
import warnings
import zlib

import pytest

from eckart.checkpoint.paths import (
    SHOWN,
    damage,
    is_there,
    open_regular,
    printable,
    read_bytes,
    read_into,
)
from eckart.errors import CheckpointError, DtypeError


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "device", "missing", "link to fifo"])
def test_only_regular_files_are_opened(kind, tmp_path, monkeypatch):
    """A FIFO without a writer would hang for ever; each kind is refused by its path."""
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = tmp_path / "x"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("x")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to fifo":
        os.mkfifo(tmp_path / "y")
        path.symlink_to(tmp_path / "y")

    with pytest.raises(CheckpointError, match=r"x(:| is not a regular file)"):
        open_regular(path)


def test_a_refused_file_is_closed_again(tmp_path):
    """No descriptor is left behind."""
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0  # noqa: PTH110, PTH208
    for _ in range(20):
        with pytest.raises(CheckpointError):
            open_regular(tmp_path)
    after = len(os.listdir("/proc/self/fd")) if before else 0  # noqa: PTH208

    assert after <= before + 2


def test_links_to_regular_files_are_followed(tmp_path):
    """The hub cache is made of them."""
    (tmp_path / "blob").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "blob")

    assert read_bytes(tmp_path / "link", 100) == b"content"


def test_a_file_above_the_limit_is_refused_unread(tmp_path):
    """At the limit it is read, one byte above it is not."""
    (tmp_path / "x").write_bytes(b"12345")

    assert read_bytes(tmp_path / "x", 5) == b"12345"
    with pytest.raises(CheckpointError, match="has 5 bytes; at most 4"):
        read_bytes(tmp_path / "x", 4)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    """The byte where it ends, and no crash."""
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    descriptor = open_regular(path)
    os.truncate(path, 3)
    try:
        with pytest.raises(CheckpointError, match="ends at byte 3"):
            read_into(descriptor, memoryview(bytearray(4)), 1, path)
    finally:
        os.close(descriptor)


def test_what_is_there_is_said_and_what_cannot_be_looked_at_is_an_error(tmp_path):
    """Files, folders and links to them are there; dangling links and files below files are not."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "loop").symlink_to("loop")

    assert all(is_there(tmp_path / name) for name in (".", "file", "link"))
    assert not any(is_there(tmp_path / name) for name in ("x", "dangling", "file/x"))
    for name in ("loop", "n" * 5000, "a\0b"):
        with pytest.raises(CheckpointError, match="cannot open"):
            is_there(tmp_path / name)


def test_every_control_format_and_separating_character_is_escaped():
    """C0, C1, bidi, zero width, surrogates, line separators: over all of Unicode's first plane."""
    for code in range(0x10000):
        shown = printable(chr(code))

        assert all(unicodedata.category(c)[0] != "C" for c in shown)
        assert not {"\u2028", "\u2029"} & {*shown}
        assert shown == chr(code) or shown.startswith("\\")


def test_ordinary_names_are_shown_as_they_are():
    """Letters of any script, spaces, brackets, slashes, up to the longest path."""
    for name in ("model.layers.0.q_proj", "模型/é", "a [b] <c>", "5\u202f%", "", "x" * SHOWN):
        assert printable(name) == name


def test_a_name_of_megabytes_is_shown_by_both_ends():
    """A file's names are as long as its author likes; a terminal is not."""
    shown = printable("begin" + "x" * 10**7 + "end")

    assert len(shown) < SHOWN + 10
    assert shown.startswith("begin")
    assert shown.endswith("end")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("no\x1b[2J such\nsecond line"), r"no\\x1b\[2J such\."),
        (ValueError(""), "it cannot be parsed"),
        (IndexError("list index out of range"), r"it cannot be parsed \(IndexError\)"),
        (struct.error("unpack"), "it cannot be parsed"),
        (zlib.error("Error -3"), "it cannot be parsed"),
        (OverflowError("int too large"), "it cannot be parsed"),
        (OSError("bad"), "bad"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_other_parsers_raise_becomes_one_sentence(error, words, tmp_path):
    """The file, what was wrong as far as it was said, and what to do; no second line."""
    with (
        pytest.raises(CheckpointError, match=f"x is damaged: {words}") as caught,
        damage(tmp_path / "x"),
    ):
        raise error

    assert "Download it again" in str(caught.value)
    assert str(caught.value).isprintable()


def test_what_other_parsers_warn_of_is_left_out(tmp_path):
    """Only within: what is warned of before and after is heard."""
    with damage(tmp_path):
        warnings.warn("a spelling", DeprecationWarning, stacklevel=1)

    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", UserWarning, stacklevel=1)


def test_our_own_errors_and_our_own_bugs_are_left_as_they_are(tmp_path):
    """What was said nearer to the place stands; a NameError is nobody's damage."""
    for error in (DtypeError("said"), NameError("a bug"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, damage(tmp_path):
            raise error

        assert caught.value is error
