"""The work folder: what an earlier run left is taken over, or refused with the reason."""

import json
import random

import pytest
import torch
from builders import decaying, write_checkpoint

from eckart.checkpoint.opening import open_checkpoint
from eckart.decompose import Decomposer, Failure, Request
from eckart.decompose.work import JOURNAL, WORK, identity_of, open_work
from eckart.errors import StaleError, StorageError
from eckart.matrix import Matrix

NAMES = [f"m{i}.weight" for i in range(4)]
TENSORS = {name: decaying(name, 10 + i, 8) for i, name in enumerate(NAMES)}
REQUEST = Request(3, all_values=True)
SETTINGS = {"seed": 0, "threads": None, "device": "cpu", "versions": {"torch": "9"}}


@pytest.fixture
def source(tmp_path):
    return open_checkpoint(write_checkpoint(tmp_path / "src", TENSORS))


def opened(source, folder, **changes):
    folder.mkdir(exist_ok=True)
    return open_work(folder, source, identity_of(source, **(SETTINGS | changes)), NAMES)


def fill(work, names=NAMES):
    """Decomposes the tensors and journals them."""
    decomposer, parts = Decomposer(work.source, work.digest, 0), work.parts(names)
    for name in names:
        matrix = Matrix(work.source.tensors[name].shape)
        work.record(decomposer(name, matrix, REQUEST, parts[name]))
    return work


def test_a_new_folder_is_empty_and_says_what_it_is_for(source, tmp_path):
    """Nothing is done; the identity stands in canonical JSON."""
    work = opened(source, tmp_path / "work")

    assert (work.done, work.failed, work.damaged) == ({}, {}, [])
    assert work.missing(dict.fromkeys(NAMES, REQUEST)).keys() == set(NAMES)
    document = json.loads((tmp_path / "work" / WORK).read_bytes())
    assert document["schema"] == "eckart-work/1"
    assert document["identity"] == work.identity


def test_what_was_done_is_taken_over(source, tmp_path):
    """Parts and failures alike; only the rest is missing."""
    work = fill(opened(source, tmp_path / "work"), NAMES[:2])
    work.record(Failure(NAMES[2], "every method failed"))

    again = opened(source, tmp_path / "work")

    assert again.done.keys() == set(NAMES[:2])
    assert again.failed == {NAMES[2]: Failure(NAMES[2], "every method failed")}
    assert again.missing(dict.fromkeys(NAMES, REQUEST)).keys() == {NAMES[3]}
    assert torch.equal(again.done[NAMES[0]].values, work.done[NAMES[0]].values)


def test_a_larger_rank_than_was_kept_is_missing(source, tmp_path):
    """A smaller one is not."""
    work = fill(opened(source, tmp_path / "work"))

    assert work.missing({NAMES[0]: Request(4, all_values=True)}).keys() == {NAMES[0]}
    assert work.missing({NAMES[0]: Request(2, all_values=False)}) == {}


def test_a_part_without_its_journal_line_is_taken_over(source, tmp_path):
    """Parts describe themselves: the journal is an index."""
    fill(opened(source, tmp_path / "work"))
    (tmp_path / "work" / JOURNAL).unlink()

    assert opened(source, tmp_path / "work").done.keys() == set(NAMES)


def test_a_journal_line_without_its_part_is_damage(source, tmp_path):
    """It is said, and the matrix is done again."""
    work = fill(opened(source, tmp_path / "work"))
    work.done[NAMES[1]].part.unlink()
    again = opened(source, tmp_path / "work")

    assert again.damaged == [NAMES[1]]
    assert again.missing(dict.fromkeys(NAMES, REQUEST)).keys() == {NAMES[1]}


def test_a_torn_line_does_not_swallow_the_next(source, tmp_path):
    """A run killed while it wrote a line, and another that went on."""
    fill(opened(source, tmp_path / "work"), NAMES[:1])
    journal = tmp_path / "work" / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-5])

    opened(source, tmp_path / "work").record(Failure(NAMES[3], "no"))

    assert opened(source, tmp_path / "work").failed.keys() == {NAMES[3]}


def test_flipped_bits_in_journal_and_parts_are_done_again_or_refused(source, tmp_path):
    """300 flips, one at a time: what is taken over is always what was written."""
    work = fill(opened(source, tmp_path / "work"))
    expected = {name: found.values for name, found in work.done.items()}
    files = [tmp_path / "work" / JOURNAL, *(found.part for found in work.done.values())]
    draw = random.Random(1)
    for _ in range(300):
        path = draw.choice(files)
        content = path.read_bytes()
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)

        again = opened(source, tmp_path / "work")

        assert again.failed == {}
        assert all(torch.equal(found.values, expected[n]) for n, found in again.done.items())
        assert len(again.done) + len(again.damaged) == len(NAMES)
        path.write_bytes(content)


CHANGES = [
    ({"seed": 1}, "seed was 0, now 1"),
    ({"threads": 2}, "threads was null, now 2"),
    ({"device": "cuda"}, 'device was "cpu", now "cuda"'),
    ({"versions": {"torch": "10"}}, 'version of torch was "9", now "10"'),
    ({"seed": 1, "device": "cuda"}, 'device was "cpu", now "cuda"; seed was 0, now 1'),
]


@pytest.mark.parametrize(("changes", "words"), CHANGES, ids=[str(c) for c, _ in CHANGES])
def test_each_changed_option_is_named(changes, words, source, tmp_path):
    """StaleError; nothing is deleted."""
    fill(opened(source, tmp_path / "work"))

    with pytest.raises(StaleError) as caught:
        opened(source, tmp_path / "work", **changes)
    assert words in str(caught.value)
    assert opened(source, tmp_path / "work").done.keys() == set(NAMES)


def test_another_source_is_named(source, tmp_path):
    """Other tensors than those that were decomposed."""
    fill(opened(source, tmp_path / "work"))
    other = open_checkpoint(write_checkpoint(tmp_path / "other", dict([*TENSORS.items()][:3])))

    with pytest.raises(StaleError, match="the source has other tensors"):
        open_work(tmp_path / "work", other, identity_of(other, **SETTINGS), NAMES[:3])


def test_a_source_written_again_is_compared_by_digest(source, tmp_path):
    """Touched only: its work is still good. One weight changed: that tensor is named."""
    fill(opened(source, tmp_path / "work"))
    path = source.file(source.files[0])
    content = path.read_bytes()
    path.write_bytes(content)
    touched = opened(open_checkpoint(source.path), tmp_path / "work")
    begin = source.tensors[NAMES[2]].begin
    path.write_bytes(content[:begin] + bytes([content[begin] ^ 1]) + content[begin + 1 :])

    assert touched.done.keys() == set(NAMES)
    with pytest.raises(StaleError, match=r"m2\.weight has changed in .*src since"):
        opened(open_checkpoint(source.path), tmp_path / "work")


def test_a_folder_with_other_things_is_not_taken_for_work(source, tmp_path):
    """Somebody's files are left alone."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes.txt").write_text("mine")

    with pytest.raises(StaleError, match=r"holds notes\.txt, which is not eckart's"):
        opened(source, tmp_path / "work")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"schema":"eckart-work/9"}', b"\xff"])
def test_a_damaged_identity_is_refused(content, source, tmp_path):
    """Nothing in such a folder can be trusted; it is not deleted."""
    fill(opened(source, tmp_path / "work"))
    (tmp_path / "work" / WORK).write_bytes(content)

    with pytest.raises(StaleError):
        opened(source, tmp_path / "work")
    assert (tmp_path / "work" / WORK).read_bytes() == content


def test_a_journal_that_cannot_be_written_is_a_storage_error(source, tmp_path):
    """Exit 5, not a traceback."""
    work = opened(source, tmp_path / "work")
    (tmp_path / "work" / JOURNAL).mkdir()

    with pytest.raises(StorageError, match="Is a directory"):
        work.record(Failure(NAMES[0], "no"))
