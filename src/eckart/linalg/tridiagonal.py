"""The symmetric eigenproblem of a projected matrix: values first, vectors of a few if wanted.

Knows tensors only.
"""

from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from threadpoolctl import ThreadpoolController
from torch import Tensor

PANEL = 64  # columns of a block of reflectors


class Tridiagonal:
    """A symmetric matrix reduced to tridiagonal form, so that values and vectors share the work.

    LAPACK's sytrd, once: 4s³/3 flops; then sterf for the values alone, and stevd with ormtr (as
    ormqr on the rows below the first) for vectors. All on one thread and in float64.

    >>> gram = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    >>> values, vectors = Tridiagonal(gram).leading(1)
    >>> values.tolist(), bool(torch.dist(gram @ vectors, values * vectors) < 1e-14)
    ([3.0], True)
    """

    def __init__(self, gram: Float[Tensor, "s s"]) -> None:
        with one_thread():
            lwork = int(_lapack("sytrd_lwork")(len(gram), lower=1)[0])
            reduced = _lapack("sytrd")(gram.numpy(), lower=1, lwork=lwork)
        self._reflectors, self._diagonal, beside, self._scales, failure = reduced
        assert failure == 0, f"sytrd: {failure}"
        self._beside = beside if len(gram) > 1 else np.zeros(1)  # scipy asks for one entry

    def values(self) -> Float[Tensor, " s"]:
        """Returns the eigenvalues, descending."""
        with one_thread():
            values, failure = _lapack("sterf")(self._diagonal, self._beside)
        assert failure == 0, f"sterf: {failure}"
        return torch.from_numpy(values).flip(0)

    def leading(self, count: int) -> tuple[Float[Tensor, " k"], Float[Tensor, "s k"]]:
        """Returns the k = min(count, s) largest eigenvalues, descending, and their vectors."""
        with one_thread():
            values, every, failure = _lapack("stevd")(self._diagonal, self._beside)
            assert failure == 0, f"stevd: {failure}"
            vectors = np.asfortranarray(every[:, max(0, len(values) - count) :])
            if len(values) > 1:
                below = np.asfortranarray(self._reflectors[1:, :-1])
                work = PANEL * vectors.shape[1]
                vectors[1:] = _lapack("ormqr")("L", "N", below, self._scales, vectors[1:], work)[0]
        largest = torch.from_numpy(values[::-1][:count].copy())
        return largest, torch.from_numpy(vectors[:, ::-1].copy())


def one_thread() -> AbstractContextManager[object]:
    """Returns a context in which scipy's BLAS runs on one thread.

    A projected matrix is too small for more: its factorization is thousands of short loops, and
    where another process has one of the cores every barrier between them waits for a time slice
    (measured, 160², two threads on one free core: 1.2 s instead of 1 ms). torch's own threads,
    which multiply the large matrix, are left alone.
    """
    return _blas().limit(limits=1, user_api="blas")


@cache
def _lapack(name: str) -> Any:
    from scipy.linalg import get_lapack_funcs

    return get_lapack_funcs(name, dtype=np.float64)


@cache
def _blas() -> ThreadpoolController:
    import_module("scipy.linalg")  # the controller finds only libraries that are loaded
    return ThreadpoolController()
