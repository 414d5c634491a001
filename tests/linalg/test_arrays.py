"""The border: what is taken for a matrix, what is refused, and what is left untouched."""

import inspect
import math

import numpy as np
import pytest
import torch
from torch import nn

from eckart.errors import DtypeError, EckartError, NonFiniteError, RankError, ShapeError
from eckart.linalg import arrays
from eckart.linalg.arrays import as_matrix, as_tensor, check_rank, working_dtype
from eckart.linalg.exact import exact_svd, singular_values
from eckart.linalg.factors import factorize, pivot, recompress, split
from eckart.linalg.matrices import matrix_with_spectrum, named_generator, random_low_rank
from eckart.linalg.rank import matrix_rank
from eckart.linalg.residual import output_difference, relative_error, residual_norm
from eckart.linalg.rounding import signal_rank
from eckart.linalg.truncated import truncated_svd
from eckart.nn import LowRankLinear, PivotedLinear

unchecked = inspect.unwrap(as_tensor)
"""`as_tensor` as users get it: the tests' type checker would refuse a wrong type before it."""


def test_tensor_is_returned_without_a_copy():
    """A torch tensor of a known dtype shares its memory with the result."""
    W = torch.ones(3, 2)

    assert as_tensor(W).data_ptr() == W.data_ptr()


def test_parameter_is_detached():
    """A parameter is read without its gradient history, and keeps its own."""
    W = nn.Parameter(torch.ones(3, 2))

    assert not as_matrix(W).requires_grad
    assert W.requires_grad
    assert exact_svd(W * 2).s.requires_grad is False


@pytest.mark.parametrize("kind", ["float64", "float32", "float16"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_numpy_arrays_of_either_byte_order_keep_values_and_dtype(kind, order):
    """A big-endian array gives the same numbers as a little-endian one."""
    array = np.arange(6, dtype=kind).reshape(2, 3)
    tensor = as_tensor(array.astype(np.dtype(kind).newbyteorder(order)))

    assert tensor.dtype == getattr(torch, kind)
    assert tensor.tolist() == array.tolist()


VIEWS = {
    "reversed": lambda a: a[::-1, ::-1],
    "transposed": lambda a: a.T,
    "every other": lambda a: a[::2, 1::2],
    "broadcast": lambda a: np.broadcast_to(a[:1], (4, 6)),
    "fortran": np.asfortranarray,
    "one field of a record": lambda a: np.rec.fromarrays([a > 0, a], names="b,w")["w"],
}


@pytest.mark.parametrize("view", VIEWS)
def test_numpy_views_keep_their_values(view):
    """Negative, zero, swapped and unaligned strides are read like any others."""
    array = VIEWS[view](np.arange(24, dtype=np.float32).reshape(4, 6))

    assert as_tensor(array).tolist() == array.tolist()


def test_read_only_array_is_copied_without_a_warning():
    """A read-only array is not exposed to writing, and stays as it was."""
    array = np.ones((2, 2), dtype=np.float32)
    array.flags.writeable = False
    tensor = as_tensor(array)
    tensor[0, 0] = 5

    assert array[0, 0] == 1


def test_dlpack_objects_are_taken():
    """Anything with __dlpack__ and __dlpack_device__ is a matrix."""

    class Foreign:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, *, stream=None, **options):
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    W = torch.diag(torch.tensor([3.0, 2.0, 0.0]))

    assert torch.equal(as_matrix(Foreign(W)), W)
    assert matrix_rank(Foreign(W)) == 2
    assert factorize(Foreign(W), rank=2).rank == 2


REFUSED = {
    "int64 tensor": (lambda: torch.arange(4).reshape(2, 2), "dtype int64"),
    "bool tensor": (lambda: torch.eye(2, dtype=torch.bool), "dtype bool"),
    "complex tensor": (lambda: torch.eye(2, dtype=torch.complex64), "dtype complex64"),
    "fp8 tensor": (lambda: torch.eye(2).to(torch.float8_e4m3fn), "dtype float8_e4m3fn"),
    "sparse tensor": (lambda: torch.eye(2).to_sparse(), "is sparse"),
    "csr tensor": (lambda: torch.eye(2).to_sparse_csr(), "is sparse"),
    "meta tensor": (lambda: torch.empty(2, 2, device="meta"), "no values"),
    "int array": (lambda: np.eye(2, dtype=np.int32), "dtype int32"),
    "complex array": (lambda: np.eye(2, dtype=np.complex128), "dtype complex128"),
    "bool array": (lambda: np.eye(2, dtype=bool), "dtype bool"),
    "object array": (lambda: np.array([[1.0, None]], dtype=object), "dtype object"),
    "text array": (lambda: np.array([["a"]]), "dtype <U1"),
    "str": (lambda: "model.safetensors", "is a str"),
    "bytes": (lambda: b"1234", "is a bytes"),
    "list": (lambda: [[1.0, 2.0]], "is a list"),
    "float": (lambda: 1.0, "is a float"),
    "None": (lambda: None, "is a NoneType"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_floating_point_array_is_refused_by_name(kind):
    """The error names the matrix and what was wrong with it, and is a ValueError too."""
    build, words = REFUSED[kind]

    with pytest.raises(DtypeError, match=rf"^layer .*{words}") as raised:
        unchecked(build(), "layer")
    assert isinstance(raised.value, ValueError)
    assert raised.value.exit_code == 3


def test_extended_precision_array_is_refused():
    """A long double array is refused rather than rounded silently."""
    if np.dtype(np.longdouble).itemsize == 8:
        pytest.skip("long double is double on this machine")

    with pytest.raises(DtypeError, match="layer has dtype"):
        as_tensor(np.eye(2, dtype=np.longdouble), "layer")


@pytest.mark.parametrize("shape", [(), (3,), (2, 2, 2), (0, 0), (0, 3), (3, 0)])
def test_only_a_non_empty_matrix_is_a_matrix(shape):
    """Other numbers of dimensions and empty sides are refused with the shape."""
    with pytest.raises(ShapeError, match=rf"layer has shape \({', '.join(map(str, shape))}"):
        as_matrix(torch.ones(shape), "layer")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [(0, 0), (0, 4), (2, 3), (6, 0), (6, 4)])
def test_first_non_finite_entry_is_named(where, bad, dtype):
    """The error gives the value and the index of the first bad entry in row order."""
    W = torch.ones(7, 5, dtype=dtype)
    W[where] = bad

    with pytest.raises(
        NonFiniteError, match=rf"layer holds 1 .*\({bad}\) at \[{where[0]}, {where[1]}\]"
    ):
        as_matrix(W, "layer")


def test_every_non_finite_entry_is_counted():
    """NaN, Inf and −Inf count together, and the count is of entries."""
    W = torch.ones(10, 10)
    W[3:6, 2] = math.nan
    W[9, 9], W[8, 8] = math.inf, -math.inf

    with pytest.raises(NonFiniteError, match=r"holds 5 non-finite entries.*at \[3, 2\]"):
        as_matrix(W)


def test_largest_finite_entries_are_finite(dtype):
    """The largest number of a format is a number."""
    W = torch.full((2, 2), torch.finfo(dtype).max, dtype=dtype)

    assert torch.equal(as_matrix(W), W)


@pytest.mark.parametrize("rank", [0, -1, 4, 100])
def test_rank_out_of_range_names_the_range(rank):
    """A rank below 1 or above min(m, n) is a usage error that says what would do."""
    with pytest.raises(RankError, match=rf"rank {rank} .*layer of shape 5×3: choose 1 to 3") as got:
        check_rank(rank, (5, 3), "layer")
    assert got.value.exit_code == 2


@pytest.mark.parametrize("rank", [1, 3])
def test_rank_in_range_is_returned(rank):
    """Both ends of the range are in it."""
    assert check_rank(rank, (5, 3)) == rank


@pytest.mark.parametrize("rank", [2.0, True, "2", None])
def test_rank_that_is_no_whole_number_is_refused(rank):
    """2.0 and True are not ranks."""
    with pytest.raises(RankError, match="not a whole number"):
        inspect.unwrap(check_rank)(rank, (5, 3))


def test_working_dtype_is_float32_or_float64():
    """Half precision is computed in float32, float64 stays."""
    assert [working_dtype(dtype) for dtype in arrays.FLOATING] == [
        torch.float64,
        torch.float32,
        torch.float32,
        torch.float32,
    ]


def _matrix(dtype=torch.float32):
    return random_low_rank(12, 9, 3).to(dtype)


PUBLIC = {
    "exact_svd": lambda: exact_svd(_matrix()),
    "singular_values": lambda: singular_values(_matrix()),
    "truncated_svd": lambda: truncated_svd(random_low_rank(300, 290, 3), rank=2),
    "factorize": lambda: factorize(_matrix(), energy=0.9),
    "split": lambda: split(exact_svd(_matrix())),
    "pivot": lambda: pivot(factorize(_matrix(), rank=2)),
    "recompress": lambda: recompress(factorize(_matrix(), rank=2), rank=1),
    "matrix_rank": lambda: matrix_rank(_matrix()),
    "signal_rank": lambda: signal_rank(_matrix(torch.bfloat16)),
    "relative_error": lambda: relative_error(_matrix(), factorize(_matrix(), rank=2)),
    "output_difference": lambda: output_difference(
        _matrix(), factorize(_matrix(), rank=2), generator=torch.Generator()
    ),
    "residual_norm": lambda: residual_norm(
        _matrix(), factorize(_matrix(), rank=2), generator=torch.Generator()
    ),
    "random_low_rank": lambda: random_low_rank(4, 4, 2),
    "matrix_with_spectrum": lambda: matrix_with_spectrum(torch.ones(2), 4, 4),
    "named_generator": lambda: torch.rand(3, generator=named_generator(0, "name")),
    "LowRankLinear.from_factors": lambda: LowRankLinear.from_factors(factorize(_matrix(), rank=2)),
    "PivotedLinear.from_factors": lambda: PivotedLinear.from_factors(
        pivot(factorize(_matrix(), rank=2))
    ),
}


@pytest.mark.parametrize("function", PUBLIC)
def test_global_settings_stay_as_they_were(function):
    """No function draws from a global generator or changes threads, dtype or gradient mode."""
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002  # the global state is what is watched
    before = torch.get_rng_state()
    PUBLIC[function]()
    expected = np.random.RandomState(1).get_state()[1]

    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == expected).all()  # noqa: NPY002
    assert torch.get_num_threads() == 1
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=str)
def test_results_do_not_depend_on_the_default_dtype(default):
    """torch.set_default_dtype changes no result."""
    expected = factorize(_matrix(), rank=2), random_low_rank(5, 4, 2)
    torch.set_default_dtype(default)
    try:
        got = factorize(_matrix(), rank=2), random_low_rank(5, 4, 2)
        found = signal_rank(_matrix(torch.bfloat16))
    finally:
        torch.set_default_dtype(torch.float32)

    assert torch.equal(got[0].product(), expected[0].product())
    assert torch.equal(got[1], expected[1])
    assert found == signal_rank(_matrix(torch.bfloat16))


def test_dtype_and_device_are_those_of_the_matrix(dtype):
    """Factors come back in the dtype and on the device of W."""
    W = _matrix(dtype)
    for factors in (factorize(W, rank=2), pivot(factorize(W, rank=2))):
        assert factors.A.dtype == dtype
        assert factors.A.device == W.device
        assert factors.product().dtype == dtype


def test_every_refusal_is_an_error_of_ours():
    """One except clause for EckartError, or ValueError, catches every refusal."""
    for bad in (torch.zeros(0, 3), torch.tensor([[math.nan]]), torch.ones(3)):
        with pytest.raises(EckartError) as raised:
            as_matrix(bad)

        assert isinstance(raised.value, ValueError)
