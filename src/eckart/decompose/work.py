"""The work folder: parts, the journal that lists them, and the identity that all of it must have.

A killed run is continued from here, and another budget is served from here without an SVD.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eckart.checkpoint.documents import canonical_json, read_json
from eckart.checkpoint.journal import append_line, read_lines
from eckart.checkpoint.paths import printable, storage_errors, sync, write_file
from eckart.checkpoint.source import Source
from eckart.checkpoint.statistics import Statistics
from eckart.decompose.part import Decomposition, read_part
from eckart.decompose.request import Request
from eckart.decompose.unit import Failure
from eckart.decompose.weighting import damping_of
from eckart.errors import CheckpointError, StaleError

SCHEMA = "eckart-work/1"
WORK, PARTS, JOURNAL = "work.json", "parts", "journal-1-of-1"

Identity = Mapping[str, Any]


@dataclass
class Work:
    """An open work folder, locked by the caller: what was found before, and where new parts go."""

    folder: Path
    source: Source
    identity: Identity
    done: dict[str, Decomposition] = field(default_factory=dict)
    failed: dict[str, Failure] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """The SHA-256 of the identity: every part carries it."""
        return hashlib.sha256(canonical_json(self.identity)).hexdigest()

    def parts(self, names: Iterable[str]) -> dict[str, Path]:
        """Returns each tensor's part: named by its place in the source, never by its name."""
        places = {name: place for place, name in enumerate(self.source.tensors)}
        return {
            name: self.folder / PARTS / f"part-{places[name]:06d}.safetensors" for name in names
        }

    def missing(self, requests: Mapping[str, Request]) -> dict[str, Request]:
        """Returns the requests that no kept part serves."""
        return {
            name: request
            for name, request in requests.items()
            if name not in self.failed
            and not (name in self.done and request.within(_kept(self.done[name])))
        }

    def record(self, result: Decomposition | Failure) -> None:
        """Adds a result to the journal. Not synced: see `write_part`."""
        if isinstance(result, Failure):
            self.failed[result.name] = result
            entry = {"name": result.name, "failed": result.reason}
        else:
            self.done[result.name] = result
            entry = {"name": result.name, "part": result.part.name}
        append_line(self.folder / JOURNAL, entry)


def open_work(folder: Path, source: Source, identity: Identity, names: Iterable[str]) -> Work:
    """Returns the work in a folder: begun here, or what an earlier run left, checked.

    Raises StaleError, naming each option that differs, where the folder belongs to another
    request or to something else. Cost: reads and hashes every part that is there.
    """
    work = Work(folder, source, identity)
    if (folder / WORK).exists():
        stamps_differ = _check_same(folder, identity, source)
        _recover(work, names)
        if stamps_differ or source.known:  # where digests are known, comparing costs nothing
            _check_source(work)
    else:
        _begin(work)
    return work


def identity_of(
    source: Source,
    *,
    seed: int,
    threads: int | None,
    device: str,
    versions: Mapping[str, str],
    statistics: Statistics | None = None,
) -> dict[str, Any]:
    """Returns all that a decomposition depends on; the stamps of the files stand beside it."""
    headers = [[name, info.dtype, [*info.shape]] for name, info in source.tensors.items()]
    return {
        "source": hashlib.sha256(canonical_json(headers)).hexdigest(),
        "metric": damping_of(statistics),
        "statistics": statistics and statistics.digest,
        "seed": seed,
        "threads": threads,
        "device": device,
        **{f"version of {package}": version for package, version in versions.items()},
    }


def _begin(work: Work) -> None:
    strangers = [path.name for path in work.folder.iterdir() if path.name not in ("lock", "output")]
    if strangers:
        raise StaleError(
            f"{printable(work.folder)} holds {printable(strangers[0])}, which is not eckart's: "
            "name an empty folder, or one that does not exist, with --work."
        )
    with storage_errors(work.folder):
        (work.folder / PARTS).mkdir()
    write_file(work.folder / WORK, canonical_json(_document(work.identity, work.source)) + b"\n")
    sync(work.folder)


def _document(identity: Identity, source: Source) -> dict[str, Any]:
    stamps = {file: [stamp.bytes, stamp.mtime_ns] for file, stamp in source.stamps.items()}
    return {"schema": SCHEMA, "identity": dict(identity), "files": stamps}


def _check_same(folder: Path, identity: Identity, source: Source) -> bool:
    """Raises StaleError unless the folder's identity is this one; True if only stamps differ."""
    try:
        found = read_json(folder / WORK)
    except CheckpointError as error:
        raise StaleError(f"{error} Delete {printable(folder)}, or name another --work.") from None
    theirs, expected = found.get("identity"), _document(identity, source)
    if found.get("schema") != SCHEMA or not isinstance(theirs, dict):
        raise StaleError(
            f"{printable(folder)} was written by another version: delete it, or name another "
            "--work."
        )
    changes = [
        f"{key} was {_shown(theirs.get(key))}, now {_shown(identity.get(key))}"
        if key != "source"
        else "the source has other tensors"
        for key in sorted({*theirs, *identity})
        if theirs.get(key) != identity.get(key)
    ]
    if changes:
        raise StaleError(
            f"{printable(folder)} holds work for another request ({'; '.join(changes)}): delete "
            "it, name another --work, or go back to those options."
        )
    return found.get("files") != expected["files"]


def _shown(value: object) -> str:
    return printable(json.dumps(value))


def _recover(work: Work, names: Iterable[str]) -> None:
    """Takes over every part that is whole, and the failures that the journal tells of."""
    lines = read_lines(work.folder / JOURNAL)
    listed = {entry["name"]: entry for entry in lines if isinstance(entry.get("name"), str)}
    for name, path in work.parts(names).items():
        if "failed" in listed.get(name, {}):
            work.failed[name] = Failure(name, str(listed[name]["failed"]))
        elif path.exists():
            try:
                work.done[name] = read_part(path, name, work.digest)
            except CheckpointError:
                work.damaged.append(name)
        elif name in listed:
            work.damaged.append(name)


def _check_source(work: Work) -> None:
    """The files were written again since: what was decomposed must still be what stands there."""
    for name, found in work.done.items():
        if work.source.digest(name) != found.source_digest:
            raise StaleError(
                f"{printable(name)} has changed in {printable(work.source.path)} since "
                f"{printable(work.folder)} was begun: delete that folder, or name another --work."
            )


def _kept(found: Decomposition) -> Request:
    return Request(found.rank, found.all_values)
