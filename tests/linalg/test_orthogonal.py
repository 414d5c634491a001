"""Orthonormal bases: of good, bad and hopeless blocks, and of blocks beside a basis."""

import pytest
import torch

from eckart.linalg.matrices import matrix_with_spectrum
from eckart.linalg.orthogonal import (
    Basis,
    cholesky_qr,
    extend,
    householder_qr,
    orthonormalize,
)


def _block(condition, dtype, m=200, b=12):
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), b, dtype=torch.float64)
    return matrix_with_spectrum(values, m, b).to(dtype)


def _loss(Q):
    Q = Q.double()
    return float((Q.mT @ Q - torch.eye(Q.shape[1], dtype=torch.float64)).abs().max())


def _basis(dtype, m=200, columns=20):
    basis = Basis(m, torch.zeros(0, dtype=dtype))
    blocks = orthonormalize(_block(3.0, dtype, m, columns))[0].split(columns // 2, dim=1)
    for block in blocks:
        basis.append(block)
    return basis


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e9, 1e15])
def test_columns_are_orthonormal_whatever_the_condition(condition, dtype):
    """CholeskyQR2 where it is sound and Householder elsewhere keep ‖QᵀQ − I‖ at rounding."""
    Z = _block(condition, dtype)
    Q, R = orthonormalize(Z)
    eps = torch.finfo(dtype).eps

    assert _loss(Q) < 20 * eps
    assert float((Q @ R - Z).norm()) < 20 * eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_pass_repairs_the_first(dtype):
    """At κ = 10⁶ one pass in float64 loses 10⁻⁴ of orthogonality; the whole loses nothing."""
    Z = _block(1e6, dtype)
    once = cholesky_qr(Z)

    assert once is not None
    assert _loss(once[0]) > 1e-6
    assert _loss(orthonormalize(Z)[0]) < 20 * torch.finfo(dtype).eps


def test_second_pass_refuses_what_is_far_from_orthonormal():
    """The check is the Gram matrix of the second pass: beyond 0.1 from I it gives None."""
    Q = orthonormalize(_block(2.0, torch.float64))[0]

    assert cholesky_qr(Q, near_identity=True) is not None
    assert cholesky_qr(1.2 * Q, near_identity=True) is None


def test_cholesky_failure_is_none():
    """A block with a zero column has no Cholesky factor, and neither has one with a NaN."""
    Z = _block(2.0, torch.float64)
    Z[:, 3] = 0
    broken = Z.clone()
    broken[0, 0] = torch.nan

    assert cholesky_qr(Z) is None
    assert cholesky_qr(broken) is None


def test_zero_block_becomes_an_orthonormal_one():
    """With no noise level every column stays, even where there is nothing to span."""
    Q, R = householder_qr(torch.zeros(30, 4))

    assert _loss(Q) < 1e-6
    assert float(R.abs().max()) == 0


def test_directions_in_the_noise_are_dropped():
    """Only the singular values above the noise level give a column."""
    values = torch.tensor([1.0, 0.5, 0.1, 1e-6, 1e-7])
    Z = matrix_with_spectrum(values, 60, 5)
    Q, R = orthonormalize(Z, noise=1e-5)

    assert Q.shape == (60, 3)
    assert R.shape == (3, 5)
    assert float((Q @ R - Z).norm()) < 1.1e-6
    assert orthonormalize(Z * 1e-9, noise=1e-5)[0].shape == (60, 0)


@pytest.mark.parametrize("layout", ["row-major", "column-major"])
def test_memory_layout_does_not_matter(layout):
    """A column-major block gives the same factors as a row-major one."""
    Z = _block(10.0, torch.float64)
    Q, R = orthonormalize(Z.mT.contiguous().mT if layout == "column-major" else Z)

    assert torch.allclose(Q @ R, Z, atol=1e-14)


@pytest.mark.parametrize("share", [1.0, 1e-3, 1e-6])
def test_extension_is_orthogonal_to_the_basis(share):
    """Even where all but a millionth of the block lies in the basis, Q is orthogonal to it."""
    basis = _basis(torch.float32)
    generator = torch.Generator().manual_seed(1)
    inside = torch.randn(20, 8, generator=generator)
    Z = basis.vectors @ inside + share * torch.randn(200, 8, generator=generator)
    Q, C, R = extend(basis, Z)
    whole = torch.cat([basis.vectors, Q], dim=1)

    assert _loss(whole) < 2e-5
    assert float((basis.vectors @ C + Q @ R - Z).norm()) < 1e-5


def test_block_inside_the_basis_adds_nothing():
    """What lies in the newest block to within the noise gives coefficients, no directions."""
    basis = _basis(torch.float64)
    Z = basis.block @ torch.ones(10, 3, dtype=torch.float64)
    Q, C, R = extend(basis, Z, noise=1e-10)

    assert Q.shape[1] == 0
    assert R.shape == (0, 3)
    assert torch.allclose(basis.vectors @ C, Z)


def test_basis_never_exceeds_its_space():
    """A basis of all of ℝᵐ cannot grow; one that nearly fills it grows by what is left."""
    generator = torch.Generator().manual_seed(2)
    basis = Basis(10, torch.zeros(0))
    basis.append(orthonormalize(torch.randn(10, 8, generator=generator))[0])
    Q, _, _ = extend(basis, torch.randn(10, 5, generator=generator))
    basis.append(Q)
    nothing, C, _ = extend(basis, torch.eye(10))

    assert Q.shape == (10, 2)
    assert nothing.shape == (10, 0)
    assert torch.allclose(basis.vectors @ C, torch.eye(10), atol=1e-5)


def test_basis_grows_by_blocks_and_keeps_them():
    """Appending moves no earlier column, across every reallocation."""
    basis = Basis(6, torch.zeros(0))
    eye = torch.eye(6)
    for k in range(3):
        basis.append(eye[:, 2 * k : 2 * k + 2])

    assert torch.equal(basis.vectors, eye)
    assert torch.equal(basis.block, eye[:, 4:])
    assert (basis.count, basis.newest) == (6, 2)
