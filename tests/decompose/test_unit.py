"""One tensor decomposed: slices of a part serve any rank, and nothing else decides its bytes."""

import pytest
import torch
from builders import decaying, write_checkpoint

from eckart.checkpoint.opening import open_checkpoint
from eckart.decompose import Decomposer, Failure, Request, unit
from eckart.errors import FactorizationError, NonFiniteError, StorageError
from eckart.linalg.matrices import matrix_with_spectrum
from eckart.matrix import Matrix

TENSORS = {
    "a.weight": decaying("a", 30, 20),
    "b.weight": decaying("b", 20, 30),
    "c.weight": decaying("c", 16, 16, torch.bfloat16),
    "d.weight": decaying("d", 18, 12).double(),
}
MATRICES = {name: Matrix(tuple(tensor.shape)) for name, tensor in TENSORS.items()}
ALL = Request(8, all_values=True)


@pytest.fixture
def source(tmp_path):
    return open_checkpoint(write_checkpoint(tmp_path / "src", TENSORS))


@pytest.fixture
def decomposed(source, tmp_path):
    """Decomposes one of the tensors, to rank 8."""

    def call(name, part="part", matrix=None, request=ALL, **settings):
        decomposer = Decomposer(source, "identity", 0, **settings)
        return decomposer(name, matrix or MATRICES[name], request, tmp_path / part)

    return call


@pytest.mark.parametrize("name", TENSORS)
def test_a_part_serves_every_rank_up_to_the_one_kept(name, source, decomposed):
    """B·A at each rank is within rounding of the Eckart–Young error, tall, wide or square."""
    found = decomposed(name)
    W = source.load(name).double()
    values = torch.linalg.svdvals(W)

    assert found.all_values
    assert found.rank == 8
    for rank in range(1, 9):
        missed = (W - found.factors(W, rank).product()).norm()

        assert missed <= values[rank:].norm() * (1 + 1e-6) + 1e-6 * values[0]


@pytest.mark.parametrize("name", TENSORS)
def test_components_are_nested_in_the_rank(name, source, decomposed):
    """The factors of rank 3 are the first three columns and rows of those of rank 8."""
    found, W = decomposed(name), source.load(name)
    small, large = found.factors(W, 3), found.factors(W, 8)

    assert torch.allclose(small.B, large.B[:, :3], rtol=1e-9, atol=1e-12)
    assert torch.allclose(small.A, large.A[:3], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", TENSORS)
def test_factors_are_balanced(name, source, decomposed):
    """√σ to each side: the columns of B and the rows of A have equal norms."""
    factors = decomposed(name).factors(source.load(name), 5)

    assert torch.allclose(factors.B.norm(dim=0), factors.A.norm(dim=1), rtol=1e-4)


def test_more_than_was_kept_is_our_own_mistake(source, decomposed):
    """An assertion that names the matrix."""
    with pytest.raises(AssertionError, match=r"a\.weight: rank 9 of 8 kept"):
        decomposed("a.weight").factors(source.load("a.weight"), 9)


def test_order_and_company_make_no_difference(source, tmp_path):
    """Each matrix has its own generator: alone or after another, the part has the same bytes."""
    few = Request(3, all_values=False)
    W = matrix_with_spectrum(torch.arange(1.0, 261) ** -1, 300, 260).float()
    large = open_checkpoint(write_checkpoint(tmp_path / "large", {"x.weight": W}))
    one = Decomposer(large, "identity", 0)

    one("x.weight", Matrix((300, 260)), few, tmp_path / "first")
    Decomposer(source, "identity", 0)("a.weight", MATRICES["a.weight"], ALL, tmp_path / "other")
    one("x.weight", Matrix((300, 260)), few, tmp_path / "second")

    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


@pytest.mark.parametrize(("name", "side"), [("a.weight", 20), ("b.weight", 20), ("d.weight", 12)])
def test_a_part_holds_the_vectors_of_the_short_side(name, side, decomposed):
    """Half a factorization or less, in the dtype that was computed in."""
    part = open_checkpoint_file(decomposed(name).part)

    assert part["vectors"].shape == (8, side)
    assert part["vectors"].dtype == ("F64" if name == "d.weight" else "F32")
    assert part["values"].shape == (1, side)


def open_checkpoint_file(path):
    from eckart.checkpoint.header import read_header

    return read_header(path)


def test_a_stack_is_decomposed_matrix_by_matrix(tmp_path):
    """Its values are those of all its matrices together, its factors those of each."""
    stack = torch.stack([decaying(f"e{i}", 14, 10) * (i + 1) for i in range(3)])
    src = write_checkpoint(tmp_path / "src", {"experts.up": stack})
    source, matrix = open_checkpoint(src), Matrix((3, 14, 10))

    found = Decomposer(source, "identity", 0)("experts.up", matrix, ALL, tmp_path / "part")

    values = torch.stack([torch.linalg.svdvals(W.double()) for W in stack])
    assert torch.allclose(found.spectrum.values, values.square().sum(0).sqrt(), rtol=1e-5)
    assert found.spectrum.energy == pytest.approx(float(stack.double().square().sum()))
    for index, W in enumerate(stack):
        missed = (W.double() - found.factors(W, 4, index).product()).norm()

        assert missed == pytest.approx(float(values[index, 4:].norm()), rel=1e-5)
    assert found.source_digest == source.digest("experts.up")


def test_a_transposed_layer_is_decomposed_as_it_acts(source, decomposed):
    """(in, out) as GPT-2 stores it: B is out × r, A is r × in."""
    found = decomposed("a.weight", matrix=Matrix((30, 20), "in_out"))
    W = source.load("a.weight").mT
    factors = found.factors(W, 8)

    assert (factors.B.shape, factors.A.shape) == ((20, 8), (8, 30))
    assert found.spectrum.shape == (20, 30)


def test_the_threads_of_the_process_are_put_back(source, decomposed):
    """By shape, or as many as asked for; afterwards as before."""
    before = torch.get_num_threads()
    decomposed("a.weight", threads=2)

    assert torch.get_num_threads() == before


def test_a_matrix_that_no_method_can_factor_is_a_result(decomposed, monkeypatch):
    """Not an exception: the others go on, and its reason goes into the certificate."""

    def failing(*_, **__):
        raise FactorizationError("every method failed")

    monkeypatch.setattr(unit, "short_side_svd", failing)

    assert decomposed("b.weight") == Failure("b.weight", "every method failed")


def test_a_non_finite_entry_stops_everything(tmp_path):
    """It is not a matter of methods: named, with its place."""
    W = decaying("a", 8, 8)
    W[2, 3] = float("nan")
    source = open_checkpoint(write_checkpoint(tmp_path / "src", {"a.weight": W}))

    with pytest.raises(NonFiniteError, match=r"a\.weight holds 1 non-finite .* \[2, 3\]"):
        Decomposer(source, "identity", 0)("a.weight", Matrix((8, 8)), ALL, tmp_path / "part")


def test_a_work_folder_that_is_gone_is_a_storage_error(decomposed):
    """Not a traceback."""
    with pytest.raises(StorageError, match="No such file"):
        decomposed("a.weight", part="gone/part")
