"""tuned − base as an adapter: what is carried, what is lost and said, and that it is proved."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import (
    decaying,
    eckart,
    forge,
    in_a_process_killed_at,
    read_document,
    small_tensors,
    snapshot,
    undetected,
    vector,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from eckart import apply, extract, verify
from eckart.errors import InputError, LossError, PromiseError, StaleError, UsageError
from eckart.execute import local
from eckart.linalg.matrices import named_generator

WEIGHTS = "adapter_model.safetensors"
Q, UP = "layers.0.q_proj", "layers.0.up_proj"


def low_rank(name: str, m: int, n: int, rank: int) -> Tensor:
    """A matrix of that rank, the same one for the same name."""
    W = decaying(f"low {name}", m, n).double()
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    return ((U[:, :rank] * s[:rank]) @ Vh[:rank]).float()


def pair(tmp_path: Path, changes: dict[str, Tensor], dtype: torch.dtype = torch.float32):
    """A base, and the same with something added to some of its tensors."""
    base = small_tensors(dtype)
    tuned = {
        name: (tensor + changes[name]).to(dtype) if name in changes else tensor
        for name, tensor in base.items()
    }
    return write_checkpoint(tmp_path / "tuned", tuned), write_checkpoint(tmp_path / "base", base)


@pytest.fixture
def simple(tmp_path):
    """Two matrices that differ by rank 2 and 3."""
    changes = {
        f"{Q}.weight": low_rank("q", 24, 16, 2),
        f"{UP}.weight": 0.5 * low_rank("u", 40, 16, 3),
    }
    return pair(tmp_path, changes)


def difference(tuned: Path, base: Path, name: str) -> np.ndarray:
    """tuned − base in float64, by numpy alone."""
    ours, theirs = (load_file(folder / "model.safetensors")[name] for folder in (tuned, base))
    return ours.double().numpy() - theirs.double().numpy()


def product(out: Path, X: str) -> np.ndarray:
    """B·A as stored, by numpy alone."""
    tensors = load_file(out / WEIGHTS)
    A, B = (tensors[f"base_model.model.{X}.lora_{part}.weight"] for part in "AB")
    return B.double().numpy() @ A.double().numpy()


def test_a_low_rank_change_is_found_to_rounding(simple, tmp_path):
    """B·A is what was added, in float64 by numpy, and only what differs is in the adapter."""
    tuned, base = simple
    certificate = extract(tuned, base, tmp_path / "out", rank=3)

    for X in (Q, UP):
        change = difference(tuned, base, f"{X}.weight")
        assert np.linalg.norm(change - product(tmp_path / "out", X)) < 1e-6
    assert sorted(certificate.factored) == [Q, UP]
    assert len(load_file(tmp_path / "out" / WEIGHTS)) == 4


def test_every_figure_of_the_certificate_is_true(simple, tmp_path):
    """Errors, shares and counts, recomputed by numpy from the files."""
    tuned, base = simple
    out = tmp_path / "out"
    certificate = extract(tuned, base, out, rank=1)
    changes = {row.name: difference(tuned, base, row.name) for row in certificate.matrices}
    total = sum(np.sum(change**2) for change in changes.values())
    missed = 0.0
    for row in certificate.matrices:
        change = changes[row.name]
        away = np.linalg.norm(change - product(out, row.name.removesuffix(".weight")))
        missed += away**2

        assert row.relative_error == pytest.approx(away / np.linalg.norm(change), rel=1e-6)
        assert row.energy_share == pytest.approx(np.sum(change**2) / total, rel=1e-6)
        assert row.parameters == (change.size, sum(change.shape))
    assert certificate.change is not None
    assert certificate.change.relative_error == pytest.approx(math.sqrt(missed / total), rel=1e-6)
    assert certificate.change.lost == 0
    assert set(certificate.unchanged) == set(small_tensors()) - changes.keys()


POLICIES = [
    {"rank": 2},
    {"rank": 100},
    {"energy": 0.9},
    {"error": 0.3},
    {"error": 0.0},
    {"keep": 0.3},
    {"size": 1500},
]


@pytest.mark.parametrize(
    ("policy", "align"),
    [(p, align) for p in POLICIES for align in (1, 4) if p.get("rank", align) % align == 0],
    ids=str,
)
def test_every_policy_keeps_its_word_and_is_verified(policy, align, tmp_path):
    """Of changes of full rank: errors, parameters and bytes as asked; all checks hold."""
    changes = {f"{Q}.weight": decaying("dq", 24, 16), f"{UP}.weight": decaying("du", 40, 16)}
    tuned, base = pair(tmp_path, changes)
    out = tmp_path / "out"
    certificate = extract(tuned, base, out, **policy, align=align)
    checks = verify(out, tuned, base=base)

    assert [check for check in checks if not check.held] == []
    assert [check for check in verify(out) if not check.held] == []
    for row in certificate.matrices:
        assert row.rank <= 16
        assert row.rank % align == 0 or row.rank == 16
        if "energy" in policy:
            assert row.relative_error**2 <= 1 - policy["energy"] + 1e-6
        if "error" in policy:
            assert row.relative_error <= policy["error"] + 1e-6
    before, after = certificate.totals.targeted_parameters
    if "keep" in policy:
        assert 0.5 * policy["keep"] < after / before <= policy["keep"]
    if "size" in policy:
        assert 0.8 * policy["size"] <= certificate.totals.tensor_bytes[1] <= policy["size"]


def test_a_budget_goes_where_the_energy_is(tmp_path):
    """A change a hundred times smaller gets nothing: its module is left out, as its row says."""
    changes = {f"{Q}.weight": decaying("dq", 24, 16), f"{UP}.weight": decaying("du", 40, 16) / 100}
    tuned, base = pair(tmp_path, changes)
    out = tmp_path / "out"
    certificate = extract(tuned, base, out, keep=0.15)
    dropped = next(row for row in certificate.matrices if row.name == f"{UP}.weight")

    assert list(certificate.factored) == [Q]
    assert (dropped.rank, dropped.relative_error, dropped.output_error) == (0, 1.0, None)
    assert all(check.held for check in verify(out, tuned, base=base))


@pytest.mark.parametrize("budget", [{"size": 10}, {"keep": 1e-5}])
def test_a_budget_too_small_for_any_rank_is_said_to_be_that(budget, simple, tmp_path):
    """Exit 2: it is not the change that no LoRA holds."""
    tuned, base = simple
    with pytest.raises(UsageError, match=r"leaves no matrix a rank, .* raise it"):
        extract(tuned, base, tmp_path / "out", **budget)

    assert not (tmp_path / "out").exists()


def test_two_equal_models_are_nothing_to_extract(tmp_path):
    """Exit 3, and nothing is written."""
    tuned, base = pair(tmp_path, {})
    before = snapshot(tmp_path)
    done = eckart("extract", tuned, "--base", base, "-o", tmp_path / "out", "--rank", 2)

    assert done.code == 3
    assert "nothing to extract" in done.err
    assert snapshot(tmp_path) == before


LOSSES = {
    f"{Q}.bias": (vector("db", 24), "biases"),
    "norm.weight": (vector("dn", 16), "norms"),
    "embed_tokens.weight": (decaying("de", 20, 16), "embeddings"),
}


@pytest.mark.parametrize("name", [f"{Q}.bias", "norm.weight"])
def test_a_loss_is_refused_with_its_remedy_and_the_remedy_works(name, simple, tmp_path):
    """Exit 6, nothing published, the work kept; with the option the tensor is there exactly."""
    change, kind = LOSSES[name]
    changes = {f"{Q}.weight": low_rank("q", 24, 16, 2), name: change}
    tuned, base = pair(tmp_path / "lossy", changes)
    out, line = tmp_path / "out", ["extract", tuned, "--base", base, "-o", tmp_path / "out"]
    refused = eckart(*line, "--rank", 2)

    assert refused.code == 6
    assert name in refused.err
    assert f"--store-whole {kind}" in refused.err
    assert not out.exists()
    assert (tmp_path / "out.eckart-work").is_dir()
    assert eckart(*line, "--rank", 2, "--store-whole", kind).code == 0
    assert all(check.held for check in verify(out, tuned, base=base))
    assert [row["name"] for row in read_document(out)["stored_whole"]] == [name]
    assert not (tmp_path / "out.eckart-work").exists()


def test_a_loss_can_be_accepted_and_is_then_certified(tmp_path):
    """The row says what was lost, and the change's error contains it."""
    changes = {f"{Q}.weight": low_rank("q", 24, 16, 2), f"{Q}.bias": vector("db", 24)}
    tuned, base = pair(tmp_path, changes)
    out = tmp_path / "out"
    certificate = extract(tuned, base, out, rank=2, accept_loss=True)
    bias, weight = (difference(tuned, base, name) for name in (f"{Q}.bias", f"{Q}.weight"))
    share = np.sum(bias**2) / (np.sum(bias**2) + np.sum(weight**2))

    assert [row.name for row in certificate.lost] == [f"{Q}.bias"]
    assert certificate.change is not None
    assert certificate.change.lost == pytest.approx(share)
    assert certificate.change.relative_error == pytest.approx(math.sqrt(share), rel=1e-6)
    assert all(check.held for check in verify(out, tuned, base=base))


def test_a_thousandth_may_be_lost_without_a_word(tmp_path):
    """Rounding in a bias is no reason to refuse an adapter; it is named all the same."""
    changes = {f"{Q}.weight": low_rank("q", 24, 16, 2), f"{Q}.bias": 1e-3 * vector("db", 24)}
    tuned, base = pair(tmp_path, changes)
    certificate = extract(tuned, base, tmp_path / "out", rank=2)

    assert [row.name for row in certificate.lost] == [f"{Q}.bias"]


@pytest.mark.parametrize("name", ["mlp.experts.0.gate_proj.weight", "mlp.experts.1.w5.weight"])
def test_experts_that_are_not_all_there_are_named_as_lost(name, simple, tmp_path):
    """No loader makes a parameter of them: no keys that nothing finds, no silence."""
    tuned, base = simple
    W = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
    folders = []
    for folder, more in ((tuned, W), (base, W / 2)):
        tensors = {**load_file(folder / "model.safetensors"), f"layers.0.{name}": more}
        folders.append(write_checkpoint(tmp_path / f"{folder.name}-moe", tensors))
    refused = eckart(
        *("extract", folders[0], "--base", folders[1], "-o", tmp_path / "out", "--rank", 2)
    )
    certificate = extract(*folders, tmp_path / "out", rank=2, accept_loss=True)

    assert refused.code == 6
    assert "routed experts" in refused.err
    assert [row.name for row in certificate.lost] == [f"layers.0.{name}"]
    assert all(check.held for check in verify(tmp_path / "out", folders[0], base=folders[1]))


@pytest.mark.parametrize(
    ("config", "lost"),
    [
        ({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}, True),
        ({"architectures": ["GPT2LMHeadModel"]}, True),
        ({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}, False),
        ({"architectures": ["BertModel"]}, False),
        ({}, False),
    ],
)
def test_an_embedding_that_the_head_is_tied_to_is_named_as_lost(config, lost, tmp_path):
    """PEFT would change the embedding alone, and the model's output not as it was tuned."""
    W, V = decaying("e", 20, 16), decaying("q", 24, 16)
    tensors = {"model.embed_tokens.weight": W, "q.weight": V}
    tuned = {name: tensor + low_rank(name, *tensor.shape, 2) for name, tensor in tensors.items()}
    folders = [
        write_checkpoint(tmp_path / name, one, config)
        for name, one in (("tuned", tuned), ("base", tensors))
    ]
    certificate = extract(*folders, tmp_path / "out", rank=2, accept_loss=True)

    assert [row.name for row in certificate.lost] == ["model.embed_tokens.weight"] * lost
    assert len(certificate.factored) == 2 - lost


NAMES = {  # how it is stored, or why it is not
    "embed_out.weight": "lora_A.weight",
    "patch_embed.proj.weight": "lora_A.weight",
    "embedding_hidden_mapping_in.weight": "its name does not tell",
    "word_embeddings.weight": "lora_embedding_A",
    "attn.out_proj.weight": "torch's own attention",
}


@pytest.mark.parametrize("name", NAMES)
def test_only_tables_are_stored_as_embeddings(name, tmp_path):
    """A layer that PEFT would not find by its keys is never written by those keys."""
    shape = (20, 3, 2, 2) if "patch" in name else (20, 16)
    W = decaying("e", 20, math.prod(shape[1:])).reshape(shape)
    tensors = {name: W, "q.weight": decaying("q", 24, 16), "attn.in_proj_weight": torch.ones(4, 4)}
    tuned = {**tensors, name: 1.5 * W, "q.weight": 2 * tensors["q.weight"]}
    folders = [write_checkpoint(tmp_path / n, one) for n, one in (("t", tuned), ("b", tensors))]
    certificate = extract(*folders, tmp_path / "out", rank=4, accept_loss=True)
    keys = [key for key in load_file(tmp_path / "out" / WEIGHTS) if ".q." not in key]

    if "lora" in NAMES[name]:
        assert any(key.endswith(NAMES[name]) for key in keys)
    else:
        assert keys == []
        assert NAMES[name] in certificate.lost[0].reason
    assert all(check.held for check in verify(tmp_path / "out", folders[0], base=folders[1]))


def test_counters_are_no_change_of_the_model(simple, tmp_path):
    """`num_batches_tracked` is named, and weighs nothing."""
    tuned, base = (
        write_checkpoint(
            tmp_path / f"{folder.name}-counted",
            {**load_file(folder / "model.safetensors"), "num_batches_tracked": torch.tensor(count)},
        )
        for folder, count in zip(simple, (5000, 0), strict=True)
    )
    certificate = extract(tuned, base, tmp_path / "out", rank=3)

    assert [(row.name, row.energy_share) for row in certificate.lost] == [
        ("num_batches_tracked", 0.0)
    ]


def test_what_is_excluded_does_not_hide_what_is_lost(tmp_path):
    """The thousandth is of what the user did not give up."""
    changes = {
        f"{Q}.weight": low_rank("q", 24, 16, 2),
        f"{Q}.bias": vector("db", 24),
        f"{UP}.weight": 1e4 * low_rank("u", 40, 16, 2),
    }
    tuned, base = pair(tmp_path, changes)

    with pytest.raises(LossError):
        extract(tuned, base, tmp_path / "out", rank=2, exclude=["*.up_proj"])


def test_a_forged_account_of_the_change_is_found(tmp_path):
    """With good digests: a rank of 0 that claims no error, shares that are none."""
    changes = {f"{Q}.weight": decaying("dq", 24, 16), f"{UP}.weight": decaying("du", 40, 16) / 100}
    tuned, base = pair(tmp_path, changes)
    out = tmp_path / "out"
    extract(tuned, base, out, keep=0.15)

    def no_error(document):
        row = next(row for row in document["matrices"] if row["rank"] == 0)
        row |= {"relative_error": 0.0, "optimum": 0.0}

    for change in (no_error, lambda d: d["change"].update(factored=1.5)):
        honest = (out / "eckart.json").read_bytes()
        forge(out, change)
        assert not all(check.held for check in verify(out, tuned, base=base))
        (out / "eckart.json").write_bytes(honest)
    assert all(check.held for check in verify(out, tuned, base=base))


def test_vectors_alone_are_no_adapter(tmp_path):
    """PEFT needs a LoRA at least: exit 3, nothing written."""
    tuned, base = pair(tmp_path, {f"{Q}.bias": vector("db", 24)})
    done = eckart(
        *("extract", tuned, "--base", base, "-o", tmp_path / "out", "--rank", 2),
        *("--store-whole", "biases"),
    )

    assert done.code == 3
    assert "no adapter without one" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_what_the_user_excludes_is_no_unaccepted_loss(simple, tmp_path):
    """It stands among the lost, with the user's own word as the reason."""
    tuned, base = simple
    certificate = extract(tuned, base, tmp_path / "out", rank=2, exclude=["*.up_proj"])

    assert [(row.name, row.reason) for row in certificate.lost] == [
        (f"{UP}.weight", "excluded by --exclude")
    ]
    assert list(certificate.factored) == [Q]


def test_an_embedding_is_factored_as_the_layer_computes_it(tmp_path):
    """lora_embedding_A is r × vocabulary, lora_embedding_B dimension × r."""
    tuned, base = pair(tmp_path, {"embed_tokens.weight": low_rank("e", 20, 16, 2)})
    out = tmp_path / "out"
    extract(tuned, base, out, rank=2)
    tensors = load_file(out / WEIGHTS)
    A, B = (tensors[f"base_model.model.embed_tokens.lora_embedding_{part}"] for part in "AB")

    assert (tuple(A.shape), tuple(B.shape)) == ((2, 20), (16, 2))
    change = difference(tuned, base, "embed_tokens.weight")
    assert np.linalg.norm(change - (B.double() @ A.double()).T.numpy()) < 1e-6
    assert all(check.held for check in verify(out, tuned, base=base))


def test_workers_and_kept_work_make_no_difference(simple, tmp_path, monkeypatch):
    """In this process, in two, from kept parts: the same files."""
    tuned, base = simple
    extract(tuned, base, tmp_path / "here", rank=3)
    extract(tuned, base, tmp_path / "kept", rank=3, keep_work=True)
    monkeypatch.setattr(local, "SHORT_SECONDS", -1.0)
    extract(tuned, base, tmp_path / "two", rank=3, workers=2)

    for name in ("two", "kept"):
        for file in (WEIGHTS, "adapter_config.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "here" / file).read_bytes()
    assert (tmp_path / "kept.eckart-work").is_dir()


def test_killed_anywhere_and_resumed_the_bytes_are_the_same(simple, tmp_path):
    """At every fourth storage call of an extraction: no adapter, and then the very same."""
    tuned, base = simple
    extract(tuned, base, tmp_path / "fresh", energy=0.9)
    number, kills = 1, 0
    while True:
        out = tmp_path / f"killed-{number}"
        killed = in_a_process_killed_at(
            number, lambda out=out: extract(tuned, base, out, energy=0.9)
        )
        if not killed or out.exists():
            break
        kills += 1
        extract(tuned, base, out, energy=0.9)
        for file in (WEIGHTS, "adapter_config.json"):
            assert (out / file).read_bytes() == (tmp_path / "fresh" / file).read_bytes()
        assert not out.with_name(f"{out.name}.eckart-work").exists()
        number += 4
    assert kills >= 10


def test_kept_work_of_another_base_is_stale(simple, tmp_path):
    """Even where sizes and times of the files are the same: exit 4."""
    tuned, base = simple
    extract(tuned, base, tmp_path / "out", rank=2, work=tmp_path / "work")
    other = load_file(base / "model.safetensors")
    other[f"{Q}.weight"] += 0.01
    second = write_checkpoint(tmp_path / "second", other)
    stat = (base / "model.safetensors").stat()
    os.utime(second / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))

    with pytest.raises(StaleError, match="has changed"):
        extract(tuned, second, tmp_path / "again", rank=2, work=tmp_path / "work")


def test_a_model_that_was_trained_apart_is_no_base(simple, tmp_path):
    """Names and shapes fit, and the weights have nothing in common: the share is said, exit 3."""
    tuned, base = simple
    shapes = {name: t.shape for name, t in load_file(base / "model.safetensors").items()}
    drawn = {name: torch.randn(s, generator=named_generator(9, name)) for name, s in shapes.items()}
    stranger = write_checkpoint(tmp_path / "stranger", drawn)
    far = {name: t + 100 * drawn[name] for name, t in load_file(base / "model.safetensors").items()}

    with pytest.raises(InputError, match=r"is not the base of .*[0-9]% of its weights"):
        extract(tuned, stranger, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()
    extract(
        write_checkpoint(tmp_path / "far", far), base, tmp_path / "out", rank=2, accept_loss=True
    )


def test_an_adapter_that_was_changed_is_not_used(simple, tmp_path):
    """Its own certificate tells, and the file is named: exit 3 for every command that reads it."""
    tuned, base = simple
    made, out = tmp_path / "lora", tmp_path / "out"
    extract(tuned, base, made, rank=2)
    stored = load_file(made / WEIGHTS)
    stored[next(iter(stored))] *= 1.01
    save_file(stored, made / WEIGHTS, metadata={"format": "pt"})
    lines = [
        ("apply", made, "--base", base),
        ("resize", made, "--rank", 1),
        ("merge", made, made, "--rank", 1),
        ("convert", made, "--for", "vllm"),
    ]

    for line in lines:
        done = eckart(*line, "-o", out)
        assert done.code == 3
        assert "adapter_model.safetensors is not as it was written" in done.message
        assert not out.exists()
    (made / "eckart.json").unlink()
    assert eckart(*lines[0], "-o", out).code == 0


def test_half_precision_is_subtracted_exactly_and_stored_as_it_was(tmp_path):
    """bfloat16 factors by default; float32 ones are nearer."""
    changes = {f"{Q}.weight": low_rank("q", 24, 16, 2)}
    tuned, base = pair(tmp_path, changes, torch.bfloat16)
    half = extract(tuned, base, tmp_path / "half", rank=16)
    wide = extract(tuned, base, tmp_path / "wide", rank=16, dtype="float32")

    assert load_file(tmp_path / "half" / WEIGHTS)[f"base_model.model.{Q}.lora_A.weight"].dtype == (
        torch.bfloat16
    )
    assert half.matrices[0].relative_error > 1e-4 > 1e-6 > wide.matrices[0].relative_error
    assert all(check.held for check in verify(tmp_path / "half", tuned, base=base))


def test_patterns_may_name_any_tensor(simple, tmp_path):
    """One that did not change, or is a vector; one that is in no model is exit 2."""
    tuned, base = simple
    extract(tuned, base, tmp_path / "out", rank=2, exclude=["norm*", "lm_head"])

    with pytest.raises(UsageError, match="matches no tensor"):
        extract(tuned, base, tmp_path / "none", rank=2, exclude=["nothing*"])


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rank_of_a_merged_lora_is_found(rank, dtype, tmp_path):
    """--rank auto, from the rounded weights alone: exactly what was merged, on every module."""
    generator = torch.Generator().manual_seed(3)
    base = {
        f"layers.{i}.{X}.weight": torch.randn(m, n, generator=generator).to(dtype)
        for i in range(2)
        for X, (m, n) in {"q": (256, 256), "up": (512, 256)}.items()
    }
    tuned = {}
    for name, W in base.items():
        B, A = (torch.randn(*s, generator=generator) for s in ((len(W), rank), (rank, 256)))
        tuned[name] = (W.float() + 0.05 * B @ A).to(dtype)
    folders = [
        write_checkpoint(tmp_path / name, one) for name, one in (("tuned", tuned), ("base", base))
    ]
    line = ["extract", folders[0], "--base", folders[1], "-o", tmp_path / "out", "--rank", "auto"]
    done = eckart(*line)
    document = read_document(tmp_path / "out")

    assert done.code == 0
    assert [row["rank"] for row in document["matrices"]] == [rank] * 4
    assert document["remarks"] == []
    assert document["options"]["rank"] == "auto"
    for row in document["matrices"]:
        assert row["delta"]["below_floor"] is False
        assert row["delta"]["weakest"] > 2 * row["delta"]["threshold"] > 0


def test_a_change_that_is_all_rounding_is_named_so(tmp_path):
    """Rank 0 with its error, and a remark: nothing is made up, nothing is lost in silence."""
    g = torch.Generator().manual_seed(3)
    W = {X: torch.randn(128, 128, generator=g).bfloat16() for X in ("a.weight", "b.weight")}
    B, A = (torch.randn(*s, generator=g) for s in ((128, 2), (2, 128)))
    noise = 1e-3 * torch.randn(128, 128, generator=g)
    change = {"a.weight": 0.1 * B @ A, "b.weight": noise}
    tuned = {name: (one.float() + change[name]).bfloat16() for name, one in W.items()}
    folders = [write_checkpoint(tmp_path / n, one) for n, one in (("tuned", tuned), ("base", W))]
    certificate = extract(*folders, tmp_path / "out", rank="auto")

    assert [(row.name, row.rank) for row in certificate.matrices] == [
        ("a.weight", 2),
        ("b.weight", 0),
    ]
    assert any("below the rounding floor" in remark for remark in certificate.remarks)
    assert [row.delta and row.delta.below_floor for row in certificate.matrices] == [False, True]
    assert all(check.held for check in verify(tmp_path / "out", folders[0], base=folders[1]))


@pytest.mark.parametrize("rank", ["automatic", "-1", "2.5", "0"])
def test_a_rank_that_is_none_is_a_usage_error(rank, simple, tmp_path):
    """A whole number from 1, or auto."""
    tuned, base = simple

    done = eckart("extract", tuned, "--base", base, "-o", tmp_path / "out", "--rank", rank)

    assert done.code == 2


def test_an_error_below_rounding_is_refused_not_lost(tmp_path):
    """The number format is named, and what to do."""
    tuned, base = pair(tmp_path, {f"{Q}.weight": low_rank("q", 24, 16, 2)}, torch.bfloat16)

    with pytest.raises(PromiseError, match="--dtype float32"):
        extract(tuned, base, tmp_path / "out", error=1e-5)


def test_another_models_base_is_refused_before_any_work(simple, tmp_path):
    """By the share of names in common, and by the first shape that differs."""
    tuned, _base = simple
    other = write_checkpoint(tmp_path / "other", {"a.weight": decaying("a", 9, 9)})
    bent = {**small_tensors(), f"{Q}.weight": decaying("q", 25, 16)}
    crooked = write_checkpoint(tmp_path / "crooked", bent)

    with pytest.raises(InputError, match=r"is not the base of .*0\.0%"):
        extract(tuned, other, tmp_path / "out", rank=2)
    with pytest.raises(InputError, match=r"layers\.0\.q_proj\.weight is 24×16 .* and 25×16"):
        extract(tuned, crooked, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_a_wrong_base_is_refused_by_verify(simple, tmp_path):
    """Exit 3: it says of which the weights differ."""
    tuned, base = simple
    extract(tuned, base, tmp_path / "out", rank=2)
    done = eckart("verify", tmp_path / "out", "--against", tuned, "--base", tuned)

    assert done.code == 3
    assert "differ" in done.err


def test_verify_wants_both_or_none(simple, tmp_path):
    """An adapter is held against two models."""
    tuned, base = simple
    extract(tuned, base, tmp_path / "out", rank=2)

    with pytest.raises(UsageError, match="--base, too"):
        verify(tmp_path / "out", tuned)
    with pytest.raises(UsageError, match="--against"):
        verify(tmp_path / "out", base=base)


def test_any_changed_byte_of_an_adapter_is_found(simple, tmp_path):
    """Every 7th byte of every file."""
    tuned, base = simple
    out = tmp_path / "out"
    extract(tuned, base, out, rank=1)

    assert undetected(out, 7) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_none_is_named(value, tmp_path):
    """Before any decomposition."""
    broken = torch.zeros(24, 16)
    broken[3, 4] = value
    tuned, base = pair(tmp_path, {f"{Q}.weight": broken})

    with pytest.raises(InputError, match=r"layers\.0\.q_proj\.weight has a NaN or Inf"):
        extract(tuned, base, tmp_path / "out", rank=2)


def test_an_unknown_kind_to_store_whole_is_a_usage_error(simple, tmp_path):
    """The kinds there are stand in the message."""
    tuned, base = simple

    with pytest.raises(UsageError, match="norms, biases, embeddings"):
        extract(tuned, base, tmp_path / "out", rank=2, store_whole=["heads"])


def test_a_lost_tensor_is_named_even_if_it_is_new(simple, tmp_path):
    """A tensor that only the tuned model has cannot be added by an adapter."""
    _, base = simple
    tensors = {**small_tensors(), "extra.weight": decaying("x", 8, 8)}
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"] + low_rank("q", 24, 16, 2)
    tuned = write_checkpoint(tmp_path / "more", tensors)

    with pytest.raises(LossError) as refused:
        extract(tuned, base, tmp_path / "out", rank=2)
    assert any("extra.weight" in note for note in refused.value.__notes__)


APPLIED = {
    "bytes of a sum": lambda d: d["matrices"][0]["bytes"].__setitem__(0, 1),
    "parameters before": lambda d: d["totals"]["model_parameters"].__setitem__(0, 1),
    "bytes before": lambda d: d["totals"]["tensor_bytes"].__setitem__(0, 1),
    "targeted": lambda d: d["totals"].update(targeted_parameters=[1, 1]),
}


@pytest.mark.parametrize("forgery", APPLIED)
def test_forged_counts_of_a_base_with_an_adapter_in_it_are_found(forgery, simple, tmp_path):
    """By the base alone: what it held, and what each sum does."""
    extract(*simple, tmp_path / "adapter", rank=3)
    out = tmp_path / "out"
    apply(tmp_path / "adapter", simple[1], out)

    assert all(check.held for check in verify(out, tmp_path / "adapter", base=simple[1]))
    forge(out, APPLIED[forgery])
    assert not all(check.held for check in verify(out, tmp_path / "adapter", base=simple[1]))
