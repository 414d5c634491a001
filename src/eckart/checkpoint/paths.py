"""Regular files, opened so that nothing hangs, and names that are safe to print."""

import os
import stat
import unicodedata
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from eckart.errors import CheckpointError, StorageError


def open_regular(path: Path) -> int:
    """Returns a read-only descriptor of a regular file.

    O_NONBLOCK because opening a FIFO would wait for ever; devices, folders and sockets are
    refused by name. The user's own symlinks to regular files are followed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"cannot open {printable(path)}: {error.strerror}.") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{printable(path)} is not a regular file.")
    return descriptor


def read_into(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    """Fills `buffer` from `offset` on by pread; a file that shrank is an error, not a crash."""
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done : done + 2**30]], offset + done)
        except OSError as error:
            raise CheckpointError(f"cannot read {printable(path)}: {error.strerror}.") from None
        if count == 0:
            raise CheckpointError(
                f"{printable(path)} ends at byte {offset + done}, inside a tensor: it was cut, or "
                "changed while being read. Download it again."
            )
        done += count


def read_bytes(path: Path, limit: int) -> bytes:
    """Returns the whole of a regular file of at most `limit` bytes."""
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise CheckpointError(
                f"{printable(path)} has {size} bytes; at most {limit} are expected here."
            )
        buffer = bytearray(size)
        read_into(descriptor, memoryview(buffer), 0, path)
    finally:
        os.close(descriptor)
    return bytes(buffer)


def printable(name: object) -> str:
    """Returns a name that cannot move the cursor: control and bidi characters are escaped.

    >>> printable("layer\\x1b[2J")
    'layer\\\\x1b[2J'
    """
    text = str(name)
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c)[0] == "C" else c
        for c in text
    )


def write_file(path: Path, content: bytes) -> None:
    """Writes and syncs a new file."""
    with storage_errors(path), path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def storage_errors(path: Path) -> Generator[None]:
    """Turns the operating system's refusals into one sentence and exit code 5."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {printable(path)}: {error.strerror}. Free space or choose another -o."
        ) from None
