"""Locks that a dead process never holds: flock on a file, taken or refused at once."""

import errno
import fcntl
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from eckart.checkpoint.paths import printable, storage_errors
from eckart.errors import BusyError

LOCK = "lock"


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Makes a folder, where it is not there yet, and holds its lock; BusyError if another does.

    The kernel releases it with the process, however that ends. On NFS it is as good as the
    server's flock. Children that are forked inherit it, so workers come from a fork server.
    """
    path, created = folder / LOCK, not folder.exists()
    try:
        descriptor = _take(path)
        try:
            yield
        finally:
            os.close(descriptor)
    finally:
        if created:
            _remove_if_unused(folder)


def _take(path: Path) -> int:
    """The descriptor of the locked file, which says who holds it."""
    while True:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(path, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                with storage_errors(path):
                    raise
            raise BusyError(
                f"another run ({printable(holder) or 'just starting'}) is working in "
                f"{printable(path.parent)}: wait for it, or choose another output."
            ) from None
        if _is_still(path, descriptor):
            _sign(path, descriptor)
            return descriptor
        os.close(descriptor)  # the folder was removed in between: take the new one


def _sign(path: Path, descriptor: int) -> None:
    """Writes who holds it, for the message that another run will show."""
    holder = f"process {os.getpid()} on {socket.gethostname()}\n"
    try:
        with storage_errors(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise


def _remove_if_unused(folder: Path) -> None:
    """Removes a folder in which nothing but the lock was ever made."""
    with suppress(OSError):
        if {path.name for path in folder.iterdir()} <= {LOCK}:
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the path leads to the open file."""
    try:
        there, here = path.stat(), os.fstat(descriptor)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
