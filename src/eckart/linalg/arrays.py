"""The border of the mathematics: whatever holds a matrix becomes a checked torch tensor.

Knows torch, numpy and DLPack; must not know files.
"""

from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eckart.errors import DtypeError, NonFiniteError, RankError, ShapeError

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@runtime_checkable
class DLPack(Protocol):
    """Anything another library can hand over without a copy (JAX, CuPy, TensorFlow, …)."""

    def __dlpack__(self, *, stream: int | None = None) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...


Array: TypeAlias = Tensor | npt.NDArray[np.floating] | DLPack


def as_tensor(array: Array, name: str = "matrix") -> Tensor:
    """Returns `array` as a detached floating-point tensor, sharing memory where that is safe."""
    if isinstance(array, Tensor):
        tensor = array.detach()
    elif isinstance(array, np.ndarray):
        tensor = _from_numpy(array, name)
    elif isinstance(array, DLPack):
        tensor = torch.from_dlpack(array)
    else:
        raise DtypeError(
            f"{name} is a {type(array).__name__}, not an array: pass a torch tensor, a numpy "
            "array or anything with __dlpack__."
        )
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        kind = "has no values (device meta)" if tensor.device.type == "meta" else "is sparse"
        raise DtypeError(f"{name} {kind}: pass a dense tensor with values.")
    if tensor.dtype not in FLOATING:
        raise DtypeError(
            f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}; eckart factors "
            "float64, float32, bfloat16 and float16. Convert it first."
        )
    return tensor


def as_matrix(array: Array, name: str = "matrix") -> Tensor:
    """Returns `array` as a finite, non-empty 2-D tensor, or raises naming `name`.

    Cost: one pass over the entries, no allocation. It comes before every factorization
    because LAPACK can hang for ever on an Inf (numpy issue 32591) and returns NaN factors
    without an error on others.
    """
    return measured_matrix(array, name)[0]


def measured_matrix(array: Array, name: str = "matrix") -> tuple[Tensor, float]:
    """Returns what `as_matrix` returns, and its largest magnitude, which that pass tells too."""
    tensor = as_tensor(array, name)
    if tensor.ndim != 2:
        raise ShapeError(
            f"{name} has shape {tuple(tensor.shape)}, not (rows, columns): "
            "reshape it to two dimensions first."
        )
    if tensor.numel() == 0:
        raise ShapeError(f"{name} has shape {tuple(tensor.shape)}: an empty matrix has no rank.")
    return tensor, check_finite(tensor, name)


def check_finite(tensor: Tensor, name: str) -> float:
    """Returns the largest magnitude; NonFiniteError with the count and the first index unless
    every entry is finite."""
    low, high = torch.aminmax(tensor)  # NaN wins over everything, so two numbers tell
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return max(-float(low), float(high))
    bad = (~torch.isfinite(tensor)).nonzero()
    where = tuple(int(i) for i in bad[0])
    value = tensor[where].item()
    raise NonFiniteError(
        f"{name} holds {len(bad)} non-finite entr{'y' if len(bad) == 1 else 'ies'}, the first "
        f"({value}) at {list(where)}: a NaN or Inf has no factorization. Repair the weights, or "
        "leave this matrix out."
    )


def check_rank(rank: int, shape: tuple[int, int], name: str = "matrix") -> int:
    """Returns `rank` if 1 ≤ rank ≤ min(m, n); raises RankError otherwise."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise RankError(f"rank {rank!r} of {name} is not a whole number.")
    if not 1 <= rank <= min(shape):
        raise RankError(
            f"rank {rank} is out of range for {name} of shape {shape[0]}×{shape[1]}: "
            f"choose 1 to {min(shape)}."
        )
    return rank


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype to compute in: float64 stays, everything else becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _from_numpy(array: npt.NDArray[np.generic], name: str) -> Tensor:
    if array.dtype.kind not in "f" or array.dtype.itemsize > 8:
        raise DtypeError(
            f"{name} has dtype {array.dtype}; eckart factors float64, float32 and float16 numpy "
            "arrays. Convert it first."
        )
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    odd = any(stride < 0 or stride % native.itemsize for stride in native.strides)
    if odd or not native.flags.writeable:
        native = native.copy()  # torch refuses such strides and warns about read-only memory
    return torch.from_numpy(native)
