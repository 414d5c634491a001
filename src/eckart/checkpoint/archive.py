"""Zip archives and plain files as records: read by place and length, before anything is believed.

Sizes are compared with the file's before memory is taken, and every CRC must hold.
"""

import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from eckart.checkpoint.paths import damage, open_regular, printable, read_into
from eckart.errors import CheckpointError

LOCAL_HEADER, ENCRYPTED = 30, 1  # bytes before the name, and a flag: ZIP application note, 4.3.7


@dataclass(frozen=True, slots=True)
class Record:
    """A piece of a file: a member of a zip archive, or bytes that lie there as they are."""

    offset: int
    stored: int  # bytes in the file
    nbytes: int  # bytes of content
    deflated: bool = False
    crc: int | None = None  # CRC-32 of the content, where the file has one

    def read(self, path: Path) -> bytes | bytearray:
        """Returns the content, its CRC checked. Peak: it, and what is stored where that differs."""
        found = self._unpack(path, self.stored, self.nbytes + 1)
        if len(found) != self.nbytes or (self.crc is not None and zlib.crc32(found) != self.crc):
            raise CheckpointError(
                f"{printable(path)} is damaged at byte {self.offset}: the CRC of what is stored "
                "there does not hold. Download it again."
            )
        return found

    def head(self, path: Path, count: int) -> bytes | bytearray:
        """Returns the first `count` bytes of the content, or all there are, unchecked."""
        margin = 64 if self.deflated else 0  # what cannot be deflated is some bytes longer
        return self._unpack(path, min(self.stored, count + margin), count)

    def _unpack(self, path: Path, stored: int, count: int) -> bytes | bytearray:
        found = bytearray(stored)
        descriptor = open_regular(path)
        try:
            read_into(descriptor, memoryview(found), self.offset, path)
        finally:
            os.close(descriptor)
        if not self.deflated:
            return found
        with damage(path):
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(found, count)


def read_directory(path: Path) -> dict[str, Record]:
    """Returns the members of a zip archive, each within the file and once."""
    found: dict[str, Record] = {}
    with damage(path), os.fdopen(open_regular(path), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        with zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
        for member in members:
            stream.seek(member.header_offset + LOCAL_HEADER - 4)
            begin = stream.tell() + 4 + sum(struct.unpack("<HH", stream.read(4)))
            name, deflated = member.filename, member.compress_type == zipfile.ZIP_DEFLATED
            record = Record(begin, member.compress_size, member.file_size, deflated, member.CRC)
            if name in found:
                raise ValueError(f"{name} stands there twice")
            if member.flag_bits & ENCRYPTED or not (deflated or member.compress_type == 0):
                raise ValueError(f"{name} is encrypted, or packed in a way unknown here")
            if begin + record.stored > size or not (deflated or record.stored == record.nbytes):
                raise ValueError(f"{name} is larger than the file says, or than the file")
            found[name] = record
    return found
