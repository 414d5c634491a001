"""What the user names is opened as what it is, or refused in one sentence; never a traceback."""

import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from builders import WEIGHTS, write_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from eckart.checkpoint.index import PICKLE, SAFETENSORS
from eckart.checkpoint.opening import open_checkpoint, open_source
from eckart.checkpoint.paths import printable
from eckart.checkpoint.source import Checkpoint, Source
from eckart.errors import CheckpointError, EckartError

TENSORS = {
    "bias": torch.tensor([1.5, -2.0, float("inf")]),
    "count": torch.tensor(7),
    "mask": torch.tensor([[True, False]]),
    "none": torch.empty(0, 4, dtype=torch.float16),
    "weight": torch.arange(60.0).reshape(5, 4, 3),
}
ONE = {"weight": TENSORS["weight"]}


@dataclass(frozen=True)
class Kind:
    """A kind of source: how it is written, and the file that a fuzzer changes."""

    write: Callable[[Path], Path]  # into an empty folder; the path that a user would give
    file: str
    tensors: dict[str, Tensor]


def arrays(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def write_file(folder: Path) -> Path:
    save_file(TENSORS, folder / "w.safetensors")
    return folder / "w.safetensors"


def write_folder(folder: Path) -> Path:
    save_file(TENSORS, folder / WEIGHTS)
    return folder


def halves() -> Iterator[dict[str, Tensor]]:
    names = sorted(TENSORS)
    for chosen in (names[::2], names[1::2]):
        yield {name: TENSORS[name] for name in chosen}


def write_index(path: Path, shards: dict[str, dict[str, Tensor]]) -> None:
    places = {name: shard for shard, tensors in shards.items() for name in tensors}
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def write_shards(folder: Path) -> Path:
    shards = {f"model-{i}.safetensors": half for i, half in enumerate(halves())}
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
    write_index(folder / SAFETENSORS.index, shards)
    return folder


def write_npy(folder: Path) -> Path:
    np.save(folder / "weight.npy", ONE["weight"].numpy())
    return folder / "weight.npy"


def write_npz(folder: Path) -> Path:
    np.savez(folder / "w.npz", **arrays(TENSORS))
    return folder / "w.npz"


def write_packed(folder: Path) -> Path:
    np.savez_compressed(folder / "w.npz", **arrays(TENSORS))
    return folder / "w.npz"


def write_pickle(folder: Path) -> Path:
    torch.save(TENSORS, folder / PICKLE.weights)
    return folder


def write_legacy(folder: Path) -> Path:
    path = folder / "w.bin"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    keys = sorted({*re.findall(rb"X.\0\0\0(\d{6,})", content, re.DOTALL)})  # addresses
    for number, key in enumerate(keys):  # … which would make a fuzzer's findings come and go
        texts = (key, b"%d" % number)
        old, new = (b"X" + bytes([len(text), 0, 0, 0]) + text for text in texts)
        content = content.replace(old, new)
    path.write_bytes(content)
    return path


def write_pickled_shards(folder: Path) -> Path:
    shards = {f"pytorch_model-{i}.bin": half for i, half in enumerate(halves())}
    for shard, tensors in shards.items():
        torch.save(tensors, folder / shard)
    write_index(folder / PICKLE.index, shards)
    return folder


KINDS = {
    "safetensors": Kind(write_file, "w.safetensors", TENSORS),
    "folder": Kind(write_folder, WEIGHTS, TENSORS),
    "index": Kind(write_shards, SAFETENSORS.index, TENSORS),
    "npy": Kind(write_npy, "weight.npy", ONE),
    "npz": Kind(write_npz, "w.npz", TENSORS),
    "compressed npz": Kind(write_packed, "w.npz", TENSORS),
    "bin": Kind(write_pickle, PICKLE.weights, TENSORS),
    "legacy bin": Kind(write_legacy, "w.bin", TENSORS),
    "pickled index": Kind(write_pickled_shards, PICKLE.index, TENSORS),
}


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    """Each kind of source in turn."""
    return KINDS[request.param]


def opened(path: Path) -> Source:
    return open_source(path, allow_pickle=True)


def plain(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


# Laws, of every kind.


def test_every_kind_gives_the_same_tensors(kind, tmp_path):
    """Whole, by rows, as bytes and by digest, all agree with what was saved."""
    source = opened(kind.write(tmp_path))

    assert [*source.tensors] == sorted(kind.tensors)
    for name, tensor in kind.tensors.items():
        info, loaded = source.tensors[name], source.load(name)

        assert (info.shape, info.nbytes) == (tuple(tensor.shape), tensor.nbytes)
        assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
        assert plain(loaded) == plain(tensor)
        assert b"".join(plain(piece) for piece in source.chunks(name)) == plain(tensor)
        assert source.digest(name) == blake3(plain(tensor)).hexdigest()
        for start in range(len(tensor) if tensor.ndim else 0):
            assert plain(source.load(name, start)) == plain(tensor[start:])
            assert plain(source.load(name, start, start + 1)) == plain(tensor[start : start + 1])


def test_the_fingerprint_does_not_depend_on_the_kind(tmp_path):
    """The same model is the same model, in whatever it is kept."""
    found = set()
    for name, kind in KINDS.items():
        if kind.tensors is TENSORS:
            (tmp_path / name).mkdir()
            found.add(opened(kind.write(tmp_path / name)).fingerprint())

    assert len(found) == 1


def test_a_loaded_tensor_can_be_written_to(kind, tmp_path):
    """It is in memory of its own, so the next one is as before."""
    source = opened(kind.write(tmp_path))
    source.load("weight").zero_()

    assert torch.equal(source.load("weight"), TENSORS["weight"])


def test_every_kind_can_be_sent_to_another_process(kind, tmp_path):
    """It reads the same there, and is small: no tensor travels with it."""
    source = opened(kind.write(tmp_path))
    source.load("weight")
    sent = pickle.dumps(source)
    received = pickle.loads(sent)

    assert received == source
    assert received.fingerprint() == source.fingerprint()
    assert len(sent) < 4000


@pytest.mark.parametrize("change", ["size", "mtime", "gone"])
def test_a_changed_file_of_any_kind_is_noticed(change, kind, tmp_path):
    """By its size or its time, in any of its weight files."""
    path = kind.write(tmp_path)
    for name in opened(path).files:
        source = opened(path)
        source.check_unchanged()
        file, content = source.file(name), source.file(name).read_bytes()
        found = file.stat()
        file.unlink()
        if change != "gone":
            file.write_bytes(content + b"\0" * (change == "size"))
            os.utime(file, ns=(0, found.st_mtime_ns + (change == "mtime")))

        with pytest.raises(CheckpointError, match=file.name):
            source.check_unchanged()
        file.write_bytes(content)


def test_links_as_in_the_hubs_cache_are_followed(kind, tmp_path):
    """A folder of links to blobs elsewhere, each called by a hash."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    path = kind.write(tmp_path / "blobs")
    for number, file in enumerate(sorted((tmp_path / "blobs").iterdir())):
        blob = file.with_name(f"{number:064x}")
        (tmp_path / "snapshot" / file.name).symlink_to(Path("..") / "blobs" / blob.name)
        file.rename(blob)
    source = opened(tmp_path / "snapshot" / path.relative_to(tmp_path / "blobs"))

    assert [*source.tensors] == sorted(kind.tensors)
    assert torch.equal(source.load("weight"), TENSORS["weight"])


# Fuzz: damage of every kind, to every kind of file.


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """The content with bits flipped, bytes replaced, cut, doubled, put in or taken out."""
    changed = bytearray(content)
    for _ in range(random.integers(1, 4)):
        a, b = sorted(random.integers(0, len(changed) + 1, 2).tolist())
        match random.integers(0, 6):
            case 0 if changed:
                changed[a % len(changed)] ^= 1 << int(random.integers(8))
            case 1:
                changed[a : a + 4] = random.bytes(len(changed[a : a + 4]))
            case 2:
                del changed[b:]
            case 3:
                del changed[a : a + int(random.integers(1, 9))]
            case 4:
                changed[a:a] = random.bytes(int(random.integers(1, 9)))
            case _:
                changed[a:a] = changed[a:b]
    return bytes(changed)


@pytest.mark.parametrize("name", KINDS)
def test_damage_gives_our_error_or_tensors(name, tmp_path, capfd):
    """300 damaged files: an EckartError that names the file, or every tensor of the shape it says.

    Nothing is printed and nothing warned of (data of .npy and safetensors have no checksum).
    """
    kind, random = KINDS[name], np.random.default_rng(sorted(KINDS).index(name))
    path = kind.write(tmp_path)
    content, refused = (tmp_path / kind.file).read_bytes(), 0
    for _ in range(300):
        (tmp_path / kind.file).write_bytes(damaged(content, random))
        try:
            source = opened(path)
            for tensor, info in source.tensors.items():
                if info.dtype not in ("U16", "U32", "U64"):
                    assert source.load(tensor).shape == info.shape
            source.fingerprint()
        except EckartError as error:
            message, refused = str(error), refused + 1

            assert tmp_path.name in message, message
            assert message == printable(message)
            assert len(message) < 3000

    assert refused > 100
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["bin", "npz", "compressed npz"])
def test_no_flipped_bit_in_a_tensor_goes_unnoticed_where_there_is_a_checksum(name, tmp_path):
    """Opened or not, what is loaded is what was saved."""
    kind, random = KINDS[name], np.random.default_rng(0)
    path = kind.write(tmp_path)
    content = (tmp_path / kind.file).read_bytes()
    for place in random.integers(0, len(content), 100).tolist():
        changed = bytearray(content)
        changed[place] ^= 1 << int(random.integers(8))
        (tmp_path / kind.file).write_bytes(changed)
        try:
            source = opened(path)
            loaded = {tensor: source.load(tensor) for tensor in source.tensors}
        except EckartError:
            continue
        for tensor in {*loaded} & {*TENSORS}:
            assert plain(loaded[tensor]) == plain(TENSORS[tensor])


# What is opened as what.


@pytest.mark.parametrize("allow", [False, True])
def test_safetensors_are_preferred_to_pickles(allow, tmp_path):
    """As every loader does; the pickles beside them are not looked at."""
    write_folder(tmp_path)
    (tmp_path / PICKLE.weights).write_bytes(b"no pickle")

    assert isinstance(open_source(tmp_path, allow_pickle=allow), Checkpoint)


def test_what_eckart_writes_is_a_safetensors_folder(tmp_path):
    """`open_checkpoint` takes no other kind, and a path may be text."""
    src = write_checkpoint(tmp_path / "src", TENSORS)
    np.save(tmp_path / "w.npy", np.ones(3))

    assert isinstance(open_checkpoint(str(src)), Checkpoint)
    with pytest.raises(CheckpointError, match=r"w\.npy is not a safetensors checkpoint: give"):
        open_checkpoint(tmp_path / "w.npy")


@pytest.mark.parametrize("kind", ["bin", "legacy bin", "pickled index"])
def test_pickles_need_the_users_word(kind, tmp_path):
    """By default they are refused before they are looked at."""
    path = KINDS[kind].write(tmp_path)
    (tmp_path / KINDS[kind].file).write_bytes(b"nonsense")

    with pytest.raises(CheckpointError, match="add --allow-pickle"):
        open_source(path)
    with pytest.raises(CheckpointError, match=r"add --allow-pickle"):
        open_checkpoint(path)


def empty(path: Path) -> None:
    path.mkdir()


def otherwise_named(path: Path) -> None:
    path.mkdir()
    for name in ("b", "a\x1b[2J"):
        save_file(TENSORS, path / f"{name}.safetensors")


def dangling(path: Path) -> None:
    path.mkdir()
    (path / WEIGHTS).symlink_to("../blobs/nothing")


def both(path: Path) -> None:
    path.mkdir()
    write_folder(path)
    write_shards(path)


def both_pickled(path: Path) -> None:
    path.mkdir()
    write_pickle(path)
    write_pickled_shards(path)


REFUSED = {
    "nothing": (lambda path: None, "x does not exist: check the path"),
    "a dangling link": (lambda path: path.symlink_to("y"), "x does not exist"),
    "a link to itself": (lambda path: path.symlink_to("x"), "cannot open .*x: Too many levels"),
    "an empty folder": (
        empty,
        f"neither {WEIGHTS} nor {SAFETENSORS.index} in .*x: give the folder",
    ),
    "otherwise named": (
        otherwise_named,
        r"give the folder .* \(or one file, as .*x/a\\x1b\[2J\.safetensors\)",
    ),
    "a broken download": (
        dangling,
        rf"in .*x \({WEIGHTS} is a link to nothing\): give the folder [^()]*$",
    ),
    "a file and an index": (both, f"holds both {WEIGHTS} and {SAFETENSORS.index}.*: move one"),
    "two of pickles": (both_pickled, f"holds both {PICKLE.weights} and {PICKLE.index}"),
    "a FIFO": (os.mkfifo, "x is neither a folder nor"),
    "another file": (lambda path: path.write_bytes(b"x"), "x is neither a folder nor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_source_is_refused_with_what_would_be_one(case, tmp_path):
    """What, where, and what next."""
    build, words = REFUSED[case]
    build(tmp_path / "x")

    with pytest.raises(CheckpointError, match=words) as caught:
        opened(tmp_path / "x")

    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["x\0y", "n" * 5000])
def test_a_path_that_no_file_can_have_is_refused(name, tmp_path):
    """In a sentence, as any other."""
    with pytest.raises(CheckpointError, match="cannot open"):
        opened(tmp_path / name)


def test_the_file_that_the_message_suggests_can_be_opened(tmp_path):
    """A folder with one differently named file: its path, as it can be typed."""
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        opened(tmp_path)
    suggested = str(caught.value).split("(or one file, as ")[1].split(")")[0]

    assert [*opened(Path(suggested)).tensors] == sorted(TENSORS)
