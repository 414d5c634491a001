"""A laid-out safetensors file written once, from its first byte to its last, and hashed meanwhile.

Knows the order of the bytes; must not know how they are made.
"""

import errno
import fcntl
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from torch import Tensor

from eckart.checkpoint.hashing import Hash, bytes_of
from eckart.checkpoint.paths import open_regular, read_into, storage_errors
from eckart.checkpoint.tensor_file import TensorFiles

BUFFER_BYTES = 2**22
"""Written at once. A multiple of every file system's blocks, as direct writes must be."""

BUFFERS = 3
"""One is being filled, one hashed and written, one waits."""

DIRECT = getattr(os, "O_DIRECT", 0)
"""Past the page cache; macOS has it not."""


class FileStream:
    """One file of a layout, whose tensors come in the order in which they stand in it.

    A context, with a thread of this process that hashes and writes one buffer while the next is
    being filled. Buffers go past the page cache where the file system lets them: what must reach
    the disk anyway is copied once less, and what was cached stays cached. Peak memory: 12 MiB.
    """

    def __init__(self, files: TensorFiles, file: str) -> None:
        self._path, self._places = files.folder / file, files.places
        held = files.held(file)
        self._start, self._end = files.places[held[0]].begin, files.places[held[-1]].end
        self._begun = self._filled = 0  # where the buffer stands in the file, and what is in it
        self._seen = Hash()
        self._buffers = deque(memoryview(mmap.mmap(-1, BUFFER_BYTES)) for _ in range(BUFFERS))
        self._passed = deque[Future[None]]()

    def __enter__(self) -> Self:
        header = self._header()
        with storage_errors(self._path):
            self._descriptor = _open(self._path)
        self._pool = ThreadPoolExecutor(1, "stream")
        self._take(header)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        os.close(self._descriptor)

    def write(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor of the CPU, or the next piece of one, row-major."""
        data, place = bytes_of(tensor), self._places[name]
        position = self._begun + self._filled
        inside = place.begin <= position <= place.end - len(data)
        fits = inside and place.file == self._path.name
        assert fits, f"{name}: {len(data)} bytes do not belong at {position}"
        self._take(data)

    def digest(self) -> str:
        """Returns the BLAKE3 of the whole file, once all of it is on the disk."""
        position = self._begun + self._filled
        assert position == self._end, f"{self._path.name}: {position} of {self._end} bytes"
        self._pass_on()
        while self._passed:
            self._passed.popleft().result()
        with storage_errors(self._path):
            os.fsync(self._descriptor)
        return self._seen.hexdigest()

    def _header(self) -> memoryview:
        """What the layout wrote."""
        header = memoryview(bytearray(self._start))
        descriptor = open_regular(self._path)
        try:
            read_into(descriptor, header, 0, self._path)
        finally:
            os.close(descriptor)
        return header

    def _take(self, data: memoryview) -> None:
        while data:
            step = min(len(data), BUFFER_BYTES - self._filled)
            self._buffers[0][self._filled : self._filled + step] = data[:step]
            self._filled += step
            data = data[step:]
            if self._filled == BUFFER_BYTES:
                self._pass_on()

    def _pass_on(self) -> None:
        """Hands the buffer to the thread, and waits until the next one is free."""
        data = self._buffers[0][: self._filled]
        self._passed.append(self._pool.submit(self._put, data, self._begun))
        self._begun, self._filled = self._begun + self._filled, 0
        self._buffers.rotate(-1)
        if len(self._passed) == BUFFERS:
            self._passed.popleft().result()

    def _put(self, data: memoryview, offset: int) -> None:
        self._seen.update(data)
        with storage_errors(self._path):
            while data:
                try:
                    done = os.pwrite(self._descriptor, data, offset)
                except OSError as error:
                    if error.errno != errno.EINVAL or not _through_cache(self._descriptor):
                        raise
                    continue
                data, offset = data[done:], offset + done


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CLOEXEC
    try:
        return os.open(path, flags | DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags)


def _through_cache(descriptor: int) -> bool:
    """Writes by way of the page cache from now on; returns whether that is a change.

    For what is refused directly: the end of a file, which is no whole block, and everything on some
    file systems.
    """
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if not flags & DIRECT:
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~DIRECT)
    return True
