"""Extraction with statistics: the change as the tuned model feels it, and that it is proved."""

import math
from pathlib import Path

import pytest
import torch
from builders import (
    decaying,
    eckart,
    forge,
    in_a_process_killed_at,
    read_document,
    read_tensors,
    second_moment,
    small_tensors,
    snapshot,
    vector,
    write_checkpoint,
    write_moments,
)
from safetensors.torch import load_file, save_file
from test_weighted_compression import damped, losses
from torch import Tensor

from eckart import Certificate, calibrate, extract, verify
from eckart.checkpoint.statistics import Statistics
from eckart.errors import CheckpointError, LossError, StaleError, UsageError
from eckart.linalg.metric import CURVATURE_DAMPING, INPUT_DAMPING

WEIGHTS = "adapter_model.safetensors"
Q, UP = "layers.0.q_proj", "layers.0.up_proj"
POLICIES = {"keep": 0.4, "rank": 3, "error": 0.3, "energy": 0.9, "size": 3_000}
KINDS = {"full": "curvature", "diagonal": "diagonal curvature", "none": "inputs"}


def pair(
    tmp_path: Path, changes: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> tuple[Path, Path]:
    """A base, and the same with something added to some of its tensors."""
    base = small_tensors(dtype, layers=2)
    tuned = {
        name: (tensor + changes[name]).to(dtype) if name in changes else tensor
        for name, tensor in base.items()
    }
    return write_checkpoint(tmp_path / "tuned", tuned), write_checkpoint(tmp_path / "base", base)


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    """Four matrices that differ, by changes of full rank and unlike sizes."""
    changes = {
        f"layers.{i}.{X}.weight": decaying(f"d{X}{i}", m, 16) * 3.0**-i
        for i in (0, 1)
        for X, m in (("q_proj", 24), ("up_proj", 40))
    }
    return pair(tmp_path, changes)


@pytest.fixture
def statistics(both: tuple[Path, Path], tmp_path: Path) -> Path:
    return write_moments(tmp_path / "S", both[0]).folder


def change(both: tuple[Path, Path], X: str) -> Tensor:
    """tuned − base in float64."""
    ours, theirs = (read_tensors(folder)[f"{X}.weight"].double() for folder in both)
    return ours - theirs


def product(out: Path, X: str) -> Tensor:
    """B·A as stored, in float64."""
    tensors = load_file(out / WEIGHTS)
    A, B = (tensors[f"base_model.model.{X}.lora_{part}.weight"].double() for part in "AB")
    return B @ A


def roots(known: Statistics, name: str, m: int) -> tuple[Tensor, Tensor]:
    """L and R with L Lᵀ = G and R Rᵀ = C, damped, by torch alone."""
    G = known.curvature(name)
    eye = torch.eye(m, dtype=torch.float64)
    L = eye if G is None else torch.linalg.cholesky(damped(G, CURVATURE_DAMPING))
    return L, torch.linalg.cholesky(damped(known.inputs(name), INPUT_DAMPING))


@pytest.mark.parametrize("curvature", KINDS)
def test_the_factors_are_the_best_in_the_metric(curvature, both, tmp_path):
    """Equal to the closed form L⁻ᵀ·trunc(Lᵀ Δ R)·R⁻¹ of every matrix, in float64."""
    known = write_moments(tmp_path / "S", both[0], curvature=curvature)
    extract(*both, tmp_path / "out", rank=3, statistics=known.folder)

    for X in (Q, UP):
        D = change(both, X)
        L, R = roots(known, f"{X}.weight", len(D))
        U, s, Vh = torch.linalg.svd(L.mT @ D @ R, full_matrices=False)
        best = torch.linalg.inv(L.mT) @ ((U[:, :3] * s[:3]) @ Vh[:3]) @ torch.linalg.inv(R)
        assert torch.linalg.norm(product(tmp_path / "out", X) - best) < 1e-5 * D.norm()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("curvature", KINDS)
def test_what_is_claimed_in_the_metric_is_true_and_verified(curvature, policy, both, tmp_path):
    """Error, loss and plain error by their definitions, from the written file; all checks hold."""
    known = write_moments(tmp_path / "S", both[0], curvature=curvature)
    out = tmp_path / "out"
    certificate = extract(*both, out, statistics=known.folder, **{policy: POLICIES[policy]})
    checks = verify(out, both[0], base=both[1], statistics=known.folder)

    assert [check for check in [*checks, *verify(out)] if not check.held] == []
    assert any("in the metric of" in check.detail for check in checks)
    assert certificate.statistics is not None
    assert certificate.statistics.digest == known.digest
    for row in certificate.matrices:
        X = row.name.removesuffix(".weight")
        D = change(both, X)
        stored = product(out, X) if row.rank else torch.zeros_like(D)
        missed, total = losses(row.name, D, stored, known)

        assert row.metric == KINDS[curvature]
        assert row.metric_error == pytest.approx((missed / total) ** 0.5, rel=1e-5)
        assert row.loss == (None if curvature == "none" else pytest.approx(missed, rel=1e-5))
        assert row.relative_error == pytest.approx(float((D - stored).norm() / D.norm()), rel=1e-6)
        if policy in ("error", "energy"):
            assert row.metric_error <= (0.3 if policy == "error" else 0.1**0.5) * (1 + 1e-6)
    predicted = sum(row.loss or 0.0 for row in certificate.matrices)
    expected = None if curvature == "none" else pytest.approx(predicted)
    assert certificate.loss.predicted == expected


def predicted_of(certificate: Certificate, both, known: Statistics, out: Path) -> float:
    """What all that is missed costs, whatever it was approximated in."""
    found = 0.0
    for row in certificate.matrices:
        X = row.name.removesuffix(".weight")
        D = change(both, X)
        found += losses(row.name, D, product(out, X) if row.rank else 0 * D, known)[0]
    return found


@pytest.mark.parametrize("policy", [{"rank": 2}, {"rank": 5}, {"keep": 0.3}, {"size": 3_000}])
def test_the_same_ranks_or_budget_lose_less_with_statistics(policy, both, statistics, tmp_path):
    """In nats, than plain factors; and no more in the Frobenius norm than must be."""
    known = write_moments(tmp_path / "T", both[0])
    plain = extract(*both, tmp_path / "plain", **policy)
    fit = extract(*both, tmp_path / "fit", **policy, statistics=statistics)

    lost = predicted_of(fit, both, known, tmp_path / "fit")
    assert lost < predicted_of(plain, both, known, tmp_path / "plain") / 1.1
    if "rank" in policy:
        for mine, its in zip(fit.matrices, plain.matrices, strict=True):
            assert mine.relative_error >= its.relative_error - 1e-6


@pytest.mark.parametrize(("policy", "value"), [("keep", 0.3), ("size", 3_000)])
def test_without_curvature_inputs_do_not_count_from_matrix_to_matrix(policy, value, both, tmp_path):
    """One's inputs a thousand times larger: the ranks are the same, as a remark explains."""
    name = f"{Q}.weight.C"
    S = write_moments(tmp_path / "S", both[0], curvature="none").folder
    loud = 1e6 * second_moment(f"C of {Q}.weight", 16, 500)
    T = write_moments(tmp_path / "T", both[0], curvature="none", changes={name: loud}).folder
    found = [
        extract(*both, tmp_path / f"out{i}", statistics=folder, **{policy: value})
        for i, folder in enumerate((S, T))
    ]
    ranks = [[row.rank for row in certificate.matrices] for certificate in found]

    assert ranks[0] == ranks[1]
    assert any("counts each change by its energy" in remark for remark in found[0].remarks)


def test_with_curvature_a_budget_goes_where_the_loss_is(both, tmp_path):
    """A curvature a million times larger draws the ranks to its matrix."""
    name = f"{Q}.weight.G"
    T = write_moments(
        tmp_path / "T", both[0], changes={name: 1e6 * second_moment("G", 24, 500)}
    ).folder
    S = write_moments(tmp_path / "S", both[0]).folder
    ranks = {
        folder.name: {
            row.name: row.rank
            for row in extract(
                *both, tmp_path / f"out-{folder.name}", keep=0.2, statistics=folder
            ).matrices
        }
        for folder in (S, T)
    }

    assert ranks["T"][f"{Q}.weight"] > ranks["S"][f"{Q}.weight"]
    assert all(check.held for check in verify(tmp_path / "out-T", both[0], base=both[1]))


def test_what_the_statistics_do_not_know_is_plain_and_said_so(tmp_path):
    """An output head: its row is of the Frobenius norm, a remark names it and the currency."""
    changes = {
        f"{Q}.weight": decaying("dq", 24, 16),
        f"{UP}.weight": decaying("du", 40, 16),
        "lm_head.weight": decaying("dh", 20, 16),
    }
    both = pair(tmp_path, changes)
    S = write_moments(tmp_path / "S", both[0], without=(f"{UP}.weight",)).folder
    out = tmp_path / "out"
    certificate = extract(*both, out, keep=0.5, statistics=S)
    metrics = {row.name: row.metric for row in certificate.matrices}
    said = " ".join(certificate.remarks)

    assert metrics == {
        f"{Q}.weight": "curvature",
        f"{UP}.weight": "frobenius",
        "lm_head.weight": "frobenius",
    }
    assert "2 of 3 matrices are approximated in the Frobenius norm" in said
    assert f"{UP}.weight (no statistics of it)" in said
    assert "not every matrix has the loss's curvature" in said
    assert certificate.loss.predicted is None
    assert all(check.held for check in verify(out, both[0], base=both[1], statistics=S))


def test_statistics_of_no_changed_matrix_are_refused(tmp_path):
    """Exit 3, nothing written."""
    both = pair(tmp_path, {"lm_head.weight": decaying("dh", 20, 16)})
    S = write_moments(tmp_path / "S", both[0]).folder
    before = snapshot(tmp_path)
    done = eckart(
        *("extract", both[0], "--base", both[1], "-o", tmp_path / "out", "--rank", 2),
        *("--statistics", S),
    )

    assert done.code == 3
    assert "holds no statistics of any matrix" in done.message
    assert snapshot(tmp_path) == before


def test_statistics_of_the_base_are_refused(both, tmp_path):
    """By the weights' fingerprint: exit 3, nothing written."""
    S = write_moments(tmp_path / "S", both[1]).folder
    before = snapshot(tmp_path)
    done = eckart(
        *("extract", both[0], "--base", both[1], "-o", tmp_path / "out", "--rank", 2),
        *("--statistics", S),
    )

    assert done.code == 3
    assert "are of another model (base) than" in done.message
    assert snapshot(tmp_path) == before
    with pytest.raises(UsageError, match="is inside the input"):
        extract(*both, S / "out", rank=2, statistics=S)


def test_a_change_that_the_text_never_used_is_lost_with_the_reason(both, tmp_path):
    """Exit 6 unless that is accepted: nothing says what to keep of it."""
    S = write_moments(
        tmp_path / "S", both[0], changes={f"{Q}.weight.C": torch.zeros(16, 16)}
    ).folder
    with pytest.raises(LossError):
        extract(*both, tmp_path / "out", rank=2, statistics=S)
    certificate = extract(*both, tmp_path / "out", rank=2, statistics=S, accept_loss=True)

    assert [row.name for row in certificate.lost] == [f"{Q}.weight"]
    assert "the text never used it" in certificate.lost[0].reason
    assert certificate.loss.predicted is None
    assert all(
        check.held for check in verify(tmp_path / "out", both[0], base=both[1], statistics=S)
    )


def test_the_work_of_one_metric_serves_no_other(both, statistics, tmp_path):
    """Another budget in the same metric it does; other statistics, or none, are exit 4."""
    other = write_moments(tmp_path / "T", both[0], tokens=400).folder
    settings = {"statistics": statistics, "work": tmp_path / "work"}
    extract(*both, tmp_path / "a", keep=0.5, **settings)
    extract(*both, tmp_path / "b", keep=0.2, **settings)

    for changed in ({"statistics": other}, {"statistics": None}):
        with pytest.raises(StaleError, match="statistics was"):
            extract(*both, tmp_path / "c", keep=0.5, **{**settings, **changed})


def test_killed_anywhere_and_resumed_the_bytes_are_the_same(both, statistics, tmp_path):
    """At every sixth storage call: no adapter, and then the very same."""
    options = {"energy": 0.9, "statistics": statistics}
    extract(*both, tmp_path / "fresh", **options)
    number, kills = 1, 0
    while True:
        out = tmp_path / f"killed-{number}"
        killed = in_a_process_killed_at(number, lambda out=out: extract(*both, out, **options))
        if not killed or out.exists():
            break
        kills += 1
        extract(*both, out, **options)
        for file in (WEIGHTS, "adapter_config.json"):
            assert (out / file).read_bytes() == (tmp_path / "fresh" / file).read_bytes()
        number += 6
    assert kills >= 8


def test_workers_make_no_difference(both, statistics, tmp_path, monkeypatch):
    """The same bytes from two processes as from this one."""
    options = {"keep": 0.4, "statistics": statistics}
    extract(*both, tmp_path / "one", workers=1, **options)
    monkeypatch.setattr("eckart.execute.local.SHORT_SECONDS", -1.0)
    extract(*both, tmp_path / "two", workers=2, **options)

    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


def test_rank_auto_asks_the_change_and_the_metric_shapes_the_factors(tmp_path):
    """The rank that rounding cannot explain is in no metric; what is left of it is noise."""
    generator = torch.Generator().manual_seed(5)
    W = torch.randn(96, 80, generator=generator).bfloat16()
    B, A = torch.randn(96, 2, generator=generator), torch.randn(2, 80, generator=generator)
    base = write_checkpoint(tmp_path / "base", {f"{Q}.weight": W})
    tuned = write_checkpoint(
        tmp_path / "tuned", {f"{Q}.weight": (W.float() + 0.2 * B @ A).bfloat16()}
    )
    S = write_moments(tmp_path / "S", tuned).folder
    plain = extract(tuned, base, tmp_path / "plain", rank="auto")
    fit = extract(tuned, base, tmp_path / "fit", rank="auto", statistics=S)

    assert fit.matrices[0].rank == plain.matrices[0].rank == 2
    assert fit.matrices[0].metric == "curvature"
    assert fit.matrices[0].relative_error < 0.1
    assert all(check.held for check in verify(tmp_path / "fit", tuned, base=base, statistics=S))


LAYERS = {"q_proj": 8, "k_proj": 4, "v_proj": 4}
PLACES = {"q_proj": slice(0, 8), "k_proj": slice(8, 12), "v_proj": slice(12, 16)}


def whole_curvature(known: Statistics, names: list[str]) -> Tensor:
    """G of all rows, zero between those of two tensors; the identity where there is none."""
    found = [known.curvature(name) for name in names]
    blocks = [torch.diag(G) if G.ndim == 1 else G for G in found if G is not None]
    return torch.block_diag(*blocks) if blocks else torch.eye(16)


@pytest.mark.parametrize("curvature", KINDS)
@pytest.mark.parametrize("fused_first", [True, False])
def test_what_one_of_the_pair_fuses_is_weighed_by_its_parts(fused_first, curvature, tmp_path):
    """q, k and v against qkv: each row by what is known of it, whichever way they are stored."""
    base = {f"l.{X}.weight": decaying(f"b{X}", m, 6) for X, m in LAYERS.items()}
    added = torch.cat([decaying(f"d{X}", m, 6) for X, m in LAYERS.items()])
    tuned = {f"l.{X}.weight": base[f"l.{X}.weight"] + added[PLACES[X]] for X in LAYERS}
    if fused_first:
        tuned = {"l.qkv_proj.weight": torch.cat([*tuned.values()])}
    else:
        base = {"l.qkv_proj.weight": torch.cat([*base.values()])}
    both = write_checkpoint(tmp_path / "tuned", tuned), write_checkpoint(tmp_path / "base", base)
    known = write_moments(
        tmp_path / "S", both[0], curvature=curvature, group=lambda _: "l.q_proj.weight"
    )
    out = tmp_path / "out"
    certificate = extract(*both, out, rank=2, statistics=known.folder)
    C = damped(known.inputs(next(iter(tuned))), INPUT_DAMPING)
    whole = whole_curvature(known, [*tuned])

    assert [row.name for row in certificate.matrices] == sorted(base)
    for row in certificate.matrices:
        X = row.name.removesuffix(".weight")
        place = PLACES.get(X.removeprefix("l."), slice(0, 16))
        share = 0.0 if curvature == "none" else CURVATURE_DAMPING
        G, D = damped(whole[place, place], share), added[place].double()
        missed, total = (float((G @ E @ C @ E.mT).trace()) for E in (D - product(out, X), D))
        assert row.metric == KINDS[curvature]
        assert row.metric_error == pytest.approx((missed / total) ** 0.5, rel=1e-5)
    assert all(check.held for check in verify(out, both[0], base=both[1], statistics=known.folder))


def test_parts_with_inputs_of_their_own_are_plain(tmp_path):
    """Layers that the base fuses, whose statistics have no input in common."""
    base = {f"l.{X}.weight": decaying(f"b{X}", m, 6) for X, m in LAYERS.items()}
    tuned = {name: W + decaying(f"d{name}", *W.shape) for name, W in base.items()}
    tuned["l.o_proj.weight"] = 1 + decaying("o", 6, 8)
    fused = {"l.qkv_proj.weight": torch.cat([*base.values()]), "l.o_proj.weight": torch.ones(6, 8)}
    both = write_checkpoint(tmp_path / "tuned", tuned), write_checkpoint(tmp_path / "base", fused)
    S = write_moments(tmp_path / "S", both[0]).folder
    certificate = extract(*both, tmp_path / "out", rank=2, statistics=S)

    assert {row.name: row.metric for row in certificate.matrices} == {
        "l.o_proj.weight": "curvature",
        "l.qkv_proj.weight": "frobenius",
    }
    assert any("parts whose inputs differ" in remark for remark in certificate.remarks)


def test_experts_stored_one_by_one_are_weighed_each_by_its_own(tmp_path):
    """As the stack that they are loaded as: gate and up by one input, every expert by its G."""
    base, added = {}, {}
    for e in range(3):
        for X, (m, n) in {"gate_proj": (12, 8), "up_proj": (12, 8), "down_proj": (8, 12)}.items():
            name = f"m.experts.{e}.{X}.weight"
            base[name], added[name] = decaying(f"b{name}", m, n), decaying(f"d{name}", m, n)
    tuned = {name: W + added[name] for name, W in base.items()}
    both = write_checkpoint(tmp_path / "tuned", tuned), write_checkpoint(tmp_path / "base", base)
    known = write_moments(
        tmp_path / "S", both[0], group=lambda name: name.replace("up_proj", "gate_proj")
    )
    out = tmp_path / "out"
    certificate = extract(*both, out, rank=2, statistics=known.folder)
    whole = extract(*both, tmp_path / "whole", rank=8, statistics=known.folder)
    down, gate_up = certificate.matrices

    assert (down.metric, gate_up.metric) == ("curvature", "curvature")
    assert 0 < gate_up.metric_error < 1
    assert whole.loss.predicted is not None
    assert whole.loss.predicted < 1e-9 * certificate.loss.predicted
    assert all(check.held for check in verify(out, both[0], base=both[1], statistics=known.folder))
    tensors, missed = load_file(out / WEIGHTS), 0.0
    A, B = (
        next(tensor.double() for name, tensor in tensors.items() if name.endswith(end))
        for end in ("experts.lora_A.weight", "experts.lora_B.weight")
    )
    for e in range(3):
        name = f"m.experts.{e}.down_proj.weight"
        stored = B[:, e::3] @ A[2 * e : 2 * e + 2]
        missed += losses(name, added[name], stored, known)[0]
    assert down.loss == pytest.approx(missed, rel=1e-4)


def test_a_forged_loss_is_found_with_the_statistics(both, statistics, tmp_path):
    """Of what is carried, and of what a budget left out; the sum changed alike."""
    out = tmp_path / "out"
    extract(*both, out, keep=0.1, statistics=statistics)
    honest = (out / "eckart.json").read_bytes()
    ranks = [row["rank"] for row in read_document(out)["matrices"]]
    for place in (ranks.index(max(ranks)), ranks.index(0)):

        def halve(document, place=place):
            document["matrices"][place]["loss"] /= 2
            document["loss"]["predicted"] = math.fsum(row["loss"] for row in document["matrices"])

        forge(out, halve)
        assert all(check.held for check in verify(out, both[0], base=both[1]))
        assert not all(
            check.held for check in verify(out, both[0], base=both[1], statistics=statistics)
        )
        (out / "eckart.json").write_bytes(honest)


def test_verify_refuses_other_statistics(both, statistics, tmp_path):
    """Of another text: exit 3. Of an adapter made without any: exit 2."""
    other = write_moments(tmp_path / "T", both[0], tokens=400).folder
    extract(*both, tmp_path / "out", rank=2, statistics=statistics)
    extract(*both, tmp_path / "plain", rank=2)

    with pytest.raises(CheckpointError, match="does not hold the statistics that"):
        verify(tmp_path / "out", both[0], base=both[1], statistics=other)
    with pytest.raises(UsageError, match="was made without statistics"):
        verify(tmp_path / "plain", both[0], base=both[1], statistics=statistics)


def test_wholes_and_other_consumers_work_beside_a_metric(both, tmp_path):
    """A norm stored whole costs nothing; one rank for all is a rank in each metric."""
    tensors = read_tensors(both[0]) | {"norm.weight": vector("other", 16)}
    tuned = write_checkpoint(tmp_path / "more", tensors)
    S = write_moments(tmp_path / "S", tuned).folder
    options = {"rank": 2, "statistics": S}
    whole = extract(tuned, both[1], tmp_path / "whole", store_whole=["norms"], **options)
    served = extract(
        tuned, both[1], tmp_path / "served", consumer="vllm", accept_loss=True, **options
    )

    assert whole.loss.predicted is not None
    assert served.loss.predicted is None
    for out in ("whole", "served"):
        checks = verify(tmp_path / out, tuned, base=both[1], statistics=S)
        assert [check for check in checks if not check.held] == []


@pytest.mark.parametrize("kind", ["llama", "qwen3-moe"])
def test_what_calibrate_says_of_a_tuned_model_is_used(kind, tmp_path):
    """Of every changed matrix, experts and all; at one rank the loss is below plain factors'."""
    pytest.importorskip("transformers")
    from architectures import ADAPTED, IDS

    torch.manual_seed(2)
    model, both = ADAPTED[kind](), (tmp_path / "tuned", tmp_path / "base")
    model.save_pretrained(both[0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "layers" in name and not name.endswith("mlp.gate.weight"):
                parameter.add_(0.01 * torch.randn(parameter.shape))
    model.save_pretrained(both[1])
    save_file({"ids": IDS}, tmp_path / "tokens.safetensors")
    known = calibrate(both[0], tmp_path / "S", tokens=tmp_path / "tokens.safetensors")
    fit = extract(*both, tmp_path / "fit", rank=2, statistics=known.folder)
    extract(*both, tmp_path / "budget", keep=0.3, statistics=known.folder)

    assert {row.metric for row in fit.matrices} <= {"curvature", "diagonal curvature"}
    assert fit.loss.predicted is not None
    for out in ("fit", "budget"):
        checks = verify(tmp_path / out, both[0], base=both[1], statistics=known.folder)
        assert [check for check in checks if not check.held] == []
    if kind == "llama":  # where tensors have the names that they are loaded by
        plain = extract(*both, tmp_path / "plain", rank=2)
        lost = predicted_of(plain, both, known, tmp_path / "plain")
        assert fit.loss.predicted < 0.8 * lost
        assert fit.loss.predicted == pytest.approx(
            predicted_of(fit, both, known, tmp_path / "fit"), rel=1e-4
        )
