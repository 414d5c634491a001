"""Fits on disk: whole and of this very request, or none."""

from pathlib import Path

import pytest
import torch

from eckart.decompose.fit import About, fit_bytes, read_fit, write_fit
from eckart.linalg.factors import Factors

ABOUT = About(name="w", identity="i", rank=2, method="gram, drift", excess_estimate=0.0)
FACTORS = Factors(torch.arange(10.0).reshape(5, 2), torch.arange(6.0).reshape(2, 3))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "part-000000.safetensors"


def test_a_fit_is_read_as_it_was_written(path):
    """Its factors bit for bit, in the dtype asked, and over whatever stood there."""
    path.write_bytes(b"something else")
    written = write_fit(path, ABOUT, FACTORS)
    read = read_fit(path, "w", "i")
    assert read is not None
    wide = read.factors(torch.empty(5, 3), 2)

    assert read == written
    assert (read.rank, read.method) == (2, "gram, drift")
    assert wide.B.dtype == torch.float64
    assert torch.equal(wide.B.float(), FACTORS.B)
    assert torch.equal(read.factors(torch.empty(5, 3), 2, wide=False).A, FACTORS.A)
    assert path.stat().st_size <= fit_bytes((5, 3), 2, 4)


@pytest.mark.parametrize(("name", "identity"), [("v", "i"), ("w", "j")])
def test_a_fit_of_another_request_is_none(name, identity, path):
    """By the tensor, and by all that it depends on."""
    write_fit(path, ABOUT, FACTORS)

    assert read_fit(path, name, identity) is None


def test_a_missing_or_damaged_fit_is_none(path):
    """Every byte behind the header that is changed is noticed, and so is a torn file."""
    assert read_fit(path, "w", "i") is None
    write_fit(path, ABOUT, FACTORS)
    whole = path.read_bytes()
    for place in range(8 + int.from_bytes(whole[:8], "little"), len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])

        assert read_fit(path, "w", "i") is None, place
    path.write_bytes(whole[:-3])
    assert read_fit(path, "w", "i") is None
