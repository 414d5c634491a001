"""Pickles looked through, never done."""

import io
import os
import pickle
from pathlib import Path

import pytest
import torch

from eckart.checkpoint import opcodes
from eckart.checkpoint.opcodes import scan_pickle
from eckart.errors import CheckpointError

X = Path("x.bin")
STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0kX\3\0\0\0cpuK\5tQ"


def scan(body: bytes) -> tuple[list[object], list[str]]:
    return scan_pickle(io.BytesIO(b"\x80\2" + body + b"."), X)


class Evil:
    """Unpickled, it would leave a trace."""

    def __reduce__(self):
        return os.system, ("touch trace",)


def test_a_scan_finds_storages_and_strings_and_stops_at_the_end():
    """What stands behind the pickle is not touched."""
    stream = io.BytesIO(b"\x80\2X\1\0\0\0a0" + STORAGE + b".rest")

    storages, strings = scan_pickle(stream, X)

    assert storages == [("storage", "torch FloatStorage", "k", "cpu", 5)]
    assert strings == ["a", "storage", "k", "cpu"]
    assert stream.read() == b"rest"


def test_what_is_used_again_is_found_again():
    """A second tensor refers to strings and types by the memo."""
    again = STORAGE.replace(b"storagec", b"storageq\1c").replace(b"X\1\0\0\0k", b"X\1\0\0\0kq\2")
    second = b"(h\1ctorch\nFloatStorage\nh\2X\3\0\0\0cpuK\6tQ"

    storages, _ = scan(again + second + b"\x86")

    assert storages == [
        ("storage", "torch FloatStorage", "k", "cpu", 5),
        ("storage", "torch FloatStorage", "k", "cpu", 6),
    ]


@pytest.mark.parametrize(
    "wanted",
    [
        "posix system",
        "builtins eval",
        "builtins bytearray",
        "torch.storage UntypedStorages",
        "torch Tensor",
        "torch load",
        "torch._utils _rebuild_sparse_tensor",
        "torch._utils _rebuild_qtensor",
        "torch._utils _rebuild_meta_tensor_no_storage",
        "_codecs encode",
        "torch\x1b[2J x",
    ],
)
def test_a_pickle_that_asks_for_more_than_tensors_is_refused(wanted):
    """By name, with every control character escaped, and nothing is imported or called."""
    with pytest.raises(CheckpointError) as caught:
        scan(f"c{wanted.replace(' ', chr(10))}\n".encode() + b")R")

    assert wanted.replace("\x1b", "\\x1b") in str(caught.value)
    assert "nothing in it was run" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("protocol", range(6))
def test_code_is_never_run(protocol, tmp_path, monkeypatch):
    """Whatever the protocol: refused or not understood, and no trace."""
    monkeypatch.chdir(tmp_path)

    with pytest.raises((CheckpointError, ValueError)):
        scan_pickle(io.BytesIO(pickle.dumps({"a": Evil()}, protocol)), X)

    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("dtype", ["float", "half", "bfloat16", "long", "int", "bool", "cfloat"])
def test_what_torch_saves_of_plain_tensors_is_let_through(dtype):
    """Dictionaries, ordered or not, of tensors and parameters of every kind."""
    tensor = torch.ones(3, 2).to(getattr(torch, dtype))
    for value in (tensor, tensor.T, tensor[1:], torch.nn.Parameter(tensor, requires_grad=False)):
        stream = io.BytesIO()
        torch.save({"a": value}, stream, _use_new_zipfile_serialization=False)
        stream.seek(0)

        found = [scan_pickle(stream, X) for _ in range(5)]

        assert [len(storages) for storages, _ in found] == [0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    "body",
    {
        "nested, which overflows the stack when hashed": b")" + b"\x85" * 1000,
        "shared, which takes for ever to hash": b")" + b"q\0h\0\x86" * 20,
        "wide and shared": b"(" + b"K\1" * 40 + b"tq\0(" + b"h\0" * 40 + b"t",
    }.items(),
    ids=lambda item: item[0],
)
def test_a_tuple_that_costs_more_than_it_weighs_is_refused(body):
    """Each is a few hundred bytes, and would stop or kill the process as a key."""
    with pytest.raises(ValueError, match="take all memory, or for ever"):
        scan(body[1])


def test_a_tuple_is_refused_just_above_the_limit(monkeypatch):
    """As many items as the limit, its own included, pass."""
    monkeypatch.setattr(opcodes, "TUPLE_ITEMS", 5)
    scan(b"(KaKaKaKat")

    with pytest.raises(ValueError, match="take all memory"):
        scan(b"(KaKaKaKaKat")


def test_a_pickle_of_too_many_operations_is_refused(monkeypatch):
    """A byte of pickle can cost a hundred of memory."""
    monkeypatch.setattr(opcodes, "OPERATIONS", 100)
    scan(b"}" * 99)

    with pytest.raises(ValueError, match="take all memory"):
        scan(b"}" * 101)


@pytest.mark.parametrize(
    "body",
    [b"\xff", b"t", b"h\7", b"q\1", b"Q", b"R", b"X\xff\xff\xff\x7fx", b"NN\x85R", b""],
    ids=repr,
)
def test_a_pickle_that_makes_no_sense_is_an_error_of_a_known_kind(body):
    """ValueError or LookupError, which the caller turns into a sentence."""
    with pytest.raises((ValueError, LookupError)):
        scan_pickle(io.BytesIO(body), X)
