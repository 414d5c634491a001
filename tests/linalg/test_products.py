"""Products with a narrow block against plain float64 ones."""

import pytest
import torch

from eckart.linalg.products import product


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("p", "q", "k"), [(7, 5, 3), (300, 200, 16), (1, 1, 1), (64, 1, 9)])
@pytest.mark.parametrize("transposed", [False, True])
def test_product_is_that_of_the_wide_arithmetic(p, q, k, dtype, transposed):
    """Both factors in either memory order, to rounding."""
    generator = torch.Generator().manual_seed(p)
    A, B = (torch.randn(size, dtype=dtype, generator=generator) for size in ((p, q), (q, k)))
    if transposed:
        A, B = A.mT.contiguous().mT, B.mT.contiguous().mT

    expected = A.double() @ B.double()

    assert product(A, B).dtype == dtype
    assert torch.dist(product(A, B), expected.to(dtype)) <= 4 * torch.finfo(dtype).eps * q * p * k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slices_across_the_memory_order_are_multiplied_like_any(dtype):
    """Some columns of a row-major matrix, and some rows of a column-major one."""
    A, B = torch.arange(24.0, dtype=dtype).view(4, 6), torch.arange(60.0, dtype=dtype).view(6, 10)

    assert torch.equal(product(A, B[:, 2:5]), A @ B[:, 2:5])
    assert torch.equal(product(A[:, 1:3], B.mT[:2, :]), A[:, 1:3] @ B.mT[:2, :])
    assert torch.equal(product(A[::2], B[:, ::3]), A[::2] @ B[:, ::3])


@pytest.mark.parametrize(("p", "q", "k"), [(0, 5, 3), (4, 0, 3), (4, 5, 0)])
def test_empty_factors_give_empty_or_zero_products(p, q, k):
    """An inner dimension of 0 gives zeros, an outer one nothing."""
    result = product(torch.ones(p, q), torch.ones(q, k))

    assert result.shape == (p, k)
    assert not result.any()
