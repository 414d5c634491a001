"""JSON read strictly and written in one spelling."""

import json

import pytest

from eckart.checkpoint import documents
from eckart.checkpoint.documents import canonical_json, parse_json, read_json
from eckart.errors import CheckpointError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": 1, "a": 1}', "'a' stands there twice"),
        (b'{"x": {"a": 1, "a": 2}}', "'a' stands there twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": 1e999}', "1e999 is not a JSON number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[1]", "holds a JSON list, not an object"),
        (b"3", "holds a JSON int, not an object"),
        (b"null", "holds a JSON NoneType, not an object"),
    ],
    ids=repr,
)
def test_what_is_ambiguous_or_broken_is_refused_by_name(text, words):
    """CheckpointError with the document's name, never another exception."""
    with pytest.raises(CheckpointError, match="the config") as caught:
        parse_json(text, "the config")

    assert words in str(caught.value)


def test_a_duplicate_key_is_escaped_in_the_message():
    """It comes from a file."""
    with pytest.raises(CheckpointError) as caught:
        parse_json(b'{"\\u001b[2J": 1, "\\u001b[2J": 2}', "x")

    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("text", [b'{"%s": 1, "%s": 2}', b'{"a": 1e999%s}', b'{"a": %s}'])
def test_a_message_does_not_grow_with_the_file(text):
    """A key or a number of a megabyte is shown by both ends."""
    with pytest.raises(CheckpointError) as caught:
        parse_json(text.replace(b"%s", b"9" * 10**6), "x")

    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"b": [1, 2.5, None, True], "a": {"z": "é\u202e\U0001f600", "y": ""}},
        {"tiny": 5e-324, "third": 1 / 3, "large": 1.7976931348623157e308, "big": 2**70},
        {"\ud800": "lone surrogate"},
    ],
    ids=lambda d: str(list(d)).encode("unicode_escape").decode(),
)
def test_the_canonical_spelling_is_read_back_exactly(document):
    """Every float to its last bit, every string; ASCII only, and a fixed point."""
    text = canonical_json(document)

    assert parse_json(text, "x") == document
    assert canonical_json(parse_json(text, "x")) == text
    assert max(text, default=0) < 128


def test_the_canonical_spelling_does_not_depend_on_order():
    """Sorted keys, no spaces."""
    one, two = {"a": 1, "b": {"d": 1, "c": 2}}, {"b": {"c": 2, "d": 1}, "a": 1}

    assert canonical_json(one) == canonical_json(two) == b'{"a":1,"b":{"c":2,"d":1}}'


def test_a_number_that_is_none_is_never_written():
    """NaN and Inf have no JSON spelling."""
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            canonical_json({"a": number})


def test_a_file_is_read_whole(tmp_path):
    """`read_json` names the file in its errors."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"a": "é"}), encoding="utf-8")

    assert read_json(path) == {"a": "é"}
    with pytest.raises(CheckpointError, match=r"nothing\.json: No such file"):
        read_json(tmp_path / "nothing.json")


def test_a_path_is_printed_safely_and_a_file_above_the_cap_is_not_read(tmp_path, monkeypatch):
    """The cap is on bytes; the folder's name is escaped like any other."""
    path = tmp_path / "a\x1b[2J.json"
    path.write_bytes(b"[1]")
    monkeypatch.setattr(documents, "JSON_BYTES", 3)
    with pytest.raises(CheckpointError, match=r"a\\x1b\[2J.json holds a JSON list"):
        read_json(path)
    path.write_bytes(b"[1] ")

    with pytest.raises(CheckpointError, match=r"a\\x1b\[2J.json has 4 bytes; at most 3"):
        read_json(path)
