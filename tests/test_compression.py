"""A run that is stopped, divided, repeated or disturbed: the same bytes, or nothing at all."""

import os
from pathlib import Path

import pytest
import torch
from builders import (
    decaying,
    eckart,
    in_a_process_killed_at,
    law_tensors,
    read_document,
    read_tensors,
    small_tensors,
    snapshot,
    write_checkpoint,
)

from eckart import api, compress, compression, densify, planning, verify
from eckart.checkpoint.lock import locked
from eckart.checkpoint.opening import open_checkpoint
from eckart.checkpoint.source import Source
from eckart.decompose import unit
from eckart.errors import (
    BusyError,
    CheckpointError,
    NonFiniteError,
    ResourceError,
    StaleError,
    StorageError,
    UsageError,
)
from eckart.execute import local, machine
from eckart.linalg.matrices import random_low_rank

KEEP = {"keep": 0.6, "form": "auto"}
RANK = {"rank": 3}


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "src", small_tensors(layers=3))


def files(out: Path) -> dict[str, str]:
    """What law 3 speaks of: every file but the certificate …"""
    return {name: state for name, state in snapshot(out).items() if name != "eckart.json"}


def claims(out: Path) -> dict[str, object]:
    """… and of that, what is outside `run` and `digest`."""
    return {k: v for k, v in read_document(out).items() if k not in ("run", "digest")}


@pytest.mark.parametrize("options", [KEEP, RANK], ids=["keep", "rank"])
def test_killed_anywhere_and_resumed_the_bytes_are_the_same(options, tmp_path):
    """At every fourth storage call of a run: no output, and the next run ends as if nothing was."""
    fresh, src = tmp_path / "fresh", write_checkpoint(tmp_path / "small")
    compress(src, fresh, **options)
    number, kills = 1, 0
    while True:
        out = tmp_path / f"killed-{number}"
        killed = in_a_process_killed_at(number, lambda out=out: compress(src, out, **options))
        if killed and out.exists():  # killed after the last rename: only tidying was left
            assert files(out) == files(fresh)
            break
        if not killed:
            break
        kills += 1
        compress(src, out, **options)

        assert files(out) == files(fresh), f"killed at call {number}"
        assert claims(out) == claims(fresh)
        assert not out.with_name(f"{out.name}.eckart-work").exists()
        number += 4
    assert kills >= 20


def test_killed_twice_in_the_same_run_and_resumed(src, tmp_path):
    """Once in the middle of the parts, once while the output is filled."""
    compress(src, tmp_path / "fresh", **KEEP)

    for number in (30, 60):
        assert in_a_process_killed_at(number, lambda: compress(src, tmp_path / "out", **KEEP))
    compress(src, tmp_path / "out", **KEEP)
    assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_a_resumed_run_decomposes_only_what_is_missing(src, tmp_path, monkeypatch):
    """What was done is taken over, and said so."""
    stop_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt) as caught:
        compress(src, tmp_path / "out", **RANK)
    monkeypatch.undo()
    seen = count_decompositions(monkeypatch)
    notes: list[str] = []

    compress(src, tmp_path / "out", **RANK, progress=Notes(notes))

    assert "2 of 6 matrices are done and kept in" in caught.value.__notes__[0]
    assert len(seen) == 4
    assert notes == ["2 of 6 matrices are done already"]


class Notes:
    """Keeps what a run has to say."""

    def __init__(self, notes: list[str]) -> None:
        self.note = notes.append

    def stage(self, title: str, seconds: float) -> None:
        """Not looked at."""

    def advance(self, seconds: float) -> None:
        """Not looked at."""


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupts the run when so many matrices are done."""
    real, done = unit.Decomposer.__call__, []

    def call(self: unit.Decomposer, *arguments: object) -> object:
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(arguments)
        return real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(unit.Decomposer, "__call__", call)


def count_decompositions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that are decomposed from now on."""
    real, seen = unit.Decomposer.__call__, []

    def call(self: unit.Decomposer, *arguments: object) -> object:
        seen.append(str(arguments[0]))
        return real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(unit.Decomposer, "__call__", call)
    return seen


@pytest.mark.parametrize("options", [KEEP, RANK, {"error": 0.2}], ids=["keep", "rank", "error"])
def test_workers_make_no_difference(options, src, tmp_path, monkeypatch):
    """In this process, in one worker, in two: the same files, the same claims."""
    compress(src, tmp_path / "here", **options)
    monkeypatch.setattr(local, "SHORT_SECONDS", -1.0)
    for workers in (1, 2):
        compress(src, tmp_path / str(workers), **options, workers=workers)

    for workers in (1, 2):
        assert files(tmp_path / str(workers)) == files(tmp_path / "here")
        assert claims(tmp_path / str(workers)) == claims(tmp_path / "here")
        assert read_document(tmp_path / str(workers))["run"]["workers"] == workers


BUDGETS = [
    {"keep": 0.5},
    {"keep": 0.8, "form": "pivoted"},
    {"size": 9000},
    {"energy": 0.9},
    {"error": 0.3, "form": "pivoted"},
    {"keep": 0.5, "form": "ba", "align": 2},
    {"energy": 0.9, "dtype": "bfloat16"},
]


@pytest.mark.parametrize("options", BUDGETS, ids=str)
def test_a_kept_decomposition_serves_any_budget(options, src, tmp_path, monkeypatch):
    """The same bytes as a fresh run, without an SVD."""
    compress(src, tmp_path / "fresh", **options)
    compress(src, tmp_path / "first", keep=0.6, form="pivoted", work=tmp_path / "work")
    seen = count_decompositions(monkeypatch)

    compress(src, tmp_path / "second", **options, work=tmp_path / "work")

    assert seen == []
    assert files(tmp_path / "second") == files(tmp_path / "fresh")
    assert claims(tmp_path / "second") == claims(tmp_path / "fresh")


def test_more_than_was_kept_is_decomposed_again_and_said_so(src, tmp_path):
    """A rank first, then a budget, which wants all values."""
    notes: list[str] = []
    compress(src, tmp_path / "rank", **RANK, work=tmp_path / "work")
    compress(src, tmp_path / "keep", **KEEP, work=tmp_path / "work", progress=Notes(notes))
    compress(src, tmp_path / "fresh", **KEEP)

    assert notes == ["6 matrices were kept up to a smaller rank, and are made again"]
    assert files(tmp_path / "keep") == files(tmp_path / "fresh")


def test_the_work_folder_is_kept_only_if_asked(src, tmp_path):
    """By default it goes with the end of the run; named, or with keep_work, it stays."""
    compress(src, tmp_path / "a", **RANK)
    compress(src, tmp_path / "b", **RANK, keep_work=True)
    compress(src, tmp_path / "c", **RANK, work=tmp_path / "work")

    assert {path.name for path in tmp_path.iterdir()} == {
        *("src", "a", "b", "c", "work", "b.eckart-work")
    }
    assert (tmp_path / "b.eckart-work" / "work.json").exists()
    assert not (tmp_path / "b.eckart-work" / "output").exists()


def test_another_request_on_kept_work_is_refused_by_name(src, tmp_path):
    """Exit 4, what differs, and nothing is touched."""
    compress(src, tmp_path / "a", **RANK, work=tmp_path / "work")
    before = snapshot(tmp_path)

    done = eckart(
        *("compress", src, "-o", tmp_path / "b", "--rank", 3, "--seed", 4),
        *("--work", tmp_path / "work", "--threads", 2),
    )

    assert done.code == 4
    assert "seed was 0, now 4; threads was null, now 2" in done.message
    assert snapshot(tmp_path) == before


def test_a_killed_run_with_other_options_is_refused_by_name(src, tmp_path):
    """The default work folder too."""
    assert in_a_process_killed_at(40, lambda: compress(src, tmp_path / "out", **KEEP))

    with pytest.raises(StaleError, match="seed was 0, now 1"):
        compress(src, tmp_path / "out", **KEEP, seed=1)
    assert (tmp_path / "out.eckart-work" / "work.json").exists()


@pytest.mark.parametrize("named", [False, True])
def test_two_runs_at_once_are_one_too_many(named, src, tmp_path):
    """On one output, or on one work folder: exit 4, and the first is not disturbed."""
    held = tmp_path / ("work" if named else "out.eckart-work")
    options = {"work": tmp_path / "work"} if named else {}
    with locked(held), pytest.raises(BusyError, match=f"is working in .*{held.name}"):
        compress(src, tmp_path / "out", **RANK, **options)

    assert not (tmp_path / "out").exists()


def changed_during(stage: str, src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes one weight in the source at the end of a stage."""
    real = getattr(api, stage)

    def wrapped(*arguments: object) -> object:
        result = real(*arguments)
        path = src / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return result

    monkeypatch.setattr(api, stage, wrapped)


@pytest.mark.parametrize("stage", ["decompose_all", "decide"])
def test_a_source_that_changes_during_the_run_is_noticed(stage, src, tmp_path, monkeypatch):
    """Exit 3, the file's name, no output."""
    changed_during(stage, src, monkeypatch)

    with pytest.raises(CheckpointError, match=r"model\.safetensors was written again while"):
        compress(src, tmp_path / "out", **RANK)
    assert not (tmp_path / "out").exists()


def test_a_change_behind_equal_size_and_time_is_noticed_by_digest(src, tmp_path, monkeypatch):
    """The tensor that was decomposed is no longer the one that is there."""
    real = api.decompose_all

    def wrapped(*arguments: object) -> object:
        result = real(*arguments)  # type: ignore[arg-type]
        path = src / "model.safetensors"
        before, content = path.stat(), bytearray(path.read_bytes())
        content[open_checkpoint(src).tensors["layers.1.q_proj.weight"].begin] ^= 64
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return result

    monkeypatch.setattr(api, "decompose_all", wrapped)
    with pytest.raises(CheckpointError, match="is not what it was when it was decomposed"):
        compress(src, tmp_path / "out", **RANK)

    assert not (tmp_path / "out").exists()


def test_a_source_cut_short_during_the_run_is_noticed(src, tmp_path, monkeypatch):
    """Its size, before anything is read from behind the end."""
    real = api.decompose_all

    def wrapped(*arguments: object) -> object:
        os.truncate(src / "model.safetensors", 2000)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(api, "decompose_all", wrapped)
    with pytest.raises(CheckpointError):
        compress(src, tmp_path / "out", **RANK)

    assert not (tmp_path / "out").exists()


# What stays when a run fails.


@pytest.mark.parametrize(("long", "kept"), [(False, False), (True, True)])
def test_an_error_of_the_input_keeps_only_work_that_took_long(long, kept, tmp_path, monkeypatch):
    """Ten seconds of it; less is not worth a folder."""
    tensors = small_tensors(layers=2)
    tensors["layers.1.up_proj.weight"][0, 0] = float("nan")
    src = write_checkpoint(tmp_path / "src", tensors)
    monkeypatch.setattr(compression, "WORTH_KEEPING", -1.0 if long else 1e9)
    monkeypatch.setattr(local, "sorted", lambda tasks, key: [*tasks], raising=False)

    with pytest.raises(NonFiniteError, match="up_proj") as caught:
        compress(src, tmp_path / "out", **RANK)

    assert (tmp_path / "out.eckart-work" / "parts").exists() == kept
    assert bool(getattr(caught.value, "__notes__", [])) == kept


def test_no_space_keeps_the_work(src, tmp_path, monkeypatch):
    """Exit 5; the same command goes on when there is some."""

    def full(*_: object, **__: object) -> None:
        raise StorageError("no space left.")

    with monkeypatch.context() as patch:
        patch.setattr(compression, "write_sidecars", full)
        with pytest.raises(StorageError):
            compress(src, tmp_path / "out", **KEEP)
    seen = count_decompositions(monkeypatch)
    kept = (tmp_path / "out.eckart-work" / "parts").exists()

    compress(src, tmp_path / "out", **KEEP)

    assert kept
    assert seen == []


def test_too_little_space_is_refused_before_the_first_svd(src, tmp_path, monkeypatch):
    """With the number that it takes, for the parts and for the output."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 100}))
    before = snapshot(tmp_path)

    with pytest.raises(StorageError, match=r"the run needs up to [\d,]+ bytes .* 100 are free"):
        compress(src, tmp_path / "out", **KEEP)
    with pytest.raises(StorageError, match="the work folder needs up to"):
        compress(src, tmp_path / "out", **KEEP, work=tmp_path / "work")
    assert snapshot(tmp_path) == before


def test_a_matrix_that_cannot_fit_is_refused_with_the_number(src, tmp_path, monkeypatch):
    """Exit 5 before the start; the dry run says the same."""
    monkeypatch.setattr(planning, "free_memory", lambda: 40_000)
    before = snapshot(tmp_path)
    words = r"up_proj\.weight \(40×16\) may need 46,080 bytes of memory, and 40,000 are free"

    with pytest.raises(ResourceError, match=words):
        compress(src, tmp_path / "out", **KEEP)
    dry = eckart("compress", src, "-o", tmp_path / "out", "--keep", "0.6", "--dry-run")
    assert dry.code == 5
    assert snapshot(tmp_path) == before


def test_workers_are_no_more_than_memory_holds(src, tmp_path, monkeypatch):
    """Asked for, they are refused with the number that fits; by default there are fewer."""
    monkeypatch.setattr(planning, "free_memory", lambda: 100_000)
    monkeypatch.setattr(machine, "cores", lambda: 64)

    with pytest.raises(ResourceError, match="use --workers 2"):
        compress(src, tmp_path / "out", **KEEP, workers=3)
    assert compress(src, tmp_path / "out", **KEEP).run.workers == 2


def test_a_process_limit_counts_too(src, tmp_path, monkeypatch):
    """RLIMIT_DATA, as `ulimit -d` sets it."""
    monkeypatch.setattr(planning, "free_in_process", lambda: 1000)

    with pytest.raises(ResourceError, match="1,000 are free"):
        compress(src, tmp_path / "out", **KEEP)


# Kinds of tensors, end to end.


def checked(src: Path, out: Path, **options: object) -> dict[str, torch.Tensor]:
    """Compresses, verifies, multiplies out, verifies that; returns the dense tensors."""
    compress(src, out, **options)  # type: ignore[arg-type]
    dense = out.with_name(f"{out.name}-dense")
    densify(out, dense)

    assert all(check.held for check in verify(out, src)), verify(out, src)
    assert all(check.held for check in verify(out))
    assert all(check.held for check in verify(dense, out)), verify(dense, out)
    return read_tensors(dense)


CONV = decaying("conv", 24, 3 * 9).reshape(24, 3, 3, 3)
STACK = torch.stack([decaying(f"e{i}", 20, 16) * (1 + i) for i in range(3)])


@pytest.mark.parametrize("form", ["ba", "pivoted", "auto"])
@pytest.mark.parametrize("policy", [{"keep": 0.6}, {"size": 9000}, {"error": 0.2}, {"rank": 4}])
def test_every_kind_of_tensor_goes_through_and_comes_back(form, policy, tmp_path):
    """Linear, transposed, convolution, fused experts, bare: near to what they were, same shape."""
    tensors = {
        "h.0.mlp.c_fc.weight": decaying("c_fc", 16, 40),
        "h.0.mlp.c_fc.bias": torch.ones(40),
        "h.0.mlp.c_proj.weight": decaying("c_proj", 24, 24),
        "conv.weight": CONV,
        "conv.bias": torch.ones(24),
        "layers.0.experts.gate_up_proj": STACK,
        "W": decaying("bare", 18, 30),
        "norm.weight": torch.ones(4),
    }
    src = write_checkpoint(tmp_path / "src", tensors)

    dense = checked(src, tmp_path / "out", form=form, **policy)

    document = read_document(tmp_path / "out")
    records = {record["name"]: record for record in document["matrices"]}
    assert dense.keys() == tensors.keys()
    for name, tensor in tensors.items():
        missed = float((dense[name] - tensor).norm() / tensor.norm())
        limit = records[name]["relative_error"] if name in records else 0.0

        assert dense[name].shape == tensor.shape
        assert missed <= limit * (1 + 1e-5) + 1e-6
        assert not limit or missed >= limit * 0.999 - 1e-6
    if form != "auto":
        assert {record["form"] for record in records.values()} <= {form}
    assert records["h.0.mlp.c_fc.weight"]["orientation"] == "in_out"


def test_factors_of_a_convolution_and_of_experts_have_their_shapes(tmp_path):
    """A (r, in, kh, kw) and B (m, r, 1, 1); A (E, r, n) and B (E, m, r); guards of shape [0]."""
    src = write_checkpoint(tmp_path / "src", {"conv.weight": CONV, "x.experts.up_proj": STACK})

    compress(src, tmp_path / "out", rank=4, form="ba")

    found = {name: tuple(tensor.shape) for name, tensor in read_tensors(tmp_path / "out").items()}
    assert found == {
        "conv.weight": (0,),
        "conv.A.weight": (4, 3, 3, 3),
        "conv.B.weight": (24, 4, 1, 1),
        "x.experts.up_proj": (0,),
        "x.experts.up_proj.A.weight": (3, 4, 16),
        "x.experts.up_proj.B.weight": (3, 20, 4),
    }
    assert torch.nn.functional.conv2d(  # A, then B, is the convolution of the product
        torch.nn.functional.conv2d(
            torch.ones(1, 3, 5, 5), read_tensors(tmp_path / "out")["conv.A.weight"]
        ),
        read_tensors(tmp_path / "out")["conv.B.weight"],
    ).shape == (1, 24, 3, 3)


def test_experts_are_remarked_upon(tmp_path):
    """In the certificate and on the screen: the disk shrinks, the memory does not."""
    tensors = {f"mlp.experts.{i}.up_proj.weight": decaying(str(i), 20, 16) for i in range(2)}
    src = write_checkpoint(tmp_path / "src", tensors)
    words = "2 of the matrices are routed experts"

    shown = eckart("inspect", src)
    planned = eckart("compress", src, "-o", tmp_path / "out", "--rank", 2, "--dry-run")
    done = eckart("compress", src, "-o", tmp_path / "out", "--rank", 2)

    assert words in shown.err
    assert words in planned.err
    assert words in done.err
    assert words in read_document(tmp_path / "out")["remarks"][0]


def test_tied_weights_are_stored_once(tmp_path):
    """A pickled checkpoint with one memory under two names; the certificate tells which."""
    folder = tmp_path / "src"
    folder.mkdir()
    shared, W = torch.randn(20, 16), decaying("w", 24, 16)
    torch.save(
        {"embed.weight": shared, "lm_head.weight": shared, "a.up.weight": W, "b.up.weight": W},
        folder / "pytorch_model.bin",
    )

    certificate = compress(folder, tmp_path / "out", rank=3, allow_pickle=True)

    assert {(row.name, row.to) for row in certificate.tied} == {
        ("lm_head.weight", "embed.weight"),
        ("b.up.weight", "a.up.weight"),
    }
    assert read_tensors(tmp_path / "out").keys() == {
        *("embed.weight", "a.up.weight", "a.up.A.weight", "a.up.B.weight")
    }
    assert certificate.totals.model_parameters[0] == 20 * 16 + 24 * 16
    assert all(check.held for check in verify(tmp_path / "out", folder, allow_pickle=True))


@pytest.mark.parametrize("kind", ["safetensors", "npz", "npy", "bin"])
def test_single_files_are_sources_too(kind, tmp_path):
    """A bare weight file of each kind: no sidecars, the list of factors stands in eckart.json."""
    import numpy as np
    from safetensors.torch import save_file

    W, path = decaying("w", 24, 16), tmp_path / f"weights.{kind}"
    name = "weights" if kind == "npy" else "W"
    if kind == "safetensors":
        save_file({name: W}, path)
    elif kind == "bin":
        torch.save({name: W}, path)
    elif kind == "npy":
        np.save(path, W.numpy())
    else:
        np.savez(path, W=W.numpy())

    certificate = compress(path, tmp_path / "out", rank=3, allow_pickle=True)

    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("model.safetensors", "eckart.json")
    }
    assert certificate.factored[name].rank == 3
    assert certificate.source.name == path.name
    assert all(check.held for check in verify(tmp_path / "out", path, allow_pickle=True))


# Budgets.


@pytest.mark.parametrize("share", [0.9, 0.5, 0.3])
@pytest.mark.parametrize("form", ["ba", "pivoted", "auto"])
def test_a_size_is_met_in_bytes_of_the_output(share, form, tmp_path):
    """Never above, and within half a per cent."""
    src = write_checkpoint(tmp_path / "src", law_tensors())
    whole = sum(tensor.nbytes for tensor in read_tensors(src).values())
    asked = int(share * whole)

    certificate = compress(src, tmp_path / "out", size=asked, form=form)

    found = sum(tensor.nbytes for tensor in read_tensors(tmp_path / "out").values())
    assert found <= asked
    assert found >= 0.995 * asked or "of the budget is used" in certificate.remarks[0]
    assert certificate.totals.tensor_bytes == (whole, found)


def test_auto_takes_the_form_with_the_smaller_error(tmp_path):
    """Of every matrix, at the same space: no form alone is better anywhere."""
    src = write_checkpoint(tmp_path / "src", law_tensors(torch.bfloat16))
    errors = {}
    for form in ("auto", "pivoted"):
        found = compress(src, tmp_path / form, keep=0.5, form=form)
        errors[form] = {record.name: record.relative_error for record in found.matrices}

    assert errors["auto"].keys() == errors["pivoted"].keys()
    assert all(error <= errors["pivoted"][name] for name, error in errors["auto"].items())


def test_auto_falls_back_on_plain_factors_where_rounding_decides(tmp_path):
    """A low-rank matrix as half precision holds it: more rank brings less than rounding costs."""
    W = random_low_rank(60, 60, 20, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    src = write_checkpoint(tmp_path / "src", {"a.weight": W})

    certificate = compress(src, tmp_path / "out", keep=0.9, form="auto", dtype="bfloat16")

    assert [record.form for record in certificate.matrices] == ["ba"]


@pytest.mark.parametrize("form", ["ba", "pivoted", "auto"])
@pytest.mark.parametrize("policy", [{"keep": 0.6}, {"size": 90_000}, {"error": 0.2}, {"rank": 8}])
def test_ranks_are_multiples_of_align(form, policy, tmp_path):
    """Over every kind of policy and form."""
    src = write_checkpoint(tmp_path / "src", law_tensors())

    certificate = compress(src, tmp_path / "out", form=form, align=8, **policy)

    assert certificate.matrices
    assert all(record.rank % 8 == 0 for record in certificate.matrices)
    assert all(check.held for check in verify(tmp_path / "out", src))


def test_a_budget_that_is_not_used_up_says_why(tmp_path):
    """Exactly low rank: more would gain nothing. Too coarse: the next rank would exceed it."""
    exact = write_checkpoint(tmp_path / "exact", {"a.weight": random_low_rank(40, 40, 2)})
    coarse = write_checkpoint(tmp_path / "coarse", {"a.weight": decaying("a", 8, 8)})

    first = compress(exact, tmp_path / "a", keep=0.9, form="ba")
    second = compress(coarse, tmp_path / "b", keep=0.7, form="ba")

    assert first.totals.keep < 0.2
    assert "more would gain nothing" in first.remarks[0]
    assert second.totals.keep == 0.5
    assert "the next rank of any matrix would exceed it" in second.remarks[0]


def test_unknown_stages_of_a_source_stay_closed(tmp_path):
    """A factored checkpoint is no source for another compression."""
    src = write_checkpoint(tmp_path / "src")
    compress(src, tmp_path / "out", rank=2)

    with pytest.raises(CheckpointError, match="is factored already"):
        compress(tmp_path / "out", tmp_path / "again", rank=1)
    with pytest.raises(UsageError, match="no multiple of --align 4"):
        compress(src, tmp_path / "again", rank=2, align=4)
    assert isinstance(planning.open_dense(src), Source)
