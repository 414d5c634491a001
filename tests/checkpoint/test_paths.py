"""Nothing hangs on opening, and no name moves the cursor."""

import os
import socket
import unicodedata

import pytest

from eckart.checkpoint.paths import open_regular, printable, read_bytes, read_into
from eckart.errors import CheckpointError


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


def test_every_control_and_format_character_is_escaped():
    """C0, C1, bidi, zero width, surrogates, private use: over all of Unicode's first plane."""
    for code in range(0x10000):
        shown = printable(chr(code))

        assert all(unicodedata.category(c)[0] != "C" for c in shown)
        assert shown == chr(code) or shown.startswith("\\")


def test_ordinary_names_are_shown_as_they_are():
    """Letters of any script, spaces, brackets, slashes."""
    for name in ("model.layers.0.q_proj", "模型/é", "a [b] <c>", ""):
        assert printable(name) == name
