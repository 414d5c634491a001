"""Outputs that appear whole or not at all.

Everything is written into a work folder beside the output, synced, and published by one rename.
"""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from eckart.checkpoint.paths import printable, storage_errors
from eckart.errors import BusyError, StorageError, UsageError

CERTIFICATE = "eckart.json"
WORK_SUFFIX = ".eckart-work"


@contextmanager
def new_output(out: Path, *, inputs: list[Path], force: bool) -> Generator[Path]:
    """Yields an empty work folder; when the block ends well, its `output` becomes `out`.

    `out` must not exist, unless `force` and it is a folder that eckart wrote: then it is replaced
    after the new one is complete. If the block raises, the work folder is removed and `out` is as
    it was. The work folder is also the lock: while it exists no second run starts.
    """
    check_output(out, inputs=inputs, force=force)
    work = out.with_name(out.name + WORK_SUFFIX)
    created = [parent for parent in out.parents if not parent.exists()]
    try:
        work.mkdir(parents=True)
    except FileExistsError:
        raise BusyError(
            f"{printable(work)} exists: another run is writing {printable(out)}, or one was "
            "killed. If none is running, delete that folder and start again."
        ) from None
    except OSError as error:
        raise StorageError(f"cannot create {printable(work)}: {error.strerror}.") from None
    try:
        new_folder(work / "output")
        yield work
        check_output(out, inputs=inputs, force=force)  # again: the run may have taken hours
        with storage_errors(out):
            _publish(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for parent in created:
            with suppress(OSError):  # not empty: the output is there, or somebody else's file
                parent.rmdir()


def check_output(out: Path, *, inputs: list[Path], force: bool) -> None:
    """Raises UsageError unless `out` is a place where an output may be written."""
    resolved = _resolved(out)
    for folder in map(_resolved, inputs):
        if resolved == folder or resolved.is_relative_to(folder):
            raise UsageError(
                f"the output {printable(out)} is inside the input {printable(folder)}: choose "
                "another place."
            )
        if folder.is_relative_to(resolved):
            raise UsageError(
                f"the input {printable(folder)} is inside the output {printable(out)}: choose "
                "another place."
            )
    if not os.path.lexists(out):
        return
    if not force:
        raise UsageError(f"{printable(out)} exists already: choose another -o, or add --force.")
    if out.is_symlink() or not _is_ours(out):
        raise UsageError(
            f"{printable(out)} was not written by eckart, so --force does not replace it: choose "
            "another -o."
        )


def new_folder(path: Path) -> None:
    """Makes a folder that must not exist, in one that must."""
    with storage_errors(path):
        path.mkdir()


def copy_file(source: Path, target: Path) -> None:
    """Copies the contents of one regular file, and syncs."""
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        _sync(target)


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises on a link to itself


def _is_ours(folder: Path) -> bool:
    try:
        return b'"schema":"eckart/' in (folder / CERTIFICATE).read_bytes()
    except OSError:
        return False


def _publish(work: Path, out: Path) -> None:
    staged = work / "output"
    for folder in [path for path in staged.rglob("*") if path.is_dir()] + [staged]:
        _sync(folder)
    old = work / "replaced"
    if out.exists():
        out.rename(old)
    try:
        staged.rename(out)
        _sync(out.parent)
    except BaseException:  # whatever it was, `out` must be as it was
        if not staged.exists():
            out.rename(staged)
        if old.exists():
            old.rename(out)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
