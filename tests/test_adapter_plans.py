"""What the commands of adapters say they would do, from headers alone: true; nothing written."""

import json
import re
from pathlib import Path

import pytest
import torch
from builders import (
    decaying,
    eckart,
    read_document,
    small_tensors,
    snapshot,
    write_checkpoint,
    write_moments,
)

from eckart import extract, resize
from eckart.errors import ResourceError

NAMES = ["layers.0.q_proj.weight", "layers.0.up_proj.weight"]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A model and its base, of which everything that may differ does."""
    base = small_tensors()
    tuned = {
        name: tensor + decaying(f"d{name}", *tensor.shape)
        if tensor.ndim == 2 and 0 not in tensor.shape and tensor.is_floating_point()
        else tensor
        for name, tensor in base.items()
    }
    tuned |= {name: base[name] + 1 for name in ("norm.weight", "layers.0.q_proj.bias")}
    return write_checkpoint(tmp_path / "tuned", tuned), write_checkpoint(tmp_path / "base", base)


@pytest.fixture
def adapter(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    extract(*pair, tmp_path / "adapter", rank=4, include=["layers*"], accept_loss=True)
    return tmp_path / "adapter"


def asked(pair: tuple[Path, Path], tmp_path: Path, *more: object) -> tuple[object, ...]:
    """An extraction, up to its policy."""
    return ("extract", pair[0], "--base", pair[1], "-o", tmp_path / "out", *more)


def plan(*line: object) -> dict:
    """The plan as a document."""
    done = eckart(*line, "--dry-run", "--json")
    assert (done.code, done.err) == (0, ""), done.err
    return json.loads(done.out)


@pytest.mark.parametrize("consumer", ["peft", "vllm", "llama.cpp"])
def test_at_a_fixed_rank_the_plan_is_what_is_written(consumer, pair, tmp_path):
    """Ranks, parameters, bytes, what is whole and what is lost, and why."""
    line = asked(pair, tmp_path, "--rank", 3, "--accept-loss", "--for", consumer)
    line += ("--store-whole", "norms") if consumer == "peft" else ()
    before = snapshot(tmp_path)
    planned = plan(*line)

    assert snapshot(tmp_path) == before
    assert eckart(*line).code == 0
    written = read_document(tmp_path / "out")
    assert {row["name"]: tuple(row["ranks"]) for row in planned["matrices"]} == {
        row["name"]: (row["rank"], row["rank"]) for row in written["matrices"]
    }
    assert {row["name"]: row["parameters"] for row in planned["matrices"]} == {
        row["name"]: row["parameters"] for row in written["matrices"]
    }
    assert planned["output_bytes"] == written["totals"]["tensor_bytes"][1]
    assert planned["whole"] == [row["name"] for row in written["stored_whole"]]
    assert (
        planned["lost"].items() >= {row["name"]: row["reason"] for row in written["lost"]}.items()
    )


RANGES = {
    ("--energy", "0.9"): (1, 16),
    ("--error", "0.1"): (1, 16),
    ("--keep", "0.5"): (0, 16),
    ("--size", "5kB"): (0, 16),
    ("--rank", "auto"): (0, 16),
    ("--rank", "99"): (16, 16),
}


@pytest.mark.parametrize("policy", RANGES, ids=str)
def test_ranks_that_need_spectra_are_ranges(policy, pair, tmp_path):
    """Between the least and the whole rank; what is written lies within, and within the bytes."""
    line = asked(pair, tmp_path, *policy, "--accept-loss", "--include", "layers*")
    planned = plan(*line)

    assert {row["name"]: tuple(row["ranks"]) for row in planned["matrices"]} == dict.fromkeys(
        NAMES, RANGES[policy]
    )
    assert eckart(*line).code == 0
    written = read_document(tmp_path / "out")
    assert written["totals"]["tensor_bytes"][1] <= planned["output_bytes"]
    assert planned["output_bytes"] <= (5_000 if "--size" in policy else 10_000)
    for row in written["matrices"]:
        assert RANGES[policy][0] <= row["rank"] <= RANGES[policy][1]


def test_only_headers_are_read(pair, tmp_path):
    """Weights that are NaN pass; the table names ranges, sizes and what would be lost."""
    tensors = small_tensors()
    tensors["layers.0.q_proj.weight"].fill_(float("nan"))
    broken = write_checkpoint(tmp_path / "broken", tensors)
    done = eckart(*asked((broken, pair[1]), tmp_path, "--energy", "0.9", "--dry-run"))

    assert done.code == 0
    assert re.search(r"layers.0.q_proj +24×16 +1–16 +384 → ≤ 640", done.out)
    assert re.search(r"lost, if it differs +norm.weight +a norm: add --store-whole norms", done.out)
    for words in ("to read", "to write", "at most, of", "of decompositions", "memory"):
        assert words in done.out


REFUSED = {
    "no policy": ((), 2),
    "two policies": (("--rank", 2, "--energy", 0.5), 2),
    "rank 0": (("--rank", 0), 2),
    "auto aligned": (("--rank", "auto", "--align", 2), 2),
    "pattern": (("--rank", 2, "--include", "nothing*"), 2),
    "whole for vllm": (("--rank", 2, "--for", "vllm", "--store-whole", "norms"), 2),
    "component": (("--rank", 2, "--component", "unet"), 2),
    "dtype": (("--rank", 2, "--dtype", "int4"), 2),
    "workers": (("--rank", 2, "--workers", 0), 2),
    "device": (("--rank", 2, "--device", "tpu"), 2),
    "statistics": (("--rank", 2, "--statistics", "nowhere"), 3),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_dry_run_refuses_what_the_run_would(case, pair, tmp_path):
    """With the same exit code and the same sentence."""
    options, code = REFUSED[case]
    line = asked(pair, tmp_path, *options)
    dry, real = eckart(*line, "--dry-run"), eckart(*line)

    assert dry.code == real.code == code
    assert dry.message == real.message


def test_a_pair_that_is_none_is_refused(pair, tmp_path):
    """Another shape, or too little in common: exit 3. An output that is there: exit 2."""
    tensors = small_tensors() | {"layers.0.q_proj.weight": torch.ones(23, 16)}
    other = write_checkpoint(tmp_path / "other", tensors)
    (tmp_path / "out").mkdir()
    for both, code in (((pair[0], other), 3), (pair, 2), ((pair[0], tmp_path / "no"), 3)):
        line = asked(both, tmp_path, "--rank", 2)

        assert eckart(*line, "--dry-run").code == eckart(*line).code == code


def test_memory_that_no_matrix_fits_into_is_refused_and_less_is_a_remark(
    pair, tmp_path, monkeypatch
):
    """Exit 5 where every one is too large; where some are, they may not differ."""
    line = asked(pair, tmp_path, "--energy", 0.9, "--accept-loss")
    for free in (100, 200_000):
        monkeypatch.setattr("eckart.planning.free_memory", lambda free=free: free)
        monkeypatch.setattr("eckart.adapter_plans.free_memory", lambda free=free: free)
        done = eckart(*line, "--dry-run")
        assert done.code == (5 if free == 100 else 0)
    monkeypatch.setattr("eckart.planning.free_memory", lambda: 100)
    with pytest.raises(ResourceError):
        extract(*pair, tmp_path / "out", energy=0.9, accept_loss=True)
    monkeypatch.setattr("eckart.adapter_plans.free_memory", lambda: 10)
    monkeypatch.setattr("eckart.planning.free_memory", lambda: 2**30)
    assert "bytes of memory are needed, and 10 are free" in eckart(*line, "--dry-run").err


def test_what_depends_on_which_tensors_differ_is_a_remark(pair, tmp_path):
    """A rank above vLLM's, and the one rank of a budget."""
    wide = {f"layers.{i}.weight": torch.zeros(600, 600) for i in range(2)}
    both = write_checkpoint(tmp_path / "a", wide), write_checkpoint(tmp_path / "b", wide)
    large = eckart(*asked(both, tmp_path, "--rank", 550, "--for", "vllm", "--dry-run"))
    line = asked(pair, tmp_path, "--keep", 0.5, "--for", "vllm", "--include", "layers*")
    budget = eckart(*line, "--dry-run")

    assert large.code == budget.code == 0
    assert "if all of them differ, the run refuses" in large.message
    assert "takes one rank: 5, if all of them differ" in budget.message


def test_statistics_are_held_against_headers(pair, tmp_path):
    """What they do not know is said; those of other shapes, or of nothing here, are exit 3."""
    S = write_moments(tmp_path / "S", pair[0]).folder
    strange = write_checkpoint(tmp_path / "strange", {"other.weight": decaying("o", 9, 8)})
    T = write_moments(tmp_path / "T", strange).folder
    line = asked(pair, tmp_path, "--rank", 2, "--statistics")
    said = eckart(*line, S, "--dry-run")

    assert said.code == 0
    assert "approximated in the Frobenius norm" in said.message
    assert eckart(*line, T, "--dry-run").code == eckart(*line, T).code == 3


@pytest.mark.parametrize(
    "line",
    [
        ("resize", "{a}", "--rank", 2),
        ("resize", "{a}", "--rank", "auto"),
        ("resize", "{a}", "--energy", 0.9, "--for", "vllm"),
        ("merge", "{a}", "{b}", "--rank", 3, "--dtype", "bfloat16"),
        ("merge", "{a}", "{b}", "--keep", 0.5),
        ("convert", "{a}", "--for", "llama.cpp"),
        ("convert", "{b}", "--for", "peft", "--dtype", "float16"),
    ],
    ids=str,
)
def test_a_plan_of_adapters_alone_is_what_is_written_at_most(line, adapter, tmp_path):
    """Ranks within the range, bytes at most, and exactly those where ranks are fixed."""
    resize(adapter, tmp_path / "b", rank=3)
    found = [str(part).format(a=adapter, b=tmp_path / "b") for part in line]
    before = snapshot(tmp_path)
    planned = plan(*found, "-o", tmp_path / "out")

    assert snapshot(tmp_path) == before
    assert eckart(*found, "-o", tmp_path / "out").code == 0
    written = read_document(tmp_path / "out")
    ranges = {row["name"]: row["ranks"] for row in planned["matrices"]}
    for row in written["matrices"]:
        assert ranges[row["name"]][0] <= row["rank"] <= ranges[row["name"]][1]
    size = written["totals"]["tensor_bytes"][1]
    fixed = all(low == high for low, high in ranges.values())
    assert size == planned["output_bytes"] if fixed else size <= planned["output_bytes"]


def test_a_plan_of_an_application_is_what_is_written(pair, adapter, tmp_path):
    """Every sum, and the bytes of the whole model; another model's adapter is exit 3."""
    line = ("apply", adapter, "--base", pair[1], "-o", tmp_path / "out")
    before = snapshot(tmp_path)
    planned = plan(*line)

    assert snapshot(tmp_path) == before
    assert eckart(*line).code == 0
    written = read_document(tmp_path / "out")
    assert [(row["name"], row["ranks"][0]) for row in planned["matrices"]] == [
        (row["name"], row["rank"]) for row in written["matrices"]
    ]
    assert planned["output_bytes"] == written["totals"]["tensor_bytes"][1]
    strange = write_checkpoint(tmp_path / "strange", {"other.weight": decaying("o", 9, 8)})
    line = ("apply", adapter, "--base", strange, "-o", tmp_path / "new")
    assert eckart(*line, "--dry-run").code == eckart(*line).code == 3


@pytest.mark.parametrize(
    "line",
    [
        ("resize", "{a}", "--rank", 2, "--energy", 0.5),
        ("resize", "{a}", "--rank", 3, "--align", 2),
        ("merge", "{a}", "{a}", "--weights", "1", "--rank", 2),
        ("merge", "{a}", "--rank", 2, "--workers", 0),
        ("convert", "{a}", "--for", "peft", "--dtype", "int4"),
        ("convert", "{a}", "--for", "diffusers", "--component", "unet", "--threads", 0),
    ],
    ids=str,
)
def test_plans_of_adapters_refuse_what_the_run_would(line, adapter, tmp_path):
    """Exit 2, with the same sentence; and an output that is there, whatever else is asked."""
    found = [str(part).format(a=adapter) for part in line]
    dry, real = (eckart(*found, "-o", tmp_path / "out", *more) for more in (("--dry-run",), ()))

    assert dry.code == real.code == 2
    assert dry.message == real.message
    assert eckart("resize", adapter, "--rank", 2, "-o", adapter, "--dry-run").code == 2
