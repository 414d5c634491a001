"""Outputs that appear whole or not at all.

Everything is written into a work folder beside the output, synced, and published by one rename.
"""

import json
import math
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import DTYPES
from eckart.errors import BusyError, StorageError, UsageError

CERTIFICATE = "eckart.json"
WORK_SUFFIX = ".eckart-work"


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """The dtype, as safetensors spells it, shape and bytes of a tensor to be written."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, dtype: str, shape: tuple[int, ...]) -> "TensorLayout":
        """Returns the layout of a tensor of a dtype that torch holds."""
        return cls(dtype, shape, math.prod(shape) * DTYPES[dtype].itemsize)

    @property
    def itemsize(self) -> int:
        """Bytes per element; 1 for what torch does not know, which is copied as bytes."""
        return DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1


class TensorFile:
    """A safetensors file laid out first and filled tensor by tensor, in any order.

    The header is ours because safetensors' own writer needs all tensors in memory and, with two
    or more metadata keys, orders its header at random (safetensors issue 584). Tensors stand by
    falling element size, then by name, as the library sorts them, so that none is misaligned.
    """

    def __init__(self, path: Path, layout: Mapping[str, TensorLayout]) -> None:
        self.path, self._left = path, set(layout)
        header, self._places = _lay_out(layout)
        self._start = 8 + len(header)
        size = self._start + max((end for _, end in self._places.values()), default=0)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with _storage(path):
            self._descriptor = os.open(path, flags, 0o666)  # less the umask
            os.truncate(self._descriptor, size)
            self._write(len(header).to_bytes(8, "little") + header, 0)

    def write(self, name: str, tensor: Tensor) -> None:
        """Puts one tensor in its place; its bytes must be as many as were laid out."""
        begin, end = self._places[name]
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        assert len(flat) == end - begin, f"{name}: {len(flat)} bytes for a place of {end - begin}"
        with _storage(self.path):
            self._write(flat.numpy().data, self._start + begin)
        self._left.discard(name)

    def close(self) -> None:
        """Syncs and closes; every tensor must have been written."""
        assert not self._left, f"never written: {sorted(self._left)[:3]}"
        with _storage(self.path):
            os.fsync(self._descriptor)
            os.close(self._descriptor)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done : done + 2**30], offset + done)


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
        with _storage(out):
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
    with _storage(path):
        path.mkdir()


def write_file(path: Path, content: bytes) -> None:
    """Writes and syncs a new file."""
    with _storage(path), path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def copy_file(source: Path, target: Path) -> None:
    """Copies the contents of one regular file, and syncs."""
    with _storage(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        _sync(target)


def _lay_out(layout: Mapping[str, TensorLayout]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    order = sorted(layout, key=lambda name: (-layout[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places: dict[str, tuple[int, int]] = {}
    offset = 0
    for name in order:
        end = offset + layout[name].nbytes
        places[name] = offset, end
        header[name] = {
            "dtype": layout[name].dtype,
            "shape": layout[name].shape,
            "data_offsets": places[name],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8), places


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


@contextmanager
def _storage(path: Path) -> Generator[None]:
    """Turns the operating system's refusals into one sentence and exit code 5."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot write {printable(path)}: {error.strerror}. Free space or choose another -o."
        ) from None
