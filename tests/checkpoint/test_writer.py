"""Outputs appear whole or not at all; files are laid out as the library lays them out."""

import json
import os

import pytest
import torch
from builders import raw_header, small_tensors, snapshot
from safetensors.torch import load_file, save_file

from eckart.checkpoint.paths import write_file
from eckart.checkpoint.tensor_file import TensorFile, TensorLayout
from eckart.checkpoint.writer import check_output, copy_file, new_output
from eckart.errors import BusyError, StorageError, UsageError


def layout_of(tensors):
    kinds = {torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL", torch.int8: "I8"}
    return {name: TensorLayout.of(kinds[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


def test_a_file_filled_in_any_order_is_the_same_and_the_library_reads_it(tmp_path):
    """Tensors written forwards and backwards: equal bytes, equal values."""
    tensors = small_tensors()
    for path, names in (("a", list(tensors)), ("b", list(reversed(tensors)))):
        file = TensorFile(tmp_path / path, layout_of(tensors))
        for name in names:
            file.write(name, tensors[name])
        file.close()
    read = load_file(tmp_path / "a")

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_tensors_lie_as_the_library_would_lay_them(tmp_path):
    """By falling element size, then by name: the same places as in safetensors' own file."""
    tensors = {name: t for name, t in small_tensors().items() if t.dtype != torch.bool}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "ours", layout_of(tensors))
    for name, tensor in tensors.items():
        file.write(name, tensor)
    file.close()

    assert raw_header(tmp_path / "ours")[0] == raw_header(tmp_path / "theirs")[0]


def test_what_is_written_need_not_be_contiguous(tmp_path):
    """A transposed view, a slice, a scalar, an empty tensor."""
    W = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": W.T, "s": W[:, 1:3], "n": torch.tensor(2.5), "e": torch.zeros(0, 3)}
    file = TensorFile(tmp_path / "x", layout_of(tensors))
    for name, tensor in tensors.items():
        file.write(name, tensor)
    file.close()

    assert all(torch.equal(load_file(tmp_path / "x")[name], t) for name, t in tensors.items())


def test_a_file_without_tensors_is_a_file(tmp_path):
    """A header and nothing else."""
    TensorFile(tmp_path / "x", {}).close()

    assert load_file(tmp_path / "x") == {}


def test_our_own_mistakes_are_assertions(tmp_path):
    """A tensor of another size than laid out, or one never written."""
    file = TensorFile(tmp_path / "x", {"a": TensorLayout.of("F32", (2,))})

    with pytest.raises(AssertionError, match="a: 12 bytes for a place of 8"):
        file.write("a", torch.ones(3))
    with pytest.raises(AssertionError, match="never written"):
        file.close()


def test_names_of_any_script_stand_in_the_header(tmp_path):
    """UTF-8, control characters escaped as JSON does, and read back exactly."""
    names = ["é", "模型", "a\x1b\n\x00b", '"quoted"\\', "\u202e", "", "\U0001f600"]
    file = TensorFile(tmp_path / "x", {name: TensorLayout.of("I8", (1,)) for name in names})
    for i, name in enumerate(names):
        file.write(name, torch.tensor([i], dtype=torch.int8))
    file.close()
    read = load_file(tmp_path / "x")

    assert {name: int(read[name]) for name in names} == {name: i for i, name in enumerate(names)}


def test_the_output_appears_when_the_block_ends_well(tmp_path):
    """Until then there is only the work folder; afterwards only the output."""
    out = tmp_path / "out"
    with new_output(out, inputs=[], force=False) as work:
        write_file(work / "output" / "x", b"1")

        assert not out.exists()
        assert work.parent == tmp_path
    assert snapshot(tmp_path).keys() == {"out", "out/x"}


def stopped(out, error, *, force=False, meanwhile=lambda: None):
    """A run that does something half-way and then ends with the error, if any."""
    with new_output(out, inputs=[], force=force) as work:
        write_file(work / "output" / "x", b"1")
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
    with new_output(out, inputs=[], force=False) as work:
        write_file(work / "output" / "x", b"1")
        with (
            pytest.raises(BusyError, match=r"out\.eckart-work exists: another run"),
            new_output(out, inputs=[], force=False),
        ):
            pass

        assert (work / "output" / "x").exists()
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
    with new_output(out, inputs=[], force=False) as work:
        write_file(work / "output" / "eckart.json", b'{"schema":"eckart/1"}')
        write_file(work / "output" / "x", content)


def test_force_replaces_ours_after_the_new_one_is_complete(tmp_path):
    """While the new one is made the old one stands; if that fails it stays."""
    out = tmp_path / "out"
    make_ours(out)
    before = snapshot(tmp_path)
    with pytest.raises(KeyError):
        stopped(out, KeyError, force=True)
    kept = snapshot(tmp_path)
    with new_output(out, inputs=[], force=True) as work:
        write_file(work / "output" / "y", b"new")

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
    with new_output(tmp_path / "out", inputs=[], force=False) as work:
        file = TensorFile(work / "output" / "w", {"a": TensorLayout.of("I8", (1,))})
        file.write("a", torch.ones(1, dtype=torch.int8))
        file.close()
        copy_file(tmp_path / "sidecar", work / "output" / "sub" / "sidecar")
    staged = str(tmp_path / "out.eckart-work" / "output")
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]

    assert {staged, f"{staged}/w", f"{staged}/sub", f"{staged}/sub/sidecar"} <= set(before)
    assert after == [str(tmp_path)]
