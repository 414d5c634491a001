"""What a text says of a model's matrices: C = E[x xᵀ] and G of each, on disk, read one at a time.

Knows files and shapes; must not know how the moments were found, nor what they weigh.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from eckart.checkpoint.documents import canonical_json, parse_json
from eckart.checkpoint.hashing import digest_of
from eckart.checkpoint.header import TensorInfo, read_header
from eckart.checkpoint.paths import is_there, natural_order, printable, read_bytes, write_file
from eckart.checkpoint.source import Checkpoint
from eckart.checkpoint.tensor_file import Place, TensorFiles, TensorLayout, lay_out_file
from eckart.checkpoint.writer import STATISTICS
from eckart.errors import CheckpointError

STATISTICS_BYTES = 2**28

Curvature = Literal["full", "diagonal", "none"]
"""How much of G is kept: m×m, its diagonal, or nothing."""


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A frozen JSON object that accepts no unknown field."""


class Origin(Entry, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The model that was run: its folder's own name, and the digest of its tensors."""

    name: str
    fingerprint: str


class Text(Entry, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What it was run on: the file's own name, and the SHA-256 of the tensors made of it."""

    name: str
    digest: str


class Group(Entry, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Matrices that share their input, and so C (n×n)."""

    width: int  # n
    rows: int  # input vectors that C is the mean of


class Moments(Entry, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is known of one tensor's matrices."""

    shape: tuple[int, int]  # (m, n) of W, whichever way it is stored
    groups: list[str]  # one; of fused experts one for all, or one each
    curvature: Curvature
    count: int = 1  # of fused experts: how many there are
    pooled: list[int] = []  # experts that saw too little and have the layer's mean


class LeftOut(Entry, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A matrix of the model that no statistics were taken of, and why."""

    name: str
    reason: str


class Document(Entry, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`statistics.json`. `digest` covers all the rest, and through `sums` every byte of C and G."""

    schema: Literal["eckart/1"] = "eckart/1"
    kind: Literal["statistics"] = "statistics"
    digest: str = ""
    model: Origin
    text: Text
    tokens: int  # that a loss in nats per token is told of: G is a sum divided by it
    loss: float | None  # the model's own, in nats per predicted token; null without one
    curvature: Curvature  # as it was asked
    options: dict[str, str | int | float | bool | list[str] | None]
    versions: dict[str, str]
    groups: dict[str, Group]
    matrices: dict[str, Moments]
    files: dict[str, int] = {}  # name → bytes
    sums: dict[str, str] = {}  # tensor → BLAKE3 of its bytes
    left_out: list[LeftOut] = []
    remarks: list[str] = []  # what a reader of the numbers should know

    def encode(self) -> bytes:
        """Returns the file's contents, canonical, with the digest filled in."""
        document = msgspec.to_builtins(self) | {"digest": ""}
        return canonical_json(document | {"digest": _digest(document)}) + b"\n"

    def layout(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every tensor that belongs to these statistics, by its name.

        `<group>.C` is n×n. `<matrix>.G` is m×m or m, and of E fused experts E×m×m or E×m.
        """
        shapes = {f"{name}.C": (group.width, group.width) for name, group in self.groups.items()}
        return shapes | {
            f"{name}.G": (entry.count,) * (entry.count > 1) + _sides(entry)
            for name, entry in self.matrices.items()
            if entry.curvature != "none"
        }


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows begin … end − 1 of a matrix that there are statistics of."""

    name: str
    index: int | None  # in a stack of experts
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Statistics:
    """The statistics in a folder: what they are of, and C and G of each matrix on demand.

    Matrices have the names of the checkpoint's tensors, or, with `parts`, of what those are put
    together to: of each of its matrices, whose rows it has.
    """

    folder: Path
    document: Document
    _places: Checkpoint
    parts: Mapping[str, tuple[tuple[Rows, ...], ...]] = field(default_factory=dict[str, Any])

    @property
    def digest(self) -> str:
        """SHA-256 over all that these statistics say: equal digests mean equal numbers."""
        return self.document.digest

    @property
    def fingerprint(self) -> str:
        """Of the model that was run: see `Source.fingerprint`."""
        return self.document.model.fingerprint

    @property
    def tokens(self) -> int:
        """How many tokens the loss is told per."""
        return self.document.tokens

    @property
    def names(self) -> list[str]:
        """The tensors whose matrices these are of."""
        return [*self.document.matrices]

    def group(self, name: str, index: int = 0) -> str:
        """Returns the group whose input a matrix shares; `index` counts fused experts."""
        entry = self._entry(name, index)
        return entry.groups[index if len(entry.groups) > 1 else 0]

    def inputs(self, name: str, index: int = 0) -> Tensor:
        """Returns C = E[x xᵀ] of a matrix's inputs, n×n, float32. Cost: reads and hashes it."""
        return self._load(f"{self.group(name, index)}.C")

    def curvature(self, name: str, index: int = 0) -> Tensor | None:
        """Returns G = Σ g gᵀ / tokens of a matrix: m×m, its diagonal m, or None; float32.

        g is the derivative of the summed loss by the matrix's output. Between rows that were
        stored in two tensors nothing of G is known, and it is taken to be zero: each of the two is
        then weighed as it is alone.
        """
        entry = self._entry(name, index)
        if entry.curvature == "none":
            return None
        if name not in self.parts:
            G = self._load(f"{name}.G")
            return G[index] if entry.count > 1 else G
        blocks = [self._cut(rows, entry.curvature) for rows in self.parts[name][index]]
        return torch.cat(blocks) if entry.curvature == "diagonal" else torch.block_diag(*blocks)

    def _cut(self, rows: Rows, curvature: Curvature) -> Tensor:
        """What G says of some rows of a matrix."""
        G = self._load(f"{rows.name}.G")
        G = G if rows.index is None else G[rows.index]
        G = G[rows.begin : rows.end]
        return G[:, rows.begin : rows.end] if curvature == "full" else G

    def _entry(self, name: str, index: int) -> Moments:
        if name not in self.document.matrices:
            reasons = {row.name: row.reason for row in self.document.left_out}
            why = f" ({printable(reasons[name])})" if name in reasons else ""
            raise CheckpointError(
                f"{printable(self.folder)} holds no statistics of {printable(name)}{why}: "
                "calibrate with that matrix, or leave it out with --exclude."
            )
        entry = self.document.matrices[name]
        assert 0 <= index < entry.count, f"{name}: matrix {index} of {entry.count}"
        return entry

    def _load(self, tensor: str) -> Tensor:
        found = self._places.load(tensor)
        if digest_of(found) != self.document.sums[tensor]:
            raise CheckpointError(
                f"{printable(tensor)} in {printable(self.folder)} is not as it was written: "
                "calibrate again."
            )
        return found


def open_statistics(folder: Path | str) -> Statistics:
    """Returns the statistics in a folder, from its document and headers alone.

    Raises CheckpointError where they are missing, changed, or not exactly what the document says.
    """
    folder = Path(folder)
    path = folder / STATISTICS
    if not folder.exists():
        raise CheckpointError(f"{printable(folder)} does not exist: check the path.")
    if not folder.is_dir() or not is_there(path):
        raise CheckpointError(
            f"there is no {STATISTICS} in {printable(folder)}: give a folder that eckart "
            "calibrate wrote."
        )
    content = read_bytes(path, STATISTICS_BYTES)
    try:
        document = msgspec.convert(parse_json(content, printable(path)), Document)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{printable(path)} is damaged: {error}.") from None
    if document.encode() != content:
        raise CheckpointError(
            f"{printable(path)} was changed after it was written: its digest does not hold."
        )
    places = Checkpoint(folder, _read_headers(folder, document))
    _check_layout(folder, document, places.tensors)
    return Statistics(folder, document, places)


def lay_out_statistics(folder: Path, document: Document) -> TensorFiles:
    """Creates the files of statistics, one for each block of the model, with nothing in them yet.

    They are filled in any order by `TensorFiles.write`.
    """
    layout, places = document.layout(), dict[str, Place]()
    blocks = blocks_of(layout)
    for number, names in enumerate(blocks.values(), 1):
        path = folder / f"statistics-{number:05d}-of-{len(blocks):05d}.safetensors"
        shapes = {name: TensorLayout.of("F32", layout[name]) for name in names}
        places |= lay_out_file(path, shapes).places
    return TensorFiles(folder, places)


def write_statistics(folder: Path, document: Document, tensors: Mapping[str, Tensor]) -> Statistics:
    """Writes statistics whose tensors are in memory into a folder that is there, and opens them.

    `tensors` are those of `document.layout()`, float32.
    """
    files = lay_out_statistics(folder, document)
    for name in files.places:
        files.write(name, tensors[name])
    files.sync()
    sums = {name: digest_of(tensors[name]) for name in files.places}
    return write_document(folder, document, sums)


def write_document(folder: Path, document: Document, sums: Mapping[str, str]) -> Statistics:
    """Writes `statistics.json` over the files that stand in a folder, and opens the whole."""
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    whole = msgspec.structs.replace(document, files=files, sums=dict(sums))
    write_file(folder / STATISTICS, whole.encode())
    return open_statistics(folder)


def blocks_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns names by the block of the model that they belong to: up to the first number.

    >>> blocks_of(["h.10.fc.weight.G", "h.2.fc.weight.C", "head.weight.C", "h.2.fc.weight.G"])
    {'': ['head.weight.C'], 'h.2': ['h.2.fc.weight.C', 'h.2.fc.weight.G'],
     'h.10': ['h.10.fc.weight.G']}
    """
    blocks: dict[str, list[str]] = {}
    for name in sorted(names):
        blocks.setdefault(block_of(name), []).append(name)
    return {block: blocks[block] for block in sorted(blocks, key=natural_order)}


def block_of(name: str) -> str:
    """Returns the block of a model that a name belongs to: the beginning, to its first number."""
    parts = name.split(".")
    first = next(
        (place for place, part in enumerate(parts) if part.isascii() and part.isdigit()), None
    )
    return "" if first is None else ".".join(parts[: first + 1])


def _sides(entry: Moments) -> tuple[int, ...]:
    m, _ = entry.shape
    return (m, m) if entry.curvature == "full" else (m,)


def _read_headers(folder: Path, document: Document) -> dict[str, TensorInfo]:
    found: dict[str, TensorInfo] = {}
    for file, size in document.files.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{printable(file)} is no name of a file of statistics.")
        header = read_header(folder / file)
        held = (folder / file).stat().st_size
        if held != size or header.keys() & found.keys():
            raise CheckpointError(
                f"{printable(folder / file)} is not as it was written ({held} bytes, once "
                f"{size}): calibrate again."
            )
        found |= header
    return found


def _check_layout(folder: Path, document: Document, held: Mapping[str, TensorInfo]) -> None:
    """Raises CheckpointError unless the files hold just what the document's records need."""
    expected = document.layout()
    for name in sorted(expected.keys() | held.keys() | document.sums.keys()):
        info, shape = held.get(name), expected.get(name)
        if info and shape == info.shape and info.dtype == "F32" and name in document.sums:
            continue
        raise CheckpointError(
            f"{printable(folder)} does not hold what its {STATISTICS} says of {printable(name)}: "
            "calibrate again."
        )
    for name, entry in document.matrices.items():
        if not _agrees(entry, document.groups):
            raise CheckpointError(
                f"{printable(folder / STATISTICS)} contradicts itself over {printable(name)}: "
                "calibrate again."
            )
    if document.tokens < 1:
        raise CheckpointError(f"{printable(folder / STATISTICS)} is of no token: calibrate again.")


def _agrees(entry: Moments, groups: Mapping[str, Group]) -> bool:
    """Whether a record's groups are there, as many as it needs and as wide."""
    widths = [groups[group].width if group in groups else 0 for group in entry.groups]
    many = len(widths) in (1, entry.count)
    return many and min(entry.shape) > 0 and {*widths} == {entry.shape[1]}


def _digest(document: dict[str, Any]) -> str:
    rest = {key: value for key, value in document.items() if key != "digest"}
    return hashlib.sha256(canonical_json(rest)).hexdigest()
