"""Pickled checkpoints (`pytorch_model.bin`), read as data: `weights_only=True`, and no more.

Only where the user says so. torch is shown the pickle alone, after a look at what it asks for, and
says which tensor is which view of which record; the records are read here, their CRCs checked,
which torch does not do, and nothing that a tensor claims is believed beyond what is stored.
"""

import io
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eckart.checkpoint.archive import Record, read_directory
from eckart.checkpoint.header import (
    DTYPES,
    HEADER_BYTES,
    TensorInfo,
    check_claims,
    check_tensor,
)
from eckart.checkpoint.index import PICKLE, read_index
from eckart.checkpoint.opcodes import scan_pickle
from eckart.checkpoint.paths import damage, open_regular, printable
from eckart.checkpoint.source import Source, Stamp
from eckart.errors import CheckpointError

NAMES = {dtype: name for name, dtype in DTYPES.items()}

FLAT = "only a flat set of named, dense tensors is read. Convert it to safetensors if you trust it."

LEGACY_PICKLES = 5  # magic number, version, machine, tensors, keys of the storages


@dataclass(frozen=True, slots=True)
class Strided:
    """Where a tensor lies: a view of one record."""

    info: TensorInfo
    record: Record
    stride: tuple[int, ...]
    start: int  # elements

    @property
    def span(self) -> int:
        """Bytes of the record that the view reaches."""
        if 0 in self.info.shape:
            return 0
        steps = zip(self.info.shape, self.stride, strict=True)
        last = self.start + sum((side - 1) * step for side, step in steps)
        return (last + 1) * DTYPES[self.info.dtype].itemsize


@dataclass(frozen=True)
class PickleSource(Source):
    """`pytorch_model.bin`, or its shards and their index.

    Tensors are read record by record, so the peak is one record, and a copy where a tensor is
    stored transposed.
    """

    views: Mapping[str, Strided] = field(default_factory=dict)

    def read(self, name: str, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` from the tensor, which is kept until another is asked for."""
        view = self.views[name]
        stamp = self._check_file(view.info.file)
        data = _bytes(self.file(view.info.file), view, stamp)
        buffer[:] = data[offset : offset + len(buffer)]


def open_pickles(path: Path) -> PickleSource:
    """Returns the pickled checkpoint in a folder, or in one file."""
    if not path.is_dir():
        views = _read_views(path)
    elif (path / PICKLE.weights).exists():
        views = _read_views(path / PICKLE.weights)
    else:
        index = read_index(path, PICKLE)
        shards = {shard: _read_views(path / shard) for shard in index.shards}
        index.merge({shard: _infos(found) for shard, found in shards.items()})
        views = {name: view for found in shards.values() for name, view in found.items()}
    return PickleSource(path, _infos(views), _tied(views), views)


def _infos(views: Mapping[str, Strided]) -> dict[str, TensorInfo]:
    return {name: view.info for name, view in views.items()}


def _tied(views: Mapping[str, Strided]) -> dict[str, str]:
    """Names that stand for the very same memory as an earlier one, and which."""
    first: dict[Strided, str] = {}
    shared = {name: first.setdefault(view, name) for name, view in sorted(views.items())}
    return {name: other for name, other in shared.items() if name != other and views[name].span}


def _read_views(path: Path) -> dict[str, Strided]:
    """What a file holds, from its pickle alone: no tensor is read."""
    with damage(path):
        with os.fdopen(open_regular(path), "rb") as stream:
            archive = stream.read(4) == b"PK\3\4"
        found, records = _read_archive(path) if archive else _read_legacy(path)
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{printable(path)} holds a {type(found).__name__}: {FLAT}")
    views = {name: _view(name, value, path, records) for name, value in found.items()}
    check_claims(_infos(views).values(), path)
    return views


def _read_archive(path: Path) -> tuple[Any, dict[int, Record]]:
    """The format since torch 1.6: a zip archive, with a record for each storage."""
    members = read_directory(path)
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1 or members[pickles[0]].nbytes > HEADER_BYTES:
        raise ValueError("it holds no data.pkl, or several, or an enormous one")
    root = pickles[0].removesuffix("data.pkl")
    if any(record.deflated for record in members.values()):
        raise CheckpointError(
            f"{printable(path)} holds compressed records, which torch never writes: save it again."
        )
    if (order := members.get(f"{root}byteorder")) and order.read(path) != b"little":
        raise CheckpointError(
            f"{printable(path)} was written on a big-endian machine: convert it to safetensors "
            "there."
        )
    text = bytes(members[pickles[0]].read(path))
    identities, _ = scan_pickle(io.BytesIO(text), path)
    counts = _storages(identities, sum(record.nbytes for record in members.values()))
    alone = io.BytesIO()
    with zipfile.ZipFile(alone, "w") as archive:
        archive.writestr("alone/data.pkl", text)
        archive.writestr("alone/version", "3")
    found, storages = _interpret(alone)
    records: dict[int, Record] = {}
    for key, (storage, size) in zip(counts, storages, strict=True):
        record = members.get(f"{root}data/{key}", Record(0, 0, 0))
        if record.nbytes != size:
            raise ValueError(f"its storage {key} claims {size} bytes where {record.nbytes} are")
        records[storage.data_ptr()] = record
    return found, records


def _read_legacy(path: Path) -> tuple[Any, dict[int, Record]]:
    """The format before torch 1.6: five pickles, then each storage: its length, its numbers."""
    with os.fdopen(open_regular(path), "rb") as stream:
        *_, (identities, _), (_, order) = [scan_pickle(stream, path) for _ in range(LEGACY_PICKLES)]
        total, offset = os.fstat(stream.fileno()).st_size, stream.tell()
        if offset > HEADER_BYTES:
            raise ValueError("its pickles are enormous")
        stream.seek(0)
        alone = io.BytesIO(stream.read(offset))
        counts = _storages(identities, total)
        found, storages = _interpret(alone)
        places = dict(zip(counts, storages, strict=True))
        records: dict[int, Record] = {}
        for key in order:
            storage, size = places.pop(key, (None, 0))
            if int.from_bytes(stream.read(8), "little") != (counts[key] if storage else 0):
                raise ValueError(f"its storage {key} is not as long as it says")
            if storage:
                records[storage.data_ptr()] = Record(offset + 8, size, size)
            offset = stream.seek(offset + 8 + size)
    if places or offset != total:
        raise ValueError(f"its storages should end at byte {offset}, and it has {total}")
    return found, records


def _interpret(pickles: io.BytesIO) -> tuple[Any, list[tuple[torch.UntypedStorage, int]]]:
    """What torch makes of a pickle, and the storages that are not empty, in order of appearance.

    With the sizes that they were made with: torch lets a tensor that claims more enlarge its own.
    Their memory is only reserved, never touched: the data are not there.
    """
    storages: list[tuple[torch.UntypedStorage, int]] = []

    def keep(storage: Any, _: str) -> Any:
        storages.append((storage, storage.nbytes()))
        return storage

    pickles.seek(0)
    with torch.serialization.skip_data():
        try:
            found = torch.load(pickles, map_location=keep, weights_only=True)
        except pickle.UnpicklingError:  # whose text recommends to read it unsafely
            raise ValueError("torch cannot read it with weights_only=True") from None
    return found, [(storage, size) for storage, size in storages if size]


def _storages(identities: Iterable[object], total: int) -> dict[str, int]:
    """Key → number of entries of the storages that have any, in order of appearance."""
    found: dict[str, int] = {}
    for identity in identities:
        match identity:
            case ("storage", str(), str(key), _, int(count), *_):
                if count:
                    found.setdefault(key, count)
            case _:
                raise ValueError("it refers to something that is no storage")
    if sum(found.values()) > total:
        raise ValueError("its storages claim more than the file holds")
    return found


def _view(name: object, value: object, path: Path, records: Mapping[int, Record]) -> Strided:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        place = printable(name) if isinstance(name, str) else f"a {type(name).__name__}"
        raise CheckpointError(
            f"{printable(path)} holds a {type(value).__name__} under {place}: {FLAT}"
        )
    if value.layout is not torch.strided or value.dtype not in NAMES or value.is_neg():
        kind = f"{value.layout}, {value.dtype}".replace("torch.", "")
        raise CheckpointError(
            f"{printable(name)} in {printable(path)} is no plain dense tensor ({kind}): {FLAT}"
        )
    shape = tuple(value.shape)
    check_tensor(name, shape, path)
    size = value.numel() * value.itemsize
    storage = value.untyped_storage().data_ptr() if size else 0
    record = records.get(storage, Record(0, 0, 0))
    info = TensorInfo(shape, NAMES[value.dtype], path.name, 0, size)
    view = Strided(info, record, tuple(value.stride()), int(value.storage_offset()))
    if max(size, view.span) > record.nbytes:
        raise CheckpointError(
            f"{printable(name)} in {printable(path)} claims {size} bytes where {record.nbytes} are "
            "stored: it is damaged, or an expanded view, which must be made contiguous."
        )
    return view


@lru_cache(maxsize=2)  # one of a tuned model and one of its base
def _bytes(path: Path, view: Strided, stamp: Stamp) -> memoryview:
    """The bytes of one tensor of a file as it then was: row-major."""
    if not view.span:
        return memoryview(b"")
    content, dtype = _content(path, view.record, stamp), DTYPES[view.info.dtype]
    flat = torch.frombuffer(content, dtype=dtype, count=len(content) // dtype.itemsize)
    tensor = flat.as_strided(view.info.shape, view.stride, view.start).contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@lru_cache(maxsize=2)  # one of a tuned model and one of its base
def _content(path: Path, record: Record, _: Stamp) -> bytes | bytearray:
    """A record, kept because many tensors may be views of it."""
    return record.read(path)
