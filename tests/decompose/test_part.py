"""Parts check themselves: whole and at home, or refused."""

import random

import pytest
import torch
from builders import decaying, write_checkpoint

from eckart.checkpoint.opening import open_checkpoint
from eckart.decompose import Decomposer, Request, read_part
from eckart.errors import CheckpointError, EckartError
from eckart.matrix import Matrix


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """A part of a small matrix."""
    folder = tmp_path_factory.mktemp("part")
    source = open_checkpoint(write_checkpoint(folder / "src", {"a.weight": decaying("a", 12, 9)}))
    decomposer = Decomposer(source, "identity", 0)
    return decomposer(
        "a.weight", Matrix((12, 9)), Request(4, all_values=True), folder / "part.safetensors"
    )


def test_what_is_read_is_what_was_written(part):
    """Every field, and the values to the last bit."""
    found = read_part(part.part, "a.weight", "identity")

    assert torch.equal(found.values, part.values)
    assert (found.name, found.rank, found.method) == (part.name, part.rank, part.method)
    assert (found.excess_estimate, found.source_digest) == (0.0, part.source_digest)
    assert found.spectrum.energy == part.spectrum.energy


@pytest.mark.parametrize(("name", "identity"), [("b.weight", "identity"), ("a.weight", "other")])
def test_a_part_of_another_matrix_or_run_is_refused(name, identity, part):
    """Its own words decide, not its file name."""
    with pytest.raises(CheckpointError, match="belongs to another run"):
        read_part(part.part, name, identity)


def test_any_changed_bit_is_found(part, tmp_path):
    """300 bits flipped, one at a time, anywhere in the file: never a part that is wrong."""
    content, draw = part.part.read_bytes(), random.Random(0)
    damaged = tmp_path / "part.safetensors"
    for _ in range(300):
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        damaged.write_bytes(changed)
        try:
            found = read_part(damaged, "a.weight", "identity")
        except EckartError:
            continue

        assert torch.equal(found.values, part.values)  # padding of the header
        assert torch.equal(
            found.factors(torch.eye(12, 9), 4).B, part.factors(torch.eye(12, 9), 4).B
        )


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_torn_part_is_found(share, part, tmp_path):
    """Cut anywhere."""
    content = part.part.read_bytes()
    torn = tmp_path / "part.safetensors"
    torn.write_bytes(content[: int(share * len(content))])

    with pytest.raises(CheckpointError):
        read_part(torn, "a.weight", "identity")
