"""The work folder of a calibration: the files being filled, a journal, and the sums of a pass.

A killed run is continued from here, to the very same bytes.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eckart.calibration.summing import Counts, Sums
from eckart.checkpoint.documents import canonical_json, parse_json, read_json
from eckart.checkpoint.hashing import TensorHash, digest_of
from eckart.checkpoint.header import read_header
from eckart.checkpoint.journal import append_line, read_lines
from eckart.checkpoint.paths import printable, storage_errors, sync, write_file
from eckart.checkpoint.source import Checkpoint
from eckart.checkpoint.statistics import Document, lay_out_statistics
from eckart.checkpoint.tensor_file import Place, TensorFiles, TensorLayout, lay_out_file
from eckart.errors import CheckpointError, StaleError

WORK, JOURNAL, FILES, STATE = "work.json", "journal", "statistics", "state.safetensors"
ABOUT = "about"

PAUSE, PATIENCE = 60.0, 20
"""The sums are written down after so many seconds, and so many times what that takes."""

SCHEMA = "eckart-calibration/1"


@dataclass
class Work:
    """An open work folder, locked by the caller."""

    folder: Path
    files: TensorFiles
    done: dict[str, str]  # tensor → BLAKE3
    facts: list[dict[str, Any]]  # what each finished pass had to say
    pause: float = field(default_factory=lambda: PAUSE)  # seconds between two states
    _saved: float = field(default_factory=time.monotonic)

    def write(
        self, tensors: Iterable[tuple[str, Tensor]], facts: Callable[[], dict[str, Any]]
    ) -> None:
        """Puts the tensors of a finished pass in their places, and into the journal.

        `facts` is asked when all of them have been taken.
        """
        sums: dict[str, str] = {}
        for name, tensor in tensors:
            self.files.write(name, tensor)
            sums[name] = digest_of(tensor)
        self.files.sync()
        found = facts()
        append_line(self.folder / JOURNAL, {"sums": sums, "facts": found})
        self.done |= sums
        self.facts.append(found)
        (self.folder / STATE).unlink(missing_ok=True)

    def save(self, sums: Sums) -> None:
        """Writes down the sums of a pass that is under way, now and then."""
        began = time.monotonic()
        if began - self._saved < self.pause:
            return
        tensors, path = sums.tensors, self.folder / f"{STATE}.new"
        about = {
            "counts": asdict(sums.counts),
            "sums": {k: digest_of(v) for k, v in tensors.items()},
        }
        text = torch.frombuffer(bytearray(canonical_json(about)), dtype=torch.uint8)
        content = {**tensors, ABOUT: text}
        path.unlink(missing_ok=True)
        file = lay_out_file(path, {name: TensorLayout.like(t) for name, t in content.items()})
        for name, tensor in content.items():
            file.write(name, tensor)
        with storage_errors(path):
            path.rename(self.folder / STATE)
        self._saved = time.monotonic()
        self.pause = max(self.pause, PATIENCE * (self._saved - began))

    def restore(self, sums: Sums) -> bool:
        """Fills the sums with what was written down of this very pass, if that is whole."""
        path, tensors = self.folder / STATE, sums.tensors
        if not path.exists():
            return False
        try:
            state = Checkpoint(path, read_header(path))
            about = parse_json(bytes(state.load(ABOUT).numpy()), printable(path))
            if {*state.tensors} != {*tensors, ABOUT} or about["sums"].keys() != tensors.keys():
                return False
            found = {name: state.load(name) for name in tensors}
        except (CheckpointError, KeyError):
            return False
        if any(digest_of(t) != about["sums"][name] for name, t in found.items()):
            return False
        for name, tensor in tensors.items():
            tensor.copy_(found[name])
        sums.counts = Counts(**about["counts"])
        return True

    def publish(self, staged: Path) -> None:
        """Moves the files to where the output is made."""
        for file in self.files.files:
            with storage_errors(staged):
                (self.folder / FILES / file).rename(staged / file)


def open_work(folder: Path, document: Document, identity: Mapping[str, Any]) -> Work:
    """Returns the work in a run folder: begun here, or what a killed run left, checked.

    Raises StaleError, naming what differs, where that was another request.
    """
    said = {"schema": SCHEMA, "identity": dict(identity)}
    path = folder / FILES
    if not (folder / WORK).exists():
        shutil.rmtree(path, ignore_errors=True)
        with storage_errors(path):
            path.mkdir()
        files = lay_out_statistics(path, document)
        files.sync()
        write_file(folder / WORK, canonical_json(said) + b"\n")
        sync(folder)
        return Work(folder, files, {}, [])
    _check_same(folder, identity)
    return _recover(folder, document)


def _check_same(folder: Path, identity: Mapping[str, Any]) -> None:
    found = read_json(folder / WORK)
    theirs = found.get("identity")
    if found.get("schema") != SCHEMA or not isinstance(theirs, dict):
        raise StaleError(f"{printable(folder)} was written by another version: delete it.")
    differ = sorted(k for k in {*theirs, *identity} if theirs.get(k) != identity.get(k))
    if differ:
        raise StaleError(
            f"{printable(folder)} holds what a stopped run with another {differ[0]} has summed: "
            "delete it, or go back to that."
        )


def _recover(folder: Path, document: Document) -> Work:
    """What the journal says is done, where the files still have it."""
    path, layout = folder / FILES, document.layout()
    places: dict[str, Place] = {}
    for file in sorted(path.glob("*.safetensors")):
        held = read_header(file)
        places |= {name: Place(file.name, info.begin, info.end) for name, info in held.items()}
    if places.keys() != layout.keys():
        raise StaleError(f"{printable(folder)} is damaged: delete it, and start again.")
    work = Work(folder, TensorFiles(path, places), {}, [])
    for line in read_lines(folder / JOURNAL):
        sums: dict[str, str] = line["sums"]
        if all(_digest(path, places[name]) == digest for name, digest in sums.items()):
            work.done |= sums
            work.facts.append(line["facts"])
    return work


def _digest(folder: Path, place: Place) -> str:
    """BLAKE3 of what stands in a place."""
    found, left = TensorHash(), place.end - place.begin
    with (folder / place.file).open("rb") as stream:
        stream.seek(place.begin)
        while left and (piece := stream.read(min(left, 2**24))):
            found.update(piece)
            left -= len(piece)
    return found.hexdigest()
