"""Outputs that appear whole or not at all.

Everything is written into a run folder beside the output, synced, and published by one rename.
"""

import os
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from eckart.checkpoint.lock import LOCK, locked
from eckart.checkpoint.paths import printable, storage_errors, sync
from eckart.errors import StaleError, StorageError, UsageError

CERTIFICATE, STATISTICS = "eckart.json", "statistics.json"
RUN_SUFFIX = ".eckart-work"
STAGED, REPLACED = "output", "replaced"


@dataclass
class OutputRun:
    """An output in the making: the run folder, and the staged one in it that will be published."""

    folder: Path
    keep: bool = False  # what else was put into the run folder, when the run ends

    @property
    def staged(self) -> Path:
        """What is published."""
        return self.folder / STAGED


@contextmanager
def new_output(out: Path, *, inputs: Sequence[Path], force: bool) -> Generator[OutputRun]:
    """Yields a run with an empty staged folder; when the block ends well, that becomes `out`.

    `out` must not exist, unless `force` and it is a folder that eckart wrote: then it is replaced
    after the new one is complete. If the block raises, the staged folder is removed and `out` is
    as it was. The run folder (`OUT.eckart-work`) holds the lock: no second run on the same output
    starts. It is removed at the end, unless `keep` was set; what a killed run left staged is
    removed by the next one.
    """
    check_output(out, inputs=inputs, force=force)
    run = OutputRun(run_folder(out))
    _check_ours(run.folder)
    created = [folder for folder in out.parents if not folder.exists()]
    try:
        with locked(run.folder):
            try:
                _recover(run, out)
                new_folder(run.staged)
                yield run
                check_output(out, inputs=inputs, force=force)  # again: it may have taken hours
                with storage_errors(out):
                    _publish(run.staged, out, run.folder / REPLACED)
            finally:
                _recover(run, out)
                if not run.keep:
                    shutil.rmtree(run.folder, ignore_errors=True)
    finally:
        for folder in created:
            with suppress(OSError):  # not empty: the output is there, or somebody else's file
                folder.rmdir()


def _recover(run: OutputRun, out: Path) -> None:
    """Removes what was staged; puts back an output that a killed run had moved aside."""
    shutil.rmtree(run.staged, ignore_errors=True)
    replaced = run.folder / REPLACED
    if replaced.exists() and not os.path.lexists(out):
        with storage_errors(out):
            replaced.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def run_folder(out: Path) -> Path:
    """Returns the folder beside the output where a run works."""
    return out.with_name(out.name + RUN_SUFFIX)


def _check_ours(run: Path) -> None:
    """Raises StaleError where the run folder is there and is somebody else's."""
    if run.is_dir() and not (run / LOCK).is_file() and any(run.iterdir()):
        raise StaleError(
            f"{printable(run)} is where this run would work, but eckart did not make it: move it "
            "away, or choose another -o."
        )


def check_output(out: Path, *, inputs: Sequence[Path], force: bool) -> None:
    """Raises UsageError unless `out` is a place where an output may be written."""
    resolved = _resolved(out)
    for path in map(_resolved, inputs):
        if resolved == path or resolved.is_relative_to(path):
            raise UsageError(
                f"the output {printable(out)} is inside the input {printable(path)}: choose "
                "another place."
            )
        if path.is_relative_to(resolved):
            raise UsageError(
                f"the input {printable(path)} is inside the output {printable(out)}: choose "
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


def check_space(place: Path, needed: int, what: str) -> None:
    """Raises StorageError if the file system of `place` has not that many bytes free."""
    existing = next(path for path in (place, *place.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise StorageError(
            f"{what} needs up to {needed:,} bytes at {printable(place)}, where {free:,} are free: "
            "free some, or choose another place."
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
    sync(target)


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises on a link to itself


def _is_ours(folder: Path) -> bool:
    """Whether a folder has a document of ours: every output has one of the two."""
    for name in (CERTIFICATE, STATISTICS):
        with suppress(OSError):
            if b'"schema":"eckart/' in (folder / name).read_bytes():
                return True
    return False


def _publish(staged: Path, out: Path, old: Path) -> None:
    for folder in [path for path in staged.rglob("*") if path.is_dir()] + [staged]:
        sync(folder)
    if out.exists():
        out.rename(old)
    try:
        staged.rename(out)
        sync(out.parent)
    except BaseException:  # whatever it was, `out` must be as it was: see `_recover`
        if not staged.exists():
            out.rename(staged)
        raise
