"""Whatever is changed in an output, `verify` notices."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import (
    WEIGHTS,
    decaying,
    eckart,
    forge,
    raw_header,
    read_document,
    read_tensors,
    small_tensors,
    write_checkpoint,
    write_raw,
)
from safetensors.torch import save

from eckart import api, compress, densify, verify
from eckart.assemble import measurement
from eckart.decompose import request as requests
from eckart.errors import EckartError, PromiseError
from eckart.execute import local

FORMS = ("ba", "pivoted")
TINY = {"q.weight": decaying("q", 6, 5), "q.bias": torch.ones(6), "n": torch.tensor(1.5)}


@pytest.fixture(params=FORMS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A source and its output, in each form."""
    src, out = write_checkpoint(tmp_path / "src"), tmp_path / "out"
    compress(src, out, rank=3, form=request.param)
    return src, out


@pytest.fixture
def dense_pair(pair: tuple[Path, Path]) -> tuple[Path, Path]:
    """A factored checkpoint and what it was multiplied out to."""
    _, out = pair
    densify(out, out.with_name("dense"))
    return out, out.with_name("dense")


def broken(out: Path, against: Path | None = None) -> bool:
    """Whether verification fails as it should: a check that does not hold, or PromiseError."""
    try:
        return not all(check.held for check in verify(out, against))
    except PromiseError:
        return True


def flipped(path: Path, places: Iterator[int] | range, masks: tuple[int, ...]) -> Iterator[int]:
    """Changes one byte at a time, yields its place, and puts it back."""
    content = path.read_bytes()
    for place in places:
        for mask in masks:
            changed = bytearray(content)
            changed[place] ^= mask
            path.write_bytes(changed)
            yield place
    path.write_bytes(content)


def test_an_untouched_output_holds(pair):
    """Every check is held, alone and against the source, on the command line too."""
    src, out = pair

    assert all(check.held for check in verify(out))
    assert all(check.held for check in verify(out, src))
    assert eckart("verify", out, "--against", src).code == 0


def test_an_untouched_dense_output_holds(dense_pair):
    """The dense checkpoint against the factored one it came from."""
    factored, dense = dense_pair

    assert all(check.held for check in verify(dense, factored))


@pytest.mark.parametrize("name", ["eckart.json", "config.json", "tokenizer.json"])
def test_any_changed_byte_of_a_document_is_found(name, tmp_path):
    """Every byte of eckart.json, config.json and a sidecar, one at a time."""
    src, out = write_checkpoint(tmp_path / "src", TINY), tmp_path / "out"
    compress(src, out, rank=1)
    size = (out / name).stat().st_size
    masks = (1,) if name == "eckart.json" else (1, 0x80)

    places = [p for p in flipped(out / name, range(size), masks) if not broken(out)]

    assert places == []
    assert not broken(out)


def test_any_changed_byte_of_the_weights_is_found(tmp_path):
    """Every byte of the header, and every third of the data."""
    src, out = write_checkpoint(tmp_path / "src", TINY), tmp_path / "out"
    compress(src, out, rank=1)
    _, start = raw_header(out / WEIGHTS)
    size = (out / WEIGHTS).stat().st_size
    places = [*range(start), *range(start, size, 3), size - 1]

    missed = [p for p in flipped(out / WEIGHTS, iter(places), (1,)) if not broken(out)]

    assert missed == []
    assert not broken(out)


@pytest.mark.parametrize("place", ["eckart.json", WEIGHTS, "config.json"])
def test_a_broken_promise_is_exit_6(place, pair):
    """The command line says which file, on stderr, and exits with 6."""
    _, out = pair
    content = bytearray((out / place).read_bytes())
    content[len(content) // 2] ^= 4
    (out / place).write_bytes(content)

    done = eckart("verify", out)

    assert done.code == 6
    assert place in done.message


def unlink(out: Path) -> None:
    (out / WEIGHTS).unlink()


def replace_by(kind: str, name: str = WEIGHTS) -> Callable[[Path], None]:
    def change(out: Path) -> None:
        (out / name).unlink()
        if kind == "folder":
            (out / name).mkdir()
        elif kind == "fifo":
            os.mkfifo(out / name)
        elif kind == "dangling link":
            (out / name).symlink_to(out / "nowhere")
        else:
            (out / name).write_bytes(b"")

    return change


FOLDER_CHANGES: dict[str, Callable[[Path], object]] = {
    "weights removed": unlink,
    "sidecar removed": lambda out: (out / "tokenizer.json").unlink(),
    "certificate removed": lambda out: (out / "eckart.json").unlink(),
    "file added": lambda out: (out / "pytorch_model.bin").write_bytes(b""),
    "hidden file added": lambda out: (out / ".hidden").write_bytes(b""),
    "file added deeper": lambda out: write_raw(out / "a" / "b", b""),
    "dangling link added": lambda out: (out / "x").symlink_to(out / "nowhere"),
    "FIFO added": lambda out: os.mkfifo(out / "x"),
    "weights emptied": replace_by("empty"),
    "weights are a folder": replace_by("folder"),
    "weights are a FIFO": replace_by("fifo"),
    "weights are a dangling link": replace_by("dangling link"),
    "an empty sidecar is a FIFO": replace_by("fifo", "empty.txt"),
    "certificate is a FIFO": replace_by("fifo", "eckart.json"),
    "certificate emptied": replace_by("empty", "eckart.json"),
    "file renamed": lambda out: (out / "config.json").rename(out / "config.yaml"),
    "folder linked in": lambda out: (out / "x").symlink_to(out.parent / "src"),
}


@pytest.mark.parametrize("change", FOLDER_CHANGES)
def test_a_file_that_is_missing_added_or_of_another_kind_is_found(change, tmp_path):
    """Exit 6, never a traceback and never a hang."""
    src, out = write_checkpoint(tmp_path / "src", TINY), tmp_path / "out"
    (src / "empty.txt").write_bytes(b"")
    compress(src, out, rank=1)
    FOLDER_CHANGES[change](out)

    done = eckart("verify", out)

    assert done.code == 6, done.err


# Certificates that are consistent in themselves, and wrong.

Change = Callable[[dict[str, Any]], object]


def row(change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda document: change(document["matrices"][0])


def scale(key: str, factor: float) -> Change:
    return row(lambda r: r.update({key: r[key] * factor}))


LIES: dict[str, Change] = {
    "error a little lower": scale("relative_error", 1 - 1e-6),
    "error zero": scale("relative_error", 0.0),
    "output error lower": row(
        lambda r: r["output_error"].update(max=0.9 * r["output_error"]["max"])
    ),
    "relative output error lower": row(lambda r: r["output_error"].update(relative=0.0)),
    "a matrix not mentioned": lambda d: d["matrices"].pop(),
    "a matrix mentioned twice": lambda d: d["matrices"].append(d["matrices"][0]),
    "rank": row(lambda r: r.update(rank=r["rank"] - 1)),
    "shape": row(lambda r: r.update(shape=r["shape"][::-1])),
    "dtype": row(lambda r: r.update(dtype="BF16")),
    "parameters": row(lambda r: r.update(parameters=[r["parameters"][0], 1])),
    "bytes": row(lambda r: r.update(bytes=[r["bytes"][0], 1])),
    "a copy not mentioned": lambda d: d["copied"].pop(),
    "a copy mentioned twice": lambda d: d["copied"].append(d["copied"][0]),
    "a copy that is none": lambda d: d["copied"].append({"name": "ghost", "reason": "1-D"}),
    "keep": lambda d: d["totals"].update(keep=0.01),
    "targeted parameters": lambda d: d["totals"].update(targeted_parameters=[1000, 1]),
    "model parameters": lambda d: d["totals"].update(model_parameters=[1000, 1]),
    "tensor bytes": lambda d: d["totals"].update(tensor_bytes=[1000, 1]),
    "the seed of the outputs": lambda d: d["options"].update(seed=99),
    "no seed": lambda d: d["options"].pop("seed"),
    "a seed that is no number": lambda d: d["options"].update(seed="none"),
    "another factored shape": lambda d: next(iter(d["factored"].values())).update(rank=2),
    "a factored matrix not mentioned": lambda d: d["factored"].popitem(),
    "a factored matrix that is none": lambda d: d["factored"].update(
        ghost=next(iter(d["factored"].values()))
    ),
    "another kind": lambda d: d.update(kind="dense"),
    "a file outside": lambda d: d["files"].update(
        {"../src/config.json": {"bytes": 1, "blake3": ""}}
    ),
    "another source": lambda d: d["source"].update(fingerprint="0" * 64),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_wrong_claim_with_a_good_digest_is_found_against_the_source(lie, pair):
    """The digest holds, every file is as certified, and one figure is too good to be true."""
    src, out = pair
    forge(out, LIES[lie])

    if lie == "another source":
        assert eckart("verify", out, "--against", src).code == 3
    else:
        assert broken(out, src)
        assert eckart("verify", out, "--against", src).code == 6


@pytest.mark.parametrize(
    "lie", ["error zero", "output error lower", "a matrix not mentioned", "bytes", "keep"]
)
def test_a_wrong_claim_about_a_dense_output_is_found(lie, dense_pair):
    """The same for what `densify` wrote."""
    factored, dense = dense_pair
    forge(dense, LIES[lie])

    assert broken(dense, factored)


def rewrite(out: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes tensors, and the certificate so that every digest holds."""
    tensors = read_tensors(out)
    change(tensors)
    (out / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
    forge(out, lambda document: None)


X = "layers.0.q_proj"
TAMPERINGS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "one entry of A": lambda t: t[f"{X}.A.weight"][0, 0].mul_(1.5),
    "A scaled": lambda t: t[f"{X}.A.weight"].mul_(0.99),
    "a copied vector": lambda t: t["norm.weight"][0].add_(1e-3),
    "a copied scalar": lambda t: t["steps"].add_(1),
    "a copied mask": lambda t: t["mask"].logical_not_(),
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_tampered_tensors_with_good_digests_are_found_against_the_source(tampering, pair):
    """All digests are recomputed, so only the source can tell: and it does."""
    src, out = pair
    rewrite(out, TAMPERINGS[tampering])

    assert all(check.held for check in verify(out))
    assert broken(out, src)


ALONE: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "NaN in A": lambda t: t[f"{X}.A.weight"][0, 0].fill_(float("nan")),
    "Inf in A": lambda t: t[f"{X}.A.weight"][0, 0].fill_(float("inf")),
    "a factor missing": lambda t: t.pop(f"{X}.A.weight"),
    "the guard missing": lambda t: t.pop(f"{X}.weight"),
    "the guard filled": lambda t: t.update({f"{X}.weight": torch.ones(24, 16)}),
    "a factor of another shape": lambda t: t.update({f"{X}.A.weight": torch.ones(2, 16)}),
    "a copied tensor missing": lambda t: t.pop("norm.weight"),
    "a tensor added": lambda t: t.update(ghost=torch.ones(2)),
    "a copied vector's dtype": lambda t: t.update({"norm.weight": t["norm.weight"].half()}),
}

FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "an error below the optimum": lambda d: d["matrices"][0].update(
        relative_error=0.5 * d["matrices"][0]["optimum"], optimum=d["matrices"][0]["optimum"]
    ),
    "fewer parameters of a matrix": lambda d: d["matrices"][0].update(parameters=[384, 1]),
    "fewer bytes of a matrix": lambda d: d["matrices"][0].update(bytes=[1536, 4]),
    "fewer parameters of the model": lambda d: d["totals"].update(model_parameters=[9999, 1]),
    "fewer bytes in all": lambda d: d["totals"].update(tensor_bytes=[9999, 1]),
    "fewer targeted parameters": lambda d: d["totals"].update(targeted_parameters=[9999, 1]),
    "a tensor tied and copied": lambda d: d["tied"].append({"name": "steps", "to": "mask"}),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_claims_that_cannot_be_true_are_found_without_the_source(forgery, tmp_path):
    """Every digest is made to hold again: the counts of the files, and Eckart and Young, tell."""
    src, out = write_checkpoint(tmp_path / "src"), tmp_path / "out"
    compress(src, out, energy=0.9)
    forge(out, lambda document: None)
    sound = all(check.held for check in verify(out))
    forge(out, FORGERIES[forgery])

    assert sound
    assert broken(out)


@pytest.mark.parametrize("tampering", ALONE)
def test_tensors_that_cannot_be_right_are_found_without_the_source(tampering, pair):
    """Names, shapes and finiteness need no source."""
    _, out = pair
    rewrite(out, ALONE[tampering])

    assert broken(out)
    assert eckart("verify", out).code == 6


def test_a_permutation_that_is_none_is_found(tmp_path):
    """The pivoted form's rows must each stand somewhere."""
    src, out = write_checkpoint(tmp_path / "src"), tmp_path / "out"
    compress(src, out, rank=3, form="pivoted")
    rewrite(out, lambda t: t[f"{X}.perm"][0].fill_(1))
    rewrite(out, lambda t: t[f"{X}.perm"][1].fill_(1))

    assert broken(out)


def test_config_that_names_other_matrices_than_the_certificate_is_found(pair):
    """The loader reads config.json, so it must say the same."""
    _, out = pair
    config = (out / "config.json").read_text().replace('"rank": 3', '"rank": 4', 1)
    (out / "config.json").write_text(config)
    forge(out, lambda document: None)

    assert broken(out)


def test_config_that_is_no_json_is_a_broken_promise(pair):
    """With all digests recomputed it is still the output that is wrong: exit 6."""
    _, out = pair
    (out / "config.json").write_text("{")
    forge(out, lambda document: None)

    assert eckart("verify", out).code == 6


def test_a_number_too_large_for_a_float_is_a_damaged_certificate(pair):
    """One changed byte can make 1e-05 an infinity; that is exit 6, not a traceback."""
    _, out = pair
    path = out / "eckart.json"
    text = path.read_text()
    path.write_text(text.replace('"excess_estimate":0.0', '"excess_estimate":9e999', 1))

    assert path.read_text() != text
    assert eckart("verify", out).code == 6


def test_rounding_on_another_machine_is_no_broken_promise(tmp_path, monkeypatch):
    """An error at the level of float64 rounding may come out differently with other threads."""
    ones = {
        f"m{i}.weight": torch.full((n, n), 0.1, dtype=torch.float64) for i, n in [(0, 64), (1, 500)]
    }
    exact = torch.randn(300, 2, dtype=torch.float64) @ torch.randn(2, 400, dtype=torch.float64)
    src, out = write_checkpoint(tmp_path / "src", {**ones, "r.weight": exact}), tmp_path / "out"
    compress(src, out, rank=2)
    monkeypatch.setattr(requests, "threads_for", lambda _: 2)

    assert [check for check in verify(out, src) if not check.held] == []


@pytest.mark.parametrize("tampering", [None, *TAMPERINGS])
def test_workers_find_the_same(tampering, pair, monkeypatch):
    """In this process or in two: the same checks, held or not."""
    src, out = pair
    if tampering:
        rewrite(out, TAMPERINGS[tampering])
    here = verify(out, src)
    monkeypatch.setattr(local, "SHORT_SECONDS", -1.0)

    assert verify(out, src, workers=2) == here
    assert all(check.held for check in here) == (tampering is None)


def test_an_error_that_is_rounding_alone_may_come_out_differently(tmp_path, monkeypatch):
    """Another machine sums in another order: that moves a figure by ulps of what was compared."""
    exact = decaying("x", 60, 40)[:, :1] @ decaying("y", 1, 40)
    src, out = write_checkpoint(tmp_path / "src", {"r.weight": exact}), tmp_path / "out"
    compress(src, out, rank=1)
    real = measurement.compare

    def jittered(*args: Any, **options: Any) -> Any:
        found, ulps = real(*args, **options), 4e-16
        outputs = found.outputs
        size = outputs.max / outputs.relative
        moved = type(outputs)(outputs.max + ulps * size, outputs.relative + ulps)
        return replace(found, outputs=moved)

    monkeypatch.setattr(measurement, "compare", jittered)

    assert not broken(out, src)


def test_the_first_faults_are_named_and_the_rest_counted(pair):
    """Three faults in words, and how many more."""
    _, out = pair
    for i in range(5):
        (out / f"x{i}").write_bytes(b"")

    files = next(check for check in verify(out) if check.name == "files")

    assert "x0 was added; x1 was added; x2 was added (and 2 more)" in files.detail


def test_densify_refuses_a_damaged_factored_checkpoint(pair, tmp_path):
    """A changed byte is not multiplied out: exit 3, nothing written."""
    _, out = pair
    content = bytearray((out / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (out / WEIGHTS).write_bytes(content)

    done = eckart("densify", out, "-o", tmp_path / "dense")

    assert done.code == 3
    assert not (tmp_path / "dense").exists()


def test_every_source_tensor_must_be_accounted_for(tmp_path):
    """An output that lost a tensor, and a certificate that never mentions it: found."""
    src, out = write_checkpoint(tmp_path / "src"), tmp_path / "out"
    compress(src, out, rank=3)
    tensors = read_tensors(out)
    del tensors["norm.weight"]
    (out / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
    forge(out, lambda d: d.update(copied=[r for r in d["copied"] if r["name"] != "norm.weight"]))

    assert broken(out, src)


def test_verification_never_raises_but_its_own_errors(pair):
    """Random bytes anywhere in the certificate: a failed check or an EckartError, nothing else."""
    src, out = pair
    random = np.random.default_rng(1)
    content = (out / "eckart.json").read_bytes()
    for _ in range(60):
        changed = bytearray(content)
        for place in random.integers(0, len(content), 3):
            changed[place] = random.integers(32, 127)
        (out / "eckart.json").write_bytes(changed)
        try:
            held = all(check.held for check in api.verify(out, src))
        except EckartError:
            held = False

        assert not held


def test_dense_small_tensors_are_whole(dense_pair):
    """What the fixtures build is what they say: the original names are back."""
    _, dense = dense_pair

    assert read_tensors(dense).keys() == small_tensors().keys()
    assert read_document(dense)["kind"] == "dense"
