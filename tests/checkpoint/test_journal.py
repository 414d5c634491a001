"""Journals: what was written whole is read, whatever happened to the last line."""

from eckart.checkpoint.journal import append_line, read_lines


def test_lines_come_back_in_order(tmp_path):
    """As the objects they were."""
    for i in range(3):
        append_line(tmp_path / "journal", {"name": f"x\n{i}", "more": [i]})

    assert read_lines(tmp_path / "journal") == [{"name": f"x\n{i}", "more": [i]} for i in range(3)]
    assert read_lines(tmp_path / "none") == []


def test_a_torn_line_is_passed_over_and_the_next_stands(tmp_path):
    """Cut anywhere."""
    path = tmp_path / "journal"
    append_line(path, {"n": 1})
    whole = path.read_bytes()
    append_line(path, {"n": 2})
    both = path.read_bytes()

    for end in range(len(whole) + 1, len(both)):
        path.write_bytes(both[:end])
        append_line(path, {"n": 3})
        assert read_lines(path) == [{"n": 1}, {"n": 3}]


def test_a_changed_byte_makes_a_line_count_for_nothing(tmp_path):
    """By its checksum."""
    path = tmp_path / "journal"
    append_line(path, {"n": 1})
    append_line(path, {"n": 2})
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)

    assert read_lines(path) == [{"n": 1}]
