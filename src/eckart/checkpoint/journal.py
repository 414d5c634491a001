"""Journals: one line for each thing done, each with its checksum, so that a torn one is seen."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eckart.checkpoint.documents import canonical_json, parse_json
from eckart.checkpoint.paths import read_bytes, storage_errors

JOURNAL_BYTES = 2**30


def append_line(path: Path, entry: Mapping[str, object]) -> None:
    """Adds a line. Not synced: what a power cut takes was not done.

    A line begins with its newline: after a torn one the next still stands by itself.
    """
    text = canonical_json(entry)
    with storage_errors(path), path.open("ab") as stream:
        stream.write(f"\n{zlib.crc32(text):08x} ".encode() + text)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines that are whole; a torn or damaged one is left out."""
    if not path.exists():
        return []
    entries: list[dict[str, Any]] = []
    for line in read_bytes(path, JOURNAL_BYTES).split(b"\n"):
        checksum, _, text = line.partition(b" ")
        if checksum == f"{zlib.crc32(text):08x}".encode():
            entries.append(parse_json(text, path.name))
    return entries
