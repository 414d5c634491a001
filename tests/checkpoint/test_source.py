"""Checkpoints read lazily: headers alone, then single tensors, to the bit."""

import json

import numpy as np
import pytest
import torch
from builders import WEIGHTS, small_tensors, write_checkpoint, write_raw

from eckart.checkpoint import header
from eckart.checkpoint import source as module
from eckart.checkpoint.header import DTYPES, read_header
from eckart.checkpoint.source import open_checkpoint
from eckart.errors import CheckpointError, DtypeError

KINDS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def test_every_dtype_comes_back_to_the_bit(tmp_path):
    """All twelve, as the library writes them."""
    bits = torch.arange(64, dtype=torch.uint8)
    tensors = {
        name: (bits % 2 if name == "BOOL" else bits).view(kind) for name, kind in KINDS.items()
    }
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "src", tensors))

    assert KINDS == DTYPES
    for name, kind in KINDS.items():
        loaded = checkpoint.load(name)

        assert checkpoint.tensors[name].dtype == name
        assert loaded.dtype == kind
        assert torch.equal(loaded.view(torch.uint8), tensors[name].view(torch.uint8))


def test_names_are_sorted_and_shapes_and_counts_are_those_of_the_header(tmp_path):
    """Scalars, empty tensors, and sizes in bytes."""
    tensors = small_tensors()
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "src", tensors))

    assert list(checkpoint.tensors) == sorted(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert checkpoint.tensors[name].nbytes == tensor.nbytes
        assert checkpoint.tensors[name].parameters == tensor.numel()
        assert torch.equal(checkpoint.load(name), tensor)
    assert checkpoint.files == [WEIGHTS]


def test_a_loaded_tensor_is_in_memory_of_its_own(tmp_path):
    """What happens to the file later does not change it."""
    src = write_checkpoint(tmp_path / "src")
    loaded = open_checkpoint(src).load("norm.weight")
    before = loaded.clone()
    (src / WEIGHTS).write_bytes(bytes((src / WEIGHTS).stat().st_size))

    assert torch.equal(loaded, before)


def test_a_file_cut_after_opening_is_an_error_that_names_it(tmp_path):
    """No SIGBUS, as a mapped file would give."""
    src = write_checkpoint(tmp_path / "src")
    checkpoint = open_checkpoint(src)
    content = (src / WEIGHTS).read_bytes()
    (src / WEIGHTS).write_bytes(content[: len(content) // 2])

    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} ends at byte \d+, inside a tensor"):
        [checkpoint.load(name) for name in checkpoint.tensors]


def test_the_fingerprint_is_that_of_the_weights_alone(tmp_path):
    """One changed byte of a tensor changes it; a sidecar does not."""
    src = write_checkpoint(tmp_path / "src")
    first = open_checkpoint(src).fingerprint()
    (src / "tokenizer.json").write_text("{}")
    second = open_checkpoint(src).fingerprint()
    content = bytearray((src / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (src / WEIGHTS).write_bytes(content)
    third = open_checkpoint(src).fingerprint()

    assert first == second != third


def test_a_dtype_that_torch_lacks_is_listed_and_read_as_bytes_only(tmp_path):
    """`raw` gives the bytes, `load` says why it cannot."""
    header = {"scale": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}
    write_raw(tmp_path / "src" / WEIGHTS, header, b"\1\2\3\4")
    checkpoint = open_checkpoint(tmp_path / "src")

    assert checkpoint.raw("scale").tolist() == [1, 2, 3, 4]
    with pytest.raises(DtypeError, match="scale has dtype F8_E8M0"):
        checkpoint.load("scale")


def test_opening_reads_headers_only(tmp_path, monkeypatch):
    """No byte of a tensor is touched until it is loaded."""
    src = write_checkpoint(tmp_path / "src")
    size = int.from_bytes((src / WEIGHTS).read_bytes()[:8], "little") + 8
    real, ends = header.read_into, []

    def recorded(descriptor, buffer, offset, path):
        ends.append(offset + len(buffer))
        return real(descriptor, buffer, offset, path)

    for place in (module, header):
        monkeypatch.setattr(place, "read_into", recorded)
    open_checkpoint(src)

    assert max(ends) == size


def test_a_header_with_leading_spaces_and_unaligned_data_is_accepted(tmp_path):
    """The format allows both; the values are right all the same."""
    header = (
        b"  "
        + json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
        + b" "
    )
    write_raw(tmp_path / "src" / WEIGHTS, header, np.array([1.5, -2.0], "<f4").tobytes())

    assert open_checkpoint(tmp_path / "src").load("a").tolist() == [1.5, -2.0]


@pytest.mark.parametrize("side", [2**48, 2**62])
def test_an_absurd_side_is_refused_at_the_limit(side, tmp_path):
    """2⁴⁸ is refused, one less is accepted (of no entries)."""

    def header(size: int) -> dict[str, object]:
        return {"a": {"dtype": "F32", "shape": [0, size], "data_offsets": [0, 0]}}

    with pytest.raises(CheckpointError, match=r"a in .* has an absurd shape"):
        read_header(write_raw(tmp_path / "bad", header(side)))
    assert read_header(write_raw(tmp_path / "good", header(2**48 - 1)))["a"].parameters == 0


def test_mutated_headers_give_our_error_or_a_checkpoint(tmp_path):
    """400 random changes of a file: CheckpointError, or every tensor can be read."""
    content = (
        write_checkpoint(tmp_path / "src", {"a.weight": torch.ones(3, 2)}) / WEIGHTS
    ).read_bytes()
    random = np.random.default_rng(0)
    opened = 0
    for _ in range(400):
        changed = bytearray(content)
        for place in random.integers(0, len(content) - 24, random.integers(1, 4)):
            changed[place] = random.integers(0, 256)
        (tmp_path / "src" / WEIGHTS).write_bytes(changed)
        try:
            checkpoint = open_checkpoint(tmp_path / "src")
        except CheckpointError:
            continue
        opened += 1
        for name in checkpoint.tensors:
            assert checkpoint.load(name).numel() == checkpoint.tensors[name].parameters
    assert opened < 400
