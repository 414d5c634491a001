"""Pickled checkpoints: what torch loads is what is read, and nothing is run or believed."""

import io
import json
import os
import pickle
import pickletools
import shutil
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from torch import Tensor

from eckart.checkpoint import archive, header
from eckart.checkpoint.index import PICKLE
from eckart.checkpoint.opening import open_source
from eckart.checkpoint.pickle_source import PickleSource
from eckart.checkpoint.source import Source
from eckart.errors import CheckpointError

W = torch.arange(24.0).reshape(4, 6)

TENSORS = {
    "contiguous": W,
    "transposed": W.T,
    "rows": W[1:3],
    "columns": W[:, 1::2],
    "one row": W[2],
    "permuted": torch.arange(24).reshape(2, 3, 4).permute(2, 0, 1),
    "channels last": torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
    "parameter": torch.nn.Parameter(W.clone()),
    "frozen": torch.nn.Parameter(W.clone(), requires_grad=False),
    "buffer": torch.arange(5).expand(1, -1),
    "0-d": torch.tensor(3),
    "0-d of a matrix": W[1, 2],
    "empty": torch.empty(0, 3),
    "empty of a matrix": W[4:],
    "bool": W > 7,
    "float64": W.double(),
    "float16": W.half(),
    "bfloat16": W.bfloat16(),
    "int64": W.long(),
    "int32": W.int(),
    "int16": W.short(),
    "int8": W.char(),
    "uint8": W.byte(),
}
FLOAT8 = {
    str(dtype): W.to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
}  # the legacy format cannot hold them

FORMATS = {"zip": True, "legacy": False}


def opened(path: Path) -> Source:
    return open_source(path, allow_pickle=True)


def save(path: Path, value: object, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.fixture(params=FORMATS)
def zipped(request) -> bool:
    """Whether in the format since torch 1.6, or before it."""
    return FORMATS[request.param]


def rewritten(
    path: Path,
    change: Callable[[bytes], bytes] = bytes,
    pack: int = zipfile.ZIP_STORED,
    **records: bytes,
) -> Path:
    """Writes a zipped checkpoint again, its pickle changed, and some records added."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    [name] = [name for name in members if name.endswith("/data.pkl")]
    members[name] = change(members[name])
    members |= {f"{name.removesuffix('data.pkl')}{record}": b for record, b in records.items()}
    with zipfile.ZipFile(path, "w", pack) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return path


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(text: bytes) -> bytes:
        assert old in text
        return text.replace(old, new)

    return change


# What is read.


def test_every_tensor_comes_back_as_torch_loads_it(zipped, tmp_path):
    """Of any dtype and strides: shape, numbers, rows, bytes and digest are torch's."""
    tensors = TENSORS | (FLOAT8 if zipped else {})
    path = save(tmp_path / "x.bin", tensors, zipped)
    source, expected = opened(path), torch.load(path, weights_only=True)

    assert [*source.tensors] == sorted(expected)
    for name, tensor in expected.items():
        content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        loaded = source.load(name)

        assert (loaded.shape, loaded.dtype) == (tensor.shape, tensor.dtype)
        assert loaded.reshape(-1).view(torch.uint8).numpy().tobytes() == content
        assert b"".join(piece.numpy() for piece in source.chunks(name)) == content
        assert source.digest(name) == blake3(content).hexdigest()
        for start in range(len(tensor) if tensor.ndim else 0):
            row = source.load(name, start, start + 1).reshape(-1).view(torch.uint8)
            assert torch.equal(row, tensor[start].contiguous().reshape(-1).view(torch.uint8))


def test_names_that_share_memory_are_tied(zipped, tmp_path):
    """The very same view of the same storage, under the first of its names; no other is."""
    X = W.clone()
    shared = {"b": X, "a": X, "c": torch.nn.Parameter(X), "rows": X[:2], "turned": X.T}
    alone = {"same numbers": X.clone(), "none": X[4:], "nothing": X[4:], "e": torch.empty(0)}
    source = opened(save(tmp_path / "x.bin", shared | alone, zipped))

    assert source.tied == {"b": "a", "c": "a"}
    assert torch.equal(source.load("turned"), X.T)


def test_memory_seen_as_another_dtype_is_not_tied(tmp_path):
    """The bytes are the same, the tensors are not."""
    X = torch.arange(8, dtype=torch.uint8)
    views = {"a": X.view(torch.float8_e4m3fn), "b": X.view(torch.float8_e5m2)}
    source = opened(save(tmp_path / "x.bin", views))

    assert source.tied == {}
    assert all(source.load(name).dtype == view.dtype for name, view in views.items())
    assert source.digest("a") == source.digest("b") == blake3(bytes(range(8))).hexdigest()


def test_a_state_dict_of_a_module_is_read(zipped, tmp_path):
    """Ordered, with metadata, from any device, empty at worst."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    state = module.state_dict()
    source = opened(save(tmp_path / "x.bin", state, zipped))

    assert state._metadata
    assert [*source.tensors] == sorted(state)
    assert all(torch.equal(source.load(name), state[name]) for name in state)
    for empty in ({}, OrderedDict()):
        assert opened(save(tmp_path / "y.bin", empty, zipped)).tensors == {}


def test_a_checkpoint_saved_on_a_gpu_is_read_where_there_is_none(tmp_path):
    """The device is only a remark."""
    path = save(tmp_path / "x.bin", {"a": W})
    rewritten(path, replaced(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:7"))

    assert torch.equal(opened(path).load("a"), W)


def test_an_archive_that_another_program_wrote_is_read(tmp_path):
    """Without torch's alignment and its extra records."""
    path = rewritten(save(tmp_path / "x.bin", TENSORS | FLOAT8))
    expected = torch.load(path, weights_only=True)

    assert all(torch.equal(opened(path).load(name), expected[name]) for name in TENSORS)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth"])
def test_a_single_file_is_a_source(suffix, tmp_path):
    """By any of its usual suffixes."""
    source = opened(save(tmp_path / f"x.{suffix}", {"a": W}))

    assert isinstance(source, PickleSource)
    assert (source.folder, source.files, source.name) == (None, [f"x.{suffix}"], f"x.{suffix}")


def write_shards(folder: Path, shards: dict[str, dict[str, Tensor]], zipped: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    for shard, tensors in shards.items():
        save(folder / shard, tensors, zipped)
    places = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / PICKLE.index).write_text(json.dumps({"weight_map": places}))
    return folder


def test_shards_and_their_index_are_one_checkpoint(zipped, tmp_path):
    """As one file with the same tensors: names, numbers, fingerprint."""
    shards = {"pytorch_model-1.bin": {"b": W, "t": W}, "pytorch_model-2.bin": {"a": W.T}}
    source = opened(write_shards(tmp_path / "shards", shards, zipped))
    (tmp_path / "whole").mkdir()
    save(tmp_path / "whole" / PICKLE.weights, {"a": W.T, "b": W, "t": W}, zipped)
    whole = opened(tmp_path / "whole")

    assert [*source.tensors] == ["a", "b", "t"]
    assert source.files == sorted(shards)
    assert source.tied == {"t": "b"}
    assert source.fingerprint() == whole.fingerprint()


def test_shards_that_do_not_agree_with_their_index_are_refused(tmp_path):
    """As strictly as safetensors'."""
    folder = write_shards(tmp_path, {"a.bin": {"a": W}, "b.bin": {"b": W}})
    for tensors, words in (
        ({"a": W, "b": W}, "a stands in two shards"),
        ({}, "1 tensor named in .* stands in no shard, the first b"),
        ({"b": W, "c": W}, "c stands in shard 2 of 2, b.bin, but .* does not name it"),
    ):
        save(folder / "b.bin", tensors)

        with pytest.raises(CheckpointError, match=words):
            opened(folder)
    (folder / "b.bin").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards are missing: b\.bin"):
        opened(folder)
    save(folder / PICKLE.weights, {"a": W})
    with pytest.raises(CheckpointError, match="holds both"):
        opened(folder)


def test_opening_reads_the_pickle_alone(zipped, tmp_path, monkeypatch):
    """Then a record once, for all views of it and all their pieces."""
    path = save(tmp_path / "x.bin", {"a": W, "b": W.T, "c": W[1:]}, zipped)
    read: list[int] = []
    real = archive.Record.read
    monkeypatch.setattr(
        archive.Record, "read", lambda self, p: read.append(self.nbytes) or real(self, p)
    )
    source = opened(path)
    read.clear()  # the pickle, and the byte order

    for name, rows in (("a", 4), ("b", 6), ("c", 3)):
        for row in range(rows):
            source.load(name, row, row + 1)
    assert read == [W.nbytes]


def test_a_file_that_is_written_again_is_never_read_from_memory(zipped, tmp_path):
    """What was kept of the old file is not given for the new one."""
    path = save(tmp_path / "x.bin", {"a": W}, zipped)
    old = opened(path)
    assert torch.equal(old.load("a"), W)
    save(path, {"a": W + 1}, zipped)
    os.utime(path, ns=(1, 1))

    assert torch.equal(opened(path).load("a"), W + 1)
    with pytest.raises(CheckpointError, match=r"x\.bin .* while it was being read"):
        old.load("a")


# What is refused.


def test_pickles_are_read_only_where_the_user_says_so(zipped, tmp_path):
    """Whatever they hold; the message says what they are, and how to say so."""
    save(tmp_path / PICKLE.weights, {"a": W}, zipped)
    for path in (tmp_path, tmp_path / PICKLE.weights):
        with pytest.raises(CheckpointError, match=r"can carry code.*safetensors.*--allow-pickle"):
            open_source(path)


class Evil:
    """Unpickled, it would leave a trace."""

    def __reduce__(self):
        return os.system, ("touch trace",)


@pytest.mark.parametrize("place", ["alone", "value", "key", "within a tensor's dictionary", "raw"])
def test_code_is_never_run(place, zipped, tmp_path, monkeypatch):
    """Refused by what it asks for, and no trace."""
    monkeypatch.chdir(tmp_path)
    values = {
        "alone": Evil(),
        "value": {"a": W, "b": Evil()},
        "key": {Evil(): W},
        "within a tensor's dictionary": {"a": {"b": [Evil()]}},
    }
    if place == "raw":
        Path("x.bin").write_bytes(pickle.dumps(Evil(), 2))
    else:
        save(Path("x.bin"), values[place], zipped)

    with pytest.raises(CheckpointError, match=r"x\.bin asks for posix system.*nothing .* was run"):
        opened(tmp_path / "x.bin")

    assert not (tmp_path / "trace").exists()


def test_a_pickle_in_the_place_of_a_tensor_is_not_run_either(tmp_path, monkeypatch):
    """Nor one under another name in the archive, nor a second data.pkl."""
    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps(Evil(), 2)
    path = save(tmp_path / "x.bin", {"a": W})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("y/data.pkl", evil)

    with pytest.raises(CheckpointError, match=r"holds no data\.pkl, or several"):
        opened(path)

    rewritten(save(path, {"a": W}), **{"constants.pkl": evil, "data/9": evil})
    assert torch.equal(opened(path).load("a"), W)
    assert not (tmp_path / "trace").exists()


def test_weights_only_is_what_reads_them(zipped, tmp_path, monkeypatch):
    """torch.load is called with weights_only=True, whatever the environment says."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    calls: list[object] = []
    real = torch.load

    def load(*args: object, **options: object) -> object:
        calls.append(options["weights_only"])
        return real(*args, **options)

    monkeypatch.setattr(torch, "load", load)

    assert torch.equal(opened(save(tmp_path / "x.bin", {"a": W}, zipped)).load("a"), W)
    assert calls == [True]


SPARSE = torch.eye(3).to_sparse()
NEGATED = torch._neg_view(torch.ones(3))

OTHERS = {
    "a tensor alone": (W, "holds a Tensor: only a flat set"),
    "a list": ([W], "holds a list: only a flat set"),
    "a number": (3, "holds a int: only a flat set"),
    "nested": ({"model": {"a": W}}, "holds a dict under model: only a flat set"),
    "a number within": ({"a": W, "step": 3}, "holds a int under step: only a flat set"),
    "a text within": ({"a": "x"}, "holds a str under a: only a flat set"),
    "no name": ({3: W}, "holds a Tensor under a int: only a flat set"),
    "a name of bytes": ({b"a": W}, "asks for _codecs encode"),
    "a tuple for a name": ({("a", 1): W}, "holds a Tensor under a tuple: only a flat set"),
    "half a character": ({"a\ud800": W}, "has a name that is no Unicode text"),
    "an escape in a name": ({"a\x1b[2J": 3}, r"holds a int under a\\x1b\[2J:"),
    "complex": ({"a": W.to(torch.complex64)}, r"a in .* is no plain dense tensor \(strided, compl"),
    "negated lazily": ({"a": NEGATED}, "a in .* is no plain dense tensor"),
    "sparse": ({"a": SPARSE}, "asks for torch._utils _rebuild_sparse_tensor"),
    "meta": ({"a": W.to("meta")}, "asks for torch._utils _rebuild_meta_tensor_no_storage"),
    "with attributes": ({"a": torch.nn.Buffer(W)}, "asks for|only a flat set"),
    "a device": ({"a": torch.device("cpu")}, "asks for torch device"),
    "a set": ({"a": {1}}, "asks for|only a flat set"),
    "a bytearray": ({"a": bytearray(3)}, "asks for .*bytearray"),
    "expanded": ({"a": torch.zeros(1).expand(2**20, 2**20)}, "claims 4398046511104 bytes where 4"),
    "overlapping": ({"a": W.as_strided((4, 24), (0, 1))}, "claims 384 bytes where 96 are stored"),
    "nine dimensions": ({"a": W.reshape(4, 6, *[1] * 7)}, "absurd shape"),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.filterwarnings("ignore")  # torch's own, on saving
def test_what_is_no_plain_tensor_is_refused_by_name(case, zipped, tmp_path):
    """The message says what it is and where, and nothing that torch or the file would print."""
    value, words = OTHERS[case]
    path = save(tmp_path / "x.bin", value, zipped)

    with pytest.raises(CheckpointError, match=words) as caught:
        opened(path)

    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.filterwarnings("ignore")  # quantized tensors are on their way out of torch
def test_quantized_tensors_are_refused(tmp_path):
    """They carry a scale that a plain tensor has no place for."""
    quantized = torch.quantize_per_tensor(W, 0.1, 0, torch.qint8)

    with pytest.raises(CheckpointError, match="asks for torch"):
        opened(save(tmp_path / "x.bin", {"a": quantized}))


SIZE, STRIDE = b"K\4K\6\x86", b"K\6K\1\x86"

PICKLES = {
    "more rows": (replaced(SIZE, b"K\5K\6\x86"), "out of bounds|claims"),
    "an enormous side": (
        replaced(SIZE, b"\x8a\x08" + struct.pack("<q", 2**62) + b"K\6\x86"),
        "damaged",
    ),
    "a negative side": (replaced(SIZE, b"J\xff\xff\xff\xffK\6\x86"), "damaged|claims"),
    "an absurd side of nothing": (
        replaced(SIZE, b"K\0\x8a\x07" + (2**50).to_bytes(7, "little") + b"\x86"),
        "absurd shape",
    ),
    "a stride beyond": (replaced(STRIDE, b"K\7K\1\x86"), "out of bounds|claims"),
    "a negative stride": (replaced(STRIDE, b"J\xff\xff\xff\xffK\1\x86"), "damaged|claims"),
    "a bomb": (
        replaced(SIZE + b"q\x08" + STRIDE, b"M\xff\xffM\xff\xff\x86q\x08K\0K\0\x86"),
        "claims",
    ),
    "one more stride": (replaced(STRIDE, b"K\6K\1K\1\x87"), "damaged|claims"),
    "an offset beyond": (replaced(b"QK\0", b"QK\1"), "out of bounds|claims"),
    "a negative offset": (replaced(b"QK\0", b"QJ\xff\xff\xff\xff"), "damaged|claims"),
    "a larger storage": (replaced(b"K\x18", b"K\x19"), "claims"),
    "a smaller storage": (replaced(b"K\x18", b"K\x17"), "claims 92 bytes where 96 are"),
    "an enormous storage": (
        replaced(b"K\x18", b"\x8a\x08" + struct.pack("<q", 2**62)),
        "claim more than the file holds",
    ),
    "a negative storage": (replaced(b"K\x18", b"J\xff\xff\xff\xff"), "damaged|claims"),
    "another storage": (
        replaced(b"X\1\0\0\0000", b"X\1\0\0\0007"),
        "storage 7 claims 96 bytes where 0 are",
    ),
    "a storage elsewhere": (
        replaced(b"X\1\0\0\0000", b"X\n\0\0\0../version"),
        "version claims 96 bytes where 0",
    ),
    "a wider type": (replaced(b"FloatStorage", b"DoubleStorage"), "claims"),
    "an unknown type": (replaced(b"FloatStorage", b"OtherStorage"), "damaged"),
    "no storage": (replaced(b"storage", b"modules"), "no storage"),
    "an escape": (replaced(b"FloatStorage", b"Float\x1b[2J"), r"asks for torch Float\\x1b\[2J"),
    "a name used as a function": (replaced(b")R", b"K\1R"), "damaged"),
    "text used as a function": (replaced(b"ccollections\nOrderedDict\n", b"X\1\0\0\0x"), "damaged"),
    "no end": (lambda text: text[:-1], "damaged"),
    "nothing": (lambda text: b"", "damaged"),
    "another protocol": (lambda text: b"\x80\5" + text[2:], None),
    "a key that overflows the stack": (
        lambda text: b"\x80\2})" + b"\x85" * 10**6 + b"K\1s.",
        "take all memory, or for ever",
    ),
    "a call that fills the memory": (
        lambda text: b"\x80\2cbuiltins\nbytearray\nJ\0\0\0\x70\x85R.",
        "asks for builtins bytearray",
    ),
    "a storage that fills the memory": (
        lambda text: b"\x80\2ctorch.storage\nUntypedStorage\nJ\0\0\0\x70\x85R.",
        "calls what is no function",
    ),
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_that_claims_what_is_not_there_is_refused(case, tmp_path, capfd):
    """What a view claims must lie within the record it names; torch's own texts are not printed."""
    change, words = PICKLES[case]
    path = rewritten(save(tmp_path / "x.bin", {"a": W}), change)

    if words is None:
        assert torch.equal(opened(path).load("a"), W)
    else:
        with pytest.raises(CheckpointError, match=words) as caught:
            opened(path)

        assert str(path) in str(caught.value)
        assert str(caught.value).isprintable()
        assert "weights_only=False" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore")  # torch's own, on loading what was changed
def test_a_changed_pickle_is_refused_or_means_what_torch_says(tmp_path):
    """200 pickles with bytes changed, the archive sound: never another tensor than torch's."""
    tensors = {"a": W, "b": W.T, "c": W[1:], "d": torch.tensor([True, False]), "e": W.half()}
    save(tmp_path / "good.bin", tensors)
    random, compared = np.random.default_rng(0), 0

    def change(text: bytes) -> bytes:
        place = int(random.integers(len(text)))
        new = random.bytes(int(random.integers(0, 3)))
        return text[:place] + new + text[place + int(random.integers(0, 3)) :]

    for _ in range(200):
        path = rewritten(shutil.copy(tmp_path / "good.bin", tmp_path / "x.bin"), change)
        try:
            source = opened(path)
            found = {name: source.load(name) for name in source.tensors}
        except CheckpointError:
            continue
        compared += 1
        expected = torch.load(path, weights_only=True, map_location="cpu")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    assert 5 < compared < 195


def test_views_out_of_proportion_to_the_file_are_refused(tmp_path, monkeypatch):
    """Each lies within the storage; together they would fill the disk."""
    X = torch.zeros(1000)
    views = {f"{i}": X[i:] for i in range(500)}
    path = save(tmp_path / "x.bin", views)
    opened(path)
    monkeypatch.setattr(header, "CLAIM", 0)
    monkeypatch.setattr(header, "CLAIM_RATIO", 10)

    with pytest.raises(CheckpointError, match="made to fill memory"):
        opened(path)


ARCHIVES = {
    "compressed": ({"pack": zipfile.ZIP_DEFLATED}, "compressed records"),
    "big-endian": ({"byteorder": b"big"}, "big-endian"),
    "of no known byte order": ({"byteorder": b"middle\x1b[2J"}, "big-endian"),
    "a short record": ({"data/0": bytes(95)}, "claims 96 bytes where 95 are"),
    "a long record": ({"data/0": bytes(97)}, "claims 96 bytes where 97 are"),
    "an empty record": ({"data/0": b""}, "claims 96 bytes where 0 are"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_that_torch_would_not_write_is_refused(case, tmp_path):
    """By what is wrong with it."""
    changes, words = ARCHIVES[case]
    path = rewritten(save(tmp_path / "x.bin", {"a": W}), **changes)

    with pytest.raises(CheckpointError, match=words) as caught:
        opened(path)

    assert str(caught.value).isprintable()


def test_a_changed_byte_in_a_record_is_found(tmp_path):
    """torch reads on with the wrong number; the archive's CRC-32 says so."""
    path = save(tmp_path / "x.bin", {"a": W})
    content = path.read_bytes()
    place = content.index(W.numpy().tobytes()) + 50
    path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])

    assert not torch.equal(torch.load(path, weights_only=True)["a"], W)
    source = opened(path)
    with pytest.raises(CheckpointError, match=r"x\.bin is damaged at byte \d+: the CRC"):
        source.load("a")


@pytest.mark.parametrize("kept", [0, 1, 4, 100, 0.5, -1])
def test_a_file_that_was_cut_is_refused(kept, zipped, tmp_path):
    """Wherever it was cut; the last byte of all counts."""
    path = save(tmp_path / "x.bin", {"a": W, "b": W.T.clone()}, zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])

    with pytest.raises(CheckpointError, match=r"x\.bin is damaged") as caught:
        opened(path)

    assert str(caught.value).isprintable()


def parts_of_legacy(value: object) -> tuple[list[bytes], bytes]:
    """The five pickles of a legacy file, and its storages."""
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=False)
    stream.seek(0)
    ends = [0]
    for _ in range(5):
        for _ in pickletools.genops(stream):
            pass
        ends.append(stream.tell())
    content = stream.getvalue()
    return [content[a:b] for a, b in pairwise(ends)], content[ends[-1] :]


COUNT = struct.pack("<q", W.numel())

STORAGES = {
    "none is listed": ([], b""),
    "one is listed twice": ([0, 0], 2 * (COUNT + bytes(96))),
    "another is listed": ([1], COUNT + bytes(96)),
    "another, empty, too": ([0, 1], COUNT + bytes(96) + bytes(8)),
    "one is longer": ([0], struct.pack("<q", 25) + bytes(100)),
    "one is negative": ([0], struct.pack("<q", -1) + bytes(96)),
    "one is cut": ([0], COUNT + bytes(95)),
    "a byte follows": ([0], COUNT + bytes(97)),
    "no length": ([0], b""),
}


@pytest.mark.parametrize("case", STORAGES)
def test_a_legacy_file_holds_exactly_the_storages_that_its_tensors_name(case, tmp_path):
    """torch would give a storage that is not listed whatever stands in memory."""
    pickles, content = parts_of_legacy({"a": W})
    [key] = pickle.loads(pickles[4])
    (tmp_path / "good.bin").write_bytes(b"".join(pickles) + content)
    listed, stored = STORAGES[case]
    keys = pickle.dumps([[key, "other"][index] for index in listed], 2)
    (tmp_path / "x.bin").write_bytes(b"".join(pickles[:4]) + keys + stored)

    assert content == COUNT + W.numpy().tobytes()
    assert torch.equal(opened(tmp_path / "good.bin").load("a"), W)
    if case == "another, empty, too":  # it takes no memory, and no tensor is a view of it
        assert not opened(tmp_path / "x.bin").load("a").any()
        return
    with pytest.raises(CheckpointError, match=r"x\.bin is damaged: its storage"):
        opened(tmp_path / "x.bin")


def test_a_legacy_storage_that_fills_the_memory_is_refused(tmp_path):
    """By the file's size, before it is reserved."""
    pickles, content = parts_of_legacy({"a": W})
    enormous = replaced(b"K\x18", b"\x8a\6" + (2**40).to_bytes(6, "little"))(pickles[3])
    (tmp_path / "x.bin").write_bytes(b"".join([*pickles[:3], enormous, pickles[4]]) + content)

    with pytest.raises(CheckpointError, match="claim more than the file holds"):
        opened(tmp_path / "x.bin")


FILES = {
    "text": b"weights\n",
    "garbage": bytes(range(256)) * 4,
    "zeros": bytes(1000),
    "a pickle": pickle.dumps({"a": 1}, 2),
    "five pickles": pickle.dumps({"a": 1}, 2) * 5,
    "a zip's beginning": b"PK\3\4" + bytes(100),
    "safetensors": struct.pack("<Q", 2) + b"{}",
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_torch_did_not_write_is_refused(case, tmp_path):
    """Whatever it is."""
    (tmp_path / "x.bin").write_bytes(FILES[case])

    with pytest.raises(CheckpointError, match=r"x\.bin is damaged") as caught:
        opened(tmp_path / "x.bin")

    assert str(caught.value).isprintable()


def test_a_tar_archive_is_never_handed_to_tarfile(tmp_path, monkeypatch):
    """torch tries the format of before 2017 first, and tarfile can be made to loop for ever."""
    monkeypatch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("tarfile was asked"))
    save(tmp_path / "x.bin", {"a": W}, zipped=False)

    assert torch.equal(opened(tmp_path / "x.bin").load("a"), W)
    with io.BytesIO() as stream:
        with tarfile.TarFile(fileobj=stream, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
        (tmp_path / "x.bin").write_bytes(stream.getvalue())
    with pytest.raises(CheckpointError, match="is damaged"):
        opened(tmp_path / "x.bin")


@pytest.mark.parametrize("name", ["x.bin", PICKLE.weights, PICKLE.index])
def test_only_regular_files_are_read(name, tmp_path):
    """A FIFO would hang, whichever file it stands for."""
    os.mkfifo(tmp_path / name)

    with pytest.raises(CheckpointError, match=f"{name} is not a regular file"):
        opened(tmp_path / name if name == "x.bin" else tmp_path)
