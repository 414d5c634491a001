"""Adapters resized and added up: the exact weighted sum, then its best approximation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import eckart, forge, read_document, undetected
from safetensors.torch import load_file, save_file

from eckart import convert, merge, resize, verify
from eckart.errors import CheckpointError, UsageError

PREFIX = "base_model.model."
SIDES = {"layers.0.q": (24, 16), "layers.0.up": (40, 16), "layers.1.q": (24, 16)}


def write_adapter(
    folder: Path, ranks: dict[str, int], seed: int, config=None, dtype=torch.float32
) -> Path:
    """A random adapter as PEFT would write it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for X, r in ranks.items():
        m, n = SIDES[X]
        for part, shape in (("A", (r, n)), ("B", (m, r))):
            random = torch.randn(*shape, generator=generator) / 4
            tensors[f"{PREFIX}{X}.lora_{part}.weight"] = random.to(dtype)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    first = next(iter(ranks.values()))
    document = {
        "peft_type": "LORA",
        "r": first,
        "lora_alpha": 2 * first,
        "rank_pattern": {X: r for X, r in ranks.items() if r != first},
        "target_modules": sorted(ranks),
        "base_model_name_or_path": "somebody/base",
        "task_type": "CAUSAL_LM",
        **(config or {}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def products(folder: Path, scale=None) -> dict[str, np.ndarray]:
    """scale·B·A of every module, in float64 by numpy; our own outputs have a scale of 1."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [name for name in tensors if name.endswith(".lora_A.weight")]
    found = {}
    for name in names:
        A, B = (tensors[name.replace("lora_A", f"lora_{p}")].double().numpy() for p in "AB")
        X = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        found[X] = (scale(X, len(A)) if scale else 1.0) * (B @ A)
    return found


def best(W: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation, by numpy's SVD of the whole matrix."""
    U, s, Vh = np.linalg.svd(W, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vh[:rank]


@pytest.mark.parametrize("rank", [1, 3, 5, 100])
def test_a_resized_adapter_is_the_best_of_its_rank(rank, tmp_path):
    """Against a dense SVD of scale·B·A; a rank above the adapter's own is its own."""
    ranks = {"layers.0.q": 6, "layers.0.up": 4}
    given = write_adapter(tmp_path / "given", ranks, 1)
    certificate = resize(given, tmp_path / "out", rank=rank)
    exact = products(given, lambda X, r: 12 / r)

    for X, found in products(tmp_path / "out").items():
        expected = best(exact[X], rank)
        assert np.linalg.norm(found - expected) < 1e-6 * np.linalg.norm(exact[X])
    assert {row.name: row.rank for row in certificate.matrices} == {
        f"{X}.weight": min(rank, r) for X, r in ranks.items()
    }
    assert all(check.held for check in verify(tmp_path / "out", given))
    assert all(check.held for check in verify(tmp_path / "out"))


SCALES = {
    "alpha": ({"lora_alpha": 3}, lambda X, r: 3 / r),
    "rslora": ({"lora_alpha": 3, "use_rslora": True}, lambda X, r: 3 / math.sqrt(r)),
    "alpha pattern": (
        {"lora_alpha": 3, "alpha_pattern": {r"^layers\.1\.q": 7, "q": 5}},
        lambda X, r: (7 if X == "layers.1.q" else 5 if X.endswith(".q") else 3) / r,
    ),
}


@pytest.mark.parametrize("case", SCALES)
def test_a_merge_is_the_exact_weighted_sum(case, tmp_path):
    """Different ranks, targets, scales; a negative weight. Against numpy's dense sum."""
    config, scale = SCALES[case]
    one = write_adapter(tmp_path / "one", {"layers.0.q": 4, "layers.1.q": 4}, 1, config)
    two = write_adapter(tmp_path / "two", {"layers.0.q": 2, "layers.0.up": 5}, 2)
    merge([one, two], tmp_path / "out", weights=[0.75, -1.5], error=0)
    first, second = products(one, scale), products(two, lambda X, r: 4 / r)
    found = products(tmp_path / "out")

    assert found.keys() == first.keys() | second.keys()
    for X, product in found.items():
        expected = 0.75 * first.get(X, 0) - 1.5 * second.get(X, 0)
        assert np.linalg.norm(product - expected) < 1e-6 * np.linalg.norm(expected)
    assert all(check.held for check in verify(tmp_path / "out", [one, two]))


def test_ranks_that_add_up_above_the_layers_own_are_no_more_than_it(tmp_path):
    """Two adapters of rank 12 on a layer with 16 columns."""
    one, two = (write_adapter(tmp_path / str(i), {"layers.0.q": 12}, i) for i in (1, 2))
    certificate = merge([one, two], tmp_path / "out", error=0)

    assert certificate.matrices[0].rank == 16
    assert certificate.matrices[0].relative_error < 1e-6


@pytest.mark.parametrize(
    "policy",
    [{"energy": 0.9}, {"error": 0.2}, {"keep": 0.5}, {"size": 1500}, {"rank": 2}],
    ids=str,
)
def test_every_policy_keeps_its_word(policy, tmp_path):
    """Errors, parameters and bytes as asked, measured by numpy."""
    ranks = {"layers.0.q": 8, "layers.0.up": 8, "layers.1.q": 3}
    given = write_adapter(tmp_path / "given", ranks, 3)
    certificate = resize(given, tmp_path / "out", **policy)
    exact, found = products(given, lambda X, r: 16 / r), products(tmp_path / "out")

    for row in certificate.matrices:
        X = row.name.removesuffix(".weight")
        error = np.linalg.norm(exact[X] - found[X]) / np.linalg.norm(exact[X])
        assert row.relative_error == pytest.approx(error, rel=1e-6, abs=1e-12)
        if "error" in policy:
            assert error <= 0.2
        if "energy" in policy:
            assert error**2 <= 0.1 + 1e-9
    before, after = certificate.totals.targeted_parameters
    assert before == 8 * 40 + 8 * 56 + 3 * 40
    if "keep" in policy:
        assert 0.4 < after / before <= 0.5
    if "size" in policy:
        assert 1200 < certificate.totals.tensor_bytes[1] <= 1500


def test_a_budget_may_leave_a_module_out_and_says_so(tmp_path):
    """Rank 0: the module is not in the adapter, and stands in the certificate."""
    given = write_adapter(tmp_path / "given", {"layers.0.q": 2, "layers.0.up": 8}, 3)
    tensors = load_file(given / "adapter_model.safetensors")
    name = f"{PREFIX}layers.0.q.lora_B.weight"
    save_file({**tensors, name: tensors[name] / 1000}, given / "adapter_model.safetensors")
    certificate = resize(given, tmp_path / "out", keep=0.22)

    assert [(row.name, row.rank) for row in certificate.matrices if row.rank == 0] == [
        ("layers.0.q.weight", 0)
    ]
    assert list(certificate.factored) == ["layers.0.up"]
    assert [check for check in verify(tmp_path / "out", given) if not check.held] == []


BROKEN = {
    "dora": ({"use_dora": True}, "use_dora"),
    "an unknown field": ({"new_trick": 0.5}, "new_trick"),
    "another type": ({"peft_type": "IA3"}, "IA3"),
    "ranks that disagree": ({"r": 5}, "they must agree"),
    "a regular expression": ({"rank_pattern": {"(a+)+$": 4}}, "no regular expression"),
    "a class": ({"alpha_pattern": {"layers\\.\\d": 4}}, "no regular expression"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha"),
    "a huge alpha": ({"lora_alpha": 10**400}, "lora_alpha"),
    "a huge pattern": ({"alpha_pattern": {"q": 10**400}}, "no table of numbers"),
    "an initialization that changes the base": ({"init_lora_weights": "pissa"}, "pissa"),
    "a condition": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "no truth value": ({"use_rslora": "x"}, "use_rslora"),
    "a pattern of words": ({"rank_pattern": {"q": "four"}}, "no table of numbers"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_understood_is_refused_by_name(case, tmp_path):
    """Exit 3, one sentence, nothing written."""
    config, words = BROKEN[case]
    given = write_adapter(tmp_path / "given", {"layers.0.q": 4}, 1, config)
    done = eckart("resize", given, "-o", tmp_path / "out", "--rank", 2)

    assert done.code == 3, done.err
    assert words in done.err
    assert not (tmp_path / "out").exists()


def with_tensors(folder: Path, more: dict[str, torch.Tensor]) -> Path:
    """The adapter with further tensors."""
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({**tensors, **more}, folder / "adapter_model.safetensors")
    return folder


Q = f"{PREFIX}layers.0.q"
ODD = {
    "a bias of another length": {f"{Q}.lora_B.bias": torch.ones(23)},
    "a bias that is no vector": {f"{Q}.lora_B.bias": torch.ones(24, 1)},
    "a bias of integers": {f"{Q}.lora_B.bias": torch.ones(24, dtype=torch.int32)},
    "a B with a window": {f"{Q}.lora_B.weight": torch.ones(24, 2, 2, 1)},
    "both replaced and added to": {f"{Q}.weight": torch.ones(24, 16)},
    "a bias both replaced and added to": {
        f"{Q}.base_layer.bias": torch.ones(24),
        f"{Q}.lora_B.bias": torch.ones(24),
    },
    "a bias twice": {f"{Q}.base_layer.bias": torch.ones(24), f"{Q}.bias": torch.ones(24)},
    "a bias that overflows": {f"{Q}.lora_B.bias": torch.full((24,), torch.inf)},
}


@pytest.mark.parametrize("case", ODD)
def test_tensors_that_do_not_belong_together_are_refused(case, tmp_path):
    """Exit 3, one sentence, nothing written."""
    given = with_tensors(write_adapter(tmp_path / "given", {"layers.0.q": 4}, 1), ODD[case])
    done = eckart("resize", given, "-o", tmp_path / "out", "--rank", 2)

    assert done.code == 3, done.err
    assert "q" in done.err
    assert not (tmp_path / "out").exists()


def test_a_budget_for_nothing_is_refused(tmp_path):
    """No adapter that no loader takes, and no bias that goes with its module in silence."""
    given = write_adapter(tmp_path / "given", {"layers.0.q": 4, "layers.1.q": 4}, 1)
    with_tensors(given, {f"{Q}.lora_B.bias": torch.ones(24)})

    assert "no adapter" in eckart("resize", given, "-o", tmp_path / "o", "--size", 150).err
    tensors = load_file(given / "adapter_model.safetensors")
    name = f"{Q}.lora_B.weight"
    with_tensors(given, {name: tensors[name] / 1000})
    done = eckart("resize", given, "-o", tmp_path / "o", "--size", 96 + 4 * 40 + 8)
    assert done.code == 2
    assert "the bias" in done.err


def test_a_whole_bias_of_a_module_that_is_left_out_stays(tmp_path):
    """By the name that its layer then has; what the base is called stays as it was."""
    given = write_adapter(tmp_path / "given", {"layers.0.q": 4, "layers.1.q": 4}, 1)
    tensors = load_file(given / "adapter_model.safetensors")
    small = {f"{Q}.lora_B.weight": tensors[f"{Q}.lora_B.weight"] / 1000}
    with_tensors(given, {**small, f"{Q}.base_layer.bias": torch.ones(24)})
    config = json.loads((given / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (given / "adapter_config.json").write_text(json.dumps(config))
    resize(given, tmp_path / "out", size=96 + 4 * 40 + 8)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())

    assert f"{Q}.bias" in load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written["base_model_name_or_path"] is None
    assert all(check.held for check in verify(tmp_path / "out", given))


def test_adapters_of_different_models_are_refused(tmp_path):
    """The tensor and both shapes are named."""
    one = write_adapter(tmp_path / "one", {"layers.0.q": 4}, 1)
    two = write_adapter(tmp_path / "two", {"layers.0.q": 4}, 2)
    tensors = load_file(two / "adapter_model.safetensors")
    name = f"{PREFIX}layers.0.q.lora_B.weight"
    save_file({**tensors, name: torch.ones(25, 4)}, two / "adapter_model.safetensors")

    with pytest.raises(CheckpointError, match=r"\(24, 16\) .* \(25, 16\)"):
        merge([one, two], tmp_path / "out", rank=2)


@pytest.mark.parametrize("weights", ["1", "1,2,3", "1,inf", "a,b"])
def test_weights_that_do_not_fit_are_a_usage_error(weights, tmp_path):
    """One finite number for each adapter."""
    one, two = (write_adapter(tmp_path / str(i), {"layers.0.q": 4}, i) for i in (1, 2))
    done = eckart("merge", one, two, "--weights", weights, "-o", tmp_path / "out", "--rank", 2)

    assert done.code == 2
    assert "--weights" in done.err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_beside_an_adapter_are_taken_off_again(dtype, tmp_path):
    """One rank for all, as vLLM wants it, and back: the ranks that were there, and the product."""
    ranks = {"layers.0.q": 3, "layers.0.up": 8, "layers.1.q": 1}
    given = write_adapter(tmp_path / "given", ranks, 1, dtype=dtype)
    convert(given, tmp_path / "padded", consumer="vllm")
    certificate = resize(tmp_path / "padded", tmp_path / "out", rank="auto", dtype="float32")

    stored = load_file(tmp_path / "padded" / "adapter_model.safetensors")
    assert {len(t) for name, t in stored.items() if ".lora_A." in name} == {8}
    assert {row.name: row.rank for row in certificate.matrices} == {
        f"{X}.weight": r for X, r in ranks.items()
    }
    assert max(row.relative_error for row in certificate.matrices) < 1e-6
    assert all(check.held for check in verify(tmp_path / "out", tmp_path / "padded"))


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.1, 0.3], [1 / 3, -1e-3], [1e6, 1e-6]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_copies_of_an_adapter_have_the_rank_of_one(dtype, weights, tmp_path):
    """Whatever the weights: what both share is stored once, and it is their sum."""
    one = write_adapter(tmp_path / "one", {"layers.0.q": 4, "layers.0.up": 5}, 1, dtype=dtype)
    line = ["merge", one, one, "-o", tmp_path / "out", "--rank", "auto", "--dtype", "float32"]
    done = eckart(*line, f"--weights={weights[0]!r},{weights[1]!r}")
    exact, found = products(one, lambda X, r: 8 / r), products(tmp_path / "out")

    assert done.code == 0
    assert [row["rank"] for row in read_document(tmp_path / "out")["matrices"]] == [4, 5]
    assert read_document(tmp_path / "out")["options"]["rank"] == "auto"
    for X, product in found.items():
        expected = sum(weights) * exact[X]
        assert np.linalg.norm(product - expected) < 1e-6 * np.linalg.norm(expected)


def test_a_component_far_below_the_others_is_no_rounding(tmp_path):
    """10⁻¹¹ of the largest is there in the given numbers, and so it counts."""
    one = write_adapter(tmp_path / "one", {"layers.0.q": 4}, 1)
    two = write_adapter(tmp_path / "two", {"layers.0.q": 1}, 2)
    certificate = merge([one, two], tmp_path / "out", weights=[1.0, 1e-11], rank="auto")

    assert certificate.matrices[0].rank == 5


def test_what_cancels_has_no_rank_and_all_of_it_no_adapter(tmp_path):
    """In one module: rank 0, and the others are as they were. In all of them: exit 2."""
    one = write_adapter(tmp_path / "one", {"layers.0.q": 4, "layers.0.up": 5}, 1)
    two = write_adapter(tmp_path / "two", {"layers.1.q": 2}, 2)
    merge([one, two], tmp_path / "both", error=0)
    merge([tmp_path / "both", one], tmp_path / "out", weights=[1, -1], rank="auto", dtype="float64")
    ranks = {row["name"]: row["rank"] for row in read_document(tmp_path / "out")["matrices"]}

    assert ranks["layers.1.q.weight"] == 2
    assert min(ranks.values()) >= 2  # what was rounded in between is there
    exact = merge([one, one, two], tmp_path / "exact", weights=[1, -1, 1], rank="auto")
    assert {row.name: row.rank for row in exact.matrices} == {
        "layers.0.q.weight": 0,
        "layers.0.up.weight": 0,
        "layers.1.q.weight": 2,
    }
    assert all(check.held for check in verify(tmp_path / "exact", [one, one, two]))
    with pytest.raises(UsageError, match="cancel each other"):
        merge([one, one], tmp_path / "none", weights=[1, -1], rank="auto")


def test_auto_is_no_multiple_of_anything(tmp_path):
    """--align beside it is exit 2, and so is a rank that is neither."""
    given = write_adapter(tmp_path / "given", {"layers.0.q": 4}, 1)
    line = ["resize", given, "-o", tmp_path / "out", "--rank"]

    assert "leave --align 4 out" in eckart(*line, "auto", "--align", 4).message
    assert eckart(*line, "auto", "--align", 4).code == eckart(*line, "most").code == 2
    assert eckart(*line, 3, "--align", 2).code == 2
    assert not (tmp_path / "out").exists()


def test_one_rank_for_all_is_the_largest_that_was_found(tmp_path):
    """For a loader of one rank: zeros again, but no more than one module needs."""
    ranks = {"layers.0.q": 3, "layers.0.up": 5}
    given = write_adapter(tmp_path / "given", ranks, 1)
    convert(given, tmp_path / "padded", consumer="vllm")
    both = [tmp_path / "padded", tmp_path / "padded"]
    certificate = merge(both, tmp_path / "out", rank="auto", consumer="llama.cpp")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")

    assert [row.rank for row in certificate.matrices] == [3, 5]
    assert {len(tensor) for name, tensor in tensors.items() if ".lora_A." in name} == {5}


def test_other_adapters_than_it_was_made_from_are_refused(tmp_path):
    """By number, and by fingerprint in their order."""
    one, two = (write_adapter(tmp_path / str(i), {"layers.0.q": 4}, i) for i in (1, 2))
    merge([one, two], tmp_path / "out", rank=2)

    with pytest.raises(CheckpointError, match="made from 2 adapters"):
        verify(tmp_path / "out", one)
    with pytest.raises(CheckpointError, match="differ, or the order"):
        verify(tmp_path / "out", [two, one])
    with pytest.raises(UsageError, match="no adapter to merge"):
        merge([], tmp_path / "none", rank=2)
    with pytest.raises(UsageError, match="no base"):
        verify(tmp_path / "out", [one, two], base=one)


def test_half_precision_stays_what_it_was(tmp_path):
    """bfloat16 in, bfloat16 out; the error of that rounding is in the certificate."""
    given = write_adapter(tmp_path / "given", {"layers.0.q": 4}, 1, dtype=torch.bfloat16)
    certificate = resize(given, tmp_path / "out", error=0.01)
    wide = resize(given, tmp_path / "wide", error=0, dtype="float32")

    assert certificate.matrices[0].dtype == "BF16"
    assert certificate.matrices[0].relative_error > 1e-4 > wide.matrices[0].relative_error


def test_any_changed_byte_is_found(tmp_path):
    """Every 5th byte of every file."""
    given = write_adapter(tmp_path / "given", {"layers.0.q": 4}, 1)
    out = tmp_path / "out"
    resize(given, out, rank=2)

    assert undetected(out, 5) == []
    assert read_document(out)["kind"] == "merged"


COUNTS = {
    "parameters of a module": lambda d: d["matrices"][0]["parameters"].__setitem__(0, 1),
    "bytes of a module": lambda d: d["matrices"][0]["bytes"].__setitem__(0, 1),
    "bytes of what is left out": lambda d: d["matrices"][-1]["bytes"].__setitem__(0, 1),
    "parameters before": lambda d: d["totals"]["model_parameters"].__setitem__(0, 1),
    "bytes before": lambda d: d["totals"]["tensor_bytes"].__setitem__(0, 1),
    "targeted": lambda d: d["totals"]["targeted_parameters"].__setitem__(0, 1),
    "keep": lambda d: d["totals"].update(keep=0.5),
}


@pytest.mark.parametrize("forgery", COUNTS)
def test_forged_counts_of_what_was_given_are_found(forgery, tmp_path):
    """By the adapters alone; of a module that cancelled, and padded ones, the counts are true."""
    one = write_adapter(tmp_path / "one", {"layers.0.q": 4, "layers.0.up": 5}, 1)
    two = write_adapter(tmp_path / "two", {"layers.1.q": 2}, 2, dtype=torch.bfloat16)
    given, out = [one, one, two, two], tmp_path / "out"
    options = {"weights": [1, 1, 1, -1], "rank": "auto", "consumer": "vllm", "dtype": "float16"}
    certificate = merge(given, out, **options)
    checks = verify(out, given)

    assert [row.rank for row in certificate.matrices] == [4, 5, 0]
    assert [check for check in checks if not check.held] == []
    forge(out, COUNTS[forgery])
    assert not all(check.held for check in verify(out, given))
