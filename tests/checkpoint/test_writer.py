"""Outputs appear whole or not at all."""

import json
import os

import pytest
import torch
from builders import snapshot

from eckart.checkpoint.paths import write_file
from eckart.checkpoint.tensor_file import TensorLayout, lay_out_file
from eckart.checkpoint.writer import check_output, check_space, copy_file, new_output
from eckart.errors import BusyError, StorageError, UsageError


def test_the_output_appears_when_the_block_ends_well(tmp_path):
    """Until then there is only the work folder; afterwards only the output."""
    out = tmp_path / "out"
    with new_output(out, inputs=[], force=False) as run:
        write_file(run.staged / "x", b"1")

        assert not out.exists()
        assert run.folder.parent == tmp_path
    assert snapshot(tmp_path).keys() == {"out", "out/x"}


def stopped(out, error, *, force=False, meanwhile=lambda: None):
    """A run that does something half-way and then ends with the error, if any."""
    with new_output(out, inputs=[], force=force) as run:
        write_file(run.staged / "x", b"1")
        meanwhile()
        if error:
            raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_when_the_block_raises(error, tmp_path):
    """Not the work folder, not the parents made for it, not even after Ctrl-C."""
    with pytest.raises(error):
        stopped(tmp_path / "a" / "b" / "out", error)

    assert list(tmp_path.iterdir()) == []


def test_parents_with_somebody_elses_files_stay(tmp_path):
    """Only empty folders that this run made are taken away."""

    def meanwhile():
        (tmp_path / "a" / "other").write_text("x")

    with pytest.raises(KeyError):
        stopped(tmp_path / "a" / "b" / "out", KeyError, meanwhile=meanwhile)

    assert snapshot(tmp_path).keys() == {"a", "a/other"}


def test_a_second_run_on_the_same_output_is_refused_and_disturbs_nothing(tmp_path):
    """The work folder is the lock."""
    out = tmp_path / "out"
    with new_output(out, inputs=[], force=False) as run:
        write_file(run.staged / "x", b"1")
        with (
            pytest.raises(BusyError, match=r"another run .* is working in .*out\.eckart-work"),
            new_output(out, inputs=[], force=False),
        ):
            pass

        assert (run.staged / "x").exists()
    assert (out / "x").read_bytes() == b"1"


@pytest.mark.parametrize("content", [["theirs"], []])
def test_an_output_made_meanwhile_by_somebody_else_is_not_replaced(content, tmp_path):
    """A folder that appeared during the run stays, empty or not: exit 2."""
    out = tmp_path / "out"

    def meanwhile():
        out.mkdir()
        for name in content:
            (out / name).write_text("mine")

    with pytest.raises(UsageError, match="out exists already"):
        stopped(out, None, meanwhile=meanwhile)

    assert snapshot(tmp_path).keys() == {"out", *(f"out/{name}" for name in content)}


def make_ours(out, content=b"old"):
    with new_output(out, inputs=[], force=False) as run:
        write_file(run.staged / "eckart.json", b'{"schema":"eckart/1"}')
        write_file(run.staged / "x", content)


def test_force_replaces_ours_after_the_new_one_is_complete(tmp_path):
    """While the new one is made the old one stands; if that fails it stays."""
    out = tmp_path / "out"
    make_ours(out)
    before = snapshot(tmp_path)
    with pytest.raises(KeyError):
        stopped(out, KeyError, force=True)
    kept = snapshot(tmp_path)
    with new_output(out, inputs=[], force=True) as run:
        write_file(run.staged / "y", b"new")

    assert kept == before
    assert snapshot(tmp_path).keys() == {"out", "out/y"}


def test_force_puts_the_old_one_back_when_the_last_rename_fails(tmp_path, monkeypatch):
    """Between the two renames lies the only moment without an output."""
    out = tmp_path / "out"
    make_ours(out)
    before, real = snapshot(tmp_path), os.rename

    def rename(source, target, **options):
        if str(source).endswith("output"):
            raise OSError(5, "Input/output error")
        return real(source, target, **options)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(StorageError):
        stopped(out, None, force=True)

    assert snapshot(tmp_path) == before


def test_force_does_not_replace_a_folder_with_somebody_elses_certificate(tmp_path):
    """eckart.json must be there and must be ours."""
    out = tmp_path / "out"
    out.mkdir()
    for content in ({}, {"schema": "other/1"}):
        (out / "eckart.json").write_text(json.dumps(content))
        with pytest.raises(UsageError, match="was not written by eckart"):
            check_output(out, inputs=[], force=True)


def test_inside_and_around_are_told_by_where_paths_lead(tmp_path):
    """Through links and `..`; a sibling whose name begins alike is neither."""
    src = tmp_path / "model"
    (src / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(src)

    for out in (src, src / "x", tmp_path / "link" / "x", src / "deep" / ".." / "x"):
        with pytest.raises(UsageError, match="is inside the input"):
            check_output(out, inputs=[src], force=False)
    with pytest.raises(UsageError, match="is inside the output"):
        check_output(tmp_path, inputs=[src], force=False)
    check_output(tmp_path / "model-small", inputs=[src], force=False)


def test_everything_is_synced_before_it_is_published(tmp_path, monkeypatch):
    """The file and its folder before the rename, the parent after it."""
    events = []
    real_sync, real_rename = os.fsync, os.rename

    def fsync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115
        return real_sync(descriptor)

    def rename(source, target, **options):
        events.append("rename")
        return real_rename(source, target, **options)

    if not os.path.exists("/proc/self/fd"):  # noqa: PTH110
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    (tmp_path / "sidecar").write_bytes(b"1")
    with new_output(tmp_path / "out", inputs=[], force=False) as run:
        file = lay_out_file(run.staged / "w", {"a": TensorLayout.of("I8", (1,))})
        file.write("a", torch.ones(1, dtype=torch.int8))
        file.sync()
        copy_file(tmp_path / "sidecar", run.staged / "sub" / "sidecar")
    staged = str(tmp_path / "out.eckart-work" / "output")
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]

    assert {staged, f"{staged}/w", f"{staged}/sub", f"{staged}/sub/sidecar"} <= set(before)
    assert after == [str(tmp_path)]


def test_an_output_that_a_killed_run_had_moved_aside_is_put_back(tmp_path):
    """Between the two renames of --force lies a moment without an output: nothing is lost in it."""
    out = tmp_path / "out"
    make_ours(out)
    before = snapshot(tmp_path)
    (tmp_path / "out.eckart-work").mkdir()
    (tmp_path / "out.eckart-work" / "lock").touch()
    out.rename(tmp_path / "out.eckart-work" / "replaced")

    with pytest.raises(KeyError):
        stopped(out, KeyError, force=True)

    assert snapshot(tmp_path) == before


def test_what_a_killed_run_left_staged_is_removed(tmp_path):
    """Its lock died with it; the next run begins anew."""
    staged = tmp_path / "out.eckart-work" / "output"
    staged.mkdir(parents=True)
    (tmp_path / "out.eckart-work" / "lock").touch()
    (staged / "half").write_text("half")

    with new_output(tmp_path / "out", inputs=[], force=False) as run:
        assert [*run.staged.iterdir()] == []
    assert snapshot(tmp_path).keys() == {"out"}


@pytest.mark.parametrize("error", [None, KeyError])
def test_what_else_is_in_the_run_folder_stays_if_it_is_kept(error, tmp_path):
    """Whether the run ends well or not: what is staged goes, the rest is for the next run."""
    try:
        with new_output(tmp_path / "out", inputs=[], force=False) as run:
            (run.folder / "part").write_text("x")
            run.keep = True
            if error:
                raise error
    except KeyError:
        pass

    assert (tmp_path / "out.eckart-work" / "part").exists()
    assert not (tmp_path / "out.eckart-work" / "output").exists()
    assert (tmp_path / "out").exists() == (error is None)


def test_too_little_space_is_told_in_numbers(tmp_path):
    """Where, how much is needed, how much is free; for a place that does not exist yet."""
    with pytest.raises(StorageError, match=r"the run needs up to 1,000,.* bytes at .*deep, where"):
        check_space(tmp_path / "not" / "so" / "deep", 10**18, "the run")
    check_space(tmp_path, 1, "the run")
