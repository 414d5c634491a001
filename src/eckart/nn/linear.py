"""Linear layers in factored form, both ways of storing the factors.

Knows modules; must not know files. The names in a state dict are those of format 1, the guard
among them: `weight`, of shape [0], is there for those who only ask for its dtype or its device,
and stops whoever would compute with it.
"""

import warnings
from typing import Self

import torch
from jaxtyping import Int
from torch import Tensor, nn

from eckart.errors import InputError, RankError
from eckart.linalg.factors import Factors, PivotedFactors, factorize, pivot


class LowRankLinear(nn.Module):
    """y = B(Ax) + b: a linear layer of rank r, two thin layers in a row.

    State dict: `A.weight` (r×n), `B.weight` (m×r), `B.bias` (m), and the guard `weight` ([0]).
    Both factors train.

    >>> layer = LowRankLinear.from_linear(nn.Linear(64, 32), rank=4)
    >>> layer(torch.ones(2, 64)).shape, sorted(layer.state_dict())
    (torch.Size([2, 32]), ['A.weight', 'B.bias', 'B.weight', 'weight'])
    """

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank, out_features, in_features)
        self.A = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.B = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))

    @classmethod
    def from_linear(
        cls,
        layer: nn.Linear,
        *,
        rank: int | None = None,
        energy: float | None = None,
        error: float | None = None,
    ) -> Self:
        """Returns the best layer of its rank in place of `layer`: same dtype, device and bias."""
        _check_linear(layer)
        factors = factorize(layer.weight, rank=rank, energy=energy, error=error, name="the layer")
        return cls.from_factors(factors, layer.bias)

    @classmethod
    def from_factors(cls, factors: Factors, bias: Tensor | None = None) -> Self:
        """Returns a layer that holds these factors and a copy of the bias."""
        (m, n), B = factors.shape, factors.B
        # Made without values, so that nothing is drawn from the global generator.
        new = cls(n, m, factors.rank, bias=bias is not None, device="meta", dtype=B.dtype)
        state = {"A.weight": _copy(factors.A, B), "B.weight": _copy(B, B), "weight": B.new_empty(0)}
        if bias is not None:
            state["B.bias"] = _copy(bias, B)
        new.load_state_dict(state, assign=True)
        return new

    @property
    def rank(self) -> int:
        """r, the width between A and B."""
        return self.A.out_features

    @property
    def bias(self) -> nn.Parameter | None:
        """b, which B holds: some models look for it here."""
        return self.B.bias

    def forward(self, x: Tensor) -> Tensor:
        """Returns B(Ax) + b for x of shape (…, n)."""
        return self.B(self.A(x))

    def factors(self) -> Factors:
        """Returns the factors, sharing memory with the layer."""
        return Factors(self.B.weight.detach(), self.A.weight.detach())

    def extra_repr(self) -> str:
        """in, out and rank, as `nn.Linear` prints its sizes."""
        return f"{self.A.in_features} → {self.B.out_features}, rank={self.rank}"


class PivotedLinear(nn.Module):
    """y[perm] = [h; Kh] + b[perm] with h = Ax: rank r in r(m + n − r) numbers.

    State dict: `A.weight` (r×n), `K.weight` ((m−r)×r), `perm` (int64, m), `bias` (m), and the
    guard `weight` ([0]). A and K train; the permutation is fixed.

    >>> layer = PivotedLinear.from_linear(nn.Linear(64, 32, bias=False), rank=4)
    >>> layer(torch.ones(2, 64)).shape, sorted(layer.state_dict())
    (torch.Size([2, 32]), ['A.weight', 'K.weight', 'perm', 'weight'])
    """

    weight: Tensor
    perm: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank, out_features, in_features)
        self.A = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        with warnings.catch_warnings():  # at full rank K has no rows; torch warns of that
            warnings.simplefilter("ignore", UserWarning)
            self.K = nn.Linear(rank, out_features - rank, bias=False, device=device, dtype=dtype)
        self.register_buffer("weight", torch.empty(0, device=device, dtype=dtype))
        self.register_buffer("perm", torch.arange(out_features, device=device))
        zeros = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros))

    @classmethod
    def from_linear(
        cls,
        layer: nn.Linear,
        *,
        rank: int | None = None,
        energy: float | None = None,
        error: float | None = None,
    ) -> Self:
        """Returns the best layer of its rank in place of `layer`: same dtype, device and bias."""
        _check_linear(layer)
        W = layer.weight
        wide = W.detach().to(torch.promote_types(W.dtype, torch.float32))
        factors = factorize(wide, rank=rank, energy=energy, error=error, name="the layer")
        return cls.from_factors(pivot(factors).to(W.dtype), layer.bias)

    @classmethod
    def from_factors(cls, factors: PivotedFactors, bias: Tensor | None = None) -> Self:
        """Returns a layer that holds these factors and a copy of the bias."""
        (m, n), A = factors.shape, factors.A
        # Made without values, so that nothing is drawn from the global generator.
        new = cls(n, m, factors.rank, bias=bias is not None, device="meta", dtype=A.dtype)
        state = {"A.weight": _copy(A, A), "K.weight": _copy(factors.K, A), "weight": A.new_empty(0)}
        state["perm"] = factors.perm.clone()
        if bias is not None:
            state["bias"] = _copy(bias, A)
        new.load_state_dict(state, assign=True)
        return new

    @property
    def rank(self) -> int:
        """r, the number of pivot rows."""
        return self.A.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Returns W'x + b for x of shape (…, n)."""
        h = self.A(x)
        y = scattered(h, self.K(h), self.perm)
        return y if self.bias is None else y + self.bias

    def factors(self) -> PivotedFactors:
        """Returns the factors, sharing memory with the layer."""
        return PivotedFactors(self.A.weight.detach(), self.K.weight.detach(), self.perm)

    def extra_repr(self) -> str:
        """in, out and rank, as `nn.Linear` prints its sizes."""
        return f"{self.A.in_features} → {len(self.perm)}, rank={self.rank}"


def scattered(pivots: Tensor, others: Tensor, perm: Int[Tensor, " m"], dim: int = -1) -> Tensor:
    """Returns y with y[…, perm] = [pivots, others], along one dimension.

    Each half goes straight to its places: putting them together first and sorting `perm` for a
    gather took as long as the products of one token do.

    >>> scattered(torch.tensor([1.0]), torch.tensor([2.0, 3.0]), torch.tensor([2, 0, 1]))
    tensor([2., 3., 1.])
    """
    r, shape = pivots.shape[dim], [*pivots.shape]
    shape[dim] = len(perm)
    y = pivots.new_empty(shape)
    return y.index_copy_(dim, perm[:r], pivots).index_copy_(dim, perm[r:], others)


def check_rank(rank: int, m: int, n: int) -> None:
    """Raises RankError unless a layer n → m has the rank."""
    if not 1 <= rank <= min(m, n):
        raise RankError(
            f"rank {rank} is out of range for a layer {n} → {m}: choose 1 to {min(m, n)}."
        )


def _copy(tensor: Tensor, like: Tensor) -> Tensor:
    """A contiguous copy of its own, in the dtype and on the device of `like`."""
    return tensor.detach().to(like, copy=True).contiguous()


def _check_linear(layer: nn.Module) -> None:
    if not isinstance(layer, nn.Linear):
        raise InputError(
            f"from_linear takes an nn.Linear, not a {type(layer).__name__}: factor its weight with "
            "eckart.factorize and use from_factors."
        )
