"""Headers and directories: what they claim is held against the file before memory is taken."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import write_raw
from safetensors.torch import save_file

from eckart.checkpoint import header as module
from eckart.checkpoint.header import (
    CLAIM,
    TensorInfo,
    check_claims,
    check_tensor,
    read_header,
)
from eckart.errors import CheckpointError


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# safetensors.


def test_a_header_says_where_each_tensor_lies(tmp_path):
    """Name, shape, dtype, and bytes from the start of the file, sorted by name."""
    tensors = {"b": torch.arange(6, dtype=torch.int16).reshape(2, 3), "a": torch.tensor(1.5)}
    save_file(tensors, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()

    found = read_header(tmp_path / "x.safetensors")

    assert list(found) == ["a", "b"]
    assert (found["b"].shape, found["b"].dtype, found["b"].nbytes) == ((2, 3), "I16", 12)
    for name, info in found.items():
        assert content[info.begin : info.end] == tensors[name].numpy().tobytes()
        assert info.file == "x.safetensors"


def test_a_header_with_leading_spaces_and_unaligned_data_is_accepted(tmp_path):
    """The format allows both; the places are right all the same."""
    text = b"  " + json.dumps({"a": entry("F32", [2], 0, 8)}).encode() + b" "
    path = write_raw(tmp_path / "x", text, np.array([1.5, -2.0], "<f4").tobytes())

    info = read_header(path)["a"]

    assert np.frombuffer(path.read_bytes()[info.begin : info.end], "<f4").tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    ("largest", "absurd"),
    [([0, 2**48 - 1], [0, 2**48]), ([0, 2**24, 2**23], [0, 2**24, 2**24]), ([0] * 8, [0] * 9)],
)
def test_an_absurd_shape_is_refused_at_the_limit(largest, absurd, tmp_path):
    """2⁴⁸ entries, were there any, or nine dimensions; below, the shape can be allocated."""

    def written(shape: list[int]) -> Path:
        return write_raw(tmp_path / "x", {"a": entry("F32", shape, 0, 0)})

    torch.empty(read_header(written(largest))["a"].shape)

    with pytest.raises(CheckpointError, match=r"a in .*x has an absurd shape, \[0, "):
        read_header(written(absurd))


def test_mutated_headers_give_our_error_or_a_header(tmp_path):
    """100 random changes: CheckpointError, or tensors that lie within the file."""
    save_file({"a.weight": torch.ones(3, 2)}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    random = np.random.default_rng(0)
    opened = 0
    for _ in range(100):
        changed = bytearray(content)
        for place in random.integers(0, len(content) - 24, random.integers(1, 4)):
            changed[place] = random.integers(0, 256)
        (tmp_path / "x.safetensors").write_bytes(changed)
        try:
            found = read_header(tmp_path / "x.safetensors")
        except CheckpointError:
            continue
        opened += 1
        assert all(8 <= info.begin <= info.end <= len(content) for info in found.values())
    assert 0 < opened < 100


def test_a_file_that_is_replaced_between_two_looks_is_an_error(tmp_path, monkeypatch):
    """The library checked another file than ours: an error, not a KeyError."""
    good = write_raw(tmp_path / "good", {"a": entry("F32", [1], 0, 4)}, bytes(4))
    bad = write_raw(tmp_path / "bad", {"a": {"shape": "?"}}, bytes(4))
    real = module.safe_open
    monkeypatch.setattr(module, "safe_open", lambda _, **options: real(good, **options))

    with pytest.raises(CheckpointError, match="bad was changed while being read"):
        read_header(bad)


def test_a_folder_whose_name_is_no_text_is_read(tmp_path):
    """Linux allows any bytes in a name."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    folder.mkdir()
    path = write_raw(folder / "x", {"a": entry("F32", [1], 0, 4)}, bytes(4))

    assert list(read_header(path)) == ["a"]


# What no tensor is.


@pytest.mark.parametrize("name", ["", "a\x1b[2J", "模型", "\U0001f600", "../x"])
def test_any_text_is_a_name(name, tmp_path):
    """Names are never paths, and are escaped where they are printed."""
    check_tensor(name, (2, 3), tmp_path)


def test_half_a_character_is_no_name(tmp_path):
    """It could not be written into a safetensors header."""
    with pytest.raises(CheckpointError, match=r"a\\ud800 in x has a name that is no Unicode text"):
        check_tensor("a\ud800", (2,), Path("x"))


def test_tensors_out_of_proportion_to_their_file_are_refused_at_the_limit(tmp_path, monkeypatch):
    """64 MiB whatever the file, or a hundred times the file."""
    (tmp_path / "x").write_bytes(bytes(10))

    def infos(total: int) -> list[TensorInfo]:
        return [
            TensorInfo((total - 1,), "U8", "x", 0, total - 1),
            TensorInfo((1,), "U8", "x", 0, 1),
        ]

    check_claims(infos(CLAIM), tmp_path / "x")
    with pytest.raises(CheckpointError, match=rf"has 10 bytes, but .* would take {CLAIM + 1}"):
        check_claims(infos(CLAIM + 1), tmp_path / "x")
    monkeypatch.setattr(module, "CLAIM", 0)
    check_claims(infos(1000), tmp_path / "x")
    with pytest.raises(CheckpointError, match="would take 1001"):
        check_claims(infos(1001), tmp_path / "x")
