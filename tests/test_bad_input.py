"""Whatever is wrong with the input or the request: the exit code, what is said, nothing written."""

import errno
import json
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from builders import (
    CONFIG,
    WEIGHTS,
    eckart,
    forge,
    read_document,
    read_tensors,
    small_tensors,
    snapshot,
    write_checkpoint,
    write_raw,
)
from safetensors.torch import save

from eckart import api
from eckart.errors import EckartError

RANK = ("--rank", "2")
HOSTILE = "a\x1b[2J\n\x07\u202eb\x9b[/bold]<script>../../x"


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def weights(tmp: Path) -> Path:
    return write_checkpoint(tmp / "src") / WEIGHTS


# What may stand in the place of the source: each builds tmp/src.


def missing(tmp: Path) -> None:
    """No such folder."""


def empty(tmp: Path) -> None:
    (tmp / "src").mkdir()


def a_file(tmp: Path) -> None:
    (tmp / "src").write_bytes(save(small_tensors()))


def fifo(tmp: Path) -> None:
    (tmp / "src").mkdir()
    os.mkfifo(tmp / "src" / WEIGHTS)


def device(tmp: Path) -> None:
    (tmp / "src").mkdir()
    (tmp / "src" / WEIGHTS).symlink_to("/dev/zero")


def dangling(tmp: Path) -> None:
    (tmp / "src").mkdir()
    (tmp / "src" / WEIGHTS).symlink_to(tmp / "nowhere")


def weights_are_a_folder(tmp: Path) -> None:
    (tmp / "src" / WEIGHTS).mkdir(parents=True)


def loop(tmp: Path) -> None:
    (tmp / "src").symlink_to(tmp / "src")


def cut(length: int) -> Callable[[Path], None]:
    def build(tmp: Path) -> None:
        path = weights(tmp)
        content = path.read_bytes()
        path.write_bytes(content[: length if length >= 0 else len(content) + length])

    return build


def grown(tmp: Path) -> None:
    path = weights(tmp)
    path.write_bytes(path.read_bytes() + b"\0")


def raw(header: object, data: bytes = b"") -> Callable[[Path], None]:
    def build(tmp: Path) -> None:
        write_raw(tmp / "src" / WEIGHTS, header, data)  # type: ignore[arg-type]

    return build


def prefix(length: int, rest: bytes = b"{}" * 50) -> Callable[[Path], None]:
    def build(tmp: Path) -> None:
        (tmp / "src").mkdir()
        (tmp / "src" / WEIGHTS).write_bytes(struct.pack("<Q", length) + rest)

    return build


def header_above_cap(tmp: Path) -> None:
    (tmp / "src").mkdir()
    path = tmp / "src" / WEIGHTS
    path.write_bytes(struct.pack("<Q", 2**25 + 8))
    os.truncate(path, 2**25 + 100)


def garbage(tmp: Path) -> None:
    (tmp / "src").mkdir()
    (tmp / "src" / WEIGHTS).write_bytes(bytes(range(256)) * 8)


def with_entry(value: float, dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    def build(tmp: Path) -> None:
        tensors = small_tensors(dtype)
        tensors["layers.0.up_proj.weight"][3, 5] = value
        write_checkpoint(tmp / "src", tensors)

    return build


def nothing_to_factor(tmp: Path) -> None:
    tensors = {"embed.weight": torch.ones(8, 8), "q.weight": torch.ones(8, 8, dtype=torch.int8)}
    write_checkpoint(tmp / "src", tensors)


def write_plain(tmp: Path) -> None:
    write_checkpoint(tmp / "src")


def no_tensors(tmp: Path) -> None:
    raw({})(tmp)


def config(text: bytes) -> Callable[[Path], None]:
    def build(tmp: Path) -> None:
        write_checkpoint(tmp / "src")
        (tmp / "src" / "config.json").write_bytes(text)

    return build


def name_taken(tmp: Path) -> None:
    extra = {"layers.0.q_proj.A.weight": torch.ones(2)}
    write_checkpoint(tmp / "src", {**small_tensors(), **extra})


def factored(tmp: Path) -> None:
    write_checkpoint(tmp / "dense")
    api.compress(tmp / "dense", tmp / "src", rank=2)


TWICE = (
    b'{"a.weight":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},'
    b'"a.weight":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}'
)
OVERLAP = {"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}
HOLE = {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}

SOURCES: list[tuple[str, Callable[[Path], None], str]] = [
    ("missing folder", missing, "src does not exist check the path"),
    ("empty folder", empty, f"no {WEIGHTS} in src give the folder"),
    ("a file, not a folder", a_file, "src is neither a folder nor a .safetensors give the folder"),
    ("FIFO", fifo, f"src/{WEIGHTS} is not a regular file"),
    ("device", device, f"src/{WEIGHTS} is not a regular file"),
    ("link to nothing", dangling, f"no {WEIGHTS} in src"),
    ("weights are a folder", weights_are_a_folder, f"src/{WEIGHTS} is not a regular file"),
    ("link to itself", loop, "src"),
    ("no bytes", cut(0), f"src/{WEIGHTS} has 0 bytes not a safetensors file"),
    ("7 bytes", cut(7), f"src/{WEIGHTS} has 7 bytes not a safetensors file"),
    ("8 bytes", cut(8), f"src/{WEIGHTS} header"),
    ("cut in the header", cut(60), f"src/{WEIGHTS} announces a header cut short"),
    ("one byte short", cut(-1), f"src/{WEIGHTS} is damaged Download it again"),
    ("half", cut(2500), f"src/{WEIGHTS} is damaged Download it again"),
    ("one byte more", grown, f"src/{WEIGHTS} is damaged"),
    ("garbage", garbage, f"src/{WEIGHTS} not a safetensors file"),
    ("header larger than the file", prefix(5000), "announces a header of 5000 bytes"),
    ("header of 2^63 bytes", prefix(2**63), "announces a header"),
    ("header above the cap", header_above_cap, f"announces a header of {2**25 + 8} bytes"),
    ("header is no JSON", raw(b"{nonsense"), "not valid JSON"),
    ("header is a list", raw(b"[]"), "list not an object"),
    ("header is not UTF-8", raw(b'{"\xff": 1}'), "not valid JSON"),
    ("header nests without end", raw(b'{"a":' + b"[" * 100_000), "not valid JSON"),
    ("header with NaN", raw(b'{"a": NaN}'), "NaN is not a JSON number"),
    ("duplicate key", raw(TWICE, bytes(4)), "'a.weight' stands there twice"),
    ("overlap", raw(OVERLAP, bytes(12)), "is damaged"),
    ("hole", raw(HOLE, bytes(12)), "is damaged"),
    ("offsets reversed", raw({"a": entry("F32", [1], 4, 0)}, bytes(4)), "is damaged"),
    ("shape and bytes differ", raw({"a": entry("F32", [3], 0, 4)}, bytes(4)), "is damaged"),
    ("shape overflows", raw({"a": entry("F32", [2**62, 8], 0, 4)}, bytes(4)), "is damaged"),
    ("unknown dtype", raw({"a": entry("F99", [1], 0, 4)}, bytes(4)), "is damaged"),
    ("negative side", raw({"a": entry("F32", [-1], 0, 4)}, bytes(4)), "is damaged"),
    ("entry is a number", raw({"a": 5}), "is damaged"),
    ("absurd side", raw({"a": entry("F32", [0, 2**60], 0, 0)}), "a in absurd shape"),
    ("1000 dimensions", raw({"a": entry("F32", [1] * 1000, 0, 4)}, bytes(4)), "absurd shape"),
    ("no tensors", no_tensors, "src holds no tensors at all"),
    ("nothing to factor", nothing_to_factor, "src no matrix embedding dtype I8"),
    ("factored already", factored, "src is factored already densify"),
]

DATA: list[tuple[str, Callable[[Path], None], str]] = [
    ("NaN", with_entry(float("nan")), "layers.0.up_proj.weight 1 non-finite [3, 5] Repair"),
    ("Inf", with_entry(float("inf")), "layers.0.up_proj.weight 1 non-finite [3, 5] Repair"),
    ("-Inf in half", with_entry(float("-inf"), torch.float16), "up_proj.weight non-finite"),
    ("NaN in bfloat16", with_entry(float("nan"), torch.bfloat16), "up_proj.weight non-finite"),
]

CONFIGS: list[tuple[str, Callable[[Path], None], str]] = [
    ("not JSON", config(b"{"), "src/config.json is not valid JSON"),
    ("a list", config(b"[]"), "src/config.json holds a JSON list"),
    ("a key twice", config(b'{"a": 1, "a": 2}'), "src/config.json 'a' stands there twice"),
    (
        "quantized by another",
        config(b'{"quantization_config": {"quant_method": "gptq"}}'),
        "src/config.json quantization_config gptq",
    ),
    ("a name that a factor needs", name_taken, "layers.0.q_proj.A.weight --exclude"),
]


def names(rows: list[tuple[str, Callable[[Path], None], str]]) -> list[str]:
    return [row[0] for row in rows]


def holds_words(message: str, words: str) -> bool:
    """Whether the words stand in the message, in any order."""
    return all(word in message for word in words.split())


@pytest.mark.parametrize(("case", "build", "words"), SOURCES, ids=names(SOURCES))
def test_a_source_that_is_no_checkpoint_is_refused_before_anything_is_written(
    case, build, words, tmp_path
):
    """Exit 3, what and where and what next, and the folders are as they were."""
    build(tmp_path)
    before = snapshot(tmp_path)

    done = eckart("compress", tmp_path / "src", "-o", tmp_path / "out", *RANK)

    assert done.code == 3, done.err
    assert holds_words(done.message, words)
    assert snapshot(tmp_path) == before
    assert done.out == ""


@pytest.mark.parametrize("command", ["inspect", "dry run"])
@pytest.mark.parametrize(("case", "build", "words"), SOURCES, ids=names(SOURCES))
def test_every_command_refuses_the_same_sources(case, build, words, command, tmp_path):
    """`inspect` and `--dry-run` say what `compress` says (but `inspect` may find nothing to do)."""
    build(tmp_path)
    src, out = tmp_path / "src", tmp_path / "out"
    line = {
        "inspect": ("inspect", src),
        "dry run": ("compress", src, "-o", out, *RANK, "--dry-run"),
    }

    done = eckart(*line[command])

    if (case, command) == ("nothing to factor", "inspect"):
        assert done.code == 0
    else:
        assert done.code == 3, done.err
        assert holds_words(done.message, words)
    assert not out.exists()


@pytest.mark.parametrize(("case", "build", "words"), DATA, ids=names(DATA))
def test_a_number_that_is_none_is_named_and_nothing_is_left(case, build, words, tmp_path):
    """NaN and Inf show only when the matrix is read; then the output is taken away again."""
    build(tmp_path)
    before = snapshot(tmp_path)

    for policy in (RANK, ("--keep", "0.5"), ("--energy", "0.9")):
        done = eckart("compress", tmp_path / "src", "-o", tmp_path / "out", *policy)

        assert done.code == 3, done.err
        assert holds_words(done.message, words)
        assert snapshot(tmp_path) == before
    assert eckart("inspect", tmp_path / "src").code == 3


@pytest.mark.parametrize(("case", "build", "words"), CONFIGS, ids=names(CONFIGS))
def test_what_headers_and_config_show_is_refused_before_the_first_svd(
    case, build, words, tmp_path, monkeypatch
):
    """A config.json that cannot be carried over costs no decomposition."""
    build(tmp_path)
    before = snapshot(tmp_path)
    monkeypatch.setattr(api, "decompose_all", lambda *_, **__: pytest.fail("an SVD was begun"))

    done = eckart("compress", tmp_path / "src", "-o", tmp_path / "out", *RANK)

    assert done.code == 3, done.err
    assert holds_words(done.message, words)
    assert snapshot(tmp_path) == before


def test_an_int8_matrix_is_copied_and_the_certificate_says_so(tmp_path):
    """A dtype that has no factorization is not an error while there is something else to do."""
    src = write_checkpoint(tmp_path / "src")

    done = eckart("compress", src, "-o", tmp_path / "out", *RANK)

    rows = {row["name"]: row["reason"] for row in read_document(tmp_path / "out")["copied"]}
    assert done.code == 0
    assert rows["table.weight"] == "dtype I8"


# The output's place.


@dataclass(frozen=True)
class Place:
    """Where -o points, from tmp, and what stands there."""

    out: str
    words: str
    build: Callable[[Path], None] = lambda tmp: None
    force: bool = True  # refused even with --force


def outside(tmp: Path) -> None:
    (tmp / "elsewhere").mkdir()
    (tmp / "out").symlink_to(tmp / "elsewhere")


PLACES = {
    "a file": Place("out", "out exists --force", lambda tmp: (tmp / "out").write_text("mine")),
    "an empty folder": Place("out", "out exists --force", lambda tmp: (tmp / "out").mkdir()),
    "a folder with files": Place(
        "out", "out exists", lambda tmp: write_raw(tmp / "out" / "x", b"mine")
    ),
    "a link to a folder": Place("out", "out exists", outside),
    "a dangling link": Place(
        "out", "out exists", lambda tmp: (tmp / "out").symlink_to(tmp / "nowhere")
    ),
    "inside the input": Place("src/out", "src/out inside the input choose another place"),
    "the input itself": Place("src", "inside the input choose another place"),
    "the input, spelled otherwise": Place("src/../src", "inside the input choose another place"),
    "around the input": Place(".", "is inside the output choose another place"),
    "a link to the input": Place(
        "out", "inside the input", lambda tmp: (tmp / "out").symlink_to(tmp / "src")
    ),
    "a link that leads nowhere": Place(
        "out", "out exists", lambda tmp: (tmp / "out").symlink_to(tmp / "out")
    ),
}


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["plain", "force"])
@pytest.mark.parametrize("place", PLACES)
def test_an_output_is_never_put_where_something_is(place, force, tmp_path, monkeypatch):
    """Exit 2 before the first SVD; what stood there and the input are untouched."""
    write_checkpoint(tmp_path / "src")
    where = PLACES[place]
    where.build(tmp_path)
    before = snapshot(tmp_path)
    monkeypatch.setattr(api, "decompose_all", lambda *_, **__: pytest.fail("an SVD was begun"))
    words = where.words.replace("exists --force", "was not written") if force else where.words
    words = words.replace("out exists", "out was not written by eckart") if force else words

    done = eckart("compress", tmp_path / "src", "-o", tmp_path / where.out, *RANK, *force)

    assert done.code == 2, done.err
    assert holds_words(done.message, words)
    assert snapshot(tmp_path) == before


def test_a_folder_in_the_place_of_the_work_is_somebody_elses(tmp_path):
    """Exit 4, the folder's name, and it is left alone."""
    src = write_checkpoint(tmp_path / "src")
    (tmp_path / "out.eckart-work").mkdir()
    (tmp_path / "out.eckart-work" / "thesis.txt").write_text("theirs")
    before = snapshot(tmp_path)

    done = eckart("compress", src, "-o", tmp_path / "out", *RANK)

    assert done.code == 4
    assert holds_words(done.message, "out.eckart-work eckart did not make it move it away")
    assert snapshot(tmp_path) == before


def test_force_replaces_only_what_eckart_wrote(tmp_path):
    """An output of ours is replaced whole; without --force it is refused."""
    src, out = write_checkpoint(tmp_path / "src"), tmp_path / "out"
    eckart("compress", src, "-o", out, *RANK)
    (out / "left over").write_text("from before")

    refused = eckart("compress", src, "-o", out, "--rank", "3")
    forced = eckart("compress", src, "-o", out, "--rank", "3", "--force")

    assert refused.code == 2
    assert forced.code == 0
    assert not (out / "left over").exists()
    assert {row["rank"] for row in read_document(out)["matrices"]} == {3}
    assert eckart("verify", out, "--against", src).code == 0


# Options.

OPTIONS: list[tuple[tuple[str, ...], str]] = [
    ((), "exactly one of --rank, --energy, --error, --keep and --size got none"),
    (("--rank", "2", "--keep", "0.5"), "exactly one got --rank and --keep"),
    (("--energy", "0.9", "--error", "0.1"), "exactly one got --energy and --error"),
    (("--loss", "0.1"), "--loss 0.1 in nats per token which --statistics with curvature tell"),
    (("--loss", "0"), "--loss 0.0 out of range finite number of nats above 0"),
    (("--loss", "inf"), "--loss inf out of range finite number of nats above 0"),
    (("--rank", "2", "--nonsense"), "No such option --nonsense"),
    (("--rank", "two"), "--rank integer"),
    (("--rank", "2.5"), "--rank integer"),
    (("--rank", "0"), "--rank 0 out of range whole number from 1"),
    (("--rank", "-1"), "--rank -1 out of range whole number from 1"),
    (("--keep", "0"), "--keep 0.0 out of range above 0, up to 1"),
    (("--keep", "1.01"), "--keep 1.01 out of range above 0, up to 1"),
    (("--keep", "-0.5"), "--keep -0.5 out of range"),
    (("--keep", "nan"), "--keep nan out of range"),
    (("--keep", "0.01"), "--keep 0.01 cannot be reached rank 1 everywhere keeps 0.09"),
    (("--energy", "0"), "--energy 0.0 out of range"),
    (("--energy", "1.5"), "--energy 1.5 out of range"),
    (("--error", "1"), "--error 1.0 out of range"),
    (("--error", "-0.1"), "--error -0.1 out of range"),
    (("--rank", "2", "--include", "*.nothing"), "'*.nothing' matches no matrix shell globs"),
    (("--rank", "2", "--exclude", "*.nothing"), "'*.nothing' matches no matrix layers.0"),
    (("--rank", "2", "--include", "norm"), "'norm' matches no matrix"),
    (("--rank", "2", "--dtype", "int8"), "--dtype int8 unknown choose float64, bfloat16"),
    (("--rank", "2", "--dtype", "F32"), "--dtype F32 unknown choose"),
    (("--rank", "2", "--form", "round"), "--form 'round' is not one of 'auto', 'ba', 'pivoted'"),
    (("--rank", "2", "--align", "0"), "--align 0 out of range whole number from 1"),
    (("--rank", "2", "--align", "4"), "--rank 2 is no multiple of --align 4"),
    (("--size", "many"), "--size many is no size 5GB"),
    (("--size", "0"), "--size 0 out of range 1 byte or more"),
    (("--size", "100"), "--size 100 cannot be reached rank 1 everywhere takes"),
    (("--rank", "2", "--workers", "0"), "--workers 0 out of range"),
    (("--rank", "2", "--device", "abacus"), "--device abacus not supported cpu or cuda"),
    (("--rank", "2", "--device", "cuda:77"), "--device cuda:77 not to be had here"),
    (("--rank", "2", "--threads", "0"), "--threads 0 out of range"),
    (("--rank", "2", "--seed", "x"), "--seed integer"),
]


@pytest.mark.parametrize(
    ("line", "words"), OPTIONS, ids=[" ".join(o[0]) or "none" for o in OPTIONS]
)
def test_a_wrong_option_is_refused_before_the_first_svd(line, words, tmp_path, monkeypatch):
    """Exit 2, the option and the value that was given, and what to choose instead."""
    src = write_checkpoint(tmp_path / "src")
    before = snapshot(tmp_path)
    monkeypatch.setattr(api, "decompose_all", lambda *_, **__: pytest.fail("an SVD was begun"))

    done = eckart("compress", src, "-o", tmp_path / "out", *line)

    assert done.code == 2, done.err
    assert holds_words(done.message, words), done.message
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("line", [("compress",), ("densify", "x"), ("verify",), ("nonsense",)])
def test_a_command_without_its_arguments_is_a_usage_error(line):
    """Exit 2, and nothing on stdout."""
    done = eckart(*line)

    assert done.code == 2
    assert done.out == ""


# What stands in the place of an output.


def test_densify_of_a_dense_folder_has_nothing_to_do(tmp_path):
    """Exit 3 for a plain checkpoint and for one that was densified already."""
    src = write_checkpoint(tmp_path / "src")
    api.compress(src, tmp_path / "factored", rank=2)
    api.densify(tmp_path / "factored", tmp_path / "dense")
    before = snapshot(tmp_path)

    plain = eckart("densify", src, "-o", tmp_path / "out")
    twice = eckart("densify", tmp_path / "dense", "-o", tmp_path / "out")

    assert (plain.code, twice.code) == (3, 3)
    assert holds_words(plain.message, "no eckart.json in src")
    assert holds_words(twice.message, "dense is not factored")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("build", "code"), [(missing, 3), (a_file, 3), (empty, 6), (write_plain, 6)]
)
def test_verify_of_what_eckart_did_not_write(build, code, tmp_path):
    """Exit 3 where no folder is, 6 for a folder that lacks its certificate."""
    build(tmp_path)

    done = eckart("verify", tmp_path / "src")

    assert done.code == code
    assert "src" in done.message


def test_verify_against_the_wrong_source_names_both(tmp_path):
    """Exit 3: the source is wrong, the output may be right."""
    src = write_checkpoint(tmp_path / "src")
    other = write_checkpoint(tmp_path / "other", {**small_tensors(), "steps": torch.tensor(4)})
    api.compress(src, tmp_path / "out", rank=2)

    wrong = eckart("verify", tmp_path / "out", "--against", other)
    absent = eckart("verify", tmp_path / "out", "--against", tmp_path / "nowhere")

    assert (wrong.code, absent.code) == (3, 3)
    assert holds_words(wrong.message, "other is not the checkpoint out (src) weights differ")
    assert holds_words(absent.message, "nowhere does not exist")


# Storage.


def test_a_parent_that_may_not_be_written_is_a_storage_error(tmp_path, monkeypatch):
    """EACCES and ENOSPC on the work folder: exit 5, and what the system said."""
    src = write_checkpoint(tmp_path / "src")
    before = snapshot(tmp_path)
    for number, words in ((errno.EACCES, "Permission denied"), (errno.ENOSPC, "No space left")):

        def refuse(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "mkdir", refuse)
            done = eckart("compress", src, "-o", tmp_path / "out", *RANK)

        assert done.code == 5
        assert holds_words(done.message, f"out.eckart-work {words}")
        assert snapshot(tmp_path) == before


def test_a_parent_that_is_a_file_is_a_storage_error(tmp_path):
    """Exit 5, and the file is as it was."""
    src = write_checkpoint(tmp_path / "src")
    before = snapshot(tmp_path)

    done = eckart("compress", src, "-o", src / "config.json" / "deeper" / "out", *RANK)
    beside = eckart("compress", src, "-o", tmp_path / "src2" / "out", "--rank", "0")
    (tmp_path / "file").write_text("x")
    inside = eckart("compress", src, "-o", tmp_path / "file" / "out", *RANK)

    assert (done.code, beside.code, inside.code) == (2, 2, 5)
    assert "Not a directory" in inside.message
    assert snapshot(tmp_path) == {**before, "file": snapshot(tmp_path)["file"]}


def test_parents_made_for_a_failed_output_are_taken_away(tmp_path):
    """With -o a/b/out and a NaN, neither a nor b is left."""
    with_entry(float("nan"))(tmp_path)
    before = snapshot(tmp_path)

    done = eckart("compress", tmp_path / "src", "-o", tmp_path / "a" / "b" / "out", *RANK)

    assert done.code == 3
    assert snapshot(tmp_path) == before


class Failing:
    """Lets every storage call through but the N-th, which fails."""

    CALLS = ("mkdir", "open", "truncate", "pwrite", "fsync", "rename")

    def __init__(self, patch: pytest.MonkeyPatch, at: int, root: Path, number: int) -> None:
        self.count, self.at, self.root, self.number = 0, at, str(root), number
        for call in self.CALLS:
            patch.setattr(os, call, self.wrap(call, getattr(os, call)))

    def wrap(self, call: str, real: Callable[..., object]) -> Callable[..., object]:
        def called(*args: object, **options: object) -> object:
            if self.counts(call, args):
                self.count += 1
                if self.count == self.at:
                    raise OSError(self.number, os.strerror(self.number))
            return real(*args, **options)

        return called

    def counts(self, call: str, args: tuple[object, ...]) -> bool:
        """Whether this call writes below the root."""
        if call == "open":
            flags = args[1]
            assert isinstance(flags, int)
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            return bool(writes) and str(args[0]).startswith(self.root)
        if call == "mkdir" and Path(str(args[0])).is_dir():
            return False  # that it exists already is an answer, not a failure
        return call in ("pwrite", "fsync", "truncate") or str(args[0]).startswith(self.root)


@pytest.mark.parametrize("command", ["compress", "densify", "compress --force"])
def test_whichever_write_fails_the_output_is_absent_or_as_it_was(command, tmp_path, monkeypatch):
    """The N-th storage call fails, for N = 1 … until a run is clean: exit 5, and nothing is left
    but the decompositions that are done, from which the clean run goes on."""
    src, out = write_checkpoint(tmp_path / "src"), tmp_path / "out"
    api.compress(src, tmp_path / "factored", rank=2)
    if command == "compress --force":
        api.compress(src, out, rank=3)
    lines = {
        "compress": ("compress", src, "-o", out, *RANK),
        "densify": ("densify", tmp_path / "factored", "-o", out),
        "compress --force": ("compress", src, "-o", out, *RANK, "--force"),
    }
    before = snapshot(tmp_path)
    code, n = 5, 0
    while code:
        n += 1
        with monkeypatch.context() as patch:
            failing = Failing(patch, n, tmp_path, errno.ENOSPC)
            done = eckart(*lines[command])
            code = done.code

        if code:
            assert failing.count >= n
            assert code == 5, done.err
            assert "No space left" in done.message
            left = snapshot(tmp_path)
            kept = {name for name in left if name.startswith("out.eckart-work")}
            assert {name: left[name] for name in left.keys() - kept} == before, f"call {n}"
            assert not any(name.startswith("out.eckart-work/output") for name in kept)
        assert n < 200
    assert n > 10
    assert failing.count < n
    assert snapshot(tmp_path).keys() - before.keys() <= {
        name for name in snapshot(tmp_path) if name.split("/")[0] == "out"
    }
    assert eckart("verify", out).code == 0


def test_full_disk_while_parts_are_written_is_a_storage_error(tmp_path):
    """A real limit on file size (EFBIG), in a process of its own: exit 5, nothing left."""
    import subprocess
    import sys

    src = write_checkpoint(tmp_path / "src")
    before = snapshot(tmp_path)
    limited = (
        "import resource, signal, sys; from eckart.cli import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "import eckart.api;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64)); main()"
    )

    done = subprocess.run(
        [sys.executable, "-c", limited, "compress", src, "-o", tmp_path / "out", *RANK],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.returncode == 5, done.stderr
    assert "File too large" in done.stderr
    assert snapshot(tmp_path) == before


# Names from files.


def hostile_checkpoint(folder: Path) -> Path:
    tensors = {f"{HOSTILE}.weight": torch.eye(8), f"{HOSTILE}.more": torch.ones(3)}
    tensors |= {"a[/b].weight": torch.eye(8), "fc[bold].weight": torch.eye(8)}
    return write_checkpoint(folder, tensors)


def assert_harmless(text: str) -> None:
    """No control but the newlines of the table itself, no bidi mark."""
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


@pytest.mark.parametrize("extra", [(), ("--json",)], ids=["table", "json"])
def test_a_hostile_name_never_reaches_the_terminal_raw(extra, tmp_path):
    """ESC, newline, bidi marks and markup in tensor names are escaped, in tables, JSON, errors."""
    src, out = hostile_checkpoint(tmp_path / "src"), tmp_path / "out"
    lines = [
        ("inspect", src),
        ("compress", src, "-o", out, "--rank", "1", "--dry-run"),
        ("compress", src, "-o", out, "--rank", "1"),
        ("verify", out, "--against", src),
        ("densify", out, "-o", tmp_path / "dense"),
        ("compress", src, "-o", tmp_path / "none", "--rank", "1", "--include", HOSTILE + "?"),
    ]
    codes = []
    for line in lines:
        done = eckart(*line, *extra)
        codes.append(done.code)

        assert_harmless(done.out)
        assert_harmless(done.err)
        assert "a[/b]" in done.out + done.err
    assert codes == [0, 0, 0, 0, 0, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out", "src"]


def test_a_hostile_name_is_escaped_in_errors_and_broken_promises(tmp_path):
    """NaN in a matrix with such a name, and a lost promise about it."""
    src, out = hostile_checkpoint(tmp_path / "src"), tmp_path / "out"
    api.compress(src, out, rank=1)
    tensors = read_tensors(out)
    tensors[f"{HOSTILE}.A.weight"][0, 0] = float("nan")
    (out / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
    forge(out, lambda document: None)
    broken = eckart("verify", out)
    damaged = write_checkpoint(
        tmp_path / "nan", {f"{HOSTILE}.weight": torch.full((8, 8), torch.nan)}
    )
    refused = eckart("inspect", damaged)

    assert (broken.code, refused.code) == (6, 3)
    for done in (broken, refused):
        assert_harmless(done.out)
        assert_harmless(done.err)


def test_a_hostile_path_in_a_message_is_escaped(tmp_path):
    """Paths that the user gave are data too."""
    done = eckart("inspect", tmp_path / "no\x1b[2Jthing[/bold]")

    assert done.code == 3
    assert_harmless(done.err)
    assert "[/bold]" in done.message


def test_a_sidecar_with_a_name_that_is_not_utf8_is_copied(tmp_path):
    """The user's own file names need not be text."""
    src, out = write_checkpoint(tmp_path / "src"), tmp_path / "out"
    Path(os.fsdecode(os.fsencode(src) + b"/\xff\n.txt")).write_text("kept")

    done = eckart("compress", src, "-o", out, *RANK)

    assert done.code == 0, done.err
    assert Path(os.fsdecode(os.fsencode(out) + b"/\xff\n.txt")).read_text() == "kept"
    assert eckart("verify", out, "--against", src).code == 0


def test_a_config_with_a_lone_surrogate_is_carried_over(tmp_path):
    """JSON may spell half a character; it comes out as it went in."""
    src, out = write_checkpoint(tmp_path / "src"), tmp_path / "out"
    (src / "config.json").write_text('{"x": "\\ud800"}')

    done = eckart("compress", src, "-o", out, *RANK)

    assert done.code == 0, done.err
    assert json.loads((out / "config.json").read_text())["x"] == "\ud800"


def test_every_error_class_has_an_exit_code_that_is_documented():
    """The tree of `errors`: 1 is ours alone, the rest are 2 to 6."""

    def below(kind: type[EckartError]) -> list[type[EckartError]]:
        return [kind, *(deeper for sub in kind.__subclasses__() for deeper in below(sub))]

    for kind in below(EckartError):
        assert kind.__doc__
        assert kind.exit_code in range(1, 7)
        assert (kind.exit_code == 1) == (kind is EckartError)


def test_the_input_is_never_changed(tmp_path):
    """Its SHA-256 before and after every command."""
    src = write_checkpoint(tmp_path / "src", config=CONFIG)
    before = snapshot(src)
    out = tmp_path / "out"

    eckart("inspect", src)
    eckart("compress", src, "-o", out, *RANK)
    eckart("verify", out, "--against", src)
    eckart("densify", out, "-o", tmp_path / "dense")

    assert snapshot(src) == before
