"""Compression with statistics: what is claimed in the metric is true, and the files say so."""

from pathlib import Path

import pytest
import torch
from builders import (
    decaying,
    eckart,
    forge,
    law_tensors,
    product_of,
    read_document,
    read_tensors,
    second_moment,
    small_tensors,
    snapshot,
    write_checkpoint,
    write_moments,
)
from torch import Tensor

from eckart import Certificate, compress, densify, verify
from eckart.checkpoint.statistics import Statistics, open_statistics
from eckart.decompose import unit
from eckart.errors import CheckpointError, StaleError, UsageError
from eckart.linalg.metric import CURVATURE_DAMPING, INPUT_DAMPING

POLICIES = {"keep": 0.6, "rank": 4, "error": 0.3, "energy": 0.9, "size": 9_000}
CURVATURES = ("full", "diagonal", "none")
Q, UP = "layers.0.q_proj.weight", "layers.0.up_proj.weight"


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "src", small_tensors(layers=2))


@pytest.fixture
def statistics(src: Path, tmp_path: Path) -> Path:
    return write_moments(tmp_path / "S", src).folder


def damped(S: Tensor, share: float) -> Tensor:
    S = torch.diag(S.double()) if S.ndim == 1 else S.double()
    return S + share * S.diagonal().mean() * torch.eye(len(S), dtype=torch.float64)


def losses(name: str, W: Tensor, product: Tensor, statistics: Statistics) -> tuple[float, float]:
    """½ tr(G E C Eᵀ) of the error and of W itself, with G = I where there is none."""
    C, G = damped(statistics.inputs(name), INPUT_DAMPING), statistics.curvature(name)
    eye = torch.eye(len(W), dtype=torch.float64)
    full = eye if G is None else damped(G, CURVATURE_DAMPING)

    def form(E: Tensor) -> float:
        return 0.5 * float(torch.einsum("ij,jk,kl,il->", full, E, C, E))

    return form(W.double() - product), form(W.double())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("curvature", CURVATURES)
def test_what_is_claimed_in_the_metric_is_true_of_the_files(curvature, policy, src, tmp_path):
    """Error and loss recomputed from the written tensors and the statistics, by the definition."""
    known = write_moments(tmp_path / "S", src, curvature=curvature)
    options = {policy: POLICIES[policy]}
    certificate = compress(src, tmp_path / "out", statistics=known.folder, **options)

    written, source = read_tensors(tmp_path / "out"), read_tensors(src)
    kind = {"full": "curvature", "diagonal": "diagonal curvature", "none": "inputs"}[curvature]
    assert certificate.matrices
    for row in certificate.matrices:
        product = torch.from_numpy(product_of(written, row.name.removesuffix(".weight")))
        missed, total = losses(row.name, source[row.name], product, known)

        assert row.metric == kind
        assert row.metric_error == pytest.approx((missed / total) ** 0.5, rel=1e-6)
        assert row.loss == (None if curvature == "none" else pytest.approx(missed, rel=1e-6))
        if policy != "rank":
            assert row.optimum == pytest.approx(row.metric_error, rel=1e-3)
        if policy in ("error", "energy"):
            assert row.metric_error <= (0.3 if policy == "error" else 0.1**0.5) * (1 + 1e-6)
    if curvature == "none":
        assert certificate.loss.predicted is None
    else:
        predicted = sum(row.loss or 0.0 for row in certificate.matrices)
        assert certificate.loss.predicted == pytest.approx(predicted)


@pytest.mark.parametrize("form", ["ba", "pivoted", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_form_and_dtype_is_verified(dtype, form, tmp_path):
    """Alone, against the source, and with the statistics in the metric too; densified as well."""
    src = write_checkpoint(tmp_path / "src", small_tensors(dtype))
    S = write_moments(tmp_path / "S", src).folder
    compress(src, tmp_path / "out", keep=0.6, form=form, statistics=S)
    checks = verify(tmp_path / "out", src, statistics=S)
    densify(tmp_path / "out", tmp_path / "dense")

    assert all(check.held for check in [*verify(tmp_path / "out"), *checks])
    assert any("in the metric of curvature" in check.detail for check in checks)
    assert all(check.held for check in verify(tmp_path / "dense", tmp_path / "out"))


def predicted_of(certificate: Certificate, src: Path, statistics: Statistics, out: Path) -> float:
    """The quadratic form over all targeted matrices, whatever they were approximated in."""
    written, source = read_tensors(out), read_tensors(src)
    return sum(
        losses(
            row.name,
            source[row.name],
            torch.from_numpy(product_of(written, row.name.removesuffix(".weight"))),
            statistics,
        )[0]
        for row in certificate.matrices
    )


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.8])
def test_the_same_budget_loses_less_with_statistics_and_less_still_pivoted(keep, tmp_path):
    """In the quadratic picture, by far; each within its budget."""
    src = write_checkpoint(tmp_path / "src", law_tensors())
    known = write_moments(tmp_path / "S", src)
    found = {}
    for name, options in {
        "plain": {},
        "weighted": {"statistics": known.folder},
        "pivoted": {"statistics": known.folder, "form": "pivoted"},
    }.items():
        certificate = compress(src, tmp_path / name, keep=keep, **options)
        found[name] = predicted_of(certificate, src, known, tmp_path / name)
        assert certificate.totals.keep <= keep
        assert certificate.totals.keep > 0.99 * keep or certificate.remarks

    assert found["pivoted"] < found["weighted"] < found["plain"] / 1.2


def test_ranks_in_multiples_of_align(src, statistics, tmp_path):
    """Under a budget in nats too."""
    certificate = compress(src, tmp_path / "out", keep=0.7, align=4, statistics=statistics)

    assert {row.rank % 4 for row in certificate.matrices} == {0}


def test_statistics_of_another_model_are_refused(src, statistics, tmp_path):
    """By the weights' fingerprint: exit 3 and nothing left behind."""
    tensors = small_tensors(layers=2)
    tensors[Q] = tensors[Q] + 1e-3
    other = write_checkpoint(tmp_path / "other", tensors)
    before = snapshot(tmp_path)
    done = eckart(
        "compress", other, "-o", tmp_path / "out", "--keep", 0.6, "--statistics", statistics
    )

    assert done.code == 3
    assert "are of another model (src) than" in done.message
    assert snapshot(tmp_path) == before


def test_statistics_of_other_shapes_are_refused_from_headers(src, tmp_path):
    """Before a weight is read, in a dry run too; and so are those of no matrix at all."""
    wide = write_checkpoint(tmp_path / "wide", {Q: decaying("q", 20, 12), UP: decaying("u", 9, 12)})
    none = write_checkpoint(tmp_path / "none", {"other.weight": decaying("o", 20, 12)})
    for index, (model, words) in enumerate(
        [(wide, "calibrate this model"), (none, "no statistics")]
    ):
        S = write_moments(tmp_path / f"S{index}", model).folder
        asked = ("compress", src, "-o", tmp_path / "out", "--rank", 2, "--statistics", S)

        assert eckart(*asked, "--dry-run").code == eckart(*asked).code == 3
        assert words in eckart(*asked).message


@pytest.mark.parametrize("file", ["statistics.json", "statistics-00001-of-00002.safetensors"])
def test_damaged_statistics_are_refused(file, src, statistics, tmp_path):
    """Exit 3, and nothing is left behind but what was there."""
    content = bytearray((statistics / file).read_bytes())
    content[-9] ^= 1
    (statistics / file).write_bytes(content)
    before = snapshot(tmp_path)
    done = eckart("compress", src, "-o", tmp_path / "out", "--rank", 2, "--statistics", statistics)

    assert done.code == 3
    assert snapshot(tmp_path) == before


def test_an_output_inside_the_statistics_is_refused(src, statistics):
    """As one inside the source is."""
    with pytest.raises(UsageError, match="is inside the input"):
        compress(src, statistics / "out", rank=2, statistics=statistics)


def test_a_matrix_without_statistics_stays_dense_with_the_reason(src, tmp_path):
    """And counts in full against the budget; the plan says it as well."""
    S = write_moments(tmp_path / "S", src, without=(Q,)).folder
    certificate = compress(src, tmp_path / "out", keep=0.8, statistics=S)
    planned = eckart(
        "compress", src, "-o", tmp_path / "new", "--keep", 0.8, "--statistics", S, "--dry-run"
    )

    reasons = {row.name: row.reason for row in certificate.copied}
    assert reasons[Q] == "dense: no statistics of it"
    assert certificate.totals.keep <= 0.8
    assert "no statistics of it" in planned.out
    assert torch.equal(read_tensors(tmp_path / "out")[Q], read_tensors(src)[Q])


def test_a_matrix_that_the_text_never_used_stays_dense_with_the_reason(src, tmp_path):
    """Its inputs, or its curvature, were zero: nothing says what to keep of it."""
    S = write_moments(
        tmp_path / "S",
        src,
        changes={f"{Q}.C": torch.zeros(16, 16), f"{UP}.G": torch.zeros(40, 40)},
    ).folder
    certificate = compress(src, tmp_path / "out", rank=2, statistics=S)

    reasons = {row.name: row.reason for row in certificate.copied}
    for name, what in ((Q, "inputs"), (UP, "curvature")):
        assert reasons[name] == (
            f"dense: the second moment of the {what} of {name} is zero: the text never used it"
        )
    assert len(certificate.matrices) == 2


def test_singular_second_moments_work(src, tmp_path):
    """Of three tokens only: every matrix is factored, and holds what is claimed."""
    S = write_moments(
        tmp_path / "S",
        src,
        changes={f"{Q}.C": second_moment("few", 16, 3), f"{UP}.G": second_moment("few", 40, 1)},
    ).folder
    certificate = compress(src, tmp_path / "out", rank=2, statistics=S)

    assert len(certificate.matrices) == 4
    assert all(check.held for check in verify(tmp_path / "out", src, statistics=S))


@pytest.mark.parametrize(("tokens", "warned"), [(39, True), (40, False)])
def test_too_few_tokens_for_a_width_are_remarked_upon(tokens, warned, src, tmp_path):
    """With the matrix, its width and the number: in the plan and in the certificate."""
    S = write_moments(tmp_path / "S", src, tokens=tokens).folder
    done = eckart("compress", src, "-o", tmp_path / "out", "--rank", 2, "--statistics", S)
    words = f"up_proj.weight for one 40 wide, with {tokens}"

    assert (words in done.err) == warned
    assert any(words in remark for remark in read_document(tmp_path / "out")["remarks"]) == warned


def test_without_statistics_a_language_model_is_told_what_that_costs(tmp_path):
    """In the plan and after the run; with statistics, or of another model, no word of it."""
    src = write_checkpoint(tmp_path / "src", config={"architectures": ["LlamaForCausalLM"]})
    bare = write_checkpoint(tmp_path / "bare")
    S = write_moments(tmp_path / "S", src).folder
    line = ("--rank", 2, "-o")
    words = "Without --statistics every matrix"

    assert words in eckart("compress", src, *line, tmp_path / "a", "--dry-run").err
    assert words in eckart("compress", src, *line, tmp_path / "a").err
    assert words not in eckart("compress", src, *line, tmp_path / "b", "--statistics", S).err
    assert words not in eckart("compress", bare, *line, tmp_path / "c").err


def test_the_certificate_names_the_statistics(src, statistics, tmp_path):
    """Their folder, digest and tokens."""
    compress(src, tmp_path / "out", rank=2, statistics=statistics)

    known = open_statistics(statistics)
    assert read_document(tmp_path / "out")["statistics"] == {
        "name": "S",
        "digest": known.digest,
        "tokens": 500,
    }


def test_another_budget_is_served_from_the_same_work(src, statistics, tmp_path, monkeypatch):
    """No SVD a second time; other statistics, or none, are stale work: exit 4."""
    work, other = tmp_path / "work", write_moments(tmp_path / "T", src, tokens=400).folder
    settings = {"statistics": statistics, "form": "pivoted", "work": work}
    compress(src, tmp_path / "a", keep=0.8, **settings)
    monkeypatch.setattr(unit, "short_side_svd", None)
    compress(src, tmp_path / "b", keep=0.5, **settings)

    assert read_document(tmp_path / "b")["totals"]["keep"] <= 0.5
    for changed in ({"statistics": other}, {"statistics": None}):
        with pytest.raises(StaleError, match="statistics was"):
            compress(src, tmp_path / "c", keep=0.5, **{**settings, **changed})


def test_workers_make_no_difference(src, statistics, tmp_path, monkeypatch):
    """The same bytes from two processes as from this one."""
    options = {"keep": 0.6, "form": "auto", "statistics": statistics}
    compress(src, tmp_path / "one", workers=1, **options)
    monkeypatch.setattr("eckart.execute.local.WORTH_SECONDS", 0.0)
    compress(src, tmp_path / "two", workers=2, **options)

    one, two = (
        {name: state for name, state in snapshot(tmp_path / out).items() if name != "eckart.json"}
        for out in ("one", "two")
    )
    assert one == two


def test_transposed_layers_and_stacks_are_weighed_as_they_act(tmp_path):
    """A Conv1D layer by the inputs of its columns; experts each by their own curvature."""
    stack = torch.stack([decaying(f"e{i}", 24, 16) for i in range(3)])
    tensors = {
        "h.0.mlp.c_fc.weight": decaying("fc", 16, 40),
        "h.0.mlp.c_fc.bias": torch.zeros(40),
        "x.experts.up_proj": stack,
    }
    src = write_checkpoint(tmp_path / "src", tensors)
    known = write_moments(tmp_path / "S", src)
    certificate = compress(src, tmp_path / "out", rank=4, statistics=known.folder)

    assert known.document.matrices["h.0.mlp.c_fc.weight"].shape == (40, 16)
    assert len(certificate.matrices) == 2
    assert all(check.held for check in verify(tmp_path / "out", src, statistics=known.folder))
    written = read_tensors(tmp_path / "out")
    missed = 0.0
    for index in range(3):
        C = damped(known.inputs("x.experts.up_proj", index), INPUT_DAMPING)
        G = known.curvature("x.experts.up_proj", index)
        assert G is not None
        A, B = (written[f"x.experts.up_proj.{part}.weight"][index].double() for part in "AB")
        E = stack[index].double() - B @ A
        missed += 0.5 * float((damped(G, CURVATURE_DAMPING) @ E @ C @ E.mT).trace())
    row = next(row for row in certificate.matrices if row.name == "x.experts.up_proj")
    assert row.loss == pytest.approx(missed, rel=1e-6)


FORGERIES = {
    "an error below the optimum": lambda row: row.update(metric_error=row["optimum"] / 2),
    "no error in the metric": lambda row: row.update(metric_error=None),
    "no loss": lambda row: row.update(loss=None),
    "another loss": lambda row: row.update(loss=row["loss"] / 2),
    "another metric": lambda row: row.update(metric="frobenius"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_claim_in_the_metric_is_found_without_the_statistics(
    forgery, src, statistics, tmp_path
):
    """Below the optimum, or at odds with itself: what the certificate alone can tell."""
    compress(src, tmp_path / "out", keep=0.6, statistics=statistics)
    forge(tmp_path / "out", lambda document: FORGERIES[forgery](document["matrices"][0]))

    assert not all(check.held for check in verify(tmp_path / "out"))


def test_a_forged_loss_is_found_with_the_statistics(src, statistics, tmp_path):
    """Each matrix and the sum changed alike: only the metric can tell."""
    compress(src, tmp_path / "out", rank=4, statistics=statistics)

    def halve(document: dict) -> None:
        document["matrices"][0]["loss"] /= 2
        document["loss"]["predicted"] = sum(row["loss"] for row in document["matrices"])

    forge(tmp_path / "out", halve)

    assert all(check.held for check in verify(tmp_path / "out", src))
    assert not all(check.held for check in verify(tmp_path / "out", src, statistics=statistics))


def test_verify_refuses_other_statistics(src, statistics, tmp_path):
    """Of another text: exit 3. Of an output made without, or without a source: exit 2."""
    other = write_moments(tmp_path / "T", src, tokens=400).folder
    compress(src, tmp_path / "out", rank=4, statistics=statistics)
    compress(src, tmp_path / "plain", rank=4)

    with pytest.raises(CheckpointError, match="does not hold the statistics that"):
        verify(tmp_path / "out", src, statistics=other)
    with pytest.raises(UsageError, match="was made without statistics"):
        verify(tmp_path / "plain", src, statistics=statistics)
    with pytest.raises(UsageError, match="needs --against, too"):
        verify(tmp_path / "out", statistics=statistics)


def test_the_error_asked_is_that_in_the_metric(src, statistics, tmp_path):
    """The certificate shows both; the one that was asked is kept as rounded."""
    certificate = compress(
        src, tmp_path / "out", error=0.2, dtype="bfloat16", statistics=statistics
    )

    assert certificate.matrices
    assert all(row.metric_error <= 0.2 for row in certificate.matrices)
    assert any(row.relative_error > 0.2 for row in certificate.matrices)
