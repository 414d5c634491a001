"""The certificate: one spelling, one digest, nothing unknown."""

import hashlib
import json
import re
from pathlib import Path

import msgspec
import pytest
from builders import WEIGHTS, read_document, small_tensors, snapshot, write_checkpoint

from eckart import compress, densify
from eckart.certificate import Certificate, FactoredEntry, Loss, read_certificate
from eckart.checkpoint.documents import canonical_json
from eckart.errors import CheckpointError

KEYS = """
schema kind digest source base adapter statistics merged options versions files matrices copied tied
refitted stored_whole lost unchanged factored loss totals change remarks run
"""
MATRIX_KEYS = """
name shape dtype orientation rank form parameters bytes relative_error excess_estimate optimum
output_error metric metric_error loss method tail energy_share delta
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    src = write_checkpoint(tmp_path / "src")
    compress(src, tmp_path / "out", energy=0.9)
    return tmp_path / "out"


def test_the_document_has_the_fields_of_the_schema(out):
    """As docs/formats.md lists them, no more and no fewer."""
    document = read_document(out)

    assert sorted(document) == sorted(KEYS.split())
    assert document["schema"] == "eckart/1"
    assert document["kind"] == "factored"
    for row in document["matrices"]:
        assert sorted(row) == sorted(MATRIX_KEYS.split())
    assert document["loss"] == {
        "predicted": None,
        "measured": None,
        "divergence": None,
        "tokens": None,
        "allocation": None,
        "candidates": {},
        "drift": None,
    }
    assert sorted(document["run"]) == ["seconds", "source_files", "started", "workers"]


def test_the_file_is_the_canonical_spelling_of_itself(out):
    """Sorted keys, no spaces, ASCII, one newline: so that any changed byte shows."""
    content = (out / "eckart.json").read_bytes()

    assert content == canonical_json(json.loads(content)) + b"\n"


def test_the_digest_is_that_of_the_rest(out):
    """SHA-256 of the same object without `digest`, in the same spelling."""
    document = read_document(out)
    digest = document.pop("digest")

    assert digest == hashlib.sha256(canonical_json(document)).hexdigest()


def test_every_file_but_the_certificate_is_listed_with_size_and_digest(out):
    """Recomputed here."""
    files = read_document(out)["files"]
    found = {name: state for name, state in snapshot(out).items() if name != "eckart.json"}

    assert {name: record["blake3"] for name, record in files.items()} == found
    assert all(record["bytes"] == (out / name).stat().st_size for name, record in files.items())


def test_the_source_is_named_without_its_place(out, tmp_path):
    """The folder's own name and a fingerprint; no path of this machine anywhere."""
    document = read_document(out)

    assert document["source"]["name"] == "src"
    assert re.fullmatch("[0-9a-f]{64}", document["source"]["fingerprint"])
    assert str(tmp_path) not in (out / "eckart.json").read_text()
    assert document["run"]["source_files"] == {WEIGHTS: (tmp_path / "src" / WEIGHTS).stat().st_size}


def test_reading_gives_back_what_was_written(out):
    """A frozen value, equal to its own spelling."""
    certificate = read_certificate(out)

    assert certificate.encode() == (out / "eckart.json").read_bytes()
    with pytest.raises(AttributeError):
        certificate.kind = "dense"  # type: ignore[misc]


@pytest.mark.parametrize("change", ["unknown field", "missing field", "other schema", "wrong type"])
def test_a_document_of_another_schema_is_refused(change, out):
    """Even with a digest that holds."""
    document = read_document(out)
    if change == "unknown field":
        document["extra"] = 1
    elif change == "missing field":
        del document["totals"]
    elif change == "other schema":
        document["schema"] = "eckart/2"
    else:
        document["matrices"][0]["rank"] = "three"
    del document["digest"]
    document["digest"] = hashlib.sha256(canonical_json(document)).hexdigest()
    (out / "eckart.json").write_bytes(canonical_json(document) + b"\n")

    with pytest.raises(CheckpointError, match=r"eckart\.json is damaged"):
        read_certificate(out)


@pytest.mark.parametrize("spelling", ["indented", "no newline", "two newlines", "other order"])
def test_another_spelling_of_the_same_document_is_refused(spelling, out):
    """The digest would hold; the bytes are not those that were written."""
    document = read_document(out)
    text = {
        "indented": json.dumps(document, indent=1).encode(),
        "no newline": canonical_json(document),
        "two newlines": canonical_json(document) + b"\n\n",
        "other order": json.dumps(dict(reversed(document.items()))).encode(),
    }
    (out / "eckart.json").write_bytes(text[spelling])

    with pytest.raises(CheckpointError, match="was changed after it was written"):
        read_certificate(out)


def test_a_dense_certificate_has_the_same_fields(out, tmp_path):
    """Kind `dense`, nothing factored."""
    densify(out, tmp_path / "dense")
    document = read_document(tmp_path / "dense")

    assert sorted(document) == sorted(KEYS.split())
    assert document["kind"] == "dense"
    assert {row["form"] for row in document["matrices"]} == {"dense"}


def test_documents_accept_no_unknown_field():
    """A typo in a field is an error, at any depth."""
    good = {"rank": 1, "form": "ba", "shape": [2, 2], "orientation": "out_in"}

    assert msgspec.convert(good, FactoredEntry).shape == (2, 2)
    for bad in ({**good, "x": 1}, {**good, "form": "round"}, {**good, "shape": [2]}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(bad, FactoredEntry)
    assert Loss() == Loss(predicted=None, measured=None, tokens=None)


def test_the_seed_is_read_from_the_options(out):
    """What the random inputs of the output check were drawn with."""
    assert read_certificate(out).seed == 0


def test_the_sources_tensors_are_all_in_one_of_the_lists(out):
    """`matrices` and `copied` together are the source."""
    certificate: Certificate = read_certificate(out)
    names = [row.name for row in [*certificate.matrices, *certificate.copied]]

    assert sorted(names) == sorted(small_tensors())
