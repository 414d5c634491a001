"""What inspect sees: all values or the leading ones, what was added to a base, and in words."""

import json

import pytest
import torch
from builders import decaying, eckart, write_checkpoint

from eckart import inspect, inspection, planning
from eckart.errors import InputError, ResourceError
from eckart.execute import local
from eckart.linalg.matrices import matrix_with_spectrum, named_generator, random_low_rank


@pytest.fixture
def src(tmp_path):
    tensors = {
        "a.weight": decaying("a", 48, 40),
        "b.weight": random_low_rank(40, 48, 3).bfloat16(),
        "x.experts.up_proj": torch.stack([decaying(f"e{i}", 20, 16) * (i + 1) for i in range(3)]),
        "conv.weight": decaying("c", 24, 27).reshape(24, 3, 3, 3),
        "norm.weight": torch.ones(4),
    }
    return write_checkpoint(tmp_path / "src", tensors)


def rows(report):
    return {row.name: row for row in report.matrices}


def test_every_value_of_every_matrix_is_in_the_document(src):
    """As torch's float64 SVD has them; of a stack, those of all its matrices together."""
    found = rows(inspect(src))
    stack = torch.stack([decaying(f"e{i}", 20, 16) * (i + 1) for i in range(3)]).double()
    expected = {
        "a.weight": torch.linalg.svdvals(decaying("a", 48, 40).double()),
        "conv.weight": torch.linalg.svdvals(decaying("c", 24, 27).double()),
        "x.experts.up_proj": torch.linalg.svdvals(stack).square().sum(0).sqrt(),
    }
    for name, values in expected.items():
        got = torch.tensor(found[name].values, dtype=torch.float64)

        assert torch.allclose(got, values, rtol=1e-5, atol=1e-6 * float(values[0]))
        assert found[name].energy == pytest.approx(float(values.square().sum()), rel=1e-5)
    assert found["x.experts.up_proj"].shape == (3, 20, 16)
    assert found["b.weight"].signal_rank == 3


def test_a_large_matrix_shows_its_leading_values_unless_all_are_asked(src, monkeypatch):
    """What they do not tell is null, and the verdict says how to learn it."""
    monkeypatch.setattr(inspection, "ALL_VALUES", 30)
    monkeypatch.setattr(inspection, "LEADING", 8)
    part, whole = (rows(inspect(src, full=full))["a.weight"] for full in (False, True))

    assert len(part.values) == 8
    assert part.values == pytest.approx(whole.values[:8], rel=1e-3)
    assert part.energy == pytest.approx(whole.energy)
    assert (part.numerical_rank, part.effective_rank, part.rank_99) == (None, None, None)
    assert part.rank_90 == whole.rank_90
    assert "more than rank 8" in part.verdict
    assert "see --full" in part.verdict
    assert (whole.numerical_rank, whole.rank_99) == (40, 24)  # Σ_{i≤24} 1/i² is the first 99 %


def test_a_low_rank_is_known_from_the_leading_values(tmp_path, monkeypatch):
    """Where they reach down to the rounding, the rank is certain without the others."""
    monkeypatch.setattr(inspection, "ALL_VALUES", 30)
    monkeypatch.setattr(inspection, "LEADING", 8)
    src = write_checkpoint(tmp_path / "src", {"a.weight": random_low_rank(48, 40, 3)})

    (row,) = inspect(src).matrices

    assert row.numerical_rank == 3
    assert row.verdict.startswith("factor to 3:")


def test_a_table_says_more_than_where_a_rank_is_not_known(src, monkeypatch):
    """On the screen as "> 8"; the summary stands below."""
    monkeypatch.setattr(inspection, "ALL_VALUES", 30)
    monkeypatch.setattr(inspection, "LEADING", 8)

    done = eckart("inspect", src)

    assert "> 8" in done.out
    assert "at 99 % energy: " in done.out


def tuned_pair(tmp_path, rank, strength=1.0):
    """A base in bfloat16, and the same with a LoRA in one matrix; another is unchanged."""
    base = {
        name: (0.02 * torch.randn(96, 80, generator=named_generator(0, name))).bfloat16()
        for name in ("q.weight", "k.weight")
    }
    delta = strength * 0.005 * random_low_rank(96, 80, rank)
    tuned = {**base, "q.weight": (base["q.weight"].float() + delta).bfloat16()}
    tuned["new.weight"] = decaying("new", 96, 80).bfloat16()
    return write_checkpoint(tmp_path / "tuned", tuned), write_checkpoint(tmp_path / "base", base)


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_the_rank_of_what_was_added_is_named(rank, tmp_path):
    """With the evidence; an unchanged matrix is called that, a new one is not compared."""
    tuned, base = tuned_pair(tmp_path, rank)
    report = inspect(tuned, base=base)
    found = rows(report)
    delta = found["q.weight"].delta

    assert found["q.weight"].signal_rank == rank
    assert found["q.weight"].verdict.startswith(f"rank {rank} above rounding")
    assert delta is not None
    assert not delta.below_floor
    assert 0.5 < delta.share <= 1
    assert found["k.weight"].verdict == "unchanged"
    assert {row.name: row.reason for row in report.copied} == {"new.weight": "not in the base"}
    assert report.base is not None
    assert report.base.name == "base"


def test_a_change_that_rounding_hides_is_said_to_be_hidden(tmp_path):
    """Below the floor no rank is named."""
    tuned, base = tuned_pair(tmp_path, 8, strength=0.002)

    verdict = rows(inspect(tuned, base=base))["q.weight"].verdict

    assert verdict.startswith("below the rounding floor")


def test_a_change_that_is_hidden_in_part_has_the_rank_that_is_not(tmp_path):
    """A full-rank change of which some values are below rounding is no small change."""
    base = {"q.weight": decaying("q", 96, 80).bfloat16()}
    tuned = {"q.weight": (base["q.weight"].float() + 0.02 * decaying("dq", 96, 80)).bfloat16()}
    folders = (write_checkpoint(tmp_path / name, t) for name, t in (("t", tuned), ("b", base)))
    tuned_folder, base_folder = folders
    row = rows(inspect(tuned_folder, base=base_folder))["q.weight"]

    assert row.delta is not None
    assert row.delta.below_floor
    assert row.signal_rank
    assert row.verdict.startswith("below the rounding floor in part")
    assert f"rank {row.signal_rank} above" in row.verdict


def test_a_base_of_another_model_is_refused(tmp_path):
    """Exit 3: no matrix in common, or none of the same shape."""
    tuned, _ = tuned_pair(tmp_path, 2)
    other = write_checkpoint(tmp_path / "other", {"q.weight": decaying("q", 20, 10)})

    with pytest.raises(InputError, match="it is not its base"):
        inspect(tuned, base=other)
    assert eckart("inspect", tuned, "--base", other).code == 3


def test_workers_see_the_same(src, monkeypatch):
    """In this process or in two: equal documents."""
    here = inspect(src)
    monkeypatch.setattr(local, "SHORT_SECONDS", -1.0)

    assert inspect(src, workers=2) == here


def test_the_summary_counts_what_99_percent_would_cost(tmp_path):
    """Dense where factoring does not pay, factored where it does."""
    tensors = {"low.weight": random_low_rank(40, 40, 2), "full.weight": torch.eye(40)}
    report = inspect(write_checkpoint(tmp_path / "src", tensors))

    assert report.summary.parameters == (3200, 2 * 80 + 1600)
    assert report.summary.text == (
        "at 99 % energy: 55 % of the parameters; plain factoring may pay here"
    )


def test_the_json_of_inspect_holds_spectra(src):
    """For programs: the same document."""
    done = eckart("inspect", src, "--json")
    document = json.loads(done.out)

    assert document["kind"] == "inspection"
    assert all(len(row["values"]) > 0 for row in document["matrices"])
    assert document["summary"]["text"].startswith("at 99 % energy")


def test_a_rank_that_rounding_may_hide_is_no_reason_to_factor(tmp_path):
    """A spectrum that runs on through the floor of its format is judged by all of its values."""
    W = matrix_with_spectrum(0.92 ** torch.arange(256, dtype=torch.float64), 256, 256).bfloat16()
    (row,) = inspect(write_checkpoint(tmp_path / "src", {"a.weight": W})).matrices

    assert row.signal_rank is not None
    assert row.signal_rank < row.break_even < (row.numerical_rank or 0)
    assert "error below rounding" not in row.verdict


def test_a_matrix_that_cannot_fit_is_refused_before_it_is_read(src, monkeypatch):
    """Exit 5, with the number."""
    monkeypatch.setattr(planning, "free_memory", lambda: 10_000)

    with pytest.raises(ResourceError, match=r"may need [\d,]+ bytes of memory, and 10,000 are"):
        inspect(src)
