"""Digests of safetensors files while they are being filled, and their way to the disk meanwhile.

Knows which tensors are complete; must not know who fills them.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Condition
from typing import Self

from eckart.checkpoint.hashing import PIECE_BYTES, Hash
from eckart.checkpoint.paths import open_regular, read_into
from eckart.checkpoint.tensor_file import TensorFiles

FLUSHED_BYTES = 2**28
"""So many bytes are handed to the disk at a time, while others are still being written."""


class FileDigests:
    """The digests of files, read back from their beginnings on as far as they are filled.

    A context with two threads of this process, which mostly wait: one hashes; one has what is
    written begin its way to the disk, so that the sync at the end finds little to do. Leaving it
    ends both.
    """

    def __init__(self, files: TensorFiles) -> None:
        self._files = files
        self._complete: set[str] = set()
        self._changed = Condition()
        self._stopped = False
        self._hashing: Future[dict[str, str]] = Future()
        self._flushing: Future[None] = Future()

    def __enter__(self) -> Self:
        pool = ThreadPoolExecutor(2, "digests")
        self._hashing, self._flushing = pool.submit(self._hash), pool.submit(self._flush)
        pool.shutdown(wait=False)
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in (self._hashing, self._flushing):
            thread.exception()  # waits for its end

    def filled(self, *names: str) -> None:
        """Says that tensors are written."""
        with self._changed:
            self._complete.update(names)
            self._changed.notify_all()

    def result(self) -> dict[str, str]:
        """Returns the digest of every file, when the last byte is hashed."""
        missing = self._files.places.keys() - self._complete
        assert not missing, f"never filled: {missing}"
        return self._hashing.result()

    def _hash(self) -> dict[str, str]:
        buffer, found = memoryview(bytearray(PIECE_BYTES)), dict[str, str]()
        for file in self._files.files:
            path, seen, done = self._files.folder / file, Hash(), 0
            descriptor = open_regular(path)
            try:
                for end in self._ends(file):
                    while done < end and not self._stopped:
                        piece = buffer[: end - done]
                        read_into(descriptor, piece, done, path)
                        seen.update(piece)
                        done += len(piece)
            finally:
                os.close(descriptor)
            found[file] = seen.hexdigest()
        return found

    def _flush(self) -> None:
        """A hint only: whoever publishes the files syncs them, and is told what goes wrong."""
        begin = getattr(os, "fdatasync", os.fsync)  # macOS has no fdatasync
        for file in self._files.files:
            descriptor, begun = open_regular(self._files.folder / file), 0
            try:
                for end in self._ends(file):
                    if end - begun >= FLUSHED_BYTES:
                        begin(descriptor)
                        begun = end
            finally:
                os.close(descriptor)

    def _ends(self, file: str) -> Iterator[int]:
        """Yields up to where a file is complete, each time that this is further on."""
        held = [(name, place) for name, place in self._files.places.items() if place.file == file]
        left = deque(sorted(held, key=lambda one: (one[1].begin, one[1].end)))
        while left:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or left[0][0] in self._complete)
                if self._stopped:
                    return
                end = 0
                while left and left[0][0] in self._complete:
                    end = left.popleft()[1].end
            yield end
