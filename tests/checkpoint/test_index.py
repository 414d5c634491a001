"""Sharded checkpoints: read without mercy, and the output does not know how the source was cut."""

import json
import os
from pathlib import Path

import pytest
import torch
from builders import WEIGHTS, eckart, small_tensors, snapshot, write_checkpoint
from safetensors.torch import load_file, save_file

from eckart import api
from eckart.checkpoint.header import TensorInfo
from eckart.checkpoint.index import PICKLE, SAFETENSORS, Index, Layout, read_index
from eckart.checkpoint.opening import open_checkpoint
from eckart.errors import CheckpointError

INDEX = SAFETENSORS.index
SHARDS = (
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-3.safetensors",
)


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The same checkpoint as `write_checkpoint`, cut into three shards of every third tensor."""
    write_checkpoint(folder, tensors)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    for i, shard in enumerate(SHARDS):
        save_file({n: tensors[n] for n in names[i::3]}, folder / shard, {"format": "pt"})
    places = {name: SHARDS[i % 3] for i, name in enumerate(names)}
    write_index(folder, places)
    return folder


def write_index(folder: Path, places: object) -> None:
    document = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(document))


def places_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


@pytest.fixture
def sharded(tmp_path) -> Path:
    return write_shards(tmp_path / "sharded", small_tensors())


def test_shards_are_one_checkpoint(sharded):
    """Every tensor, sorted by name, loads from the shard that holds it."""
    source, expected = open_checkpoint(sharded), small_tensors()

    assert list(source.tensors) == sorted(expected)
    assert all(torch.equal(source.load(name), expected[name]) for name in expected)
    assert source.files == sorted(SHARDS)


def test_the_fingerprint_does_not_know_how_the_source_was_cut(sharded, tmp_path):
    """One file or three shards, the same model."""
    whole = open_checkpoint(write_checkpoint(tmp_path / "whole", small_tensors()))

    assert open_checkpoint(sharded).fingerprint() == whole.fingerprint()


def test_a_shard_that_changes_is_noticed(sharded):
    """Whichever it is, by its name."""
    for shard in SHARDS:
        source = open_checkpoint(sharded)
        os.utime(sharded / shard, ns=(0, 1))

        with pytest.raises(CheckpointError, match=f"{shard} was written again"):
            source.check_unchanged()


@pytest.mark.parametrize("form", ["ba", "pivoted"])
def test_the_output_does_not_know_how_the_source_was_cut(sharded, tmp_path, form):
    """Law 3: one file or three shards, the weights and config of the output are the same bytes."""
    whole = write_checkpoint(tmp_path / "whole", small_tensors())
    for name, src in (("a", whole), ("b", sharded)):
        api.compress(src, tmp_path / name, keep=0.6, form=form)

    for file in (WEIGHTS, "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert all(check.held for check in api.verify(tmp_path / "b", sharded))


def test_output_shards_are_cut_by_size_and_read_again(sharded, tmp_path):
    """`--shard-size` cuts in sorted order; verify and densify read shards and index."""
    out, dense = tmp_path / "out", tmp_path / "dense"
    asked = ("compress", sharded, "-o", out, "--keep", "0.6", "--shard-size", "2kB")
    assert eckart(*asked).code == 0

    source = open_checkpoint(out)
    names = [name for file in source.files for name in sorted(load_file(out / file))]
    assert len(source.files) > 2
    assert names == sorted(names)
    for file in source.files:
        tensors = load_file(out / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 2000
    assert eckart("verify", out, "--against", sharded).code == 0
    assert eckart("densify", out, "-o", dense, "--shard-size", "3kB").code == 0
    assert eckart("verify", dense, "--against", out).code == 0


def broken_shard_missing(folder: Path) -> None:
    (folder / SHARDS[2]).unlink()


def broken_both(folder: Path) -> None:
    save_file({"a": torch.ones(2)}, folder / WEIGHTS)


def broken_in_two_shards(folder: Path) -> None:
    extra = load_file(folder / SHARDS[1]) | dict(
        [next(iter(load_file(folder / SHARDS[0]).items()))]
    )
    save_file(extra, folder / SHARDS[1])


def broken_other_shard(folder: Path) -> None:
    places = places_of(folder)
    first, second = sorted(places)[:2]
    write_index(folder, places | {first: places[second], second: places[first]})


def broken_unnamed(folder: Path) -> None:
    places = places_of(folder)
    del places[min(places)]
    write_index(folder, places)


def broken_absent(folder: Path) -> None:
    write_index(folder, places_of(folder) | {"ghost.weight": SHARDS[0]})


def broken_outside(folder: Path) -> None:
    save_file({"secret": torch.ones(2)}, folder.parent / "secret.safetensors")
    write_index(folder, places_of(folder) | {"secret": "../secret.safetensors"})


def broken_absolute(folder: Path) -> None:
    write_index(folder, places_of(folder) | {"secret": "/etc/passwd.safetensors"})


def broken_duplicate_key(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    name, shard = next(iter(places_of(folder).items()))
    pair = f"{json.dumps(name)}: {json.dumps(shard)}"
    (folder / INDEX).write_text(text.replace(pair, f"{pair}, {pair}"))


def broken_no_map(folder: Path) -> None:
    (folder / INDEX).write_text("{}")


def broken_list(folder: Path) -> None:
    write_index(folder, ["a"])


def broken_number(folder: Path) -> None:
    write_index(folder, places_of(folder) | {"x": 3})


def broken_fifo(folder: Path) -> None:
    (folder / SHARDS[0]).unlink()
    os.mkfifo(folder / SHARDS[0])


def broken_index_fifo(folder: Path) -> None:
    (folder / INDEX).unlink()
    os.mkfifo(folder / INDEX)


def broken_link(folder: Path) -> None:
    (folder / SHARDS[2]).unlink()
    (folder / SHARDS[2]).symlink_to("../blobs/nothing")


def broken_copies(folder: Path) -> None:
    places = places_of(folder)
    (folder / "z.safetensors").symlink_to(SHARDS[0])
    write_index(folder, places | {"x": "z.safetensors"})


def broken_truncated(folder: Path) -> None:
    content = (folder / SHARDS[1]).read_bytes()
    (folder / SHARDS[1]).write_bytes(content[:-10])


BROKEN = {
    broken_shard_missing: (SHARDS[2], "1 of 3"),
    broken_both: (WEIGHTS, INDEX),
    broken_in_two_shards: (SHARDS[0], SHARDS[1]),
    broken_other_shard: (INDEX, "names"),
    broken_unnamed: ("does not name it",),
    broken_absent: ("ghost.weight", "no shard"),
    broken_outside: ("../secret", "beside it"),
    broken_absolute: ("/etc/passwd", "beside it"),
    broken_duplicate_key: (INDEX, "twice"),
    broken_no_map: ("weight_map",),
    broken_list: ("weight_map",),
    broken_number: ("3", "beside it"),
    broken_truncated: (SHARDS[1], "damaged"),
    broken_fifo: (SHARDS[0], "not a regular file"),
    broken_index_fifo: (INDEX, "not a regular file"),
    broken_link: (SHARDS[2], "1 of 3", "Download"),
    broken_copies: (SHARDS[0], "z.safetensors", "two shards"),
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_an_ambiguous_or_incomplete_checkpoint_is_refused(damage, sharded, tmp_path):
    """What and where, exit 3, and nothing is written; `inspect` refuses the same."""
    damage(sharded)
    before = snapshot(tmp_path)

    done = eckart("compress", sharded, "-o", tmp_path / "out", "--rank", "2")

    assert done.code == 3
    assert all(word in done.message for word in BROKEN[damage])
    assert eckart("inspect", sharded).code == 3
    assert snapshot(tmp_path) == before


def test_links_as_in_the_hubs_cache_are_followed(sharded, tmp_path):
    """A snapshot folder of links to blobs elsewhere is a checkpoint like any other."""
    blobs, links = tmp_path / "blobs", tmp_path / "snapshots"
    links.mkdir()
    sharded.rename(blobs)
    for number, path in enumerate(sorted(blobs.iterdir())):
        blob = blobs / f"{number:064x}"
        (links / path.name).symlink_to(Path("..") / "blobs" / blob.name)
        path.rename(blob)

    api.compress(links, tmp_path / "out", rank=4)

    assert all(check.held for check in api.verify(tmp_path / "out", links))


NO_SHARDS = {
    "empty": "",
    "this folder": ".",
    "the folder above": "..",
    "hidden": ".hidden.safetensors",
    "a line break": "a\nb.safetensors",
    "a NUL": "a\0b.safetensors",
    "an escape": "a\x1b[2Jb.safetensors",
    "text that turns": "a\u202eb.safetensors",
    "half a character": "a\ud800.safetensors",
    "another suffix": "a.bin",
    "a path": "a/b.safetensors",
    "a path elsewhere": "a\\b.safetensors",
    "too long": "é" * 122 + ".safetensors",  # 256 bytes
    "a number": 3,
    "a list": ["a.safetensors"],
    "nothing": None,
}


@pytest.mark.parametrize("case", NO_SHARDS)
def test_only_plain_names_of_safetensors_files_are_shards(case, sharded):
    """One path component, printable, visible, with the suffix; and the message is printable too."""
    write_index(sharded, places_of(sharded) | {"x": NO_SHARDS[case]})

    with pytest.raises(CheckpointError, match="beside it") as caught:
        open_checkpoint(sharded)

    assert str(caught.value).isprintable()


def test_a_shard_may_have_the_longest_name_that_a_file_can_have(sharded):
    """255 bytes, of any script."""
    name = "é" * 121 + "x.safetensors"
    (sharded / SHARDS[0]).rename(sharded / name)
    write_index(
        sharded,
        {
            tensor: name if shard == SHARDS[0] else shard
            for tensor, shard in places_of(sharded).items()
        },
    )

    assert name in open_checkpoint(sharded).files


def test_the_first_of_many_missing_shards_are_named(tmp_path):
    """Five, and how many more."""
    write_index(tmp_path, {f"t{i}": f"model-{i}.safetensors" for i in range(8)})

    with pytest.raises(
        CheckpointError, match=r"^8 of 8 shards are missing.*model-4\.\w+ and 3 more"
    ):
        read_index(tmp_path, SAFETENSORS)


def test_what_a_folder_holds_is_asked_of_the_layout(tmp_path):
    """Nothing, one file, or an index; both are an error, for either kind."""
    for layout in (SAFETENSORS, PICKLE, Layout("other", ".x")):
        assert not layout.found_in(tmp_path)
        (tmp_path / layout.weights).touch()
        assert layout.found_in(tmp_path)
        (tmp_path / layout.index).touch()
        with pytest.raises(CheckpointError, match=f"both {layout.weights} and {layout.index}"):
            layout.found_in(tmp_path)
        (tmp_path / layout.weights).unlink()
        assert layout.found_in(tmp_path)


def test_an_index_is_held_against_headers_of_any_kind():
    """It needs what shards hold, not how: each tensor once, where the index says."""
    a, b = TensorInfo((1,), "U8", "s1", 0, 1), TensorInfo((2,), "U8", "s2", 0, 2)
    index = Index(Path("x"), "i", {"a": "s1", "b": "s2"})

    assert index.shards == ["s1", "s2"]
    assert index.merge({"s1": {"a": a}, "s2": {"b": b}}) == {"a": a, "b": b}
    for headers, words in (
        ({"s1": {"a": a}, "s2": {}}, "1 tensor named in x/i stands in no shard, the first b"),
        ({"s1": {}, "s2": {}}, "2 tensors named in x/i stand in no shard, the first a"),
        ({"s1": {"a": a}, "s2": {"b": b, "a": b}}, "a stands in two shards of x: s1 and s2"),
        ({"s1": {"a": a, "b": b}, "s2": {}}, "b stands in shard 1 of 2, s1, but x/i names s2"),
        ({"s1": {"a": a, "c": a}, "s2": {"b": b}}, "c stands .* does not name it"),
    ):
        with pytest.raises(CheckpointError, match=words):
            index.merge(headers)


@pytest.mark.parametrize("size", ["", "0", "-1", "5XB", "many"])
def test_a_shard_size_that_is_none_is_refused(size, sharded, tmp_path):
    """Exit 2, and the text is repeated."""
    done = eckart("compress", sharded, "-o", tmp_path / "o", "--rank", "2", f"--shard-size={size}")

    assert done.code == 2
    assert "--shard-size" in done.message
