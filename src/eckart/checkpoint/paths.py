"""Regular files, opened so that nothing hangs, and names that are safe to print."""

import os
import pickle
import stat
import struct
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from eckart.errors import CheckpointError, EckartError, StorageError

DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    pickle.PickleError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What Python's, numpy's and torch's own parsers raise on files that are not what they should be.

(MemoryError: `ast` on an expression that nests too deep.)
"""

SHOWN = 2000
"""Characters of a name, or of a sentence with several, that are printed: some hold megabytes."""


def is_there(path: Path) -> bool:
    """Whether a path leads to something; CheckpointError where one may not look."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # ValueError: a NUL within
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"cannot open {printable(path)}: {reason}.") from None
    return True


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
                f"{printable(path)} ends at byte {offset + done}, where more should follow: it was "
                "cut, or changed while being read. Download it again."
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

    Of what is longer than any name, the beginning and the end.

    >>> printable("layer\\x1b[2J")
    'layer\\\\x1b[2J'
    """
    text = str(name)
    if len(text) > SHOWN:
        text = f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in ("Zl", "Zp") or unicodedata.category(c)[0] == "C"
        else c
        for c in text
    )


def natural_order(name: str) -> list[tuple[int, int | str]]:
    """Returns a key that sorts dotted names as people do: block 2 before block 10.

    >>> sorted(["h.10.x", "h.2.x", "h"], key=natural_order)
    ['h', 'h.2.x', 'h.10.x']
    """
    parts = name.split(".") if name else []
    return [(0, int(p)) if p.isascii() and p.isdigit() else (1, p) for p in parts]


@contextmanager
def damage(path: Path) -> Generator[None]:
    """Turns what other parsers raise over a file into one sentence that names it.

    What they would only warn of is about the file's inner spelling, and left out.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except EckartError:  # said already, nearer to the place
        raise
    except DAMAGE as error:
        spoken = isinstance(error, (OSError, RuntimeError, ValueError, zipfile.BadZipFile))
        mute = f"it cannot be parsed ({type(error).__name__})"
        reason = str(error) if spoken and str(error) else mute
        raise CheckpointError(
            f"{printable(path)} is damaged: {printable(reason.splitlines()[0]).rstrip('.')}. "
            "Download it again, or check that the copy finished."
        ) from None


def write_file(path: Path, content: bytes) -> None:
    """Writes and syncs a new file."""
    with storage_errors(path), path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Syncs a file, or a folder: what it lists stays listed when the power fails."""
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def storage_errors(path: Path) -> Generator[None]:
    """Turns the operating system's refusals into one sentence and exit code 5."""
    try:
        yield
    except StorageError:  # said already, nearer to the place
        raise
    except OSError as error:
        raise StorageError(
            f"cannot write {printable(path)}: {error.strerror}. Free space or choose another -o."
        ) from None
