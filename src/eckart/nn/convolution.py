"""2-D convolutions in factored form: W read as out × (in·kh·kw).

Knows modules; must not know files. The names in a state dict are those of format 1, as those of
the linear layers are.
"""

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from eckart.errors import InputError
from eckart.linalg.factors import Factors, PivotedFactors
from eckart.nn.linear import check_rank, scattered


class LowRankConv2d(nn.Module):
    """y = B ∗ (A ∗ x) + b: a convolution to r channels, and one of 1×1.

    State dict: `A.weight` (r×in×kh×kw), `B.weight` (out×r×1×1), `B.bias` (out), and the guard
    `weight` ([0]).
    """

    weight: Tensor

    def __init__(self, layer: nn.Conv2d, rank: int) -> None:
        """An empty layer of that rank in place of `layer`, with its strides and its padding."""
        super().__init__()
        self.A = _first(layer, rank)
        self.B = _point(layer, rank, layer.out_channels, bias=layer.bias is not None)
        self.register_buffer("weight", layer.weight.new_empty(0))

    @property
    def rank(self) -> int:
        """r, the channels between A and B."""
        return self.A.out_channels

    @property
    def bias(self) -> nn.Parameter | None:
        """b, which B holds: some models look for it here."""
        return cast("nn.Parameter | None", self.B.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the convolution of x, (batch × in × height × width)."""
        return self.B(self.A(x))

    def factors(self) -> Factors:
        """Returns the factors as matrices, sharing memory with the layer."""
        return Factors(self.B.weight.detach().flatten(1), self.A.weight.detach().flatten(1))


class PivotedConv2d(nn.Module):
    """y[perm] = [h; K ∗ h] + b[perm] with h = A ∗ x: r of the channels, and the others from them.

    State dict: `A.weight` (r×in×kh×kw), `K.weight` ((out−r)×r×1×1), `perm` (int64, out), `bias`
    (out), and the guard `weight` ([0]).
    """

    weight: Tensor
    perm: Tensor
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Conv2d, rank: int) -> None:
        """An empty layer of that rank in place of `layer`, with its strides and its padding."""
        super().__init__()
        self.A = _first(layer, rank)
        self.K = _point(layer, rank, layer.out_channels - rank, bias=False)
        W = layer.weight
        self.register_buffer("weight", W.new_empty(0))
        self.register_buffer("perm", torch.arange(layer.out_channels, device=W.device))
        zeros = None if layer.bias is None else nn.Parameter(W.new_zeros(layer.out_channels))
        self.register_parameter("bias", zeros)

    @property
    def rank(self) -> int:
        """r, the number of pivot channels."""
        return self.A.out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Returns the convolution of x, (batch × in × height × width)."""
        h = self.A(x)
        # torch refuses to convolve to nothing
        rest = self.K(h) if self.K.out_channels else h.narrow(-3, 0, 0)
        y = scattered(h, rest, self.perm, dim=-3)
        return y if self.bias is None else y + self.bias[:, None, None]

    def factors(self) -> PivotedFactors:
        """Returns the factors as matrices, sharing memory with the layer."""
        A, K = self.A.weight.detach().flatten(1), self.K.weight.detach().flatten(1)
        return PivotedFactors(A, K, self.perm)


def _first(layer: nn.Conv2d, rank: int) -> nn.Conv2d:
    """A: everything that the convolution does in space."""
    if layer.groups != 1:
        raise InputError(
            f"a convolution in {layer.groups} groups has no single A: its channels see different "
            "inputs."
        )
    m, n = layer.out_channels, layer.weight[0].numel()
    check_rank(rank, m, n)
    made = nn.utils.skip_init(
        nn.Conv2d,
        layer.in_channels,
        rank,
        _pair(layer.kernel_size),
        stride=_pair(layer.stride),
        padding=layer.padding if isinstance(layer.padding, str) else _pair(layer.padding),
        dilation=_pair(layer.dilation),
        padding_mode=layer.padding_mode,
        bias=False,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
    return cast("nn.Conv2d", made)


def _point(layer: nn.Conv2d, rank: int, channels: int, *, bias: bool) -> nn.Conv2d:
    """B, or K: a matrix over the channels."""
    with warnings.catch_warnings():  # at full rank K has no rows; torch warns of that
        warnings.simplefilter("ignore", UserWarning)
        W = layer.weight
        made = nn.utils.skip_init(
            nn.Conv2d, rank, channels, 1, bias=bias, device=W.device, dtype=W.dtype
        )
    return cast("nn.Conv2d", made)


def _pair(sides: tuple[Any, ...]) -> tuple[int, int]:
    first, second = sides
    return first, second
