"""The laws of a written checkpoint, over every rank policy and both forms."""

import itertools
import json
import math
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import (
    CONFIG,
    WEIGHTS,
    decaying,
    law_tensors,
    numpy_error,
    product_of,
    raw_header,
    read_document,
    read_tensors,
    small_tensors,
    vector,
    write_checkpoint,
)

from eckart import compress, densify, verify
from eckart.allocate import POLICIES, cost, paying_rank
from eckart.certificate import Certificate
from eckart.errors import PromiseError
from eckart.linalg.matrices import named_generator, random_low_rank

FORMS = ("ba", "pivoted")
VALUES = {
    "rank": (1, 7),
    "energy": (0.9, 0.99),
    "error": (0.3, 0.05),
    "keep": (0.8, 0.35),
    "size": (120_000, 60_000),
}
MEASURED = {"loss"}  # needs a model that runs: see tests/test_tolerance.py
REQUESTS = [
    (form, policy, value) for form in FORMS for policy in VALUES for value in VALUES[policy]
]


class Run:
    """One request over the law checkpoint, made once for all the tests of it."""

    def __init__(self, src: Path, out: Path, form: str, policy: str, value: float) -> None:
        self.form, self.policy, self.value, self.src, self.out = form, policy, value, src, out
        self.certificate: Certificate = compress(src, out, form=form, **{policy: value})
        self.source, self.written = read_tensors(src), read_tensors(out)
        self.document = read_document(out)


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("laws") / "src", law_tensors())


@pytest.fixture(scope="module", params=REQUESTS, ids=lambda r: f"{r[0]}-{r[1]}-{r[2]}")
def run(request: pytest.FixtureRequest, src: Path) -> Run:
    form, policy, value = request.param
    return Run(src, src.parent / f"{form}-{policy}-{value}", form, policy, value)


def test_every_policy_has_its_values_here():
    """A new policy is tested by existing: this fails until it is given numbers."""
    assert VALUES.keys() | MEASURED == POLICIES.keys()


def test_every_source_tensor_is_accounted_for_exactly_once(run):
    """Law 4: factored or copied with a reason; nothing lost, nothing twice."""
    named = [row["name"] for row in run.document["matrices"] + run.document["copied"]]

    assert sorted(named) == sorted(run.source)
    assert all(row["reason"] for row in run.document["copied"])
    assert run.document["lost"] == run.document["refitted"] == run.document["stored_whole"] == []


def test_the_reported_error_is_never_below_the_true_one(run):
    """Law 2: recomputed by numpy from the written file; and it is no more than rounded up."""
    for record in run.certificate.matrices:
        X = record.name.removesuffix(".weight")
        true = numpy_error(run.source[record.name], product_of(run.written, X))

        assert true <= record.relative_error <= true * (1 + 1e-6) + 1e-12


def test_the_promise_of_the_policy_is_kept(run):
    """Rank as asked, energy and error satisfied per matrix, by numpy from the written file."""
    for record in run.certificate.matrices:
        error = numpy_error(
            run.source[record.name], product_of(run.written, record.name.removesuffix(".weight"))
        )
        optimum = np.linalg.svd(run.source[record.name].double().numpy(), compute_uv=False)
        tail = math.sqrt((optimum[record.rank :] ** 2).sum() / (optimum**2).sum())

        assert 1 <= record.rank <= min(record.shape)
        assert error <= 1.001 * tail + 1e-5
        if run.policy == "rank":
            assert record.rank == run.value
        if run.policy == "energy":
            assert 1 - error**2 >= run.value - 1e-7
        if run.policy == "error":
            assert error <= run.value + 1e-7


def test_the_rank_is_the_smallest_that_suffices(run):
    """One component less would miss the energy or the error that was asked."""
    if run.policy not in ("energy", "error"):
        return
    limit = run.value if run.policy == "error" else math.sqrt(1 - run.value)
    for record in run.certificate.matrices:
        values = np.linalg.svd(run.source[record.name].double().numpy(), compute_uv=False)

        assert math.sqrt((values[record.rank - 1 :] ** 2).sum() / (values**2).sum()) > limit


def test_a_matrix_is_left_dense_only_with_a_reason_that_is_true(run):
    """Every `dense:` row names a rank that does not pay, or the better use of the budget."""
    for row in run.document["copied"]:
        if not row["reason"].startswith("dense: "):
            continue
        m, n = run.source[row["name"]].shape

        if run.policy in ("keep", "size"):
            assert "better use of the budget" in row["reason"]
        else:
            assert f"break-even is {paying_rank((m, n), run.form)} of {min(m, n)}" in row["reason"]


def test_keep_is_counted_right_and_within_half_a_per_cent_below(run):
    """A, B, K and the matrices left dense, over all targeted ones; never above what was asked."""
    targeted = [name for name in run.source if name.endswith(".fc.weight")]
    before = sum(run.source[name].numel() for name in targeted)
    after = 0
    for name in targeted:
        X = name.removesuffix(".weight")
        parts = [f"{X}.{part}.weight" for part in "ABK"] + [name]
        after += sum(run.written[part].numel() for part in parts if part in run.written)
    totals = run.document["totals"]

    assert totals["targeted_parameters"] == [before, after]
    assert totals["keep"] == after / before
    if run.policy == "keep":
        assert run.value - 0.005 <= after / before <= run.value


def test_the_totals_are_those_of_the_files(run):
    """Parameters without permutations, bytes of every tensor."""
    totals = run.document["totals"]
    files = (run.source, run.written)
    parameters = [
        sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith(".perm"))
        for tensors in files
    ]
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in files]

    assert totals["model_parameters"] == parameters
    assert totals["tensor_bytes"] == sizes
    assert all(
        record.parameters[1] == cost(record.shape, record.rank, record.form)
        for record in run.certificate.matrices
    )


def test_what_is_not_factored_is_identical_to_the_byte(run):
    """Copied tensors, sidecars; the bias of a `ba` matrix under its new name."""
    for row in run.document["copied"]:
        X = row["name"].removesuffix(".bias")
        moved = (
            run.form == "ba" and row["name"].endswith(".bias") and f"{X}.A.weight" in run.written
        )
        stored = run.written[f"{X}.B.bias" if moved else row["name"]]

        assert stored.dtype == run.source[row["name"]].dtype
        assert stored.shape == run.source[row["name"]].shape
        assert stored.numpy().tobytes() == run.source[row["name"]].numpy().tobytes()
    assert (run.out / "tokenizer.json").read_bytes() == (run.src / "tokenizer.json").read_bytes()


def test_the_tensors_of_a_factored_matrix_are_those_of_format_1(run):
    """A, and B or K and perm; the guard with the original name, dtype and shape [0]; the bias."""
    for record in run.certificate.matrices:
        X, (m, n), r = record.name.removesuffix(".weight"), record.shape, record.rank
        stored = {
            name.removeprefix(f"{X}."): tuple(tensor.shape)
            for name, tensor in run.written.items()
            if name.startswith(f"{X}.")
        }
        form = {
            "ba": {"B.weight": (m, r), "B.bias": (m,)},
            "pivoted": {"K.weight": (m - r, r), "perm": (m,), "bias": (m,)},
        }[run.form]

        assert stored == {"A.weight": (r, n), "weight": (0,), **form}
        assert run.written[record.name].dtype == run.source[record.name].dtype


def test_config_gains_the_quantization_config_and_keeps_the_rest(run):
    """What a loader must know, keyed by file names, as in the certificate."""
    config = json.loads((run.out / "config.json").read_text())
    gained = config.pop("quantization_config")

    assert config == CONFIG
    assert gained == {
        "quant_method": "eckart",
        "format_version": 1,
        "factored": {
            record.name.removesuffix(".weight"): {
                "rank": record.rank,
                "form": run.form,
                "shape": list(record.shape),
                "orientation": "out_in",
            }
            for record in run.certificate.matrices
        },
    }
    assert gained["factored"] == run.document["factored"]


def test_the_file_has_one_metadata_key_and_no_misaligned_tensor(run):
    """{"format": "pt"} alone, a header that is a multiple of 8, every offset a multiple of its
    element size, no gap."""
    header, start = raw_header(run.out / WEIGHTS)
    metadata = header.pop("__metadata__")
    places = sorted(entry["data_offsets"] for entry in header.values())

    assert metadata == {"format": "pt"}
    assert start % 8 == 0
    assert places[0][0] == 0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(places))
    assert all(
        (start + header[name]["data_offsets"][0]) % run.written[name].element_size() == 0
        for name in header
    )


def test_the_output_holds_against_its_source(run):
    """`verify` recomputes everything."""
    assert [check for check in verify(run.out, run.src) if not check.held] == []


def test_what_compress_returns_is_what_it_wrote(run):
    """The certificate in hand and the one on disk are one document."""
    assert run.certificate.encode() == (run.out / "eckart.json").read_bytes()


def test_the_tail_has_at_most_64_points_and_ends_at_what_is_known(run):
    """Remaining energy at log-spaced ranks, the chosen one among them; falling, within 0 and 1."""
    for record in run.certificate.matrices:
        ranks, shares = [r for r, _ in record.tail], [share for _, share in record.tail]

        assert len(ranks) <= 64
        assert ranks == sorted(set(ranks))
        assert record.rank in ranks
        assert shares == sorted(shares, reverse=True)
        assert all(0 <= share <= 1 for share in shares)


@pytest.mark.parametrize("form", FORMS)
def test_two_runs_are_identical_to_the_byte(form, src, tmp_path):
    """Law 3, one thread count: every file, but the certificate's `run` and `digest`."""
    for name in ("one", "two"):
        compress(src, tmp_path / name, keep=0.6, form=form)
    files = {path.name for path in (tmp_path / "one").iterdir()}
    documents = [read_document(tmp_path / name) for name in ("one", "two")]
    for document in documents:
        del document["run"], document["digest"]

    assert files == {path.name for path in (tmp_path / "two").iterdir()}
    for file in files - {"eckart.json"}:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert documents[0] == documents[1]


def test_the_order_in_which_tensors_are_stored_makes_no_difference(tmp_path):
    """Law 3: a source laid out otherwise gives the same output."""
    tensors = small_tensors()
    write_checkpoint(tmp_path / "a", tensors)
    write_checkpoint(tmp_path / "b", dict(reversed(tensors.items())))
    for name in "ab":
        compress(tmp_path / name, tmp_path / f"{name}-out", rank=3)

    one, two = ((tmp_path / f"{name}-out" / WEIGHTS).read_bytes() for name in "ab")

    assert one == two


def test_seed_and_threads_stand_in_the_certificate(tmp_path):
    """What the numbers depend on is documented: another seed draws other inputs."""
    src = write_checkpoint(tmp_path / "src")
    first = compress(src, tmp_path / "a", rank=3)
    second = compress(src, tmp_path / "b", rank=3, seed=5)

    assert (first.options["seed"], second.options["seed"]) == (0, 5)
    assert first.options["threads"] is None  # by each matrix's shape
    assert first.matrices[0].output_error != second.matrices[0].output_error
    assert first.matrices[0].relative_error == pytest.approx(second.matrices[0].relative_error)


# Corners.


def only(W: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"fc.weight": W, "other.weight": decaying("other", 20, 20)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", [{"rank": 2}, {"energy": 0.9}, {"error": 0.5}, {"keep": 0.5}])
def test_a_zero_matrix_becomes_zero_factors(form, policy, tmp_path):
    """Rank 1 or 2 is exact; no division by its norm."""
    src = write_checkpoint(tmp_path / "src", only(torch.zeros(12, 9)))
    certificate = compress(src, tmp_path / "out", form=form, **policy)
    records = {record.name: record for record in certificate.matrices}

    assert records["fc.weight"].relative_error == 0.0
    assert records["fc.weight"].output_error.max == 0.0
    assert not product_of(read_tensors(tmp_path / "out"), "fc").any()
    assert all(check.held for check in verify(tmp_path / "out", src))


def test_a_zero_matrix_is_no_use_of_a_budget(tmp_path):
    """Under --keep a zero matrix takes rank 1, and what is left keeps the other dense."""
    src = write_checkpoint(tmp_path / "src", only(torch.zeros(20, 20)))

    certificate = compress(src, tmp_path / "out", keep=0.55)

    reasons = {row.name: row.reason for row in certificate.copied}
    assert {record.name: record.rank for record in certificate.matrices} == {"fc.weight": 1}
    assert reasons == {"other.weight": "dense: the better use of the budget"}


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (2, 2)])
@pytest.mark.parametrize("policy", [{"rank": 1}, {"energy": 0.9}, {"error": 0.5}, {"keep": 0.9}])
def test_a_matrix_that_no_rank_pays_for_is_copied_with_that_reason(shape, policy, tmp_path):
    """1×n has break-even rank 0 in the `ba` form."""
    src = write_checkpoint(tmp_path / "src", only(torch.ones(shape)))

    certificate = compress(src, tmp_path / "out", form="ba", **policy)

    reasons = {row.name: row.reason for row in certificate.copied}
    assert "pay" in reasons["fc.weight"]
    assert f"break-even is 0 of {min(shape)}" in reasons["fc.weight"]


@pytest.mark.parametrize(
    ("form", "asked", "reason"),
    [
        ("ba", 8, "dense: rank 8 does not pay, break-even is 7 of 12"),
        ("ba", 100, "dense: rank 100 does not pay (clamped to 12), break-even is 7 of 12"),
        ("pivoted", 12, "dense: rank 12 does not pay, break-even is 11 of 12"),
    ],
)
def test_a_rank_that_does_not_pay_is_refused_by_name_and_number(form, asked, reason, tmp_path):
    """The matrix is copied; one rank less would have paid."""
    src = write_checkpoint(tmp_path / "src", {"fc.weight": decaying("fc", 20, 12)})
    copied = compress(src, tmp_path / "out", rank=asked, form=form)
    last = compress(src, tmp_path / "last", rank={"ba": 7, "pivoted": 11}[form], form=form)

    assert [row.reason for row in copied.copied] == [reason]
    assert copied.totals.keep == 1.0
    assert last.totals.keep < 1.0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_matrix_of_rank_2_comes_back_to_rounding(dtype, form, tmp_path):
    """At --rank 2 what is left is the rounding of factors and source in that dtype."""
    kind = getattr(torch, dtype)
    generator = named_generator(3, "rank 2")
    W = random_low_rank(40, 30, 2, dtype=torch.float64, generator=generator).to(kind)
    src = write_checkpoint(tmp_path / "src", {"fc.weight": W, "fc.bias": vector("b", 40, kind)})

    (record,) = compress(src, tmp_path / "out", rank=2, form=form).matrices

    eps = max(torch.finfo(kind).eps, torch.finfo(torch.float32).eps)  # parts are kept in float32
    written = read_tensors(tmp_path / "out")
    assert record.relative_error <= (4 if form == "ba" else 16) * eps
    assert written["fc.A.weight"].dtype == kind
    assert record.dtype == {"float64": "F64", "float32": "F32", "bfloat16": "BF16"}.get(
        dtype, "F16"
    )
    assert all(check.held for check in verify(tmp_path / "out", src))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", ["energy", "error"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_promise_counts_the_rounding_of_what_is_written(dtype, policy, form, tmp_path):
    """Asked exactly what an unrounded rank 5 would just reach: the written factors reach it."""
    W = decaying("fc", 64, 48, dtype)
    values = torch.linalg.svdvals(W.double())
    tail = float(values[5:].square().sum() / values.square().sum())
    tail *= 1 + (1e-5 if dtype.itemsize >= 4 else 1e-8)
    asked = {"energy": 1 - tail, "error": math.sqrt(tail)}[policy]
    src = write_checkpoint(tmp_path / "src", {"fc.weight": W})

    (record,) = compress(src, tmp_path / "out", form=form, **{policy: asked}).matrices

    error = numpy_error(W, product_of(read_tensors(tmp_path / "out"), "fc"))
    kept = error if policy == "error" else 1 - error**2
    assert error <= record.relative_error
    assert kept <= asked * (1 + 1e-12) if policy == "error" else kept >= asked * (1 - 1e-12)
    assert record.rank == (5 if dtype.itemsize >= 4 else 6)


@pytest.mark.parametrize("form", FORMS)
def test_an_error_below_the_rounding_of_the_dtype_leaves_the_matrix_dense(form, tmp_path):
    """Rank 2 in bfloat16 to 10⁻⁶: no rank gets there, and the reason says what would."""
    W = random_low_rank(64, 48, 2).bfloat16()
    src = write_checkpoint(tmp_path / "src", {"fc.weight": W})

    copied = compress(src, tmp_path / "out", error=1e-6, form=form)
    wide = compress(src, tmp_path / "wide", error=1e-2, form=form)

    assert copied.matrices == []
    assert "dense: " in copied.copied[0].reason
    assert wide.matrices[0].relative_error <= 1e-2


@pytest.mark.parametrize("form", FORMS)
def test_dtype_names_that_of_the_factors_and_of_nothing_else(form, tmp_path):
    """--dtype float32 on a bfloat16 source: factors float32, guard, bias and copies bfloat16."""
    src = write_checkpoint(tmp_path / "src", small_tensors(torch.bfloat16))
    certificate = compress(src, tmp_path / "out", rank=3, dtype="float32", form=form)
    written, X = read_tensors(tmp_path / "out"), "layers.0.q_proj"
    dense = tmp_path / "dense"
    densify(tmp_path / "out", dense)

    assert written[f"{X}.A.weight"].dtype == torch.float32
    assert written[f"{X}.weight"].dtype == torch.bfloat16
    assert written["norm.weight"].dtype == torch.bfloat16
    assert certificate.options["dtype"] in ("float32", "F32")
    assert read_tensors(dense)[f"{X}.weight"].dtype == torch.bfloat16
    assert all(check.held for check in verify(tmp_path / "out", src))
    assert all(check.held for check in verify(dense, tmp_path / "out"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_exact_zeros_beyond_the_rank_do_not_overflow(dtype, tmp_path):
    """A matrix with two rows that are not zero, at rank 4: 1/√σ of nothing is kept in bounds."""
    W = torch.zeros(24, 16, dtype=dtype)
    W[3], W[11] = vector("a", 16, dtype), vector("b", 16, dtype)
    src = write_checkpoint(tmp_path / "src", {"fc.weight": W})

    (record,) = compress(src, tmp_path / "out", rank=4).matrices

    largest = max(
        float(t.float().abs().max()) for t in read_tensors(tmp_path / "out").values() if len(t)
    )
    assert record.relative_error <= 4 * torch.finfo(dtype).eps
    assert largest < 100


def test_factors_that_overflow_half_precision_are_an_error_with_a_way_out(tmp_path):
    """A pivot row of the approximation above 65504: the tensor, and --dtype; nothing is written."""
    W = torch.full((24, 16), 65504.0, dtype=torch.float16)
    W[12:, 8:] = 0
    src = write_checkpoint(tmp_path / "src", {"fc.weight": W})

    with pytest.raises(PromiseError, match=r"fc\.A\.weight .* --dtype float32"):
        compress(src, tmp_path / "out", rank=1, form="pivoted")
    compress(src, tmp_path / "wide", rank=1, form="pivoted", dtype="float32")

    assert not (tmp_path / "out").exists()
    assert all(check.held for check in verify(tmp_path / "wide", src))


def test_a_tensor_of_a_dtype_that_torch_lacks_is_copied_as_bytes(tmp_path):
    """F8_E8M0 scales and their kin pass through, and verify compares them."""
    import struct

    header = {
        "fc.weight": {"dtype": "F32", "shape": [8, 8], "data_offsets": [0, 256]},
        "scale": {"dtype": "F8_E8M0", "shape": [5], "data_offsets": [256, 261]},
    }
    src = tmp_path / "src"
    src.mkdir()
    text = json.dumps(header).encode()
    data = decaying("fc", 8, 8).numpy().tobytes() + bytes([1, 2, 3, 4, 5])
    (src / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)

    certificate = compress(src, tmp_path / "out", rank=1)
    header, start = raw_header(tmp_path / "out" / WEIGHTS)
    begin, end = header["scale"]["data_offsets"]

    assert {row.name: row.reason for row in certificate.copied}["scale"] == "dtype F8_E8M0"
    assert (tmp_path / "out" / WEIGHTS).read_bytes()[start + begin : start + end] == bytes(
        [1, 2, 3, 4, 5]
    )
    assert all(check.held for check in verify(tmp_path / "out", src))


def test_a_checkpoint_without_config_is_factored_too(tmp_path):
    """There is then no config.json in the output either."""
    src = write_checkpoint(tmp_path / "src", config=None)

    compress(src, tmp_path / "out", rank=2)

    assert not (tmp_path / "out" / "config.json").exists()
    assert all(check.held for check in verify(tmp_path / "out", src))


def test_files_are_as_readable_as_any_other(tmp_path):
    """0666 less the umask, not executable and not private."""
    src = write_checkpoint(tmp_path / "src")
    compress(src, tmp_path / "out", rank=2)
    (tmp_path / "plain").write_bytes(b"")
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)

    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == expected, path.name


def test_other_weights_and_hidden_files_are_not_carried_along(tmp_path):
    """Nothing that would bring the dense weights back in; folders of sidecars are copied."""
    src = write_checkpoint(tmp_path / "src")
    (src / "original").mkdir()
    for name in ("pytorch_model.bin", "model.gguf", ".gitattributes", "original/consolidated.pth"):
        (src / name).write_bytes(b"weights")
    (src / "original" / "params.json").write_text("{}")

    compress(src, tmp_path / "out", rank=2)

    found = {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    expected = {WEIGHTS, "config.json", "tokenizer.json", "eckart.json", "original/params.json"}
    assert found == expected


def test_the_hub_cache_with_its_links_is_a_checkpoint(tmp_path):
    """Files that are links to blobs are followed, and copied as files."""
    blobs = write_checkpoint(tmp_path / "blobs")
    src = tmp_path / "snapshot"
    src.mkdir()
    for path in blobs.iterdir():
        (src / path.name).symlink_to(path)

    compress(src, tmp_path / "out", rank=2)

    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert all(check.held for check in verify(tmp_path / "out", src))


def test_a_bias_free_and_a_biased_matrix_live_side_by_side(tmp_path):
    """Only the biased one's bias moves, and only in the `ba` form."""
    src = write_checkpoint(tmp_path / "src")
    compress(src, tmp_path / "ba", rank=2)
    compress(src, tmp_path / "pivoted", rank=2, form="pivoted")
    ba, pivoted = read_tensors(tmp_path / "ba"), read_tensors(tmp_path / "pivoted")

    assert "layers.0.q_proj.B.bias" in ba
    assert "layers.0.q_proj.bias" not in ba
    assert "layers.0.q_proj.bias" in pivoted
    assert "layers.0.up_proj.B.bias" not in ba
