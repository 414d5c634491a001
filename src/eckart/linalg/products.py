"""Products with a narrow block, by the library whose kernels are quickest there.

Knows tensors only.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def product(A: Float[Tensor, "p q"], B: Float[Tensor, "q k"]) -> Float[Tensor, "p k"]:
    """Returns A·B where one of the two is a narrow block.

    For float32 on the CPU by oneDNN, whose kernels take 40–80 % of MKL's time at 16 to 128
    columns (measured on an AVX-512 EPYC), in float32 throughout. It refuses empty ones, and takes
    500 times as long where B is a slice across its memory order: that is copied.
    """
    narrow = A.device.type == "cpu" and A.dtype == torch.float32 and A.numel() and B.numel()
    if narrow and torch.backends.mkldnn.is_available():
        if not (B.is_contiguous() or B.mT.is_contiguous()):
            B = B.contiguous()
        return torch.ops.mkldnn._linear_pointwise(A, B.mT, None, "none", [], "")
    return A @ B
