"""The use cases from Python: the same stages as the command line, with values instead of text."""

import subprocess
import sys

import pytest
import torch
from builders import decaying, read_tensors, small_tensors, snapshot, vector, write_checkpoint

import eckart
from eckart import api
from eckart.allocate import FixedRank, Keep
from eckart.errors import CheckpointError, NonFiniteError, UsageError
from eckart.inspection import verdict
from eckart.linalg.matrices import matrix_with_spectrum, random_low_rank
from eckart.linalg.spectrum import Spectrum


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )


def test_importing_eckart_is_quick():
    """No torch, numpy or typer until a name is used; then only what that name needs."""
    done = run_python(
        "import sys, eckart; dir(eckart)\n"
        "heavy = {'torch', 'numpy', 'scipy', 'typer', 'rich', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "eckart.EckartError; assert 'torch' not in sys.modules\n"
        "eckart.compress; assert 'torch' in sys.modules and 'transformers' not in sys.modules"
    )

    assert done.returncode == 0, done.stderr


def test_paths_may_be_text_or_path(tmp_path):
    """Every function takes both."""
    src = write_checkpoint(tmp_path / "src")
    out, dense = str(tmp_path / "out"), str(tmp_path / "dense")

    eckart.compress(str(src), out, rank=2)
    eckart.densify(out, dense)

    assert all(check.held for check in eckart.verify(out, str(src)))
    assert all(check.held for check in eckart.verify(dense, out))
    assert eckart.inspect(str(src)).matrices


def test_exactly_one_policy_is_asked_for():
    """None and two are refused by name."""
    assert api.policy_of(rank=3) == FixedRank(3)
    assert api.policy_of(keep=0.5) == Keep(0.5)
    with pytest.raises(UsageError, match="got none"):
        api.policy_of()
    with pytest.raises(UsageError, match="got --energy and --keep"):
        api.policy_of(energy=0.5, keep=0.5)


def test_errors_are_value_errors_too(tmp_path):
    """Whoever does not know our classes catches them all the same."""
    src = write_checkpoint(tmp_path / "src")
    with pytest.raises(ValueError, match="--rank 0"):
        eckart.compress(src, tmp_path / "out", rank=0)
    with pytest.raises(ValueError, match="does not exist"):
        eckart.compress(tmp_path / "nowhere", tmp_path / "out", rank=1)


def test_inspect_reports_every_field_of_every_matrix(tmp_path):
    """Known singular values: the ranks and shares are those of the closed form."""
    values = torch.tensor([8.0, 4.0, 2.0, 1.0] + [0.0] * 12, dtype=torch.float64)
    W = matrix_with_spectrum(values, 24, 16).float()
    half = random_low_rank(40, 30, 3).bfloat16()
    src = write_checkpoint(
        tmp_path / "src", {"a.weight": W, "b.weight": half, "a.bias": vector("a", 24)}
    )
    report = eckart.inspect(src)
    a, b = report.matrices
    p = values[:4] / values.sum()

    assert (a.name, a.shape, a.dtype) == ("a.weight", (24, 16), "F32")
    assert (a.numerical_rank, a.signal_rank) == (4, None)
    assert a.effective_rank == pytest.approx(float(torch.exp(-(p * p.log()).sum())), abs=2e-3)
    assert (a.rank_90, a.rank_99, a.break_even) == (2, 4, 383 // 40)
    assert a.verdict == "factor to 4: 42 % of the parameters, error below rounding"
    assert (b.dtype, b.signal_rank, b.break_even) == ("BF16", 3, 1199 // 70)
    assert b.numerical_rank > b.signal_rank
    assert b.verdict.startswith("factor to 3: 18 % of the parameters")
    assert [(row.name, row.reason) for row in report.copied] == [("a.bias", "1-D")]
    assert (report.schema, report.kind) == ("eckart/1", "inspection")
    assert report.source.name == "src"
    assert {"eckart", "torch", "python", "cpu"} <= report.versions.keys()


def test_inspect_uses_the_same_patterns(tmp_path):
    """--include and --exclude choose what is looked at."""
    src = write_checkpoint(tmp_path / "src")

    assert [row.name for row in eckart.inspect(src, include=["*.up_proj"]).matrices] == [
        "layers.0.up_proj.weight"
    ]
    assert [row.name for row in eckart.inspect(src, include=["lm_head"]).matrices] == [
        "lm_head.weight"
    ]


def spectrum(values: list[float], shape: tuple[int, int]) -> Spectrum:
    s = torch.tensor(values, dtype=torch.float64)
    return Spectrum(shape, s, float(s.square().sum()))


@pytest.mark.parametrize(
    ("values", "rank", "words"),
    [
        ([1.0] * 4 + [0.0] * 12, 4, "factor to 4: 50 % of the parameters, error below rounding"),
        ([0.0] * 16, 0, "factor to 1: 12 % of the parameters, error below rounding"),
        ([1.0] * 4 + [0.005] * 12, 16, "factor to 4: 50 % of the parameters at 0.9 % error"),
        ([1.0] * 4 + [0.01] * 12, 16, "factor to 4: 50 % of the parameters at 1.7 % error"),
        ([1.0] * 4 + [0.04] * 12, 16, "factor to 4: 50 % of the parameters at 6.9 % error"),
        ([1.0] * 16, 16, "not worth it: 99 % of the energy needs rank 16 of 16, break-even is 7"),
    ],
)
def test_the_verdict_says_in_words_whether_factoring_pays(values, rank, words):
    """The rank itself, then 1, 3 and 10 % error, then not worth it."""
    assert verdict(spectrum(values, (16, 16)), rank) == words


def test_a_plan_reads_headers_only(tmp_path):
    """NaN weights pass; ranks that need spectra are ranges."""
    tensors = small_tensors()
    tensors["layers.0.q_proj.weight"].fill_(float("nan"))
    tensors["tiny.weight"] = torch.ones(1, 5)
    src = write_checkpoint(tmp_path / "src", tensors)
    before = snapshot(tmp_path)
    fixed = api.plan(src, FixedRank(3))
    ranged = api.plan(src, Keep(0.9), form="pivoted")
    rows = {row.name: row for row in fixed.matrices}

    assert rows["layers.0.q_proj.weight"].ranks == (3, 3)
    assert rows["layers.0.q_proj.weight"].parameters == (384, 120)
    assert rows["tiny.weight"].ranks == (0, 0)
    assert "does not pay" in rows["tiny.weight"].reason
    assert fixed.copied["lm_head.weight"] == "output head"
    assert {row.name: row.ranks for row in ranged.matrices}["layers.0.q_proj.weight"] == (1, 15)
    assert snapshot(tmp_path) == before


def test_a_plan_and_its_run_agree(tmp_path):
    """What a fixed rank will do is known before it is done."""
    src = write_checkpoint(tmp_path / "src")
    plan = api.plan(src, FixedRank(8))
    done = eckart.compress(src, tmp_path / "out", rank=8)
    ranks = {record.name: record.rank for record in done.matrices}

    assert {row.name: row.ranks[1] for row in plan.matrices if row.ranks[1]} == ranks
    assert {record.name: record.parameters for record in done.matrices} == {
        row.name: row.parameters for row in plan.matrices if row.ranks[1]
    }


def test_include_and_exclude_reach_the_certificate(tmp_path):
    """The head can be named; what was left out says why."""
    src = write_checkpoint(tmp_path / "src")

    certificate = eckart.compress(
        src, tmp_path / "out", rank=3, include=["lm_head", "*proj"], exclude=["*.q_*"]
    )

    reasons = {row.name: row.reason for row in certificate.copied}
    assert {record.name for record in certificate.matrices} == {
        "lm_head.weight",
        "layers.0.up_proj.weight",
    }
    assert reasons["layers.0.q_proj.weight"] == "excluded by --exclude"
    assert certificate.options["include"] == ["lm_head", "*proj"]


def test_nothing_in_the_process_is_changed(tmp_path):
    """Global seed, dtype, threads and gradients are as they were; the folder may change too."""
    src = write_checkpoint(tmp_path / "src")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    before = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())

    eckart.compress(src, tmp_path / "out", keep=0.5)
    eckart.inspect(src)
    eckart.verify(tmp_path / "out", src)

    assert torch.equal(torch.get_rng_state(), state)
    after = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
    assert after == before


def test_non_finite_entries_are_an_error_in_inspect_too(tmp_path):
    """Named; never a rank of NaN."""
    W = decaying("a", 8, 8)
    W[0, 0] = float("inf")
    src = write_checkpoint(tmp_path / "src", {"a.weight": W})

    with pytest.raises(NonFiniteError, match=r"a\.weight"):
        eckart.inspect(src)


def test_a_factored_checkpoint_is_no_source(tmp_path):
    """Neither to inspect nor to factor again: guards are not weights."""
    src = write_checkpoint(tmp_path / "src")
    eckart.compress(src, tmp_path / "out", rank=2)

    with pytest.raises(CheckpointError, match="factored already"):
        eckart.inspect(tmp_path / "out")


@pytest.mark.parametrize("form", ["ba", "pivoted"])
def test_the_layers_compute_what_the_files_say(form, tmp_path):
    """Wx + b against B(Ax) + b: the certificate's figures bound fresh inputs' difference."""
    src = write_checkpoint(tmp_path / "src")
    certificate = eckart.compress(src, tmp_path / "out", energy=0.999, form=form)
    source, out = read_tensors(src), read_tensors(tmp_path / "out")
    generator = torch.Generator().manual_seed(9)
    for record in certificate.matrices:
        X = record.name.removesuffix(".weight")
        x = torch.randn(200, record.shape[1], generator=generator)
        y = x @ source[record.name].T
        A = out[f"{X}.A.weight"]
        if form == "ba":
            found = (x @ A.T) @ out[f"{X}.B.weight"].T
        else:
            h = x @ A.T
            rows = torch.cat([h, h @ out[f"{X}.K.weight"].T], dim=1)
            found = torch.empty_like(y)
            found[:, out[f"{X}.perm"]] = rows

        assert (y - found).norm() / y.norm() < 2 * record.relative_error + 1e-5
