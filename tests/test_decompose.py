"""Each matrix once, kept as a part; slices of a part serve any rank."""

import pytest
import torch
from builders import decaying, write_checkpoint

from eckart import decompose as module
from eckart.checkpoint.source import open_checkpoint
from eckart.decompose import Request, decompose
from eckart.errors import FactorizationError, NonFiniteError, StorageError


@pytest.fixture
def checkpoint(tmp_path):
    tensors = {
        "a.weight": decaying("a", 30, 20),
        "b.weight": decaying("b", 20, 30),
        "c.weight": decaying("c", 16, 16, torch.bfloat16),
    }
    (tmp_path / "work").mkdir()
    return open_checkpoint(write_checkpoint(tmp_path / "src", tensors))


REQUESTS = {f"{name}.weight": Request(8, all_values=True) for name in "abc"}


def test_a_part_serves_every_rank_up_to_the_one_kept(checkpoint, tmp_path):
    """B·A at each rank is within rounding of the Eckart–Young error."""
    done, failed = decompose(checkpoint, REQUESTS, tmp_path / "work", seed=0)

    assert failed == {}
    assert done.keys() == REQUESTS.keys()
    for name, found in done.items():
        W = checkpoint.load(name).double()
        values = torch.linalg.svdvals(W)
        assert found.spectrum.complete
        assert found.rank == 8
        for rank in range(1, 9):
            missed = (W - found.factors(W, rank).product()).norm()

            assert missed <= values[rank:].norm() * (1 + 1e-6) + 1e-6 * values[0]


def test_components_are_nested_in_the_rank(checkpoint, tmp_path):
    """The factors of rank 3 are the first three columns and rows of those of rank 8."""
    done, _ = decompose(checkpoint, REQUESTS, tmp_path / "work", seed=0)
    for name, found in done.items():
        W = checkpoint.load(name)
        small, large = found.factors(W, 3), found.factors(W, 8)

        assert torch.allclose(small.B, large.B[:, :3], rtol=1e-12)
        assert torch.allclose(small.A, large.A[:3], rtol=1e-9, atol=1e-12)


def test_factors_are_balanced(checkpoint, tmp_path):
    """√σ to each side: the columns of B and the rows of A have equal norms."""
    done, _ = decompose(checkpoint, REQUESTS, tmp_path / "work", seed=0)
    for name, found in done.items():
        factors = found.factors(checkpoint.load(name), 5)

        assert torch.allclose(factors.B.norm(dim=0), factors.A.norm(dim=1), rtol=1e-5)


def test_more_than_was_kept_is_our_own_mistake(checkpoint, tmp_path):
    """An assertion that names the matrix."""
    done, _ = decompose(checkpoint, REQUESTS, tmp_path / "work", seed=0)

    with pytest.raises(AssertionError, match=r"a\.weight: rank 9 of 8 kept"):
        done["a.weight"].factors(checkpoint.load("a.weight"), 9)


def test_order_makes_no_difference(checkpoint, tmp_path):
    """Each matrix has its own generator, so asking backwards or alone gives equal parts."""
    runs = [REQUESTS, dict(reversed(REQUESTS.items())), {"b.weight": REQUESTS["b.weight"]}]
    parts = []
    for i, requests in enumerate(runs):
        (tmp_path / f"work{i}").mkdir()
        done, _ = decompose(checkpoint, requests, tmp_path / f"work{i}", seed=0)
        parts.append(done["b.weight"].part.read_bytes())

    assert parts[0] == parts[1] == parts[2]


def test_a_part_holds_u_alone_in_float32(checkpoint, tmp_path):
    """Half a factorization: A is made from the source again."""
    done, _ = decompose(checkpoint, REQUESTS, tmp_path / "work", seed=0)
    part = open_checkpoint_file(done["a.weight"].part)

    assert {name: (i.shape, i.dtype) for name, i in part.items()} == {"U": ((30, 8), "F32")}


def open_checkpoint_file(path):
    from eckart.checkpoint.header import read_header

    return read_header(path)


def test_a_matrix_that_no_method_can_factor_is_reported_not_raised(
    checkpoint, tmp_path, monkeypatch
):
    """The others are done; its reason goes into the certificate."""
    real = module.exact_svd

    def failing(W, name="matrix"):
        if name == "b.weight":
            raise FactorizationError(f"{name}: every method failed")
        return real(W, name)

    monkeypatch.setattr(module, "exact_svd", failing)

    done, failed = decompose(checkpoint, REQUESTS, tmp_path / "work", seed=0)

    assert sorted(done) == ["a.weight", "c.weight"]
    assert failed == {"b.weight": "b.weight: every method failed"}


def test_compress_copies_what_no_method_could_factor(tmp_path, monkeypatch):
    """With the reason in the certificate, and the others factored."""
    from eckart import compress, verify

    src = write_checkpoint(tmp_path / "src")
    real = module.exact_svd

    def failing(W, name="matrix"):
        if "q_proj" in name:
            raise FactorizationError("every method failed on it")
        return real(W, name)

    monkeypatch.setattr(module, "exact_svd", failing)
    for policy in ({"energy": 0.9}, {"keep": 0.7}, {"error": 0.3}):
        out = tmp_path / "-".join(policy)
        certificate = compress(src, out, **policy)
        reasons = {row.name: row.reason for row in certificate.copied}

        assert reasons["layers.0.q_proj.weight"] == "dense: every method failed on it"
        assert [record.name for record in certificate.matrices] == ["layers.0.up_proj.weight"]
        assert all(check.held for check in verify(out, src))


def test_a_non_finite_entry_stops_everything(tmp_path):
    """It is not a matter of methods: named, with its place."""
    W = decaying("a", 8, 8)
    W[2, 3] = float("nan")
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "src", {"a.weight": W}))

    with pytest.raises(NonFiniteError, match=r"a\.weight holds 1 non-finite .* \[2, 3\]"):
        decompose(checkpoint, {"a.weight": Request(2, all_values=True)}, tmp_path, seed=0)


def test_a_work_folder_that_is_gone_is_a_storage_error(checkpoint, tmp_path):
    """Not a traceback."""
    with pytest.raises(StorageError, match="No such file"):
        decompose(checkpoint, REQUESTS, tmp_path / "gone", seed=0)


def test_a_small_rank_of_a_large_matrix_does_not_need_every_value(tmp_path):
    """With a fixed rank the values beyond it may stay unknown, and the optimum is then null."""
    from eckart import compress, verify

    values = torch.arange(1, 301, dtype=torch.float64) ** -1.0
    from eckart.linalg.matrices import matrix_with_spectrum

    W = matrix_with_spectrum(values, 400, 300).float()
    src = write_checkpoint(tmp_path / "src", {"a.weight": W})

    (record,) = compress(src, tmp_path / "out", rank=10).matrices

    best = float((values[10:].square().sum() / values.square().sum()).sqrt())
    assert best * (1 - 1e-5) <= record.relative_error <= best * 1.001 + 1e-6
    assert all(check.held for check in verify(tmp_path / "out", src))
